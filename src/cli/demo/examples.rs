//! The bundled examples: where they are, and the tasks among them.
//!
//! `base` is a model folder, `train.toml` trains an adapter for every task, `adapters/<task>` is one that is trained, `tasks/<task>/test.jsonl` one conversation per line
//! (`{"messages": [{"role", "content"}, …]}`) whose last turn is the expected answer.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cli::Failure;

pub(super) const BASE: &str = "base";
const ADAPTERS: &str = "adapters";
const TASKS: &str = "tasks";
/// Configuration that trains an adapter for every task.
pub(super) const TRAINING: &str = "train.toml";
const TEST_FILE: &str = "test.jsonl";

/// A task with test questions and an adapter.
pub(super) struct Task {
    pub name: String,
    /// Folder of its adapter.
    pub adapter: PathBuf,
    /// At least one.
    pub samples: Vec<Sample>,
}

/// One question with its answer.
pub(super) struct Sample {
    /// `file:line`, for messages.
    place: String,
    /// The conversation up to the answer.
    pub question: Value,
    /// Its last message.
    pub asked: String,
    /// Without white space at its ends.
    pub expected: String,
}

impl Sample {
    /// A failure at this sample.
    pub fn failure(&self, reason: &dyn Display) -> Failure {
        Failure::Failed(format!("{}: {reason}", self.place))
    }
}

/// The folder of the examples: the one given, else the first `examples` with a base, adapters and tasks in the current
/// folder, above it, or above this program.
pub(super) fn find(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let parts = [BASE, ADAPTERS, TASKS];
    if let Some(folder) = given {
        return match parts.iter().find(|part| !folder.join(part).is_dir()) {
            None => Ok(folder.to_owned()),
            Some(part) => Err(Failure::Usage(format!(
                "{}: no folder `{part}` in it; wanted `{BASE}`, `{ADAPTERS}` and `{TASKS}`",
                folder.display()
            ))),
        };
    }
    // The current folder as `.`, so that messages stay short.
    let current = std::env::current_dir().unwrap_or_default();
    let above = current.ancestors().skip(1).map(Path::to_owned);
    let program = std::env::current_exe().unwrap_or_default();
    let around = std::iter::once(PathBuf::new()).chain(above).chain(program.ancestors().map(Path::to_owned));
    around
        .map(|folder| folder.join("examples"))
        .find(|folder| parts.iter().all(|part| folder.join(part).is_dir()))
        .ok_or_else(|| {
            Failure::Usage(format!(
                "the bundled examples are neither in {} nor above it or this program; they are the folder `examples` \
                 of the source: name it with --examples DIR",
                current.display()
            ))
        })
}

/// The tasks in order of name, each with its first `limit` test questions (0: all).
pub(super) fn read_tasks(folder: &Path, limit: usize) -> Result<Vec<Task>, Failure> {
    let tasks = folder.join(TASKS);
    let unreadable = |error| Failure::Usage(format!("{}: cannot list it: {error}", tasks.display()));
    let mut names = Vec::new();
    for entry in fs::read_dir(&tasks).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort_unstable();
    if names.is_empty() {
        return Err(Failure::Usage(format!("{}: no task in it", tasks.display())));
    }
    let limit = if limit == 0 { usize::MAX } else { limit };
    let read = names.into_iter().map(|name| {
        let samples = read_samples(&tasks.join(&name).join(TEST_FILE), limit)?;
        Ok(Task { adapter: folder.join(ADAPTERS).join(&name), name, samples })
    });
    read.collect()
}

fn read_samples(path: &Path, limit: usize) -> Result<Vec<Sample>, Failure> {
    let refuse = |reason: &dyn Display| Failure::Usage(format!("{}: {reason}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| refuse(&error))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(limit);
    let samples = lines.map(|(index, line)| {
        let place = format!("{}:{}", path.display(), index + 1);
        read_sample(&place, line).map_err(|reason| Failure::Usage(format!("{place}: {reason}")))
    });
    let samples: Vec<Sample> = samples.collect::<Result<_, _>>()?;
    if samples.is_empty() { Err(refuse(&"no question in it")) } else { Ok(samples) }
}

/// Reads one line: all turns but the last are the question.
fn read_sample(place: &str, line: &str) -> Result<Sample, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| format!("not valid JSON: {error}"))?;
    let messages = value.get("messages").and_then(Value::as_array).ok_or("wanted a list `messages`")?;
    let content = |message: &Value| message.get("content").and_then(Value::as_str).map(str::to_owned);
    let [question @ .., answer] = messages.as_slice() else {
        return Err("`messages` is empty".to_owned());
    };
    if answer.get("role").and_then(Value::as_str) != Some("assistant") {
        return Err("the last of `messages` is not of the role `assistant`".to_owned());
    }
    let asked = question.last().ok_or("`messages` has an answer but no question")?;
    let last = messages.len() - 1;
    let no_text = |index: usize| format!("`messages[{index}].content` is not a string");
    Ok(Sample {
        place: place.to_owned(),
        asked: content(asked).ok_or_else(|| no_text(last - 1))?,
        expected: content(answer).ok_or_else(|| no_text(last))?.trim().to_owned(),
        question: Value::Array(question.to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_question_and_its_answer() {
        let line = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                       {"role": "assistant", "content": " a\n"}]}"#;
        let sample = read_sample("f:1", line).unwrap();
        assert_eq!((sample.asked.as_str(), sample.expected.as_str()), ("q", "a"));
        assert_eq!(sample.question.as_array().unwrap().len(), 2);
    }

    #[test]
    fn a_line_that_is_no_conversation_is_refused() {
        for (line, reason) in [
            ("{", "not valid JSON"),
            ("[]", "`messages`"),
            (r#"{"messages": []}"#, "is empty"),
            (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "no question"),
            (r#"{"messages": [{"role": "user", "content": "q"}]}"#, "not of the role `assistant`"),
            (
                r#"{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}"#,
                "`messages[0].content`",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]}"#,
                "`messages[1].content`",
            ),
        ] {
            let error = read_sample("f:1", line).err().unwrap();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }
}
