//! How good an adapter is on each task, before and after it was trained.
//!
//! Every task stands for itself: a mean over tasks would hide the one that got worse.

use std::collections::BTreeSet;

use serde::Serialize;

use super::heat_map::{Cell, Header, HeatMap, Row};
use super::numbers::{count, number, percent, points, relative};
use super::records::{Evaluation, JobRecord};
use super::statistics::wilson;

/// Classes up to which a confusion matrix is shown whole.
const MOST_CLASSES: usize = 16;
/// Of a larger one, the most frequent confusions.
const MOST_CONFUSIONS: usize = 20;
/// A change of so much, in shares or relative to the loss, has the full colour.
const FULL_CHANGE: f64 = 0.3;

/// A task's scores on one of its files.
pub struct Outcome<'a> {
    pub task: &'a str,
    pub split: &'a str,
    pub trained: bool,
    /// At step 0.
    pub before: Option<&'a Evaluation>,
    /// The last one: that of the weights that were kept.
    pub after: Option<&'a Evaluation>,
}

impl Outcome<'_> {
    /// The newest scores.
    pub fn latest(&self) -> Option<&Evaluation> {
        self.after.or(self.before)
    }
}

/// All tasks' scores, in the order of the tasks; test data before validation data.
pub fn outcomes(record: &JobRecord) -> Vec<Outcome<'_>> {
    let mut outcomes = Vec::new();
    for task in record.tasks() {
        for split in ["test", "valid"] {
            let evaluations =
                || record.evaluations.iter().filter(|line| line.task == task && line.split == split);
            let before = evaluations().find(|evaluation| evaluation.step == 0);
            let after = evaluations().rfind(|evaluation| evaluation.step > 0);
            if let Some(any) = after.or(before) {
                outcomes.push(Outcome { task, split, trained: any.trained, before, after });
            }
        }
    }
    outcomes
}

/// The scores to judge a task by: test data if it was evaluated both before and after, else validation data.
pub fn judged<'a, 'b>(outcomes: &'b [Outcome<'a>], task: &str) -> Option<&'b Outcome<'a>> {
    let of_task = || outcomes.iter().filter(|outcome| outcome.task == task);
    let complete = |outcome: &&Outcome<'_>| outcome.before.is_some() && outcome.after.is_some();
    of_task().find(complete).or_else(|| of_task().next())
}

/// A score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    ExactMatch,
    LabelAccuracy,
    /// The less the better.
    Loss,
}

impl Measure {
    /// The first that all have.
    pub fn of<'a>(evaluations: impl Iterator<Item = &'a Evaluation> + Clone) -> Self {
        let all_have = |measure: &Self| evaluations.clone().all(|line| measure.value(line).is_some());
        [Self::ExactMatch, Self::LabelAccuracy].into_iter().find(all_have).unwrap_or(Self::Loss)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::ExactMatch => "exact match",
            Self::LabelAccuracy => "label accuracy",
            Self::Loss => "loss",
        }
    }

    pub fn value(self, evaluation: &Evaluation) -> Option<f64> {
        match self {
            Self::ExactMatch => evaluation.exact_match,
            Self::LabelAccuracy => evaluation.label_accuracy,
            Self::Loss => evaluation.loss,
        }
    }

    /// A cell with the value.
    pub fn cell(self, evaluation: Option<&Evaluation>) -> Cell {
        match (self, evaluation.and_then(|evaluation| self.value(evaluation))) {
            (_, None) => Cell::empty(),
            (Self::Loss, value) => Cell { text: number(value), ..Cell::default() },
            (_, Some(share)) => Cell::level(percent(Some(share)), share),
        }
    }

    /// A cell with the change: percentage points of a share, percent of a loss.
    pub fn change(self, before: Option<&Evaluation>, after: Option<&Evaluation>) -> Cell {
        let value = |evaluation: Option<&Evaluation>| evaluation.and_then(|line| self.value(line));
        let (Some(old), Some(new)) = (value(before), value(after)) else { return Cell::empty() };
        let mut cell = match self {
            Self::Loss if old > 0.0 => {
                let change = (new - old) / old;
                Cell::signed(relative(Some(change)), -change / FULL_CHANGE)
            }
            Self::Loss => Cell::empty(),
            _ => Cell::signed(points(Some(new - old)), (new - old) / FULL_CHANGE),
        };
        let shown = |value| if self == Self::Loss { number(Some(value)) } else { percent(Some(value)) };
        cell.title = format!("{} → {}", shown(old), shown(new));
        cell
    }
}

/// A line of the table of scores.
#[derive(Serialize)]
pub struct AccuracyRow<'a> {
    task: &'a str,
    split: &'a str,
    trained: bool,
    samples: u64,
    exact_match: BeforeAfter,
    /// In which the exact match of all such data lies, with 95 % confidence.
    interval: Option<(f64, f64)>,
    label_accuracy: BeforeAfter,
    f1: BeforeAfter,
    loss: BeforeAfter,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct BeforeAfter {
    before: Option<f64>,
    after: Option<f64>,
}

impl BeforeAfter {
    fn new(outcome: &Outcome<'_>, value: impl Fn(&Evaluation) -> Option<f64>) -> Self {
        Self { before: outcome.before.and_then(&value), after: outcome.after.and_then(&value) }
    }

    fn known(self) -> bool {
        self.before.is_some() || self.after.is_some()
    }
}

/// The table of scores, and which of its columns say anything.
#[derive(Serialize)]
pub struct Accuracy<'a> {
    rows: Vec<AccuracyRow<'a>>,
    has_exact_match: bool,
    has_label_accuracy: bool,
    has_f1: bool,
    has_loss: bool,
}

/// The table of all scores; `None` without any.
pub fn accuracy<'a>(outcomes: &[Outcome<'a>]) -> Option<Accuracy<'a>> {
    let row = |outcome: &Outcome<'a>| {
        let latest = outcome.latest()?;
        Some(AccuracyRow {
            task: outcome.task,
            split: outcome.split,
            trained: outcome.trained,
            samples: latest.samples,
            exact_match: BeforeAfter::new(outcome, |line| line.exact_match),
            interval: latest
                .exact_match
                .filter(|_| latest.samples > 0)
                .map(|share| wilson(share, latest.samples)),
            label_accuracy: BeforeAfter::new(outcome, |line| line.label_accuracy),
            f1: BeforeAfter::new(outcome, |line| line.f1),
            loss: BeforeAfter::new(outcome, |line| line.loss),
        })
    };
    let rows: Vec<AccuracyRow<'a>> = outcomes.iter().filter_map(row).collect();
    if rows.is_empty() {
        return None;
    }
    let has = |column: fn(&AccuracyRow<'_>) -> BeforeAfter| rows.iter().any(|row| column(row).known());
    Some(Accuracy {
        has_exact_match: has(|row| row.exact_match),
        has_label_accuracy: has(|row| row.label_accuracy),
        has_f1: has(|row| row.f1),
        has_loss: has(|row| row.loss),
        rows,
    })
}

/// What became of the tasks that a job does not train.
pub fn forgetting(outcomes: &[Outcome<'_>]) -> Option<HeatMap> {
    let mut tasks: Vec<&str> =
        outcomes.iter().filter(|outcome| !outcome.trained).map(|outcome| outcome.task).collect();
    tasks.dedup();
    let rows: Vec<Row> = (tasks.into_iter())
        .filter_map(|task| {
            let outcome = judged(outcomes, task)?;
            let (before, after) = (outcome.before?, outcome.after?);
            let measure = Measure::of([before, after].into_iter());
            let cells = vec![
                measure.cell(Some(before)),
                measure.cell(Some(after)),
                measure.change(Some(before), Some(after)),
            ];
            Some(Row { header: Header::new(task, format!("{}, {}", measure.name(), outcome.split)), cells })
        })
        .collect();
    let columns = ["before", "after", "change"].map(|name| Header::new(name, "")).into();
    (!rows.is_empty()).then(|| HeatMap { corner: "other task".to_owned(), columns, rows })
}

/// What was expected and what was given.
#[derive(Serialize)]
pub struct Confusion<'a> {
    task: &'a str,
    split: &'a str,
    samples: u64,
    /// Where there are not too many classes.
    matrix: Option<HeatMap>,
    /// Else the confusions, the most frequent ones first.
    confusions: Vec<Confused<'a>>,
}

#[derive(Serialize)]
struct Confused<'a> {
    expected: &'a str,
    given: &'a str,
    samples: u64,
}

/// The newest confusion matrix of each task that has one.
pub fn confusions<'a>(outcomes: &'a [Outcome<'a>]) -> Vec<Confusion<'a>> {
    let mut tasks: Vec<&str> = outcomes.iter().map(|outcome| outcome.task).collect();
    tasks.dedup();
    let of_task = |task: &&str| {
        let outcome = outcomes.iter().find(|outcome| {
            outcome.task == *task && outcome.latest().is_some_and(|line| !line.confusion.is_empty())
        })?;
        Some(confusion(outcome, outcome.latest()?))
    };
    tasks.iter().filter_map(of_task).collect()
}

fn confusion<'a>(outcome: &Outcome<'a>, evaluation: &'a Evaluation) -> Confusion<'a> {
    let expected: Vec<&str> = evaluation.confusion.keys().map(String::as_str).collect();
    let given: BTreeSet<&str> =
        evaluation.confusion.values().flat_map(|given| given.keys().map(String::as_str)).collect();
    // The same classes in the same order, then what is none of them.
    let others = given.into_iter().filter(|class| !evaluation.confusion.contains_key(*class));
    let columns: Vec<&str> = expected.iter().copied().chain(others).collect();
    let samples = evaluation.confusion.values().flat_map(|given| given.values()).sum();
    let (mut matrix, mut confusions) = (None, Vec::new());
    if columns.len() <= MOST_CLASSES {
        matrix = Some(confusion_matrix(evaluation, &columns));
    } else {
        for (expected, given) in &evaluation.confusion {
            for (given, &samples) in given.iter().filter(|(given, _)| *given != expected) {
                confusions.push(Confused { expected, given, samples });
            }
        }
        confusions.sort_by_key(|confused| std::cmp::Reverse(confused.samples));
        confusions.truncate(MOST_CONFUSIONS);
    }
    Confusion { task: outcome.task, split: outcome.split, samples, matrix, confusions }
}

fn confusion_matrix(evaluation: &Evaluation, columns: &[&str]) -> HeatMap {
    let rows = (evaluation.confusion.iter())
        .map(|(expected, given)| {
            let total: u64 = given.values().sum();
            let cells = (columns.iter())
                .map(|class| match given.get(*class) {
                    None | Some(0) => Cell::empty(),
                    Some(&samples) => {
                        let share = samples as f64 / total as f64;
                        let right = class == expected;
                        let title = format!("{expected} → {class}: {}", percent(Some(share)));
                        let cell = Cell::signed(count(samples), if right { share } else { -share });
                        Cell { title, ..cell }
                    }
                })
                .collect();
            Row { header: Header::new(expected, format!("{} samples", count(total))), cells }
        })
        .collect();
    let columns = columns.iter().map(|class| Header::new(*class, "")).collect();
    HeatMap { corner: "expected \\ given".to_owned(), columns, rows }
}

/// The scores of one group of a task's samples.
#[derive(Serialize)]
pub struct GroupRow<'a> {
    task: &'a str,
    split: &'a str,
    group: &'a str,
    samples: u64,
    exact_match: BeforeAfter,
    positive: BeforeAfter,
}

/// The scores of all groups, task after task.
pub fn groups<'a>(outcomes: &'a [Outcome<'a>]) -> Vec<GroupRow<'a>> {
    let mut rows = Vec::new();
    for outcome in outcomes {
        let Some(latest) = outcome.latest() else { continue };
        for (group, scores) in &latest.groups {
            let in_group = |line: &Evaluation| line.groups.get(group).copied();
            rows.push(GroupRow {
                task: outcome.task,
                split: outcome.split,
                group,
                samples: scores.samples,
                exact_match: BeforeAfter::new(outcome, |line| in_group(line)?.exact_match),
                positive: BeforeAfter::new(outcome, |line| in_group(line)?.positive),
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::report::heat_map::Tone;

    fn line(step: u64, split: &str, share: Option<f64>) -> Evaluation {
        Evaluation {
            step,
            task: "t".into(),
            split: split.into(),
            exact_match: share,
            loss: Some(2.0 - step as f64 / 10.0),
            samples: 10,
            ..Evaluation::default()
        }
    }

    fn record(evaluations: Vec<Evaluation>) -> JobRecord {
        JobRecord { evaluations, ..JobRecord::default() }
    }

    #[test]
    fn a_task_is_judged_by_what_was_evaluated_before_and_after() {
        let record = record(vec![
            line(0, "valid", Some(0.1)),
            line(5, "valid", Some(0.6)),
            line(9, "valid", Some(0.5)),
            line(9, "test", Some(0.4)),
        ]);
        let outcomes = outcomes(&record);
        let splits: Vec<&str> = outcomes.iter().map(|outcome| outcome.split).collect();
        assert_eq!(splits, ["test", "valid"]);
        let outcome = judged(&outcomes, "t").unwrap();
        assert_eq!(outcome.split, "valid");
        // The last evaluation, not the best one.
        assert_eq!(outcome.after.unwrap().exact_match, Some(0.5));
    }

    #[test]
    fn without_answers_the_loss_is_what_is_compared() {
        let (before, after) = (line(0, "test", Some(0.1)), line(10, "test", None));
        assert_eq!(Measure::of([&before].into_iter()), Measure::ExactMatch);
        let measure = Measure::of([&before, &after].into_iter());
        assert_eq!(measure, Measure::Loss);
        let cell = measure.change(Some(&before), Some(&after));
        assert_eq!((cell.text.as_str(), cell.tone), ("−50.0 %", Tone::Better));
    }

    #[test]
    fn what_was_forgotten_is_worse() {
        let (before, after) = (line(0, "test", Some(0.8)), line(10, "test", Some(0.65)));
        let cell = Measure::ExactMatch.change(Some(&before), Some(&after));
        assert_eq!((cell.text.as_str(), cell.tone, cell.strength), ("−15.0", Tone::Worse, 50));
        assert_eq!(cell.title, "80.0 % → 65.0 %");
    }

    #[test]
    fn large_confusion_matrices_become_lists() {
        let mut evaluation = line(1, "test", Some(0.5));
        for class in 0..MOST_CLASSES + 1 {
            let given = [(format!("{class:02}"), 5), (format!("{:02}", (class + 1) % 17), class as u64)];
            evaluation.confusion.insert(format!("{class:02}"), given.into());
        }
        let record = record(vec![evaluation]);
        let outcomes = outcomes(&record);
        let confusions = confusions(&outcomes);
        assert!(confusions[0].matrix.is_none());
        let first = &confusions[0].confusions[0];
        assert_eq!((first.expected, first.given, first.samples), ("16", "00", 16));
    }

    #[test]
    fn answers_that_are_no_class_have_the_last_columns() {
        let mut evaluation = line(1, "test", Some(0.5));
        evaluation.confusion.insert("b".into(), [("b".into(), 3), ("?".into(), 1)].into());
        evaluation.confusion.insert("c".into(), [("b".into(), 1)].into());
        let record = record(vec![evaluation]);
        let outcomes = outcomes(&record);
        let matrix = confusions(&outcomes).remove(0).matrix.unwrap();
        let names: Vec<&str> = matrix.columns.iter().map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["b", "c", "?"]);
        assert_eq!(matrix.rows[0].cells[0].tone, Tone::Better);
        assert_eq!(matrix.rows[0].cells[0].strength, 75);
        assert_eq!(matrix.rows[1].cells[0].tone, Tone::Worse);
    }
}
