//! `CONFIG.toml` as a whole: its tables, and the run that they describe.

use std::io::Read as _;
use std::path::Path;

use toml::de::DeTable;

use super::check::{check_folders, check_names};
use super::document::{Document, Given, Table};
use super::job::{Job, Layer, Run, job};
use super::keys::{BASE, DEFAULTS, DEFAULTS_TASK, JOB, JOB_TASK, KINDS, MAX_ROWS, ROOT, RUN, word};
use super::notes::notes;
use super::{ConfigError, Recompute, RunConfig};
use crate::format::{FormatError, open_regular};

/// Largest file that is read.
const MAX_BYTES: usize = 4 << 20;

impl RunConfig {
    /// Reads a configuration. The notes that come with it are about settings that are allowed and uncommon.
    ///
    /// # Errors
    /// When the file cannot be read, or something in it is unknown, out of range or contradictory: the first thing that
    /// was found, with its line.
    pub fn read(path: &Path) -> Result<(Self, Vec<String>), ConfigError> {
        let mut bytes = Vec::new();
        // One byte more than the limit tells a file at the limit from one beyond it.
        let file = open_regular(path)?.take(MAX_BYTES as u64 + 1);
        { file }.read_to_end(&mut bytes).map_err(FormatError::io(path, "read"))?;
        Self::parse(path, &bytes)
    }

    /// Reads the content of a configuration; `path` is for messages, and its folder what other paths are relative to.
    ///
    /// # Errors
    /// As [`Self::read`], apart from reading.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<(Self, Vec<String>), ConfigError> {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let before = &bytes[..error.valid_up_to()];
                let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
                let problem = "not UTF-8".to_owned();
                return Err(ConfigError::Line { path: path.to_owned(), line, problem });
            }
        };
        let document = Document { path, text };
        if bytes.len() > MAX_BYTES {
            return Err(document.refuse(1, format!("larger than {} MiB", MAX_BYTES >> 20)));
        }
        let values = DeTable::parse(text).map_err(|error| {
            let line = document.line(error.span().map_or(text.len(), |span| span.start));
            document.refuse(line, format!("not valid TOML: {}", error.message()))
        })?;
        run(&document, values.get_ref())
    }
}

fn run(document: &Document, values: &DeTable) -> Result<(RunConfig, Vec<String>), ConfigError> {
    let root = Table::root(document, values, &ROOT, KINDS)?;
    if let Some(line) = root.line_of("mixture") {
        let problem =
            "[mixture]: trained routers come later, this version trains adapters alone; remove the table";
        return Err(document.refuse(line, problem));
    }
    let table =
        |key: &str, kind| root.value(key).map(|value| Table::new(document, value, kind, KINDS)).transpose();
    let missing = |table: &str, key: &str| document.refuse(1, format!("no {table}; wanted one with `{key}`"));
    let base = table("base", &BASE)?.ok_or_else(|| missing("[base]", "model"))?;
    let settings = table("run", &RUN)?.ok_or_else(|| missing("[run]", "out"))?;
    let defaults = table("defaults", &DEFAULTS)?;

    let folder = document.path.parent().unwrap_or(Path::new(""));
    let model =
        base.text("model")?.ok_or_else(|| base.missing("model", "the folder of a Hugging Face model"))?;
    let out = settings.text("out")?.ok_or_else(|| settings.missing("out", "the folder to write to"))?;
    let max_tokens_per_step = settings.count("max_tokens_per_step", 2, MAX_ROWS)?;
    let max_concurrent_jobs = settings.count("max_concurrent_jobs", 1, 1 << 16)?;
    let seed = settings.integer("seed", 0, u64::MAX)?;
    let mut config = RunConfig {
        folder: folder.to_owned(),
        model: folder.join(&model.value),
        device: device(&base)?,
        out: folder.join(&out.value),
        seed: seed.map_or(0, |seed| seed.value),
        max_tokens_per_step: max_tokens_per_step.map_or(4096, |rows| rows.value),
        max_concurrent_jobs: max_concurrent_jobs.map_or(16, |jobs| jobs.value),
        recompute: word(&settings, "recompute")?.map_or(Recompute::None, |word| word.value),
        tensorboard: settings.boolean("tensorboard")?.is_some_and(|given| given.value),
        jobs: Vec::new(),
    };

    let defaults = defaults.map(|table| Layer::read(&table, &DEFAULTS_TASK)).transpose()?.unwrap_or_default();
    let tables = root.tables("job", &JOB, KINDS)?.unwrap_or_default();
    if tables.is_empty() {
        return Err(document.refuse(root.line_of("job").unwrap_or(1), "no job; wanted at least one [[job]]"));
    }
    let run = Run { document, folder, seed: config.seed, max_tokens_per_step: config.max_tokens_per_step };
    let jobs = (tables.iter())
        .map(|table| {
            let name = table.text("name")?.ok_or_else(|| table.missing("name", "the job's name"))?;
            job(&run, name, Layer::read(table, &JOB_TASK)?, &defaults)
        })
        .collect::<Result<Vec<Job>, _>>()?;
    let names: Vec<&Given<String>> = jobs.iter().map(|job| &job.name).collect();
    check_names(document, &names, &config.model)?;
    check_folders(document, &jobs, &model, &out, folder)?;
    let notes = notes(document, &jobs);
    config.jobs = jobs.into_iter().map(|job| job.config).collect();
    Ok((config, notes))
}

/// `auto`, `cpu`, `cuda` or `cuda:N`.
fn device(base: &Table) -> Result<String, ConfigError> {
    let is_number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<usize>().is_ok();
    let device = base.read("device", "\"auto\", \"cpu\", \"cuda\" or \"cuda:N\"", |value| {
        let text = value.as_str()?;
        let is_device =
            ["auto", "cpu", "cuda"].contains(&text) || text.strip_prefix("cuda:").is_some_and(is_number);
        is_device.then(|| text.to_owned())
    })?;
    Ok(device.map_or_else(|| "auto".to_owned(), |device| device.value))
}
