//! `loramux eval`: every adapter and the base on every task, all in one batch.

use std::path::PathBuf;

use serde_json::json;

use super::output::print;
use super::serving::ModelArgs;
use super::tasks::{
    Column, EvaluationArgs, Task, details_table, evaluate_all, matrix_json, matrix_table, outcome, read_tasks,
};
use super::{Failure, Outcome, Verbosity};
use crate::format::write_text;

/// The column of the base alone.
const BASE: &str = "base";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of tasks, each a folder with SPLIT.jsonl in it
    #[arg(long, env = "LORAMUX_TASKS", value_name = "DIR")]
    tasks: PathBuf,
    #[command(flatten)]
    evaluation: EvaluationArgs,
    /// Ask of an adapter the task of its own name alone
    #[arg(long)]
    own: bool,
    /// Write everything that was measured as JSON, the loss and confusions included
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn run(args: &Args, verbosity: Verbosity) -> Result<Outcome, Failure> {
    let (engine, failed) = args.model.start(verbosity)?;
    let tasks = read_tasks(&args.tasks, &args.evaluation, engine.base(), engine.max_model_len(), verbosity)?;
    let adapters = engine.adapters();
    let mut columns = vec![Column { title: BASE, adapter: None }];
    columns.extend(adapters.iter().map(|card| Column { title: &card.name, adapter: Some(&card.name) }));
    let titles: Vec<&str> = columns.iter().map(|column| column.title).collect();

    let measures = args.evaluation.measures(verbosity.details() || args.output.is_some());
    let is_wanted = |task: &Task, column: &Column<'_>| {
        !args.own || column.adapter.is_none_or(|adapter| adapter == task.name)
    };
    let matrix = evaluate_all(&engine, &tasks, &columns, is_wanted, measures, verbosity)?;

    print(&matrix_table(&tasks, &titles, &matrix).to_string())?;
    if verbosity.details() {
        print(&format!("\n{}", details_table(&tasks, &titles, &matrix)))?;
    }
    if let Some(path) = &args.output {
        let adapters =
            adapters.iter().map(|card| json!({"name": card.name, "root": card.root, "hash": card.hash}));
        let report = json!({
            "base": args.model.model,
            "adapters": adapters.collect::<Vec<_>>(),
            "results": matrix_json(&tasks, &columns, &args.evaluation.split, &matrix),
        });
        write_text(path, &format!("{report:#}\n")).map_err(Failure::failed)?;
    }
    Ok(if failed.is_empty() { outcome(&matrix) } else { Outcome::Partly })
}
