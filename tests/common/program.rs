//! Running the program as its users do.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// What a run left behind.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The program with these arguments, without the settings of whoever runs the tests.
pub fn command<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loramux"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LORAMUX_")) {
        command.env_remove(name);
    }
    command.args(arguments);
    command
}

/// Runs a command to its end.
pub fn finish(mut command: Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub fn loramux<S: AsRef<OsStr>>(arguments: &[S]) -> Ran {
    finish(command(arguments))
}

/// A line of a batch file for `/v1/completions` or, when the body has messages, `/v1/chat/completions`.
pub fn line(custom_id: &str, body: Value) -> Value {
    let endpoint = if body.get("messages").is_some() { "/v1/chat/completions" } else { "/v1/completions" };
    json!({"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body})
}

pub fn write_lines<T: ToString>(path: &Path, lines: &[T]) {
    let text: String = lines.iter().map(|line| line.to_string() + "\n").collect();
    std::fs::write(path, text).unwrap();
}

/// The answers in a batch file, each line a JSON object.
pub fn read_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "a torn last line in {}", path.display());
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Copies a folder of files.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
