//! The page of a run: its jobs side by side.

use std::collections::BTreeSet;

use serde::Serialize;

use super::chart::{MOST_LINES, Scale};
use super::curves::{Curve, Kind, Panel, Plan, of_evaluations, of_steps, panels};
use super::heat_map::{Cell, Header, HeatMap, Row};
use super::interference::{Interferences, interferences};
use super::job::{Fact, Status, first_and_last_loss, warnings};
use super::numbers::count;
use super::outcomes::{Measure, Outcome, judged, outcomes};
use super::records::JobRecord;
use super::{REPORT_FILE, ReportError, render};

/// The page of a run.
pub fn page(records: &[JobRecord]) -> Result<String, ReportError> {
    let outcomes: Vec<Vec<Outcome<'_>>> = records.iter().map(outcomes).collect();
    let tasks = tasks(records);
    let page = Page {
        title: "Training run",
        facts: facts(records),
        warnings: (records.iter())
            .flat_map(|record| {
                warnings(record).into_iter().map(|warning| format!("{}: {warning}", record.name))
            })
            .collect(),
        jobs: records.iter().map(JobRow::new).collect(),
        loss: loss(records)?,
        validation: validation(records, &tasks)?,
        accuracy: across(records, &outcomes, &tasks, |measure, outcome| {
            let before = measure.cell(outcome.before).text;
            let cell = measure.cell(outcome.after);
            Cell { detail: if before.is_empty() { before } else { format!("before: {before}") }, ..cell }
        }),
        change: across(records, &outcomes, &tasks, |measure, outcome| {
            measure.change(outcome.before, outcome.after)
        }),
        interference: interferences(records),
    };
    render("run.html", &page)
}

#[derive(Serialize)]
struct Page<'a> {
    title: &'static str,
    facts: Vec<Fact>,
    warnings: Vec<String>,
    jobs: Vec<JobRow<'a>>,
    loss: Vec<Panel>,
    validation: Vec<Panel>,
    accuracy: Option<HeatMap>,
    change: Option<HeatMap>,
    interference: Option<Interferences<'a>>,
}

#[derive(Serialize)]
struct JobRow<'a> {
    name: &'a str,
    link: String,
    status: Status<'a>,
    tasks: Vec<&'a str>,
    steps: u64,
    tokens: u64,
    first_loss: Option<f64>,
    last_loss: Option<f64>,
    skipped: usize,
}

impl<'a> JobRow<'a> {
    fn new(record: &'a JobRecord) -> Self {
        let (first_loss, last_loss) = first_and_last_loss(record).unzip();
        Self {
            name: &record.name,
            link: link(record),
            status: Status::of(record),
            tasks: record.trained().into_iter().collect(),
            steps: record.last_step(),
            tokens: record.tokens(),
            first_loss,
            last_loss,
            skipped: record.skipped().count(),
        }
    }
}

/// From the run's page to the job's, with what has a meaning in an address written as `%XX` (RFC 3986).
fn link(record: &JobRecord) -> String {
    let mut link = String::new();
    for byte in record.folder.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                link.push(char::from(byte))
            }
            _ => link.push_str(&format!("%{byte:02X}")),
        }
    }
    format!("{link}/{REPORT_FILE}")
}

fn facts(records: &[JobRecord]) -> Vec<Fact> {
    let mut facts = vec![Fact::new("Jobs", count(records.len() as u64))];
    let mut outcomes: Vec<&str> =
        records.iter().map(|record| record.outcome().unwrap_or("not finished")).collect();
    outcomes.sort_unstable();
    let tallies: Vec<String> =
        outcomes.chunk_by(|a, b| a == b).map(|same| format!("{} {}", same.len(), same[0])).collect();
    facts.push(Fact::new("Outcomes", tallies.join(", ")));
    let manifests = || records.iter().filter_map(|record| record.manifest.as_ref());
    let models: BTreeSet<&str> = manifests().map(|manifest| manifest.base.model.as_str()).collect();
    let hashes: BTreeSet<&str> = manifests().map(|manifest| manifest.base.hash.as_str()).collect();
    let versions: BTreeSet<&str> = manifests().map(|manifest| manifest.loramux.as_str()).collect();
    let list = |values: BTreeSet<&str>| values.into_iter().collect::<Vec<_>>().join(", ");
    facts.push(Fact::new("Base model", list(models)));
    facts.extend(hashes.into_iter().map(|hash| Fact::hash("Base hash", hash)));
    facts.push(Fact::new("Tokens", count(records.iter().map(JobRecord::tokens).sum())));
    facts.push(Fact::new("loramux", list(versions)));
    facts.retain(|fact| !fact.value.is_empty());
    facts
}

/// The tasks of all jobs, in the order in which they come up; those that some job trains first.
fn tasks(records: &[JobRecord]) -> Vec<&str> {
    let mut seen = BTreeSet::new();
    let mut tasks: Vec<&str> =
        records.iter().flat_map(JobRecord::tasks).filter(|task| seen.insert(*task)).collect();
    tasks.sort_by_key(|task| !records.iter().any(|record| record.trained().contains(task)));
    tasks
}

fn loss(records: &[JobRecord]) -> Result<Vec<Panel>, ReportError> {
    let curves = (records.iter().enumerate())
        .map(|(place, record)| Curve {
            name: &record.name,
            place,
            points: of_steps(record, |step| step.loss),
        })
        .collect();
    panels(vec![Plan { title: "Training loss by job".to_owned(), curves, kind: Kind::Noisy(Scale::Linear) }])
}

/// The validation loss of each task, job beside job: losses of different tasks say nothing about each other.
fn validation(records: &[JobRecord], tasks: &[&str]) -> Result<Vec<Panel>, ReportError> {
    let plan = |task: &&str| {
        let mut curves: Vec<Curve<'_>> = (records.iter().enumerate())
            .map(|(place, record)| Curve {
                name: &record.name,
                place,
                points: of_evaluations(record, task, |line| line.loss),
            })
            .filter(|curve| !curve.points.is_empty())
            .collect();
        let mut title = format!("Validation loss: {task}");
        if curves.len() > MOST_LINES {
            title = format!("{title}, the {MOST_LINES} best of {} jobs", curves.len());
            let last = |curve: &Curve<'_>| curve.points.last().map_or(f64::INFINITY, |point| point.1);
            curves.sort_by(|a, b| last(a).total_cmp(&last(b)));
            curves.truncate(MOST_LINES);
        }
        Plan { title, curves, kind: Kind::Evaluated(Scale::Linear) }
    };
    panels(tasks.iter().map(plan).collect())
}

/// A table of jobs × tasks; `None` without a cell. The measure of a task is one that all jobs have.
fn across(
    records: &[JobRecord],
    outcomes: &[Vec<Outcome<'_>>],
    tasks: &[&str],
    cell: impl Fn(Measure, &Outcome<'_>) -> Cell,
) -> Option<HeatMap> {
    let (mut columns, mut measures) = (Vec::new(), Vec::new());
    for task in tasks {
        let judged: Vec<&Outcome<'_>> =
            outcomes.iter().filter_map(|outcomes| judged(outcomes, task)).collect();
        let Some(first) = judged.first() else { continue };
        let evaluations = judged.iter().flat_map(|outcome| outcome.before.into_iter().chain(outcome.after));
        let measure = Measure::of(evaluations);
        let split = if judged.iter().all(|outcome| outcome.split == first.split) {
            first.split
        } else {
            "test or valid"
        };
        columns.push(Header::new(*task, format!("{}, {split}", measure.name())));
        measures.push((*task, measure));
    }
    let row = |(record, outcomes): (&JobRecord, &Vec<Outcome<'_>>)| {
        let cells = (measures.iter())
            .map(|(task, measure)| match judged(outcomes, task) {
                None => Cell::empty(),
                Some(outcome) => Cell { marked: outcome.trained, ..cell(*measure, outcome) },
            })
            .collect();
        let header = Header { link: Some(link(record)), ..Header::new(&record.name, "") };
        Row { header, cells }
    };
    let rows: Vec<Row> = records.iter().zip(outcomes).map(row).collect();
    let known = rows.iter().flat_map(|row| &row.cells).any(|cell| !cell.text.is_empty());
    known.then(|| HeatMap { corner: "job".to_owned(), columns, rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_leads_nowhere_but_to_the_folder() {
        let link = |folder: &str| link(&JobRecord { folder: folder.into(), ..JobRecord::default() });
        assert_eq!(link("a-job_1.5"), "a-job_1.5/report.html");
        assert_eq!(link("javascript:alert(1)"), "javascript%3Aalert%281%29/report.html");
        assert_eq!(link("größe"), "gr%C3%B6%C3%9Fe/report.html");
    }
}
