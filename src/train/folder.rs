//! A job's folder: what is in it before a run, and what a finished job leaves there.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::TrainError;
use super::checkpoint::{CHECKPOINT_FILE, Outcome};
use super::metrics::METRICS_FILE;
use super::report::{REPORT_FILE, write_job_report};
use crate::adapter::peft::{CONFIG_FILE, WEIGHTS_FILE};
use crate::format::{FormatError, read_json, sha256_file, write_text};

/// Name of the file that says what a finished job is.
pub const MANIFEST_FILE: &str = "manifest.json";

/// What to do about results that are there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    /// Go on from checkpoints; what is finished stays.
    Resume,
    /// Start anew.
    Replace,
}

/// What a job finds.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Nothing to go on from.
    Nothing,
    /// A checkpoint, or the beginnings of one.
    Begun,
    /// The manifest of a job that has ended.
    Ended(Value),
}

/// Everything that a job writes.
const FILES: [&str; 6] =
    [MANIFEST_FILE, CHECKPOINT_FILE, METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE];

/// Looks into a job's folder and makes it ready for `existing`.
///
/// # Errors
/// When there are results and `existing` is [`Existing::Refuse`], or the folder cannot be made or read.
pub fn prepare(folder: &Path, existing: Existing) -> Result<Found, TrainError> {
    let present: Vec<&str> = FILES.into_iter().filter(|name| folder.join(name).exists()).collect();
    match existing {
        Existing::Refuse if !present.is_empty() => {
            return Err(TrainError::Exists { folder: folder.to_owned() });
        }
        Existing::Replace => {
            // The manifest goes first: without it nobody takes the rest for a finished job.
            for name in present {
                let path = folder.join(name);
                std::fs::remove_file(&path).map_err(FormatError::io(&path, "remove"))?;
            }
        }
        _ => {}
    }
    std::fs::create_dir_all(folder).map_err(FormatError::io(folder, "create the folder"))?;
    remove_temporaries(folder)?;
    if folder.join(MANIFEST_FILE).exists() {
        return Ok(Found::Ended(read_manifest(folder)?));
    }
    Ok(if folder.join(CHECKPOINT_FILE).exists() { Found::Begun } else { Found::Nothing })
}

/// The manifest in a job's or an adapter's folder, when the files there are those that it was written for.
///
/// # Errors
/// When it cannot be read, or it or a file that it names is damaged.
fn read_manifest(folder: &Path) -> Result<Value, TrainError> {
    let path = folder.join(MANIFEST_FILE);
    let damaged = |path: PathBuf, problem: String| {
        let remove = folder.join(MANIFEST_FILE);
        TrainError::Damaged { path, problem, remove }
    };
    let manifest = match read_json(&path) {
        Err(FormatError::Json { problem, .. }) => {
            return Err(damaged(path, format!("not valid JSON: {problem}")));
        }
        manifest => manifest?,
    };
    let Some(files) = manifest["files"].as_object() else {
        return Err(damaged(path, "it names no `files`".to_owned()));
    };
    for (name, hash) in files {
        let path = folder.join(name);
        match sha256_file(&path) {
            Ok(found) if hash == found.as_str() => {}
            Ok(_) => return Err(damaged(path, format!("{MANIFEST_FILE} has another hash for it"))),
            Err(error) => return Err(damaged(path, error.to_string())),
        }
    }
    Ok(manifest)
}

/// Removes what a process that was killed in the midst of writing left: its temporary files.
fn remove_temporaries(folder: &Path) -> Result<(), FormatError> {
    let list = || FormatError::io(folder, "list the folder");
    for entry in std::fs::read_dir(folder).map_err(list())? {
        let entry = entry.map_err(list())?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_ours = |file: &&str| name.starts_with(&format!(".{file}.")) && name.ends_with(".tmp");
        if FILES.iter().any(is_ours) {
            std::fs::remove_file(entry.path()).map_err(FormatError::io(&entry.path(), "remove"))?;
        }
    }
    Ok(())
}

/// Keeps every other run out of a run's folder for as long as it lives.
pub struct Lock(#[expect(dead_code, reason = "held, not read")] File);

impl Lock {
    /// # Errors
    /// When another run has it, or the folder cannot be made.
    pub fn take(out: &Path) -> Result<Self, TrainError> {
        std::fs::create_dir_all(out).map_err(FormatError::io(out, "create the folder"))?;
        let path = out.join(".lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(FormatError::io(&path, "open"))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(TrainError::Busy { folder: out.to_owned() }),
            // A file system without locks does not keep the run from starting.
            _ => Ok(Self(file)),
        }
    }
}

/// What the manifest says of one data file.
pub struct DataEntry<'a> {
    pub task: &'a str,
    /// `train`, `valid` or `test`.
    pub split: &'static str,
    pub data: &'a super::data::Dataset,
    /// Samples that are in the training data too.
    pub leakage: usize,
}

/// What a finished job was.
pub struct Manifest<'a> {
    pub job: &'a str,
    pub model: &'a Path,
    pub base_hash: &'a str,
    pub config: Value,
    pub seed: u64,
    pub data: Vec<DataEntry<'a>>,
    /// Where the adapter began: folders with their hashes, oldest first.
    pub lineage: Vec<Value>,
    pub steps: u64,
    pub bad_steps: u64,
    pub best_step: Option<u64>,
    pub outcome: Outcome,
}

/// Writes the manifest of the job in `folder`: its last act, with the hashes of what it leaves.
///
/// # Errors
/// When a file cannot be read back or the manifest not be written.
pub fn write_manifest(folder: &Path, manifest: &Manifest<'_>) -> Result<(), TrainError> {
    let mut files = Map::new();
    for name in [CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE] {
        let path = folder.join(name);
        if path.exists() {
            files.insert(name.to_owned(), json!(sha256_file(&path)?));
        }
    }
    let data: Vec<Value> = (manifest.data.iter())
        .map(|entry| {
            json!({
                "task": entry.task,
                "split": entry.split,
                "path": entry.data.path,
                "hash": entry.data.hash,
                "counts": entry.data.counts,
                "classes": entry.data.classes,
                "leakage": entry.leakage,
            })
        })
        .collect();
    let value = json!({
        "loramux": env!("CARGO_PKG_VERSION"),
        "job": manifest.job,
        "base": {"model": manifest.model, "hash": manifest.base_hash},
        "config": manifest.config,
        "seed": manifest.seed,
        "data": data,
        "lineage": manifest.lineage,
        "steps": manifest.steps,
        "bad_steps": manifest.bad_steps,
        "best_step": manifest.best_step,
        "outcome": manifest.outcome,
        "files": files,
    });
    write_text(&folder.join(MANIFEST_FILE), &format!("{value:#}\n"))?;
    Ok(())
}

/// What is left to do for a job that has its manifest: nothing goes on from its checkpoint, and the report is made.
///
/// # Errors
/// When the checkpoint cannot be removed or the report not be made.
pub fn finish(folder: &Path) -> Result<(), TrainError> {
    let checkpoint = folder.join(CHECKPOINT_FILE);
    match std::fs::remove_file(&checkpoint) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(FormatError::io(&checkpoint, "remove")(error).into());
        }
        _ => {}
    }
    if !folder.join(REPORT_FILE).exists() {
        write_job_report(folder)?;
    }
    Ok(())
}

/// The lineage that an adapter folder hands on: its own manifest's, and itself.
///
/// # Errors
/// When its manifest or tensors cannot be read, or are damaged.
pub fn lineage_of(adapter: &Path) -> Result<Vec<Value>, TrainError> {
    let mut lineage = Vec::new();
    if adapter.join(MANIFEST_FILE).exists() {
        let manifest = read_manifest(adapter)?;
        lineage.extend(manifest.get("lineage").and_then(Value::as_array).into_iter().flatten().cloned());
    }
    let weights: PathBuf = adapter.join(WEIGHTS_FILE);
    lineage.push(json!({"adapter": adapter, "sha256": sha256_file(&weights)?}));
    Ok(lineage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_refused_resumed_or_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path().join("a");
        assert_eq!(prepare(&job, Existing::Refuse).unwrap(), Found::Nothing);
        std::fs::write(job.join(CHECKPOINT_FILE), "x").unwrap();
        assert!(matches!(prepare(&job, Existing::Refuse), Err(TrainError::Exists { .. })));
        assert_eq!(prepare(&job, Existing::Resume).unwrap(), Found::Begun);
        let manifest = json!({"job": "a", "files": {}});
        std::fs::write(job.join(MANIFEST_FILE), manifest.to_string()).unwrap();
        assert_eq!(prepare(&job, Existing::Resume).unwrap(), Found::Ended(manifest));
        std::fs::write(job.join("notes.txt"), "mine").unwrap();
        assert_eq!(prepare(&job, Existing::Replace).unwrap(), Found::Nothing);
        assert!(job.join("notes.txt").exists() && !job.join(CHECKPOINT_FILE).exists());
    }

    #[test]
    fn what_a_killed_process_was_writing_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".checkpoint.safetensors.12-0.tmp", ".notes.txt.12-0.tmp", ".manifest.json.bak"] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        prepare(folder.path(), Existing::Resume).unwrap();
        let kept = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut kept: Vec<_> = kept.collect();
        kept.sort();
        assert_eq!(kept, [".manifest.json.bak", ".notes.txt.12-0.tmp"]);
    }

    #[test]
    fn a_folder_is_one_runs_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Lock::take(folder.path()).unwrap();
        assert!(matches!(Lock::take(folder.path()), Err(TrainError::Busy { .. })));
        drop(lock);
        Lock::take(folder.path()).unwrap();
    }
}
