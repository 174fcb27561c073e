//! Training data: JSON Lines in, token sequences with their trainable rows out.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// A row whose next token counts in the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row of the sample whose logits predict the token: the one before it.
    pub row: u32,
    pub token: u32,
}

/// One sequence to learn from, or to be evaluated on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    pub tokens: Vec<u32>,
    /// Ascending by row.
    pub targets: Vec<Target>,
    /// Line in its file, from 1.
    pub line: usize,
    /// What to ask and what to expect, where the sample has an answer.
    pub question: Option<Question>,
    /// The sample's own `task` tag.
    pub task: Option<String>,
    /// The sample's `group`, for metrics by group.
    pub group: Option<String>,
}

/// A prompt that an adapter is asked, with the answer that is right.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Question {
    /// Ready for generation: a chat ends with the generation prompt.
    pub tokens: Vec<u32>,
    /// Without white space at its ends.
    pub answer: String,
}

/// What became of the lines of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    pub read: usize,
    /// In the data set.
    pub kept: usize,
    pub dropped_too_long: usize,
    pub dropped_without_target: usize,
    pub truncated: usize,
    /// Kept samples that equal an earlier one.
    pub duplicates: usize,
    /// Tokens and targets of kept samples.
    pub tokens: usize,
    pub targets: usize,
}

/// The samples of one file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    pub path: PathBuf,
    /// SHA-256 of the file, in hex.
    pub hash: String,
    pub samples: Vec<Sample>,
    pub counts: Counts,
    /// How often each answer occurs, where the answers are few enough to be classes.
    pub classes: BTreeMap<String, usize>,
}
mod provisional;
pub use provisional::*;
