//! Training data: JSON Lines in, token sequences with their trainable rows out.
//!
//! A file holds one sample a line, all in one format, which is recognised from the keys of the first line or named
//! ([`Format`]):
//!
//! | format | keys | learned |
//! |---|---|---|
//! | messages | `messages: [{role, content, …}]`, `tools`? | every assistant turn with its end marker |
//! | prompt/completion | `prompt`, `completion` | the completion and the end token |
//! | alpaca | `instruction`, `input`?, `output` | as messages: the output |
//! | sharegpt | `conversations: [{from, value}]` | as messages: every turn of `gpt` |
//! | text | `text` | all of it and the end token |
//! | tokens | `input_ids`, `labels` | labels that are not −100 |
//! | labelled | `text`, `label` | the label, a word behind the text, and the end token |
//!
//! A sample may name its `task` and its `group` and may have an `id`, which nothing reads. A byte order mark, CRLF and
//! blank lines are accepted. Anything else fails the file, naming its line: a model must not learn from a guess.
//! `formats` reads lines, `encode` and `chat` make them tokens, `read` decides what is kept.

mod chat;
mod encode;
mod formats;
mod read;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::PathBuf;

use super::config::{Format, OnOverlong};
use crate::format::FormatError;

pub use read::read_dataset;

/// A row whose next token counts in the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// As [`final_answer`] gives it.
    pub answer: String,
}

/// What became of the lines of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Lines that hold a sample.
    pub read: usize,
    /// In the data set. May be more than were read: a conversation can become several samples, a packed document
    /// several sequences.
    pub kept: usize,
    pub dropped_too_long: usize,
    pub dropped_without_target: usize,
    /// Kept samples that lost their end.
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
    /// How often each answer occurs, where the answers are few enough to be classes: every sample has one, at most 20
    /// are different, and one occurs twice.
    pub classes: BTreeMap<String, usize>,
}

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DataOptions {
    /// Recognised from the first line where it is not named.
    pub format: Option<Format>,
    /// Most tokens of a sample.
    pub max_length: usize,
    pub on_overlong: OnOverlong,
    /// Join documents of the format text and cut them into sequences of `max_length`.
    pub packing: bool,
}

/// Why a file cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error(transparent)]
    File(#[from] FormatError),
    #[error("{}:{line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: String },
    #[error("{}: {problem}", path.display())]
    Unusable { path: PathBuf, problem: String },
}

/// What a user should know about a file that is trained on all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    pub path: PathBuf,
    /// The first line it is about.
    pub line: usize,
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.message)
    }
}

/// Samples that two files share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leakage {
    pub samples: usize,
    /// The first few, as lines of the second file.
    pub lines: Vec<usize>,
}

/// What an answer says once its reasoning is over: what follows the last `</think>`, all of it where there is none, in
/// both cases without white space at its ends. The opening `<think>` may stand in the prompt.
pub fn final_answer(text: &str) -> &str {
    text.rsplit_once("</think>").map_or(text, |(_, answer)| answer).trim()
}

/// Most lines that a message or a [`Leakage`] lists.
const LISTED: usize = 5;

/// Samples of `valid` that `train` has too: the same tokens with the same targets. Packed sequences are compared as
/// they were cut, so a document that both files hold can go unnoticed there.
pub fn leakage(train: &Dataset, valid: &Dataset) -> Leakage {
    let known: HashSet<_> = train.samples.iter().map(Sample::content).collect();
    let shared = valid.samples.iter().filter(|sample| known.contains(&sample.content()));
    let lines: Vec<usize> = shared.map(|sample| sample.line).collect();
    Leakage { samples: lines.len(), lines: lines.into_iter().take(LISTED).collect() }
}

impl Sample {
    /// What makes two samples the same.
    fn content(&self) -> (&[u32], &[Target]) {
        (&self.tokens, &self.targets)
    }
}
