//! What a job learned from: what is in its files, and what was drawn from them.

use std::collections::BTreeSet;

use serde::Serialize;

use super::records::{DataFile, JobRecord};

/// Classes whose shares are shown.
const MOST_CLASSES: usize = 24;

/// What was drawn from a task.
#[derive(Debug, PartialEq, Serialize)]
pub struct DrawnRow<'a> {
    task: &'a str,
    drawn: u64,
    /// Of everything drawn.
    share: f64,
    labels: u64,
    /// Samples in its training data.
    available: Option<u64>,
    /// How often the data was gone through.
    passes: Option<f64>,
    /// Draws beyond the first of each sample. A sampler goes through all of a task's samples before it comes back to
    /// one.
    repeated: Option<u64>,
}

/// What was drawn from each task; empty before the first step.
pub fn drawn(record: &JobRecord) -> Vec<DrawnRow<'_>> {
    let drawn = record.drawn();
    let total: u64 = drawn.values().map(|drawn| drawn.samples).sum();
    let row = |task| {
        let drawn = drawn.get(task)?;
        let available =
            record.file(task, "train").map(|file| file.counts.kept as u64).filter(|kept| *kept > 0);
        Some(DrawnRow {
            task,
            drawn: drawn.samples,
            share: drawn.samples as f64 / total.max(1) as f64,
            labels: drawn.labels,
            available,
            passes: available.map(|kept| drawn.samples as f64 / kept as f64),
            repeated: available.map(|kept| drawn.samples.saturating_sub(kept)),
        })
    };
    record.tasks().into_iter().filter_map(row).collect()
}

/// The balance of a task's classes in each of its files.
#[derive(Debug, Serialize)]
pub struct Classes<'a> {
    task: &'a str,
    splits: Vec<Split<'a>>,
    rows: Vec<ClassRow<'a>>,
    /// Classes that are not shown, the rarest ones.
    hidden: usize,
}

#[derive(Debug, Serialize)]
struct Split<'a> {
    name: &'a str,
    samples: u64,
}

#[derive(Debug, Serialize)]
struct ClassRow<'a> {
    class: &'a str,
    /// By split.
    cells: Vec<Share>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Share {
    samples: u64,
    share: f64,
    /// Of the widest bar, in percent.
    width: f64,
}

/// The class balance of each task whose answers are classes; the most frequent class first.
pub fn classes(record: &JobRecord) -> Vec<Classes<'_>> {
    let of_task = |task| {
        let files: Vec<&DataFile> =
            (record.data().iter()).filter(|file| file.task == task && !file.classes.is_empty()).collect();
        (!files.is_empty()).then(|| classes_of(task, &files))
    };
    record.tasks().into_iter().filter_map(of_task).collect()
}

fn classes_of<'a>(task: &'a str, files: &[&'a DataFile]) -> Classes<'a> {
    let totals: Vec<u64> = files.iter().map(|file| file.classes.values().sum()).collect();
    let names: BTreeSet<&str> =
        files.iter().flat_map(|file| file.classes.keys().map(String::as_str)).collect();
    let samples = |class: &str, file: &DataFile| file.classes.get(class).copied().unwrap_or(0);
    let mut names: Vec<&str> = names.into_iter().collect();
    names.sort_by_key(|class| std::cmp::Reverse(files.iter().map(|file| samples(class, file)).sum::<u64>()));
    let hidden = names.len().saturating_sub(MOST_CLASSES);
    names.truncate(MOST_CLASSES);
    let share = |class: &str, index: usize| samples(class, files[index]) as f64 / totals[index].max(1) as f64;
    let widest = (names.iter())
        .flat_map(|class| (0..files.len()).map(|index| share(class, index)))
        .fold(0.0, f64::max)
        .max(f64::MIN_POSITIVE);
    let rows = (names.into_iter())
        .map(|class| {
            let cell = |index: usize| Share {
                samples: samples(class, files[index]),
                share: share(class, index),
                width: 100.0 * share(class, index) / widest,
            };
            ClassRow { class, cells: (0..files.len()).map(cell).collect() }
        })
        .collect();
    let splits =
        files.iter().zip(&totals).map(|(file, &samples)| Split { name: &file.split, samples }).collect();
    Classes { task, splits, rows, hidden }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::Counts;
    use crate::train::report::records::{Manifest, Step, TaskStep};

    fn file(task: &str, split: &str, kept: usize, classes: &[(&str, u64)]) -> DataFile {
        DataFile {
            task: task.into(),
            split: split.into(),
            path: String::new(),
            hash: String::new(),
            counts: Counts { kept, ..Counts::default() },
            classes: classes.iter().map(|&(class, samples)| (class.to_owned(), samples)).collect(),
            leakage: 0,
        }
    }

    fn record(data: Vec<DataFile>, steps: &[&[(&str, u64)]]) -> JobRecord {
        let step = |tasks: &&[(&str, u64)]| Step {
            step: 1,
            loss: None,
            grad_norm: None,
            lr: None,
            tokens: 0,
            tasks: (tasks.iter())
                .map(|&(task, samples)| {
                    (task.to_owned(), TaskStep { loss: None, samples, labels: 2 * samples })
                })
                .collect(),
            skipped: Vec::new(),
        };
        JobRecord {
            manifest: Some(Manifest { data, ..Manifest::default() }),
            steps: steps.iter().map(step).collect(),
            ..JobRecord::default()
        }
    }

    #[test]
    fn draws_beyond_the_data_are_repeats() {
        let data = vec![file("a", "train", 4, &[]), file("b", "train", 100, &[]), file("c", "valid", 9, &[])];
        let record = record(data, &[&[("a", 5), ("b", 1)], &[("a", 5), ("b", 9)]]);
        let rows = drawn(&record);
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].drawn, rows[0].passes, rows[0].repeated), (10, Some(2.5), Some(6)));
        assert_eq!((rows[1].drawn, rows[1].share, rows[1].labels), (10, 0.5, 20));
        assert_eq!((rows[1].available, rows[1].repeated), (Some(100), Some(0)));
    }

    #[test]
    fn classes_are_shares_of_their_file() {
        let data = vec![file("a", "train", 0, &[("x", 10), ("y", 30)]), file("a", "test", 0, &[("z", 5)])];
        let record = record(data, &[]);
        let classes = classes(&record);
        assert_eq!(classes.len(), 1);
        let names: Vec<&str> = classes[0].rows.iter().map(|row| row.class).collect();
        assert_eq!(names, ["y", "x", "z"]);
        assert_eq!(classes[0].rows[0].cells[0], Share { samples: 30, share: 0.75, width: 75.0 });
        assert_eq!(classes[0].rows[0].cells[1], Share { samples: 0, share: 0.0, width: 0.0 });
    }

    #[test]
    fn the_rarest_classes_are_counted_and_not_shown() {
        let names: Vec<String> = (0..30).map(|class| format!("class {class}")).collect();
        let classes_of_file: Vec<(&str, u64)> =
            names.iter().enumerate().map(|(index, name)| (name.as_str(), index as u64 + 1)).collect();
        let record = record(vec![file("a", "train", 0, &classes_of_file)], &[]);
        let classes = classes(&record);
        assert_eq!((classes[0].rows.len(), classes[0].hidden), (24, 6));
        assert_eq!(classes[0].rows[0].class, "class 29");
    }
}
