//! What a job's folder says of it: `metrics.jsonl` and `manifest.json`, read back.
//!
//! A metrics line is one of three: a training step (it has `loss`), an evaluation (`eval`) or the cosines between the
//! gradients of tasks (`affinity`). Keys that this version does not know are passed over, so that a newer file still
//! gives a page; what it does know must be right.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ReportError;
use crate::format::{FormatError, parse_text, read_json};
use crate::train::data::Counts;
use crate::train::folder::MANIFEST_FILE;
use crate::train::metrics::METRICS_FILE;

/// A job as its files tell it.
#[derive(Debug, Default)]
pub struct JobRecord {
    pub name: String,
    /// Name of its folder within the run's.
    pub folder: String,
    /// Absent while the job runs: it is written last.
    pub manifest: Option<Manifest>,
    /// In the file's order, as the next two.
    pub steps: Vec<Step>,
    pub evaluations: Vec<Evaluation>,
    pub affinities: Vec<Affinity>,
    /// Why nothing of it is known: its files cannot be read, or are not what they should be.
    pub problem: Option<String>,
}

/// An optimizer step.
#[derive(Debug, Deserialize)]
pub struct Step {
    pub step: u64,
    /// In nats; absent where it was not finite.
    pub loss: Option<f64>,
    pub grad_norm: Option<f64>,
    pub lr: Option<f64>,
    #[serde(default)]
    pub tokens: u64,
    #[serde(default)]
    pub tasks: BTreeMap<String, TaskStep>,
    /// Tensors whose gradient was not finite.
    #[serde(default)]
    pub skipped: Vec<String>,
}

/// One task's part of a step.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct TaskStep {
    pub loss: Option<f64>,
    pub samples: u64,
    #[serde(default)]
    pub labels: u64,
}

/// The scores of an adapter on one file of a task. Shares are 0 to 1.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Evaluation {
    /// 0 is before training.
    #[serde(default)]
    pub step: u64,
    pub task: String,
    pub split: String,
    /// Whether the job trains the task.
    pub trained: bool,
    pub loss: Option<f64>,
    pub exact_match: Option<f64>,
    pub label_accuracy: Option<f64>,
    pub f1: Option<f64>,
    pub samples: u64,
    /// Expected class → given class → samples.
    #[serde(default)]
    pub confusion: BTreeMap<String, BTreeMap<String, u64>>,
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
}

/// The scores of one group of samples.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Group {
    pub samples: u64,
    pub exact_match: Option<f64>,
    /// Share of positive predictions.
    pub positive: Option<f64>,
}

/// Cosines between the gradients of pairs of tasks.
#[derive(Debug, Deserialize)]
pub struct Affinity {
    pub affinity: Vec<(String, String, Option<f64>)>,
}

/// What a job that has ended left behind.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Manifest {
    pub loramux: String,
    pub job: String,
    pub base: BaseModel,
    pub config: Map<String, Value>,
    pub seed: Option<u64>,
    pub data: Vec<DataFile>,
    /// Where the adapter began, oldest first.
    pub lineage: Vec<Value>,
    pub steps: u64,
    pub best_step: Option<u64>,
    pub outcome: Option<String>,
    /// File → SHA-256.
    pub files: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct BaseModel {
    pub model: String,
    pub hash: String,
}

/// A file of samples.
#[derive(Debug, Deserialize, Serialize)]
pub struct DataFile {
    pub task: String,
    pub split: String,
    pub path: String,
    pub hash: String,
    #[serde(default)]
    pub counts: Counts,
    /// Answer → samples, where the answers are classes.
    #[serde(default)]
    pub classes: BTreeMap<String, u64>,
    /// Samples that are in the training data too.
    #[serde(default)]
    pub leakage: u64,
}

/// What was drawn from a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drawn {
    pub samples: u64,
    pub labels: u64,
}

impl AddAssign<TaskStep> for Drawn {
    fn add_assign(&mut self, step: TaskStep) {
        self.samples += step.samples;
        self.labels += step.labels;
    }
}

impl JobRecord {
    /// Reads a job's folder.
    pub fn read(folder: &Path) -> Result<Self, ReportError> {
        let mut record = Self { folder: file_name(folder), ..Self::default() };
        let path = folder.join(METRICS_FILE);
        if path.exists() {
            let bytes = std::fs::read(&path).map_err(FormatError::io(&path, "read"))?;
            record.read_metrics(&bytes).map_err(|(line, problem)| ReportError::Metrics {
                path,
                line,
                problem,
            })?;
        }
        let path = folder.join(MANIFEST_FILE);
        if path.exists() {
            let manifest = read_json(&path)?;
            let manifest: Manifest = serde_json::from_value(manifest)
                .map_err(|error| ReportError::Manifest { path, problem: error.to_string() })?;
            if !manifest.job.is_empty() {
                record.name.clone_from(&manifest.job);
            }
            record.manifest = Some(manifest);
        }
        if record.name.is_empty() {
            record.name.clone_from(&record.folder);
        }
        Ok(record)
    }

    /// Reads every job's folder of a run, in the order of their names. One that cannot be read has its problem instead.
    pub fn read_all(run: &Path) -> Result<Vec<Self>, ReportError> {
        let failed = |source| ReportError::Folder { path: run.to_owned(), source };
        let mut folders = Vec::new();
        for entry in std::fs::read_dir(run).map_err(failed)? {
            let folder = entry.map_err(failed)?.path();
            if folder.join(METRICS_FILE).is_file() || folder.join(MANIFEST_FILE).is_file() {
                folders.push(folder);
            }
        }
        folders.sort();
        let unreadable = |folder: &Path, error: &ReportError| {
            let name = file_name(folder);
            Self { folder: name.clone(), name, problem: Some(error.to_string()), ..Self::default() }
        };
        let read = |folder: &PathBuf| Self::read(folder).unwrap_or_else(|error| unreadable(folder, &error));
        Ok(folders.iter().map(read).collect())
    }

    /// Takes in all lines; an error comes with its line, from 1.
    fn read_metrics(&mut self, bytes: &[u8]) -> Result<(), (usize, String)> {
        let lines: Vec<&[u8]> = bytes.split_inclusive(|&byte| byte == b'\n').collect();
        for (index, line) in lines.iter().enumerate() {
            let taken = self.read_line(line.trim_ascii());
            // A line is whole once its line feed is there: a job that runs may be in the midst of the last one.
            if taken.is_err() && index + 1 == lines.len() && !line.ends_with(b"\n") {
                break;
            }
            taken.map_err(|problem| (index + 1, problem))?;
        }
        Ok(())
    }

    fn read_line(&mut self, line: &[u8]) -> Result<(), String> {
        let text = std::str::from_utf8(line).map_err(|error| format!("not UTF-8: {error}"))?;
        let value = parse_text(text).map_err(|error| format!("not valid JSON: {error}"))?;
        let Value::Object(mut fields) = value else {
            return Err("not a JSON object".to_owned());
        };
        let job = fields.get("job").and_then(Value::as_str).ok_or("no string `job`")?;
        if self.name.is_empty() {
            self.name = job.to_owned();
        } else if self.name != job {
            return Err(format!("a line of job `{job}` among those of `{}`", self.name));
        }
        if let Some(scores) = fields.remove("eval") {
            let step = fields.get("step").and_then(Value::as_u64).ok_or("no whole number `step`")?;
            self.evaluations.push(Evaluation { step, ..typed(scores)? });
        } else if fields.contains_key("affinity") {
            self.affinities.push(typed(Value::Object(fields))?);
        } else if fields.contains_key("loss") {
            self.steps.push(typed(Value::Object(fields))?);
        } else {
            return Err("none of the keys `loss`, `eval` and `affinity`".to_owned());
        }
        Ok(())
    }

    /// All tasks: the trained ones first, in the order of the data, then the others.
    pub fn tasks(&self) -> Vec<&str> {
        let data = self.data().iter().map(|file| file.task.as_str());
        let evaluated = self.evaluations.iter().map(|evaluation| evaluation.task.as_str());
        let trained = self.trained();
        let mut seen = BTreeSet::new();
        let mut tasks: Vec<&str> =
            data.chain(evaluated).chain(trained.iter().copied()).filter(|task| seen.insert(*task)).collect();
        tasks.sort_by_key(|task| !trained.contains(task));
        tasks
    }

    /// Tasks that are trained.
    pub fn trained(&self) -> BTreeSet<&str> {
        let drawn = self.steps.iter().flat_map(|step| step.tasks.keys().map(String::as_str));
        let evaluated = (self.evaluations.iter())
            .filter(|evaluation| evaluation.trained)
            .map(|evaluation| evaluation.task.as_str());
        let data = (self.data().iter()).filter(|file| file.split == "train").map(|file| file.task.as_str());
        drawn.chain(evaluated).chain(data).collect()
    }

    pub fn data(&self) -> &[DataFile] {
        self.manifest.as_ref().map_or(&[], |manifest| &manifest.data)
    }

    /// The file of a task's split.
    pub fn file(&self, task: &str, split: &str) -> Option<&DataFile> {
        self.data().iter().find(|file| file.task == task && file.split == split)
    }

    /// What was drawn from each task, over all steps.
    pub fn drawn(&self) -> BTreeMap<&str, Drawn> {
        let mut drawn: BTreeMap<&str, Drawn> = BTreeMap::new();
        for (task, step) in self.steps.iter().flat_map(|step| &step.tasks) {
            *drawn.entry(task).or_default() += *step;
        }
        drawn
    }

    /// Rows computed in training.
    pub fn tokens(&self) -> u64 {
        self.steps.iter().map(|step| step.tokens).sum()
    }

    pub fn last_step(&self) -> u64 {
        self.steps.last().map_or(0, |step| step.step)
    }

    /// Steps that changed nothing, for a gradient was not finite.
    pub fn skipped(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| !step.skipped.is_empty())
    }

    pub fn outcome(&self) -> Option<&str> {
        if self.problem.is_some() {
            return Some("not readable");
        }
        self.manifest.as_ref()?.outcome.as_deref()
    }
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| error.to_string())
}

fn file_name(folder: &Path) -> String {
    folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<JobRecord, (usize, String)> {
        let mut record = JobRecord::default();
        record.read_metrics(text.as_bytes()).map(|()| record)
    }

    const STEP: &str = "{\"job\": \"a\", \"step\": 1, \"loss\": 2.0}\n";

    #[test]
    fn a_torn_last_line_is_not_there_yet() {
        for torn in ["{", "{\"job\": \"a\", \"st", "{\"job\": \"a\", \"step\": 2, \"loss\": 1", "\u{fffd}"] {
            let record = read(&format!("{STEP}{torn}")).unwrap();
            assert_eq!(record.steps.len(), 1, "{torn}");
        }
        let whole = STEP.trim_end().replace("\"step\": 1", "\"step\": 2");
        assert_eq!(read(&format!("{STEP}{whole}")).unwrap().steps.len(), 2);
        let mut record = JobRecord::default();
        record.read_metrics(&[STEP.as_bytes(), b"{\"job\": \"\xc3"].concat()).unwrap();
        assert_eq!(record.steps.len(), 1);
    }

    #[test]
    fn a_malformed_line_is_named_with_what_is_wrong() {
        for (line, wanted) in [
            ("{", "not valid JSON"),
            ("[]", "not a JSON object"),
            ("{\"step\": 2, \"loss\": 1.0}", "`job`"),
            ("{\"job\": \"b\", \"step\": 2, \"loss\": 1.0}", "job `b` among those of `a`"),
            ("{\"job\": \"a\", \"step\": -2, \"loss\": 1.0}", "-2"),
            ("{\"job\": \"a\", \"loss\": 1.0}", "`step`"),
            ("{\"job\": \"a\", \"step\": 2}", "`loss`, `eval` and `affinity`"),
            ("{\"job\": \"a\", \"step\": 2, \"eval\": {\"split\": \"test\"}}", "`task`"),
            ("{\"job\": \"a\", \"step\": 2, \"loss\": 1.0, \"loss\": 2.0}", "occurs twice"),
        ] {
            let (number, problem) = read(&format!("{STEP}{line}\n{STEP}")).unwrap_err();
            assert_eq!(number, 2, "{line}");
            assert!(problem.contains(wanted), "{line}: {problem}");
            // Its line feed makes the last line a whole one.
            assert_eq!(read(&format!("{STEP}{line}\n")).unwrap_err(), (2, problem));
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_is_absent() {
        let record = read("{\"job\": \"a\", \"step\": 1, \"loss\": null, \"skipped\": [\"x\"]}\n").unwrap();
        assert_eq!(record.steps[0].loss, None);
        assert_eq!(record.skipped().count(), 1);
    }

    #[test]
    fn tasks_that_are_trained_come_first() {
        let eval = |task: &str, trained: bool| {
            format!(
                "{{\"job\": \"a\", \"step\": 0, \"eval\": {{\"task\": \"{task}\", \"split\": \"test\", \
                 \"trained\": {trained}, \"samples\": 1}}}}\n"
            )
        };
        let record = read(&[eval("guard", false), eval("own", true), eval("other", false)].concat()).unwrap();
        assert_eq!(record.tasks(), ["own", "guard", "other"]);
    }
}
