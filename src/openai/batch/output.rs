//! The output of a batch: opened so that nothing is lost by mistake, written in input order, continued after a crash.
//!
//! Answers come in any order. [`OrderedWriter`] holds those that are early and writes each line as soon as all lines
//! before it are there. So the output is at all times a prefix of the final file plus at most one torn line, and
//! resuming is counting the whole lines: see [`open`].

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{BatchError, Lines};

/// What to do about an output that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    /// `--force`
    Overwrite,
    /// `--resume`: keep its answers and append the rest.
    Continue,
}

/// How far an earlier run came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Leading lines of the input that have an answer.
    pub done: usize,
    /// How many of these answers are failures.
    pub failed: usize,
}

/// Opens the output of a run over `input`, and says how many lines are done (none, unless an earlier run is
/// continued).
///
/// The file is locked for as long as the writer lives. When a run is continued, a torn last line is cut off, and every
/// whole line must be the answer to the input's line at the same place.
///
/// # Errors
/// When the output is the input (also through links), exists with [`Existing::Refuse`], is being written by another
/// run, holds something else than answers to the input's first lines, or cannot be opened. It is unchanged then.
pub fn open(
    input: &Path,
    output: &Path,
    existing: Existing,
) -> Result<(OrderedWriter<File>, Progress), BatchError> {
    if is_same_file(input, output).map_err(BatchError::io(input))? {
        return Err(BatchError::OutputIsInput { path: output.to_owned() });
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match existing {
        Existing::Refuse => options.create_new(true),
        Existing::Overwrite | Existing::Continue => options.create(true).truncate(false),
    };
    let mut file = options.open(output).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => BatchError::OutputExists { path: output.to_owned() },
        _ => BatchError::Io { path: output.to_owned(), source },
    })?;
    // A file system without locks does not keep the run from starting.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(BatchError::OutputBusy { path: output.to_owned() });
    }
    let (progress, length) = match existing {
        Existing::Continue => measure(input, output, &file)?,
        Existing::Refuse | Existing::Overwrite => (Progress::default(), 0),
    };
    if file.metadata().map_err(BatchError::io(output))?.is_file() {
        file.set_len(length).map_err(BatchError::io(output))?;
        file.seek(SeekFrom::Start(length)).map_err(BatchError::io(output))?;
    }
    Ok((OrderedWriter::new(file, output, progress.done), progress))
}

/// Refuses what [`open`] would refuse without looking into the output, for callers that have much to do in between.
///
/// # Errors
/// When the output is the input, or exists with [`Existing::Refuse`].
pub fn check(input: &Path, output: &Path, existing: Existing) -> Result<(), BatchError> {
    if is_same_file(input, output).map_err(BatchError::io(input))? {
        return Err(BatchError::OutputIsInput { path: output.to_owned() });
    }
    if existing == Existing::Refuse && fs::symlink_metadata(output).is_ok() {
        return Err(BatchError::OutputExists { path: output.to_owned() });
    }
    Ok(())
}

/// Whether both paths lead to one file.
fn is_same_file(input: &Path, output: &Path) -> io::Result<bool> {
    let input_data = fs::metadata(input)?;
    let output_data = match fs::metadata(output) {
        Ok(data) => data,
        // Whatever is wrong with the output shows when it is opened.
        Err(_) => return Ok(false),
    };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        Ok((input_data.dev(), input_data.ino()) == (output_data.dev(), output_data.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = (input_data, output_data);
        Ok(fs::canonicalize(input)? == fs::canonicalize(output)?)
    }
}

/// The whole lines of an earlier run's output, checked against the input, and the number of bytes they take.
fn measure(input: &Path, output: &Path, file: &File) -> Result<(Progress, u64), BatchError> {
    let mut reader = BufReader::new(file);
    let mut inputs = Lines::open(input)?;
    let (mut progress, mut length) = (Progress::default(), 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line).map_err(BatchError::io(output))?;
        if bytes == 0 {
            return Ok((progress, length));
        }
        let refuse = |reason: String| BatchError::CannotResume {
            path: output.to_owned(),
            line: progress.done + 1,
            reason,
        };
        let answer = whole_answer(&line);
        let is_last = reader.fill_buf().map_err(BatchError::io(output))?.is_empty();
        let Some(answer) = answer else {
            if is_last && is_torn_answer(&line) {
                return Ok((progress, length));
            }
            return Err(refuse("is not an answer of a batch run".to_owned()));
        };
        let wanted = match inputs.next().transpose()? {
            Some(Ok(line)) => Some(line.custom_id),
            Some(Err(line)) => line.custom_id,
            None => return Err(refuse("has no line in the input".to_owned())),
        };
        let found = answer.get("custom_id").unwrap_or(&Value::Null);
        let wanted = Value::from(wanted);
        if answer.get("error").is_none() || *found != wanted {
            return Err(refuse(format!("answers the custom_id {found}, but the input has {wanted} there")));
        }
        if answer["response"]["status_code"] != 200 {
            progress.failed += 1;
        }
        progress.done += 1;
        length += bytes as u64;
    }
}

/// How every answer of a batch run begins.
const ANSWER_START: &[u8] = br#"{"id":"batch_req_"#;

/// The answer that a line holds, if it is whole: up to its line end.
fn whole_answer(line: &[u8]) -> Option<Value> {
    let text = line.strip_suffix(b"\n").filter(|text| text.starts_with(ANSWER_START))?;
    serde_json::from_slice(text).ok()
}

/// Whether a line that is no whole answer is the beginning of one. After a power cut, bytes that were never written
/// read as NUL. Anything else is not this program's to cut off.
fn is_torn_answer(line: &[u8]) -> bool {
    let written = line.split(|&byte| byte == 0).next().unwrap_or_default();
    written.starts_with(ANSWER_START) || ANSWER_START.starts_with(written)
}

/// Writes lines in order of their index, whatever order they come in.
#[derive(Debug)]
pub struct OrderedWriter<W> {
    target: W,
    path: PathBuf,
    next: usize,
    early: BTreeMap<usize, String>,
    /// A write failed, so that the target may end in a torn line.
    broken: bool,
}

impl<W: Write> OrderedWriter<W> {
    /// A writer whose first line is that of index `first`; `path` is for messages.
    pub fn new(target: W, path: &Path, first: usize) -> Self {
        Self { target, path: path.to_owned(), next: first, early: BTreeMap::new(), broken: false }
    }

    /// Takes the line of `index`, without its line end, and writes and flushes every line whose turn it is.
    ///
    /// # Errors
    /// When the index already had its line, or writing fails; after that no more lines are written.
    pub fn put(&mut self, index: usize, line: String) -> Result<(), BatchError> {
        if index < self.next || self.early.contains_key(&index) {
            return Err(BatchError::AnsweredTwice { index });
        }
        if self.broken {
            let source = io::Error::other("an earlier line could not be written");
            return Err(BatchError::Io { path: self.path.clone(), source });
        }
        self.early.insert(index, line);
        let mut ready = Vec::new();
        let mut next = self.next;
        while let Some(line) = self.early.remove(&next) {
            ready.extend_from_slice(line.as_bytes());
            ready.push(b'\n');
            next += 1;
        }
        if ready.is_empty() {
            return Ok(());
        }
        self.target.write_all(&ready).and_then(|()| self.target.flush()).map_err(|source| {
            self.broken = true;
            BatchError::Io { path: self.path.clone(), source }
        })?;
        self.next = next;
        Ok(())
    }

    /// Index of the first line that is not written yet.
    pub fn written(&self) -> usize {
        self.next
    }

    /// Lines that wait for an earlier one.
    pub fn waiting(&self) -> usize {
        self.early.len()
    }

    /// The target, when all of `lines` lines are written.
    ///
    /// # Errors
    /// When one has no answer.
    pub fn finish(self, lines: usize) -> Result<W, BatchError> {
        if self.next < lines || !self.early.is_empty() {
            return Err(BatchError::Unanswered { index: self.next });
        }
        Ok(self.target)
    }
}
