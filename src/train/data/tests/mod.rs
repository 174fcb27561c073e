//! What a file of each format becomes, against a real base's tokenizer and chat template.

mod documentation;
mod files;
mod labels;
mod properties;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde_json::{Value, json};

use super::encode::Encoder;
use super::read::read_bytes;
use super::*;
use crate::model::{Base, Tokenizer};

/// The base of the examples: `<|user|>\n…<|end|>\n<|assistant|>\n…<|end|>\n`, no `<s>`, ends at `<|end|>`.
static BASE: LazyLock<Base> = LazyLock::new(|| Base::open(&folder("examples/base")).unwrap());

const OPTIONS: DataOptions =
    DataOptions { format: None, max_length: 512, on_overlong: OnOverlong::Error, packing: false };

/// A folder under the repository's root.
fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read_with(
    encoder: &Encoder,
    bytes: &[u8],
    options: &DataOptions,
) -> Result<(Dataset, Vec<String>), String> {
    let read = read_bytes(Path::new("data.jsonl"), bytes, encoder, options);
    read.map(|(dataset, warnings)| (dataset, warnings.iter().map(Warning::to_string).collect()))
        .map_err(|error| error.to_string())
}

/// Reads JSON values, one a line, for the examples' base.
fn read(lines: &[Value], options: &DataOptions) -> Result<(Dataset, Vec<String>), String> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    read_with(&Encoder::of(&BASE).unwrap(), text.as_bytes(), options)
}

/// The only sample of a line.
fn sample(line: Value) -> Sample {
    let (dataset, _) = read(&[line], &OPTIONS).unwrap();
    assert_eq!(dataset.samples.len(), 1);
    dataset.samples.into_iter().next().unwrap()
}

/// The text of what is learned, which must be what comes next.
fn learned_text(tokenizer: &Tokenizer, sample: &Sample) -> String {
    let learned: Vec<u32> = sample.targets.iter().map(|target| target.token).collect();
    for target in &sample.targets {
        assert_eq!(sample.tokens[target.row as usize + 1], target.token);
    }
    tokenizer.decode(&learned, false)
}

fn chat(turns: &[(&str, &str)]) -> Value {
    turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
}
