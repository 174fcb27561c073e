//! A model or adapter folder with one byte of one file changed never panics: it opens, or its error says where.

use std::fs;
use std::path::Path;

use loramux::adapter::peft::{Limits, read_adapter};
use loramux::model::Base;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// One change to a file of some length.
#[derive(Clone, Copy, Debug)]
enum Edit {
    Replace(u8),
    Insert(u8),
    Remove,
    /// Everything from here on is gone.
    Truncate,
}

impl Edit {
    fn apply(self, mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
        match self {
            Edit::Replace(byte) => bytes[at] = byte,
            Edit::Insert(byte) => bytes.insert(at, byte),
            Edit::Remove => drop(bytes.remove(at)),
            Edit::Truncate => bytes.truncate(at),
        }
        bytes
    }
}

fn edits() -> impl Strategy<Value = Edit> {
    // Bytes that mean something to JSON or templates are more likely to leave a file well-formed.
    let telling = prop::sample::select(b"{}[]\",:-.eE0123459 \\%_aft\n\0\xff".as_slice());
    let byte = prop_oneof![4 => telling, 1 => any::<u8>()];
    prop_oneof![
        6 => byte.clone().prop_map(Edit::Replace),
        2 => byte.prop_map(Edit::Insert),
        2 => Just(Edit::Remove),
        1 => Just(Edit::Truncate),
    ]
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Opens copies of a golden folder with one of `files` changed near its start (`within` bytes). `open` returns the error.
fn open_damaged(
    source: &str,
    files: &'static [&'static str],
    within: usize,
    cases: u32,
    open: impl Fn(&Path) -> Option<String>,
) {
    let folder = tempfile::tempdir().unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(source), folder.path());
    assert_eq!(open(folder.path()), None, "the folder as it is");
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let strategy = (prop::sample::select(files), any::<prop::sample::Index>(), edits());
    let result = runner.run(&strategy, |(file, at, edit)| {
        let path = folder.path().join(file);
        let whole = fs::read(&path).unwrap();
        let at = at.index(whole.len().min(within));
        fs::write(&path, edit.apply(whole.clone(), at)).unwrap();
        let error = open(folder.path());
        fs::write(&path, whole).unwrap();
        let folder = folder.path().to_string_lossy();
        let names_a_file =
            |error: &str| [&*folder, ".json", ".jinja"].iter().any(|place| error.contains(place));
        match error {
            Some(error) if !names_a_file(&error) => {
                Err(TestCaseError::fail(format!("{file}, byte {at}: the error names no file: {error}")))
            }
            _ => Ok(()),
        }
    });
    result.unwrap();
}

#[test]
fn a_damaged_model_folder_opens_or_says_where_it_is_damaged() {
    const FILES: &[&str] = &[
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model-00001-of-00004.safetensors",
    ];
    open_damaged("phi3-su/model", FILES, 3000, 400, |folder| Base::open(folder).err().map(|e| e.to_string()));
}

#[test]
fn a_damaged_adapter_folder_is_read_or_says_where_it_is_damaged() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (model, adapter) in [("phi3-su", "dora-rslora"), ("llama-yarn", "bias-all-dora")] {
        let base = Base::open(&golden.join(model).join("model")).unwrap();
        let sites = &base.checkpoint.sites().table;
        open_damaged(
            &format!("{model}/adapters/{adapter}"),
            &["adapter_config.json", "adapter_model.safetensors"],
            6000,
            200,
            |folder| {
                let adapter = read_adapter(folder, sites, &base.checkpoint, Limits { max_rank: 64 });
                adapter.err().map(|error| error.to_string())
            },
        );
    }
}
