//! The page of one job.

use serde::Serialize;
use serde_json::Value;

use super::chart::Scale;
use super::curves::{Curve, Kind, Panel, Plan, of_evaluations, of_steps, panels};
use super::data::{Classes, DrawnRow, classes, drawn};
use super::heat_map::HeatMap;
use super::interference::affinity;
use super::numbers::{count, number};
use super::outcomes::{Accuracy, Confusion, GroupRow, accuracy, confusions, forgetting, groups, outcomes};
use super::records::{BaseModel, DataFile, JobRecord};
use super::statistics::{Point, smooth, window};
use super::{ReportError, render};

/// Skipped steps that are listed.
const MOST_SKIPPED: usize = 50;

/// The page of a job.
pub fn page(record: &JobRecord) -> Result<String, ReportError> {
    let outcomes = outcomes(record);
    let page = Page {
        title: &record.name,
        status: Status::of(record),
        facts: facts(record),
        warnings: warnings(record),
        base: record.manifest.as_ref().map(|manifest| &manifest.base),
        best_step: record.manifest.as_ref().and_then(|manifest| manifest.best_step),
        accuracy: accuracy(&outcomes),
        loss: loss(record)?,
        scores: scores(record)?,
        optimizer: optimizer(record)?,
        forgetting: forgetting(&outcomes),
        confusions: confusions(&outcomes),
        groups: groups(&outcomes),
        affinity: affinity(record),
        drawn: drawn(record),
        data: record.data(),
        classes: classes(record),
        skipped: skipped(record),
        configuration: configuration(record),
        lineage: lineage(record),
        files: files(record),
    };
    render("job.html", &page)
}

#[derive(Serialize)]
struct Page<'a> {
    title: &'a str,
    status: Status<'a>,
    facts: Vec<Fact>,
    warnings: Vec<String>,
    base: Option<&'a BaseModel>,
    best_step: Option<u64>,
    accuracy: Option<Accuracy<'a>>,
    loss: Vec<Panel>,
    scores: Vec<Panel>,
    optimizer: Vec<Panel>,
    forgetting: Option<HeatMap>,
    confusions: Vec<Confusion<'a>>,
    groups: Vec<GroupRow<'a>>,
    affinity: Option<HeatMap>,
    drawn: Vec<DrawnRow<'a>>,
    data: &'a [DataFile],
    classes: Vec<Classes<'a>>,
    skipped: Skipped<'a>,
    configuration: Vec<(String, String)>,
    lineage: Vec<Vec<(String, String)>>,
    files: Vec<(&'a str, &'a str)>,
}

/// How a job ended.
#[derive(Clone, Copy, Serialize)]
pub struct Status<'a> {
    text: &'a str,
    /// `good`, `bad` or `open`.
    kind: &'static str,
}

impl<'a> Status<'a> {
    pub fn of(record: &'a JobRecord) -> Self {
        match record.outcome() {
            Some(text) if text.starts_with("failed") || record.problem.is_some() => {
                Self { text, kind: "bad" }
            }
            Some(text) => Self { text, kind: "good" },
            None => Self { text: "not finished", kind: "open" },
        }
    }
}

/// A line of the head of a page.
#[derive(Serialize)]
pub struct Fact {
    pub name: &'static str,
    pub value: String,
    /// What the value is the beginning of, where it is a hash.
    pub full: Option<String>,
}

impl Fact {
    pub fn new(name: &'static str, value: impl Into<String>) -> Self {
        Self { name, value: value.into(), full: None }
    }

    /// The beginning of a hash.
    pub fn hash(name: &'static str, hash: &str) -> Self {
        Self { full: Some(hash.to_owned()), ..Self::new(name, hash.chars().take(12).collect::<String>()) }
    }
}

fn facts(record: &JobRecord) -> Vec<Fact> {
    let mut facts = Vec::new();
    if let Some(manifest) = &record.manifest {
        facts.push(Fact::new("Base model", &manifest.base.model));
        facts.push(Fact::hash("Base hash", &manifest.base.hash));
    }
    facts.push(Fact::new("Tasks", record.trained().into_iter().collect::<Vec<_>>().join(", ")));
    let steps = record.manifest.as_ref().map_or(0, |manifest| manifest.steps).max(record.last_step());
    facts.push(Fact::new("Steps", count(steps)));
    if let Some(best) = record.manifest.as_ref().and_then(|manifest| manifest.best_step) {
        facts.push(Fact::new("Best step", count(best)));
    }
    facts.push(Fact::new("Tokens", count(record.tokens())));
    if let Some((first, last)) = first_and_last_loss(record) {
        facts.push(Fact::new("Training loss", format!("{} → {}", number(Some(first)), number(Some(last)))));
    }
    if let Some(manifest) = &record.manifest {
        facts.extend(manifest.seed.map(|seed| Fact::new("Seed", seed.to_string())));
        facts.push(Fact::new("loramux", &manifest.loramux));
    }
    facts.retain(|fact| !fact.value.is_empty());
    facts
}

/// The ends of the smoothed curve of the training loss.
pub fn first_and_last_loss(record: &JobRecord) -> Option<(f64, f64)> {
    let points = of_steps(record, |step| step.loss);
    let smoothed = smooth(&points, window(points.len()));
    Some((smoothed.first()?.1, smoothed.last()?.1))
}

/// What a reader must not overlook.
pub fn warnings(record: &JobRecord) -> Vec<String> {
    let mut warnings: Vec<String> = record.problem.iter().cloned().collect();
    let skipped = record.skipped().count();
    if skipped > 0 {
        let steps =
            if skipped == 1 { "1 step was" } else { &format!("{} steps were", count(skipped as u64)) };
        warnings.push(format!("{steps} skipped: the gradient was not finite."));
    }
    for file in record.data().iter().filter(|file| file.leakage > 0) {
        warnings.push(format!(
            "Leakage: {} of {} {} samples of {} are in the training data too.",
            count(file.leakage),
            count(file.counts.kept as u64),
            file.split,
            file.task
        ));
    }
    if record.manifest.is_none() && !record.steps.is_empty() {
        warnings.push("There is no manifest: the job still runs, or was interrupted.".to_owned());
    }
    warnings
}

fn loss(record: &JobRecord) -> Result<Vec<Panel>, ReportError> {
    let tasks = record.tasks();
    let of_task = |task: &str| of_steps(record, |step| step.tasks.get(task)?.loss);
    let by_task: Vec<Curve<'_>> = curves(&tasks, of_task);
    let mut plans = Vec::new();
    if by_task.len() != 1 {
        let curve = Curve { name: "", place: 0, points: of_steps(record, |step| step.loss) };
        plans.push(Plan {
            title: "Training loss of each batch".to_owned(),
            curves: vec![curve],
            kind: Kind::Noisy(Scale::Linear),
        });
    }
    plans.push(Plan {
        title: "Training loss by task".to_owned(),
        curves: by_task,
        kind: Kind::Noisy(Scale::Linear),
    });
    plans.push(Plan {
        title: "Validation loss by task".to_owned(),
        curves: curves(&tasks, |task| of_evaluations(record, task, |line| line.loss)),
        kind: Kind::Evaluated(Scale::Linear),
    });
    panels(plans)
}

fn scores(record: &JobRecord) -> Result<Vec<Panel>, ReportError> {
    let tasks = record.tasks();
    panels(vec![
        Plan {
            title: "Exact match on validation data".to_owned(),
            curves: curves(&tasks, |task| of_evaluations(record, task, |line| line.exact_match)),
            kind: Kind::Evaluated(Scale::Share),
        },
        Plan {
            title: "Label accuracy on validation data".to_owned(),
            curves: curves(&tasks, |task| of_evaluations(record, task, |line| line.label_accuracy)),
            kind: Kind::Evaluated(Scale::Share),
        },
    ])
}

fn optimizer(record: &JobRecord) -> Result<Vec<Panel>, ReportError> {
    panels(vec![
        Plan {
            title: "Learning rate".to_owned(),
            curves: vec![Curve { name: "", place: 0, points: of_steps(record, |step| step.lr) }],
            kind: Kind::Exact(Scale::FromZero),
        },
        Plan {
            title: "Gradient norm before clipping".to_owned(),
            curves: vec![Curve { name: "", place: 0, points: of_steps(record, |step| step.grad_norm) }],
            kind: Kind::Noisy(Scale::Linear),
        },
    ])
}

/// A curve for each task that has points.
fn curves<'a>(tasks: &[&'a str], points: impl Fn(&str) -> Vec<Point>) -> Vec<Curve<'a>> {
    (tasks.iter().enumerate())
        .map(|(place, task)| Curve { name: task, place, points: points(task) })
        .filter(|curve| !curve.points.is_empty())
        .collect()
}

#[derive(Serialize)]
struct Skipped<'a> {
    rows: Vec<(u64, &'a [String])>,
    /// Further ones.
    hidden: usize,
}

fn skipped(record: &JobRecord) -> Skipped<'_> {
    let mut rows: Vec<(u64, &[String])> =
        record.skipped().map(|step| (step.step, step.skipped.as_slice())).collect();
    let hidden = rows.len().saturating_sub(MOST_SKIPPED);
    rows.truncate(MOST_SKIPPED);
    Skipped { rows, hidden }
}

/// The configuration, one line a key; what is nested has a dotted key, as in TOML.
fn configuration(record: &JobRecord) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    for (key, value) in record.manifest.iter().flat_map(|manifest| &manifest.config) {
        flatten(key, value, &mut lines);
    }
    lines
}

fn flatten(key: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            fields.iter().for_each(|(field, value)| flatten(&format!("{key}.{field}"), value, lines));
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{key}[{index}]"), item, lines);
            }
        }
        Value::Array(items) => {
            lines.push((key.to_owned(), items.iter().map(scalar).collect::<Vec<_>>().join(", ")));
        }
        _ => lines.push((key.to_owned(), scalar(value))),
    }
}

fn scalar(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Where the adapter began, oldest first.
fn lineage(record: &JobRecord) -> Vec<Vec<(String, String)>> {
    let ancestor = |value: &Value| match value {
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), scalar(value))).collect(),
        other => vec![(String::new(), scalar(other))],
    };
    record.manifest.iter().flat_map(|manifest| &manifest.lineage).map(ancestor).collect()
}

fn files(record: &JobRecord) -> Vec<(&str, &str)> {
    let files = record.manifest.iter().flat_map(|manifest| &manifest.files);
    files.map(|(name, hash)| (name.as_str(), hash.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_one_line_a_key() {
        let config = serde_json::json!({
            "rank": 8,
            "betas": [0.9, 0.999],
            "targets": "all-linear",
            "early_stop": null,
            "task": [{"name": "t", "ratio": 0.5}],
            "init": {"from": "base"},
        });
        let mut lines = Vec::new();
        flatten("job", &config, &mut lines);
        let lines: Vec<String> = lines.into_iter().map(|(key, value)| format!("{key} = {value}")).collect();
        assert_eq!(
            lines,
            [
                "job.rank = 8",
                "job.betas = 0.9, 0.999",
                "job.targets = all-linear",
                "job.task[0].name = t",
                "job.task[0].ratio = 0.5",
                "job.init.from = base",
            ]
        );
    }
}
