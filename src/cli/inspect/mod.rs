//! `loramux inspect`: what is in a model folder, an adapter folder or a safetensors file.
//!
//! A report is one structure: serialised it is the JSON object of `--json`, displayed it is the text.

mod adapter;
mod model;
mod tensors;

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::output::print;
use super::{Failure, Outcome};
use crate::adapter::peft::{self, Limits};
use crate::engine::EngineOptions;

const MODEL_FILE: &str = "config.json";
const ENDING: &str = "safetensors";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Model folder, adapter folder or safetensors file
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Check an adapter against this base
    #[arg(long, env = "LORAMUX_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Largest rank of an adapter
    #[arg(long, env = "LORAMUX_MAX_LORA_RANK", default_value_t = EngineOptions::default().max_lora_rank, value_name = "N")]
    max_lora_rank: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<Outcome, Failure> {
    let path = args.path.as_path();
    // A folder with both files is an adapter's: some programs put the base's config.json beside it.
    if path.join(peft::CONFIG_FILE).is_file() {
        let limits = Limits { max_rank: args.max_lora_rank };
        let report = adapter::report(path, args.model.as_deref(), limits)?;
        show(&report, args.json)?;
        return match report.refused {
            None => Ok(Outcome::Done),
            Some(reason) => Err(Failure::Failed(reason)),
        };
    }
    if path.join(MODEL_FILE).is_file() {
        show(&model::report(path)?, args.json)?;
    } else if path.is_file() && path.extension().is_some_and(|ending| ending == ENDING) {
        show(&tensors::report(path)?, args.json)?;
    } else {
        return Err(Failure::Usage(neither(path)));
    }
    Ok(Outcome::Done)
}

fn show(report: &(impl Serialize + Display), as_json: bool) -> Result<(), Failure> {
    if as_json {
        let text = serde_json::to_string(report).map_err(Failure::failed)?;
        print(&(text + "\n"))
    } else {
        print(&report.to_string())
    }
}

/// Says what was looked for.
fn neither(path: &Path) -> String {
    let found = if path.is_dir() {
        "a folder without either file"
    } else if path.exists() {
        "a file of another kind"
    } else {
        "no such file or folder"
    };
    format!(
        "{}: {found}; wanted a model folder (with {MODEL_FILE}), an adapter folder (with {}) or a .{ENDING} file",
        path.display(),
        peft::CONFIG_FILE
    )
}

/// Numbers as ranges: `0-4, 6, 9-10`.
fn ranges(numbers: &[usize]) -> String {
    let mut text = String::new();
    let mut rest = numbers;
    while let Some(&first) = rest.first() {
        let run = rest.iter().enumerate().take_while(|&(index, &number)| number == first + index).count();
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push_str(&first.to_string());
        if run > 1 {
            text.push_str(&format!("-{}", first + run - 1));
        }
        rest = &rest[run..];
    }
    text
}

/// The last component of a module path.
fn last_component(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_a_row_become_a_range() {
        assert_eq!(ranges(&[0, 1, 2, 4, 6, 7]), "0-2, 4, 6-7");
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[]), "");
    }
}
