//! A file's samples: which are kept, and what is worth knowing about them.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::Read;
use std::path::Path;

use rayon::prelude::*;

use super::encode::{Encoded, Encoder, learned};
use super::formats::{read_object, read_record, recognise};
use super::{Counts, DataError, DataOptions, Dataset, LISTED, Sample, Warning};
use crate::format::{FormatError, Sha256Hasher, open_regular};
use crate::model::Base;
use crate::train::config::{Format, OnOverlong};

/// Most different answers that count as classes.
const MOST_CLASSES: usize = 20;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads a file of samples for training or evaluating adapters of `base`.
///
/// # Errors
/// Naming the first line that is not a sample of the file's format, or why none of the samples can be used.
pub fn read_dataset(
    path: &Path,
    base: &Base,
    options: &DataOptions,
) -> Result<(Dataset, Vec<Warning>), DataError> {
    let mut bytes = Vec::new();
    open_regular(path)?.read_to_end(&mut bytes).map_err(FormatError::io(path, "read"))?;
    let encoder = Encoder::of(base)
        .map_err(|error| DataError::Unusable { path: path.to_owned(), problem: error.to_string() })?;
    read_bytes(path, &bytes, &encoder, options)
}

/// Reads the samples in `bytes`; `path` is for messages.
pub(super) fn read_bytes(
    path: &Path,
    bytes: &[u8],
    encoder: &Encoder,
    options: &DataOptions,
) -> Result<(Dataset, Vec<Warning>), DataError> {
    let in_line = |line| move |problem| DataError::Line { path: path.to_owned(), line, problem };
    let lines = lines(bytes);
    let Some(&(first, text)) = lines.first() else {
        return Err(DataError::Unusable { path: path.to_owned(), problem: "found no samples".to_owned() });
    };
    let format = match options.format {
        Some(format) => format,
        None => read_object(text).and_then(|object| recognise(&object)).map_err(in_line(first))?,
    };
    let encode = |&(line, text): &(usize, &[u8])| {
        let record = read_record(read_object(text)?, format, encoder.vocab_size)?;
        encoder.encode(line, record)
    };
    let encoded: Vec<Result<Encoded, String>> = lines.par_iter().map(encode).collect();

    let mut kept = Kept { path, options, samples: Vec::new(), findings: BTreeMap::new() };
    let pack = options.packing && format == Format::Text;
    let mut documents = Vec::new();
    for (&(line, _), encoded) in lines.iter().zip(encoded) {
        let encoded = encoded.map_err(in_line(line))?;
        let findings = [(encoded.split, Finding::Split), (encoded.endless, Finding::Endless)];
        findings.into_iter().filter(|(is, _)| *is).for_each(|(_, finding)| kept.find(finding, line));
        if pack {
            documents.extend(encoded.samples);
        } else {
            encoded.samples.into_iter().try_for_each(|sample| kept.add(sample))?;
        }
    }
    packed(documents, options.max_length.max(1)).into_iter().try_for_each(|sample| kept.add(sample))?;

    let mut hasher = Sha256Hasher::new();
    hasher.update(bytes);
    let (dataset, mut warnings) = kept.finish(lines.len(), hasher.finish())?;
    let mut warn = |message: &str| {
        warnings.push(Warning { path: path.to_owned(), line: first, message: message.to_owned() });
    };
    if options.packing && !pack {
        warn("packing joins samples of the format text alone: these stay apart");
    }
    let is_chat = matches!(format, Format::Messages | Format::Alpaca | Format::ShareGpt);
    if is_chat && encoder.chat_template.is_none() {
        warn("the base has no chat template: turns are written below `### User:` and `### Assistant:`");
    }
    Ok((dataset, warnings))
}

/// The lines that are not blank, with their numbers.
fn lines(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let numbered = (1..).zip(bytes.split(|byte| *byte == b'\n'));
    numbered.filter(|(_, line)| !line.trim_ascii().is_empty()).collect()
}

/// Documents joined and cut into sequences of `length` tokens, in the order of their first tokens' lines. Documents of
/// different tasks or groups are never joined.
fn packed(documents: Vec<Sample>, length: usize) -> Vec<Sample> {
    let mut tagged: BTreeMap<_, Vec<Sample>> = BTreeMap::new();
    for document in documents {
        tagged.entry((document.task.clone(), document.group.clone())).or_default().push(document);
    }
    let mut packed = Vec::new();
    for ((task, group), documents) in tagged {
        let mut open = Sample::default();
        let mut close = |open: &mut Sample| {
            let mut sample = std::mem::take(open);
            sample.targets = learned(&sample.tokens, 0..sample.tokens.len()).collect();
            packed.push(Sample { task: task.clone(), group: group.clone(), ..sample });
        };
        for document in documents {
            let mut rest = document.tokens.as_slice();
            while !rest.is_empty() {
                if open.tokens.is_empty() {
                    open.line = document.line;
                }
                let (now, later) = rest.split_at(rest.len().min(length - open.tokens.len()));
                open.tokens.extend(now);
                rest = later;
                if open.tokens.len() == length {
                    close(&mut open);
                }
            }
        }
        if !open.tokens.is_empty() {
            close(&mut open);
        }
    }
    packed.sort_by_key(|sample| sample.line);
    packed
}

/// What is found about samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Finding {
    TooLong,
    WithoutTarget,
    Truncated,
    Split,
    Endless,
}

/// Lines of the samples that something was found about.
#[derive(Default)]
struct Lines {
    samples: usize,
    /// The first few.
    listed: Vec<usize>,
    /// There are more.
    more: bool,
}

impl Lines {
    fn add(&mut self, line: usize) {
        self.samples += 1;
        if self.listed.last() == Some(&line) {
            return;
        }
        if self.listed.len() < LISTED {
            self.listed.push(line);
        } else {
            self.more = true;
        }
    }
}

impl fmt::Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed: Vec<String> = self.listed.iter().map(usize::to_string).collect();
        let lines = if listed.len() == 1 { "line" } else { "lines" };
        write!(f, "{lines} {}{}", listed.join(", "), if self.more { ", …" } else { "" })
    }
}

/// The samples of a file that are kept so far.
struct Kept<'a> {
    path: &'a Path,
    options: &'a DataOptions,
    samples: Vec<Sample>,
    findings: BTreeMap<Finding, Lines>,
}

impl Kept<'_> {
    fn find(&mut self, finding: Finding, line: usize) {
        self.findings.entry(finding).or_default().add(line);
    }

    fn add(&mut self, mut sample: Sample) -> Result<(), DataError> {
        let (found, most) = (sample.tokens.len(), self.options.max_length);
        let too_long = found > most;
        match self.options.on_overlong {
            OnOverlong::Drop if too_long => {
                self.find(Finding::TooLong, sample.line);
                return Ok(());
            }
            OnOverlong::Error if too_long => {
                return Err(DataError::Line {
                    path: self.path.to_owned(),
                    line: sample.line,
                    problem: format!("found {found} tokens, wanted at most max_length = {most}"),
                });
            }
            OnOverlong::Truncate if too_long => {
                sample.tokens.truncate(most);
                sample.targets.retain(|target| (target.row as usize) + 1 < most);
            }
            _ => {}
        }
        if sample.targets.is_empty() {
            self.find(Finding::WithoutTarget, sample.line);
            return Ok(());
        }
        if too_long {
            self.find(Finding::Truncated, sample.line);
        }
        self.samples.push(sample);
        Ok(())
    }

    fn finish(self, read: usize, hash: String) -> Result<(Dataset, Vec<Warning>), DataError> {
        let Self { path, options, samples, findings } = self;
        let messages: Vec<(usize, String)> = findings
            .iter()
            .map(|(finding, lines)| (lines.listed[0], describe(*finding, lines, options.max_length)))
            .collect();
        if samples.is_empty() {
            let why: Vec<&str> = messages.iter().map(|(_, message)| message.as_str()).collect();
            let problem = format!("found no sample that can be used: {}", why.join("; "));
            return Err(DataError::Unusable { path: path.to_owned(), problem });
        }
        let classes = classes(&samples);
        let mut warnings: Vec<Warning> = messages
            .into_iter()
            .map(|(line, message)| Warning { path: path.to_owned(), line, message })
            .collect();
        if let (1, Some((answer, count))) = (classes.len(), classes.first_key_value()) {
            let message =
                format!("all {count} samples have the answer {answer:?}: there is nothing to tell apart");
            warnings.push(Warning { path: path.to_owned(), line: samples[0].line, message });
        }
        let found = |finding| findings.get(&finding).map_or(0, |lines| lines.samples);
        let different: HashSet<_> = samples.iter().map(Sample::content).collect();
        let counts = Counts {
            read,
            kept: samples.len(),
            dropped_too_long: found(Finding::TooLong),
            dropped_without_target: found(Finding::WithoutTarget),
            truncated: found(Finding::Truncated),
            duplicates: samples.len() - different.len(),
            tokens: samples.iter().map(|sample| sample.tokens.len()).sum(),
            targets: samples.iter().map(|sample| sample.targets.len()).sum(),
        };
        Ok((Dataset { path: path.to_owned(), hash, samples, counts, classes }, warnings))
    }
}

/// A finding in words.
fn describe(finding: Finding, lines: &Lines, max_length: usize) -> String {
    let samples = match lines.samples {
        1 => "1 sample".to_owned(),
        more => format!("{more} samples"),
    };
    match finding {
        Finding::TooLong => {
            format!("{samples} of more than max_length = {max_length} tokens dropped ({lines})")
        }
        Finding::WithoutTarget => format!("{samples} with no token to learn dropped ({lines})"),
        Finding::Truncated => {
            format!("{samples} of more than max_length = {max_length} tokens lost what is over ({lines})")
        }
        Finding::Split => format!(
            "the chat template shows earlier answers differently: {samples} became one for each answer ({lines})"
        ),
        Finding::Endless => format!(
            "{samples} with an answer that ends with no token at which generation stops ({lines}): \
             check the chat template and eos_token_id"
        ),
    }
}

/// How often each answer occurs, where they are classes.
fn classes(samples: &[Sample]) -> BTreeMap<String, usize> {
    let mut classes = BTreeMap::new();
    for sample in samples {
        let Some(question) = &sample.question else { return BTreeMap::new() };
        *classes.entry(question.answer.as_str()).or_insert(0) += 1;
        if classes.len() > MOST_CLASSES {
            return BTreeMap::new();
        }
    }
    if classes.len() == samples.len() {
        return BTreeMap::new();
    }
    classes.into_iter().map(|(answer, count)| (answer.to_owned(), count)).collect()
}
