//! Evaluation on a folder of tasks, for every command that does it: `<task>/<split>.jsonl` each.

use std::fs;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::output::{Align, Table};
use super::{Failure, Outcome, Verbosity};
use crate::engine::Engine;
use crate::model::Base;
use crate::train::config::OnOverlong;
use crate::train::data::{DataOptions, Dataset, read_dataset};
use crate::train::evaluate::{Measures, Scores, Subject, evaluate, requests};

/// What is asked, and how much of it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct EvaluationArgs {
    /// Which file of every task: SPLIT.jsonl
    #[arg(long, default_value = "test", value_name = "SPLIT")]
    pub split: String,
    /// Samples per task, from the first on; 0 takes all
    #[arg(long, default_value_t = 0, value_name = "N")]
    limit: usize,
    /// Most tokens of an answer; 0 asks no questions
    #[arg(long, default_value_t = 24, value_name = "N")]
    max_tokens: usize,
}

/// A task with its samples, at least one.
pub(crate) struct Task {
    pub name: String,
    pub dataset: Dataset,
}

/// The tasks in a folder in order of name, each with its first samples, without those of `max_model_len` tokens and
/// more. Folders without the split are passed over.
pub(crate) fn read_tasks(
    folder: &Path,
    args: &EvaluationArgs,
    base: &Base,
    max_model_len: usize,
    verbosity: Verbosity,
) -> Result<Vec<Task>, Failure> {
    let options = DataOptions {
        format: None,
        max_length: max_model_len - 1,
        on_overlong: OnOverlong::Drop,
        packing: false,
    };
    let unreadable = |error| Failure::Usage(format!("{}: cannot list it: {error}", folder.display()));
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort_unstable();
    let file = format!("{}.jsonl", args.split);
    let mut tasks = Vec::new();
    for name in names {
        let path = folder.join(&name).join(&file);
        if !path.exists() {
            if verbosity.talks() {
                eprintln!("note: {}: no {file} in it; it is passed over", folder.join(&name).display());
            }
            continue;
        }
        let (mut dataset, warnings) = read_dataset(&path, base, &options).map_err(Failure::usage)?;
        for warning in warnings.iter().filter(|_| verbosity.talks()) {
            eprintln!("note: {warning}");
        }
        if args.limit > 0 {
            dataset.samples.truncate(args.limit);
        }
        tasks.push(Task { name, dataset });
    }
    if tasks.is_empty() {
        return Err(Failure::Usage(format!("{}: no folder with {file} in it", folder.display())));
    }
    Ok(tasks)
}

/// A model to evaluate, with the name of its column.
pub(crate) struct Column<'a> {
    pub title: &'a str,
    /// Resident under this name; `None` is the base alone.
    pub adapter: Option<&'a str>,
}

/// Scores by task, then by column; `None` where a task was not asked of a column.
pub(crate) type Matrix = Vec<Vec<Option<Scores>>>;

/// Evaluates columns on tasks, all in one batch, where `is_wanted` of task and column.
pub(crate) fn evaluate_all(
    engine: &Engine,
    tasks: &[Task],
    columns: &[Column<'_>],
    is_wanted: impl Fn(&Task, &Column<'_>) -> bool,
    measures: Measures,
    verbosity: Verbosity,
) -> Result<Matrix, Failure> {
    let mut subjects = Vec::new();
    for task in tasks {
        let Dataset { samples, classes, .. } = &task.dataset;
        let asked = columns.iter().filter(|column| is_wanted(task, column));
        subjects.extend(asked.map(|column| Subject { adapter: column.adapter, samples, classes }));
    }
    let bar = progress_bar(requests(&subjects, measures), verbosity);
    let scores = evaluate(engine, &subjects, measures, || bar.inc(1)).map_err(Failure::failed)?;
    bar.finish_and_clear();
    let mut scores = scores.into_iter();
    let mut row = |task: &Task| {
        let cell = |column: &Column<'_>| if is_wanted(task, column) { scores.next() } else { None };
        columns.iter().map(cell).collect()
    };
    Ok(tasks.iter().map(&mut row).collect())
}

impl EvaluationArgs {
    /// What is measured: the loss, which takes a second look at every sample, where somebody reads it.
    pub fn measures(&self, loss: bool) -> Measures {
        Measures { max_tokens: self.max_tokens, loss }
    }
}

/// Whether every request was answered.
pub(crate) fn outcome(matrix: &Matrix) -> Outcome {
    let failed = matrix.iter().flatten().flatten().any(|scores| scores.failed > 0);
    if failed { Outcome::Partly } else { Outcome::Done }
}

/// Exact matches in percent: a row a task, a column a model.
pub(crate) fn matrix_table(tasks: &[Task], titles: &[&str], matrix: &Matrix) -> Table {
    let mut aligned = vec![Align::Left];
    aligned.resize(2 + titles.len(), Align::Right);
    let mut table = Table::new(&aligned);
    table.row(["exact match %", "samples"].iter().chain(titles));
    for (task, row) in tasks.iter().zip(matrix) {
        let mut cells = vec![task.name.clone(), task.dataset.samples.len().to_string()];
        cells.extend(row.iter().map(|scores| percent(scores.as_ref().and_then(|scores| scores.exact_match))));
        table.row(cells);
    }
    table
}

/// All numbers: a row a task and model.
pub(crate) fn details_table(tasks: &[Task], titles: &[&str], matrix: &Matrix) -> Table {
    let mut aligned = vec![Align::Left; 2];
    aligned.resize(9, Align::Right);
    let mut table = Table::new(&aligned);
    table.row([
        "task",
        "model",
        "exact %",
        "label %",
        "macro F1 %",
        "word F1 %",
        "loss",
        "perplexity",
        "failed",
    ]);
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    for (task, row) in tasks.iter().zip(matrix) {
        for (title, scores) in titles.iter().zip(row) {
            let Some(scores) = scores else { continue };
            table.row([
                task.name.clone(),
                (*title).to_owned(),
                percent(scores.exact_match),
                percent(scores.label_accuracy),
                percent(scores.f1),
                percent(scores.word_f1),
                number(scores.loss),
                number(scores.perplexity),
                scores.failed.to_string(),
            ]);
        }
    }
    table
}

/// The same as JSON: a list with an entry a task and adapter; the base alone is `null`.
pub(crate) fn matrix_json(tasks: &[Task], columns: &[Column<'_>], split: &str, matrix: &Matrix) -> Value {
    let mut entries = Vec::new();
    for (task, row) in tasks.iter().zip(matrix) {
        for (column, scores) in columns.iter().zip(row) {
            if let Some(scores) = scores {
                let mut entry = json!({"task": task.name, "split": split, "adapter": column.adapter});
                if let (Value::Object(entry), Ok(Value::Object(scores))) =
                    (&mut entry, serde_json::to_value(scores))
                {
                    entry.extend(scores);
                }
                entries.push(entry);
            }
        }
    }
    Value::Array(entries)
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1}", 100.0 * share))
}

/// A bar on standard error; hidden where that is no terminal.
fn progress_bar(requests: usize, verbosity: Verbosity) -> ProgressBar {
    if !verbosity.talks() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} answers {per_sec} eta {eta}");
    ProgressBar::new(requests as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
