//! Training runs as users start them: a configuration, data, a folder of results.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use loramux::backend::cpu::Cpu;
use loramux::train::answer::EngineAnswerer;
use loramux::train::config::RunConfig;
use loramux::train::folder::Existing;
use loramux::train::run::{Event, Run};
use serde_json::{Value, json};

use super::program::{Ran, loramux, read_lines, write_lines};

/// A run in a folder of its own.
pub struct TrainingRun {
    pub folder: tempfile::TempDir,
    pub model: PathBuf,
    run: String,
    /// Names and tables.
    jobs: Vec<(String, String)>,
}

impl TrainingRun {
    pub fn new(model: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder, model: model.canonicalize().unwrap(), run: String::new(), jobs: Vec::new() }
    }

    /// Sets keys of `[run]`.
    pub fn run_keys(&mut self, keys: &str) -> &mut Self {
        self.run = keys.to_owned();
        self
    }

    /// Adds a `[[job]]` with these keys, or gives the one of that name other keys.
    pub fn job(&mut self, name: &str, keys: &str) -> &mut Self {
        let table = format!("[[job]]\nname = \"{name}\"\n{keys}\n");
        match self.jobs.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => *old = table,
            None => self.jobs.push((name.to_owned(), table)),
        }
        self
    }

    /// Takes all jobs out of the configuration; what they have written stays.
    pub fn without_jobs(&mut self) -> &mut Self {
        self.jobs.clear();
        self
    }

    /// Writes a data file and returns its name in the configuration.
    pub fn data<T: ToString>(&self, name: &str, lines: &[T]) -> String {
        write_lines(&self.folder.path().join(name), lines);
        name.to_owned()
    }

    pub fn config(&self) -> PathBuf {
        let mut text = format!("[base]\nmodel = \"{}\"\ndevice = \"cpu\"\n", self.model.display());
        writeln!(text, "[run]\nout = \"out\"\n{}", self.run).unwrap();
        self.jobs.iter().for_each(|(_, table)| text.push_str(table));
        let path = self.folder.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn train(&self, flags: &[&str]) -> Ran {
        let config = self.config();
        let mut arguments = vec!["train", config.to_str().unwrap()];
        arguments.extend(flags);
        loramux(&arguments)
    }

    /// Trains to the end, or says why not.
    pub fn finish(&self, flags: &[&str]) -> &Self {
        let ran = self.train(flags);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        self
    }

    /// Begins, or goes on, and stops dead once `job` has done this step: nothing is saved that was not already.
    pub fn stop_after(&self, job: &str, step: u64) -> &Self {
        let (config, _) = RunConfig::read(&self.config()).unwrap();
        let run = Run::open(config).unwrap();
        let mut stop = |event: Event<'_>| {
            if let Event::Stepped { line } = event
                && (line.job.as_str(), line.step) == (job, step)
            {
                resume_unwind(Box::new("stopped"));
            }
        };
        let answerer = EngineAnswerer::start(Arc::clone(&run.base), Some(1)).unwrap();
        let backend = Cpu::new(Some(1)).unwrap();
        let train = || run.train(backend, Some(&answerer), Existing::Resume, &mut stop);
        let ran = catch_unwind(AssertUnwindSafe(train));
        assert!(ran.is_err(), "{job} ended before step {step}");
        self
    }

    pub fn out(&self, job: &str) -> PathBuf {
        self.folder.path().join("out").join(job)
    }

    /// What a job leaves that must be the same whenever and beside whatever it is trained.
    pub fn results(&self, job: &str) -> Vec<(&'static str, Vec<u8>)> {
        ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "manifest.json"]
            .map(|name| (name, std::fs::read(self.out(job).join(name)).unwrap()))
            .into()
    }

    /// The steps of a job's metrics.
    pub fn steps(&self, job: &str) -> Vec<Value> {
        self.metrics(job, "loss")
    }

    /// The lines of a job's metrics that have a key: `loss`, `eval` or `affinity`.
    pub fn metrics(&self, job: &str, key: &str) -> Vec<Value> {
        let lines = read_lines(&self.out(job).join("metrics.jsonl"));
        lines.into_iter().filter(|line| line.get(key).is_some()).collect()
    }

    pub fn manifest(&self, job: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.out(job).join("manifest.json")).unwrap()).unwrap()
    }

    /// Every file in a job's folder, by name.
    pub fn files(&self, job: &str) -> Vec<(String, Vec<u8>)> {
        let entries = std::fs::read_dir(self.out(job)).unwrap().map(|entry| entry.unwrap());
        let file = |entry: std::fs::DirEntry| {
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        };
        let mut files: Vec<_> = entries.map(file).collect();
        files.sort();
        files
    }
}

/// Random token sequences over a vocabulary, `count` of them, as lines of the format `tokens`.
pub fn token_lines(count: usize, vocabulary: u64, seed: u64) -> Vec<Value> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut line = || {
        let length = 4 + next(28);
        let ids: Vec<u64> = (0..length).map(|_| 3 + next(vocabulary - 3)).collect();
        let unlabelled = next(length - 2);
        let label = |(index, &id): (usize, &u64)| if (index as u64) < unlabelled { -100 } else { id as i64 };
        let labels: Vec<i64> = ids.iter().enumerate().map(label).collect();
        json!({"input_ids": ids, "labels": labels})
    };
    (0..count).map(|_| line()).collect()
}
