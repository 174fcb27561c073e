use std::process::ExitCode;

fn main() -> ExitCode {
    loramux::cli::main()
}
