//! The command line: one file per subcommand.
//!
//! Data goes to standard output, everything else to standard error. Flags have vLLM's spelling and an environment twin
//! `LORAMUX_…`.

mod batch;
mod demo;
mod devices;
mod eval;
mod inspect;
mod merge;
mod output;
mod plan;
mod serving;
mod tasks;
mod train;

use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};

/// What `--help` says about exit codes.
const EXIT_CODES: &str = "Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 finished with failed lines, \
                          adapters or jobs, 70 GPU lost, 130 interrupted, 143 terminated";

/// One frozen base model and many LoRA adapters in one batch.
#[derive(Parser)]
#[command(name = "loramux", version, after_help = EXIT_CODES, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// How much is said on standard error.
#[derive(clap::Args, Clone, Copy)]
pub(crate) struct Verbosity {
    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

impl Verbosity {
    /// Whether progress and summaries are wanted.
    pub fn talks(self) -> bool {
        !self.quiet
    }

    /// Whether details are wanted.
    pub fn details(self) -> bool {
        self.verbose > 0
    }
}

#[derive(Subcommand)]
enum Command {
    /// Answer a file of OpenAI requests, all adapters in one batch
    RunBatch(batch::Args),
    /// Train seven adapters of a small base side by side, then ask all of them in one batch: the guided first run
    Demo(demo::Args),
    /// Train many adapters side by side, from one configuration file
    Train(train::Args),
    /// Score adapters and the base on a folder of tasks, all in one batch
    Eval(eval::Args),
    /// Merge adapters into one, or into the base's weights
    Merge(Box<merge::Args>),
    /// Describe a model folder, an adapter folder or a safetensors file
    Inspect(inspect::Args),
    /// Estimate the memory of a training run or an engine
    Plan(plan::Args),
    /// List the devices that can run a model
    Devices(devices::Args),
}

/// How a command ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// Some lines, adapters or jobs failed; the rest is done.
    Partly,
}

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// What was asked for cannot be done as asked: flags, configuration, folders.
    #[error("{0}")]
    Usage(String),
    /// It could, and went wrong.
    #[error("{0}")]
    Failed(String),
}

impl Failure {
    pub fn usage(error: impl ToString) -> Self {
        Self::Usage(error.to_string())
    }

    pub fn failed(error: impl ToString) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::RunBatch(args) => batch::run(&args, cli.verbosity),
        Command::Demo(args) => demo::run(&args, cli.verbosity),
        Command::Train(args) => train::run(&args, cli.verbosity),
        Command::Eval(args) => eval::run(&args, cli.verbosity),
        Command::Merge(args) => merge::run(&args, cli.verbosity),
        Command::Inspect(args) => inspect::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Devices(args) => devices::run(&args),
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Partly) => ExitCode::from(3),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(if matches!(failure, Failure::Usage(_)) { 2 } else { 1 })
        }
    }
}
