//! `metrics.jsonl`: one line a step, one an evaluation.
//!
//! Nothing in it depends on time or on other jobs, so the same job writes the same bytes. A checkpoint remembers how
//! long the file was; a resumed job cuts it there and goes on.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use crate::format::FormatError;

/// Name of the file in a job's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepLine {
    pub job: String,
    /// From 1.
    pub step: u64,
    /// How much of the data has been seen, in passes.
    pub epoch: f64,
    /// Before this step's update, in nats.
    pub loss: f64,
    /// `√Σ g²` over all parameters, before clipping.
    pub grad_norm: Option<f64>,
    pub lr: f64,
    /// Rows computed.
    pub tokens: usize,
    /// Of them, those with a label.
    pub labels: usize,
    pub samples: usize,
    /// By task, those in the batch.
    pub tasks: BTreeMap<String, TaskStep>,
    /// Tensors whose gradient was not finite: the step changed nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
}

/// One task's part of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TaskStep {
    /// Mean over its labelled tokens, in nats.
    pub loss: f64,
    pub samples: usize,
    pub labels: usize,
    /// By which CoBa multiplies the weights of its tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// The file of one job.
pub struct Metrics {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Metrics {
    /// Opens the file of the job in `folder`, keeping its first `keep` bytes.
    ///
    /// # Errors
    /// When it cannot be opened, or is shorter than that.
    pub fn open(folder: &Path, keep: u64) -> Result<Self, FormatError> {
        let path = folder.join(METRICS_FILE);
        let io = |action| FormatError::io(&path, action);
        let mut file = (OpenOptions::new().create(true).truncate(false).read(true).write(true))
            .open(&path)
            .map_err(io("open"))?;
        let length = file.metadata().map_err(io("measure"))?.len();
        if length < keep {
            let problem = format!("{length} bytes, but the checkpoint was made after {keep}");
            return Err(FormatError::io(&path, "resume")(std::io::Error::other(problem)));
        }
        file.set_len(keep).map_err(io("cut"))?;
        file.seek(SeekFrom::Start(keep)).map_err(io("seek in"))?;
        Ok(Self { path, file, length: keep })
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends a step.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn step(&mut self, line: &StepLine) -> Result<(), FormatError> {
        self.append(&json!(line))
    }

    /// Appends any other line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&mut self, line: &Value) -> Result<(), FormatError> {
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).map_err(FormatError::io(&self.path, "write"))?;
        self.length += text.len() as u64;
        Ok(())
    }

    /// Waits until all lines are on the disk.
    ///
    /// # Errors
    /// When they cannot get there.
    pub fn sync(&self) -> Result<(), FormatError> {
        self.file.sync_data().map_err(FormatError::io(&self.path, "flush"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_file_goes_on_where_the_checkpoint_was() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 0).unwrap();
        metrics.append(&json!({"step": 1})).unwrap();
        let kept = metrics.len();
        metrics.append(&json!({"step": 2, "loss": 0.5})).unwrap();
        drop(metrics);
        let mut metrics = Metrics::open(folder.path(), kept).unwrap();
        metrics.append(&json!({"step": 2})).unwrap();
        let text = std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":2}\n");
        let error = Metrics::open(folder.path(), 1000).err().unwrap().to_string();
        assert!(error.contains("metrics.jsonl") && error.contains("1000"), "{error}");
    }

    #[test]
    fn a_step_says_what_was_skipped_only_when_something_was() {
        let line = StepLine {
            job: "a".into(),
            step: 3,
            epoch: 0.5,
            loss: 1.25,
            grad_norm: Some(2.0),
            lr: 0.001,
            tokens: 20,
            labels: 7,
            samples: 2,
            tasks: BTreeMap::from([(
                "t".into(),
                TaskStep { loss: 1.25, samples: 2, labels: 7, weight: None },
            )]),
            skipped: Vec::new(),
        };
        let wanted = r#"{"job":"a","step":3,"epoch":0.5,"loss":1.25,"grad_norm":2.0,"lr":0.001,"tokens":20,"labels":7,"samples":2,"tasks":{"t":{"loss":1.25,"samples":2,"labels":7}}}"#;
        assert_eq!(serde_json::to_string(&line).unwrap(), wanted);
        let skipped = StepLine { grad_norm: None, skipped: vec!["x.lora_A".into()], ..line };
        assert!(serde_json::to_string(&skipped).unwrap().ends_with(r#""skipped":["x.lora_A"]}"#));
    }
}
