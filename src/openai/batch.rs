//! Batch files: one request per line in, one answer per line out.
//!
//! A line is `{"custom_id", "method": "POST", "url", "body"}` and nothing else. A line that is not is an
//! [`InvalidLine`], which gets an answer of its own while the run goes on. Before a run, [`scan`] refuses a file in
//! which two lines have the same `custom_id`, because their answers could not be told apart. Lines are counted in two
//! ways: their number in the file, from 1 and blank lines included, is for messages; their index, from 0 and blank
//! lines left out, is their place in the output ([`output`]).

pub mod output;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::Endpoint;
use super::error::ApiError;
use super::fields::{describe, shorten};
use crate::format::parse_text;

/// Longest line that is read, in bytes.
pub const MAX_LINE_BYTES: usize = 64 << 20;

/// Why a batch cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: lines {first} and {second} both have the custom_id {custom_id:?}", path.display())]
    DuplicateId { path: PathBuf, first: usize, second: usize, custom_id: String },
    #[error("{}: the output is the same file as the input", path.display())]
    OutputIsInput { path: PathBuf },
    #[error("{}: the output exists; overwrite it with --force or continue it with --resume", path.display())]
    OutputExists { path: PathBuf },
    #[error("{}: another run is writing this output", path.display())]
    OutputBusy { path: PathBuf },
    #[error("{}: cannot resume: line {line} {reason}", path.display())]
    CannotResume { path: PathBuf, line: usize, reason: String },
    #[error("the answer of line index {index} was given twice")]
    AnsweredTwice { index: usize },
    #[error("the output ends before line index {index}, which has no answer")]
    Unanswered { index: usize },
}

impl BatchError {
    fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// A line in order.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchLine {
    pub custom_id: String,
    pub endpoint: Endpoint,
    /// A JSON object; its fields are checked when the request is parsed.
    pub body: Value,
}

/// A line that is not a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {number}: {reason}")]
pub struct InvalidLine {
    /// The line's number in the file.
    pub number: usize,
    /// When it could be read.
    pub custom_id: Option<String>,
    pub reason: String,
}

/// Reads one line of a batch file, which is the file's line `number`.
///
/// # Errors
/// What is wrong with the line, naming key and value.
pub fn parse_line(number: usize, line: &str) -> Result<BatchLine, InvalidLine> {
    let invalid = |custom_id: Option<&str>, reason: String| InvalidLine {
        number,
        custom_id: custom_id.map(str::to_owned),
        reason,
    };
    let value = parse_text(line).map_err(|error| {
        // The parser counts lines within this one, so only its column says something.
        let reason = error.to_string().replace(" at line 1 column", ", at column");
        invalid(None, format!("not valid JSON: {reason}"))
    })?;
    let Value::Object(mut object) = value else {
        return Err(invalid(None, format!("must be a JSON object, got {}", describe(&value))));
    };
    let custom_id = match object.remove("custom_id") {
        Some(Value::String(id)) if !id.is_empty() => id,
        Some(other) => {
            let found = describe(&other);
            return Err(invalid(
                None,
                format!("`custom_id` must be a string that is not empty, got {found}"),
            ));
        }
        None => return Err(invalid(None, "`custom_id` is missing".to_owned())),
    };
    read_request(object)
        .map(|(endpoint, body)| BatchLine { custom_id: custom_id.clone(), endpoint, body })
        .map_err(|reason| invalid(Some(&custom_id), reason))
}

/// What a line holds beside its `custom_id`.
fn read_request(mut object: Map<String, Value>) -> Result<(Endpoint, Value), String> {
    let mut take = |key: &str| object.remove(key).ok_or_else(|| format!("`{key}` is missing"));
    let method = take("method")?;
    if method != "POST" {
        return Err(format!("`method` must be \"POST\", got {}", describe(&method)));
    }
    let url = take("url")?;
    let endpoint = url.as_str().and_then(Endpoint::from_path).ok_or_else(|| {
        let [first, second] = Endpoint::ALL;
        format!("`url` must be \"{first}\" or \"{second}\", got {}", describe(&url))
    })?;
    let body = take("body")?;
    if !body.is_object() {
        return Err(format!("`body` must be a JSON object, got {}", describe(&body)));
    }
    if let Some(unknown) = object.keys().next() {
        return Err(format!("unknown key `{}`", shorten(unknown)));
    }
    Ok((endpoint, body))
}

/// The lines of a batch file, blank ones left out. A byte order mark and CRLF line ends are accepted.
pub struct Lines<R> {
    reader: R,
    path: PathBuf,
    number: usize,
    max_bytes: usize,
    buffer: Vec<u8>,
}

impl Lines<BufReader<File>> {
    pub fn open(path: &Path) -> Result<Self, BatchError> {
        let file = File::open(path).map_err(BatchError::io(path))?;
        Ok(Self::new(BufReader::new(file), path))
    }
}

impl<R: BufRead> Lines<R> {
    /// Lines of `reader`; `path` is for messages.
    pub fn new(reader: R, path: &Path) -> Self {
        Self { reader, path: path.to_owned(), number: 0, max_bytes: MAX_LINE_BYTES, buffer: Vec::new() }
    }

    /// Reads the next line of the file, with its line end unless it is too long. `None` at the end of the file.
    fn read(&mut self) -> io::Result<Option<Result<&str, String>>> {
        self.buffer.clear();
        let limit = self.max_bytes as u64 + 1;
        if self.reader.by_ref().take(limit).read_until(b'\n', &mut self.buffer)? == 0 {
            return Ok(None);
        }
        if self.buffer.len() > self.max_bytes && self.buffer.last() != Some(&b'\n') {
            self.reader.skip_until(b'\n')?;
            return Ok(Some(Err(format!("longer than {} bytes", self.max_bytes))));
        }
        Ok(Some(match std::str::from_utf8(&self.buffer) {
            Ok(text) => Ok(text),
            Err(error) => Err(format!("not valid UTF-8 at byte {}", error.valid_up_to() + 1)),
        }))
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Result<BatchLine, InvalidLine>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let number = self.number + 1;
            self.number = number;
            let line = match self.read() {
                Ok(line) => line?,
                Err(source) => return Some(Err(BatchError::Io { path: self.path.clone(), source })),
            };
            let text = match line {
                Ok(text) => text,
                Err(reason) => return Some(Ok(Err(InvalidLine { number, custom_id: None, reason }))),
            };
            let text = if number == 1 { text.strip_prefix('\u{FEFF}').unwrap_or(text) } else { text };
            if !text.trim().is_empty() {
                return Some(Ok(parse_line(number, text.trim())));
            }
        }
    }
}

/// What a batch file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Lines that get an answer.
    pub lines: usize,
    /// How many of them are no requests.
    pub invalid: usize,
}

/// Reads a batch file before it is run.
///
/// # Errors
/// When it cannot be read, or two lines have the same `custom_id`.
pub fn scan(path: &Path) -> Result<Scan, BatchError> {
    let mut scan = Scan::default();
    let mut seen = HashMap::new();
    let mut lines = Lines::open(path)?;
    while let Some(line) = lines.next() {
        scan.lines += 1;
        let custom_id = match line? {
            Ok(line) => Some(line.custom_id),
            Err(line) => {
                scan.invalid += 1;
                line.custom_id
            }
        };
        let Some(custom_id) = custom_id else {
            continue;
        };
        let second = lines.number;
        if let Some(&first) = seen.get(&custom_id) {
            return Err(BatchError::DuplicateId { path: path.to_owned(), first, second, custom_id });
        }
        seen.insert(custom_id, second);
    }
    Ok(scan)
}

/// Ids of the answers of one run.
#[derive(Clone, Debug)]
pub struct Ids {
    salt: String,
}

impl Ids {
    /// Runs with different salts (a time, a process id) have different ids.
    pub fn new(salt: impl Into<String>) -> Self {
        Self { salt: salt.into() }
    }

    /// Unique part of the ids of the answer to the line at `index`: 32 hexadecimal digits.
    pub fn unique(&self, index: usize) -> String {
        let digest = Sha256::digest(format!("{index}:{}", self.salt));
        let mut text = String::with_capacity(32);
        for byte in &digest[..16] {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

/// The output line, without its line end, of a request that was answered with `body`; `unique` is from [`Ids`].
pub fn answer_line(unique: &str, custom_id: &str, body: &Value) -> String {
    response_line(unique, custom_id, 200, body)
}

/// The output line, without its line end, of a request that failed.
pub fn failure_line(unique: &str, custom_id: &str, error: &ApiError) -> String {
    response_line(unique, custom_id, error.status, &error.body())
}

fn response_line(unique: &str, custom_id: &str, status: u16, body: &Value) -> String {
    let response = json!({"status_code": status, "request_id": format!("req_{unique}"), "body": body});
    json!({
        "id": format!("batch_req_{unique}"),
        "custom_id": custom_id,
        "response": response,
        "error": null,
    })
    .to_string()
}

/// The output line, without its line end, of a line that is no request.
pub fn invalid_line(unique: &str, line: &InvalidLine) -> String {
    json!({
        "id": format!("batch_req_{unique}"),
        "custom_id": line.custom_id,
        "response": null,
        "error": {"code": "invalid_line", "message": line.to_string()},
    })
    .to_string()
}
