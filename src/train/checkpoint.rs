//! Checkpoints: all that a job needs to go on as if it had never stopped.
//!
//! One safetensors file holds the weights, the optimizer's moments and, as metadata, the state of everything else. It
//! replaces the previous one in a single rename after its bytes are on the disk (see
//! [`write_atomic`](crate::format::write_atomic)), so whatever happens one whole checkpoint is there. It holds a hash of
//! itself: what a disk or a copy damages later is refused rather than gone on from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::TrainError;
use super::sampling::SamplerState;
use crate::backend::training::PairValues;
use crate::format::safetensors::{SafetensorsFile, write_safetensors};
use crate::format::{FormatError, Sha256Hasher};
use crate::tensor::Tensor;

/// Name of the file in a job's folder.
pub const CHECKPOINT_FILE: &str = "checkpoint.safetensors";

/// Under which the state is in the file's metadata.
const STATE_KEY: &str = "loramux_job_state";
/// Under which the hash of the state and all tensors is.
const HASH_KEY: &str = "loramux_sha256";

/// Where a job stands, but for its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobState {
    /// What must be the same for a job to go on: its resolved configuration, and the hashes of base and data.
    pub identity: Value,
    /// Steps done.
    pub step: u64,
    /// Of them, those that changed the weights: the `t` of AdamW.
    pub updates: u64,
    /// Steps with a gradient that was not finite.
    pub bad_steps: u64,
    pub sampler: SamplerState,
    /// Validation losses by task and evaluation, oldest first; infinite where one was not finite.
    #[serde(deserialize_with = "losses")]
    pub validation: Vec<Vec<f64>>,
    /// Step and mean validation loss of the best evaluation.
    pub best: Option<(u64, f64)>,
    /// Evaluations since then.
    pub since_best: u64,
    pub affinity: Affinity,
    /// Bytes of `metrics.jsonl`.
    pub metrics_bytes: u64,
    /// Why training ended, when it has.
    pub outcome: Option<Outcome>,
    /// Whether the evaluation after the end is done.
    pub concluded: bool,
}

impl JobState {
    /// Of a job that has not begun.
    pub fn new(identity: Value, sampler: SamplerState, tasks: usize) -> Self {
        Self {
            identity,
            step: 0,
            updates: 0,
            bad_steps: 0,
            sampler,
            validation: vec![Vec::new(); tasks],
            best: None,
            since_best: 0,
            affinity: Affinity::default(),
            metrics_bytes: 0,
            outcome: None,
            concluded: false,
        }
    }
}

/// Losses as JSON has them: what is infinite is `null` there.
fn losses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<f64>>, D::Error> {
    let tasks = Vec::<Vec<Option<f64>>>::deserialize(deserializer)?;
    let known = |task: Vec<Option<f64>>| task.into_iter().map(|loss| loss.unwrap_or(f64::INFINITY)).collect();
    Ok(tasks.into_iter().map(known).collect())
}

/// Cosines between tasks' gradients since they were written last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Affinity {
    /// Sums over the steps that had one, `[tasks, tasks]`; empty before the first step.
    pub sums: Vec<Vec<f64>>,
    /// How many steps those were.
    pub steps: Vec<Vec<u64>>,
}

impl Affinity {
    /// Adds a step's.
    pub fn add(&mut self, cosines: &[Vec<Option<f64>>]) {
        if self.sums.is_empty() {
            self.sums = vec![vec![0.0; cosines.len()]; cosines.len()];
            self.steps = vec![vec![0; cosines.len()]; cosines.len()];
        }
        for (i, row) in cosines.iter().enumerate() {
            for (j, cosine) in row.iter().enumerate() {
                if let Some(cosine) = cosine {
                    self.sums[i][j] += cosine;
                    self.steps[i][j] += 1;
                }
            }
        }
    }

    /// The mean cosine of each pair of tasks that had one.
    pub fn means(&self) -> Vec<(usize, usize, f64)> {
        let tasks = self.sums.len();
        let pairs = (0..tasks).flat_map(|i| (i + 1..tasks).map(move |j| (i, j)));
        let known = pairs.filter(|&(i, j)| self.steps[i][j] > 0);
        known.map(|(i, j)| (i, j, self.sums[i][j] / self.steps[i][j] as f64)).collect()
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    #[serde(rename = "finished")]
    Finished,
    #[serde(rename = "stopped early")]
    StoppedEarly,
    #[serde(rename = "failed")]
    Failed,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finished => "finished",
            Self::StoppedEarly => "stopped early",
            Self::Failed => "failed",
        })
    }
}

/// A job's tensors, each by pair.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobTensors {
    pub weights: Vec<PairValues>,
    pub first_moments: Vec<PairValues>,
    pub second_moments: Vec<PairValues>,
    /// The weights of the best evaluation, where they are kept.
    pub best: Option<Vec<PairValues>>,
}

const PARTS: [&str; 3] = ["weights", "first_moments", "second_moments"];
const BEST: &str = "best";

/// Writes the checkpoint of the job in `folder`; the previous one stays until this one is whole.
///
/// # Errors
/// When it cannot be written.
pub fn save(folder: &Path, state: &JobState, tensors: &JobTensors) -> Result<(), FormatError> {
    let parts = PARTS.into_iter().zip([&tensors.weights, &tensors.first_moments, &tensors.second_moments]);
    let parts = parts.chain(tensors.best.as_ref().map(|best| (BEST, best)));
    let mut named = Vec::new();
    for (part, pairs) in parts {
        for (index, pair) in pairs.iter().enumerate() {
            for (name, values) in [("a", &pair.a), ("b", &pair.b), ("magnitude", &pair.magnitude)] {
                named.push((tensor_name(part, index, name), Tensor::from_f32(vec![values.len()], values)));
            }
        }
    }
    let state = serde_json::to_string(state).expect("a state is plain data");
    let hash = content_hash(&state, tensors);
    let metadata = BTreeMap::from([(STATE_KEY.to_owned(), state), (HASH_KEY.to_owned(), hash)]);
    write_safetensors(&folder.join(CHECKPOINT_FILE), &named, &metadata)
}

/// The checkpoint in `folder`; `None` where there is none.
///
/// # Errors
/// When it cannot be read, is no checkpoint or is not as it was written.
pub fn load(folder: &Path) -> Result<Option<(JobState, JobTensors)>, TrainError> {
    let path = folder.join(CHECKPOINT_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let damaged = |problem: String| TrainError::Damaged { path: path.clone(), problem, remove: path.clone() };
    let file = match SafetensorsFile::read(&path) {
        Err(FormatError::Safetensors { problem, .. } | FormatError::Tensor { problem, .. }) => {
            return Err(damaged(problem));
        }
        file => file?,
    };
    let metadata = |key: &str| {
        let text = file.metadata().get(key);
        text.ok_or_else(|| damaged(format!("its metadata has no `{key}`")))
    };
    let (text, hash) = (metadata(STATE_KEY)?, metadata(HASH_KEY)?);
    let part = |part: &str| -> Result<Vec<PairValues>, FormatError> {
        let mut pairs = Vec::new();
        while file.contains(&tensor_name(part, pairs.len(), "a")) {
            let values = |name| -> Result<Vec<f32>, FormatError> {
                Ok(file.tensor(&tensor_name(part, pairs.len(), name))?.to_f32())
            };
            pairs.push(PairValues { a: values("a")?, b: values("b")?, magnitude: values("magnitude")? });
        }
        Ok(pairs)
    };
    let tensors = || -> Result<JobTensors, FormatError> {
        let best = part(BEST)?;
        Ok(JobTensors {
            weights: part(PARTS[0])?,
            first_moments: part(PARTS[1])?,
            second_moments: part(PARTS[2])?,
            best: (!best.is_empty()).then_some(best),
        })
    };
    let tensors = tensors().map_err(|error| damaged(error.to_string()))?;
    if content_hash(text, &tensors) != *hash {
        return Err(damaged("its content does not have the hash that was written with it".to_owned()));
    }
    let state = serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
    Ok(Some((state, tensors)))
}

/// SHA-256, in hex, of a state and its tensors.
fn content_hash(state: &str, tensors: &JobTensors) -> String {
    let mut hasher = Sha256Hasher::new();
    hasher.field(state.as_bytes());
    let parts = [&tensors.weights, &tensors.first_moments, &tensors.second_moments];
    for pair in parts.into_iter().chain(&tensors.best).flatten() {
        for values in [&pair.a, &pair.b, &pair.magnitude] {
            hasher.field(bytemuck::cast_slice(values));
        }
    }
    hasher.finish()
}

fn tensor_name(part: &str, pair: usize, name: &str) -> String {
    format!("{part}.{pair}.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> JobState {
        JobState {
            step: 3,
            validation: vec![vec![0.1 + 0.2, f64::INFINITY], Vec::new()],
            best: Some((2, 0.1 + 0.2)),
            ..JobState::new(Value::Null, SamplerState::default(), 2)
        }
    }

    fn tensors(best: Option<Vec<PairValues>>) -> JobTensors {
        let pair =
            |x: f32| PairValues { a: vec![x, 0.1], b: vec![-0.0, x, f32::MIN_POSITIVE], magnitude: vec![] };
        JobTensors {
            weights: vec![pair(1.0), pair(2.0)],
            first_moments: vec![pair(3.0), pair(4.0)],
            second_moments: vec![pair(5.0), pair(6.0)],
            best,
        }
    }

    #[test]
    fn a_checkpoint_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(load(folder.path()).unwrap(), None);
        for best in [None, Some(tensors(None).weights)] {
            let mut state = state();
            state.affinity.add(&[vec![Some(1.0), Some(1.0 / 3.0)], vec![Some(1.0 / 3.0), Some(1.0)]]);
            state.affinity.add(&[vec![None; 2], vec![None; 2]]);
            save(folder.path(), &state, &tensors(best.clone())).unwrap();
            let read = load(folder.path()).unwrap().unwrap();
            assert_eq!(read, (state, tensors(best)));
            assert_eq!(read.0.affinity.means(), [(0, 1, 1.0 / 3.0)]);
        }
    }

    #[test]
    fn no_byte_of_a_checkpoint_changes_unnoticed() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &state(), &tensors(Some(tensors(None).weights))).unwrap();
        let path = folder.path().join(CHECKPOINT_FILE);
        let whole = std::fs::read(&path).unwrap();
        for place in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[place] ^= 1 << (place % 8);
            std::fs::write(&path, &flipped).unwrap();
            let damaged = matches!(load(folder.path()), Err(TrainError::Damaged { .. }));
            // White space of the header says nothing, whatever it is.
            assert!(damaged || load(folder.path()).unwrap().unwrap().0 == state(), "byte {place}");
            assert!(damaged || whole[place].is_ascii_whitespace(), "byte {place}");
            std::fs::write(&path, &whole[..place]).unwrap();
            assert!(matches!(load(folder.path()), Err(TrainError::Damaged { .. })), "{place} bytes");
        }
    }
}
