//! What training a task together with others did to it: one adapter on many tasks against one on this task alone.
//!
//! Interference is `(multi − single) / single` of the share of right answers on the same unseen data: below 0 the
//! tasks got into each other's way, above 0 they helped each other.

use serde::Serialize;

use super::heat_map::{Cell, Header, HeatMap, Row};
use super::numbers::number;
use super::outcomes::{Measure, Outcome, outcomes};
use super::records::JobRecord;
use super::statistics::{Hits, relative_change};

/// The end of the scale that changes are drawn on.
const FULL_SCALE: f64 = 1.0;

/// A task in a job of many beside the job that has it alone.
#[derive(Debug, Serialize)]
pub struct Interference<'a> {
    task: &'a str,
    multi: &'a str,
    single: &'a str,
    split: &'a str,
    measure: &'static str,
    samples: u64,
    multi_share: f64,
    single_share: f64,
    /// With the ends of its 95 % interval; without bound where the single job had nothing right.
    change: f64,
    low: f64,
    high: f64,
    /// `clear` if the interval leaves out 0.
    clear: bool,
}

/// The interference of all tasks, and the scale to draw it on.
#[derive(Debug, Serialize)]
pub struct Interferences<'a> {
    rows: Vec<Interference<'a>>,
    /// The drawn scale goes from `-scale` to `scale`.
    scale: f64,
}

/// Compares each task of each job of many tasks with the best job of that task alone; `None` without such pairs.
///
/// Both must have been tested on the same data. The best of several single jobs is the one with the least validation
/// loss, so that the test data takes no part in the choice.
pub fn interferences(records: &[JobRecord]) -> Option<Interferences<'_>> {
    let mut rows = Vec::new();
    for multi in records.iter().filter(|record| record.trained().len() > 1) {
        for task in multi.tasks().into_iter().filter(|task| multi.trained().contains(task)) {
            let alone = |record: &&JobRecord| record.trained().into_iter().eq([task]);
            let single = (records.iter().filter(alone))
                .min_by(|a, b| validation_loss(a, task).total_cmp(&validation_loss(b, task)));
            rows.extend(single.and_then(|single| compare(multi, single, task)));
        }
    }
    let reach = rows.iter().flat_map(|row| [row.low.abs(), row.high.abs()]).fold(0.05, f64::max);
    (!rows.is_empty()).then(|| Interferences { rows, scale: reach.min(FULL_SCALE) })
}

fn validation_loss(record: &JobRecord, task: &str) -> f64 {
    let of_task = |outcome: &&Outcome<'_>| outcome.task == task && outcome.split == "valid";
    let outcomes = outcomes(record);
    let loss = outcomes.iter().find(of_task).and_then(|outcome| outcome.after?.loss);
    loss.unwrap_or(f64::INFINITY)
}

fn compare<'a>(multi: &'a JobRecord, single: &'a JobRecord, task: &'a str) -> Option<Interference<'a>> {
    for split in ["test", "valid"] {
        let hash = |record: &'a JobRecord| record.file(task, split).map(|file| &file.hash);
        if hash(multi).zip(hash(single)).is_some_and(|(multi, single)| multi != single) {
            continue;
        }
        let of_split = |outcome: &Outcome<'_>| outcome.task == task && outcome.split == split;
        let (multi_outcomes, single_outcomes) = (outcomes(multi), outcomes(single));
        let after = |outcomes: &[Outcome<'a>]| outcomes.iter().find(|outcome| of_split(outcome))?.after;
        let (Some(new), Some(old)) = (after(&multi_outcomes), after(&single_outcomes)) else { continue };
        let measure = Measure::of([new, old].into_iter());
        if measure == Measure::Loss || new.samples != old.samples || new.samples == 0 {
            continue;
        }
        let (Some(multi_share), Some(single_share)) = (measure.value(new), measure.value(old)) else {
            continue;
        };
        let hits = |share| Hits::of_share(share, new.samples);
        let (change, low, high) = relative_change(hits(multi_share), hits(single_share));
        return Some(Interference {
            task,
            multi: &multi.name,
            single: &single.name,
            split: if split == "test" { "test" } else { "valid" },
            measure: measure.name(),
            samples: new.samples,
            multi_share,
            single_share,
            change,
            low,
            high,
            clear: low > 0.0 || high < 0.0,
        });
    }
    None
}

/// Mean cosines between the gradients of a job's tasks; `None` where they were not measured.
pub fn affinity(record: &JobRecord) -> Option<HeatMap> {
    let pairs = || record.affinities.iter().flat_map(|line| &line.affinity);
    let named = |task: &&str| pairs().any(|(a, b, _)| a == task || b == task);
    let tasks: Vec<&str> = record.tasks().into_iter().filter(named).collect();
    let cell = |a: &str, b: &str| {
        let cosines: Vec<f64> = pairs()
            .filter(|(first, second, _)| (first == a && second == b) || (first == b && second == a))
            .filter_map(|(.., cosine)| *cosine)
            .collect();
        if cosines.is_empty() {
            return Cell::empty();
        }
        let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
        let low = cosines.iter().copied().fold(f64::INFINITY, f64::min);
        let high = cosines.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let title =
            format!("{} to {} in {} measurements", number(Some(low)), number(Some(high)), cosines.len());
        Cell { title, ..Cell::signed(format!("{mean:+.2}").replace('-', "−"), mean) }
    };
    let rows: Vec<Row> = (tasks.iter())
        .map(|a| Row { header: Header::new(*a, ""), cells: tasks.iter().map(|b| cell(a, b)).collect() })
        .collect();
    let columns = tasks.iter().map(|task| Header::new(*task, "")).collect();
    (!rows.is_empty()).then(|| HeatMap { corner: "task".to_owned(), columns, rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::report::heat_map::Tone;
    use crate::train::report::records::{Affinity, DataFile, Evaluation, Manifest};

    fn evaluation(task: &str, split: &str, share: f64, loss: f64) -> Evaluation {
        Evaluation {
            step: 9,
            task: task.into(),
            split: split.into(),
            trained: true,
            exact_match: Some(share),
            loss: Some(loss),
            samples: 200,
            ..Evaluation::default()
        }
    }

    fn job(name: &str, evaluations: Vec<Evaluation>) -> JobRecord {
        JobRecord { name: name.into(), evaluations, ..JobRecord::default() }
    }

    fn file(hash: &str) -> DataFile {
        let json = serde_json::json!({"task": "a", "split": "test", "path": "a.jsonl", "hash": hash});
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_task_of_many_is_compared_with_itself_alone() {
        let records = [
            job("both", vec![evaluation("a", "test", 0.6, 1.0), evaluation("b", "test", 0.5, 1.0)]),
            job("only-a", vec![evaluation("a", "test", 0.8, 1.0), evaluation("a", "valid", 0.8, 0.5)]),
            job("worse-a", vec![evaluation("a", "test", 0.9, 1.0), evaluation("a", "valid", 0.8, 0.7)]),
        ];
        let found = interferences(&records).unwrap();
        assert_eq!(found.rows.len(), 1);
        let row = &found.rows[0];
        // Chosen by the validation loss, although the other is better on the test data.
        assert_eq!((row.multi, row.single, row.task, row.split), ("both", "only-a", "a", "test"));
        assert!((row.change + 0.25).abs() < 1e-12 && row.low < -0.25 && row.high > -0.25 && row.clear);
        assert!(interferences(&records[1..]).is_none());
    }

    #[test]
    fn jobs_tested_on_other_data_are_not_compared() {
        let mut records = [
            job("both", vec![evaluation("a", "test", 0.6, 1.0), evaluation("b", "test", 0.5, 1.0)]),
            job("only-a", vec![evaluation("a", "test", 0.8, 1.0)]),
        ];
        let manifest = |hash: &str| Some(Manifest { data: vec![file(hash)], ..Manifest::default() });
        records[0].manifest = manifest("1");
        records[1].manifest = manifest("1");
        assert!(interferences(&records).is_some());
        records[1].manifest = manifest("2");
        assert!(interferences(&records).is_none());
    }

    #[test]
    fn affinity_is_the_mean_of_what_was_measured() {
        let line = |cosine| Affinity { affinity: vec![("a".into(), "b".into(), Some(cosine))] };
        let mut record =
            job("both", vec![evaluation("a", "test", 0.6, 1.0), evaluation("b", "test", 0.5, 1.0)]);
        assert!(affinity(&record).is_none());
        record.affinities = vec![line(-0.5), line(0.1)];
        let map = affinity(&record).unwrap();
        let cells = [&map.rows[0].cells[1], &map.rows[1].cells[0]];
        assert!(
            cells.iter().all(|cell| cell.text == "−0.20" && cell.tone == Tone::Worse && cell.strength == 20)
        );
        assert_eq!(map.rows[0].cells[0].text, "");
    }
}
