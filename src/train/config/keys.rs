//! The keys of jobs: the type and range of each by itself, and what is inherited.

use toml::de::DeValue;

use super::document::{Given, Table, TableKind, number};
use super::{Balance, BatchTasks, ConfigError, Format, OnOverlong, Sampling, Schedule, Targets, Word};

// Bounds far above any real run: they keep products of sizes within an integer.
const MAX_RANK: usize = 1 << 12;
const MAX_BATCH: usize = 1 << 20;
/// Most tokens of a sample, and most rows of a step.
pub(super) const MAX_ROWS: usize = 1 << 24;

/// The keys that jobs and `[defaults]` share, each with its type and how a table is asked for it: one list from which
/// come the names that are known, the struct that holds the values, and inheritance.
macro_rules! job_keys {
    ($($key:ident: $type:ty = $read:expr;)*) => {
        /// What one table says about jobs.
        #[derive(Clone, Debug, Default)]
        pub(super) struct JobKeys {
            $(pub $key: Option<Given<$type>>,)*
        }

        pub(super) const DEFAULTS_KEYS: &[&str] = &["task", $(stringify!($key)),*];
        pub(super) const JOB_KEYS: &[&str] = &["name", "task", $(stringify!($key)),*];

        impl JobKeys {
            /// # Errors
            /// When a value has the wrong type or is out of range.
            fn read_each<'a>(table: &Table<'a>) -> Result<Self, ConfigError> {
                Ok(Self {
                    $($key: {
                        let read: fn(&Table<'a>, &str) -> Result<Option<Given<$type>>, ConfigError> = $read;
                        read(table, stringify!($key))?
                    },)*
                })
            }

            /// With `defaults` where a key is absent.
            fn or(self, defaults: Self) -> Self {
                Self { $($key: self.$key.or(defaults.$key),)* }
            }
        }
    };
}

job_keys! {
    rank: usize = |t, key| t.count(key, 1, MAX_RANK);
    alpha: f64 = |t, key| t.number(key, ABOVE_0, is_positive);
    targets: Targets = targets;
    use_rslora: bool = Table::boolean;
    use_dora: bool = Table::boolean;
    // Below 1 also as the f32 that it becomes.
    dropout: f64 = |t, key| t.number(key, "from 0, below 1", |share| share >= 0.0 && (share as f32) < 1.0);
    lr: f64 = |t, key| t.number(key, ABOVE_0, is_positive);
    lr_b_ratio: f64 = |t, key| t.number(key, ABOVE_0, is_positive);
    weight_decay: f64 = |t, key| t.number(key, "of at least 0", |decay| decay >= 0.0);
    betas: [f64; 2] = betas;
    eps: f64 = |t, key| t.number(key, ABOVE_0, is_positive);
    schedule: Schedule = word;
    warmup_steps: u64 = |t, key| t.integer(key, 0, u64::MAX);
    warmup_ratio: f64 = |t, key| t.number(key, "from 0 to 1", |ratio| (0.0..=1.0).contains(&ratio));
    max_grad_norm: f64 = |t, key| t.number(key, "of at least 0 (0 clips nothing)", |norm| norm >= 0.0);
    batch_size: usize = |t, key| t.count(key, 1, MAX_BATCH);
    epochs: f64 = |t, key| t.number(key, ABOVE_0, is_positive);
    steps: u64 = |t, key| t.integer(key, 1, u64::MAX);
    shuffle: bool = Table::boolean;
    seed: u64 = |t, key| t.integer(key, 0, u64::MAX);
    // A sequence of one token has nothing to predict.
    max_length: usize = |t, key| t.count(key, 2, MAX_ROWS);
    on_overlong: OnOverlong = word;
    packing: bool = Table::boolean;
    sampling: Sampling = word;
    temperature: f64 = |t, key| t.number(key, ABOVE_0, is_positive);
    batch_tasks: BatchTasks = word;
    balance: Balance = word;
    coba: bool = Table::boolean;
    pcgrad: bool = Table::boolean;
    eval_every: u64 = |t, key| t.integer(key, 0, u64::MAX);
    eval_max_tokens: usize = |t, key| t.count(key, 0, MAX_ROWS);
    early_stop: u64 = |t, key| t.integer(key, 0, u64::MAX);
    save_every: u64 = |t, key| t.integer(key, 0, u64::MAX);
    max_bad_steps: u64 = |t, key| t.integer(key, 1, u64::MAX);
    init_from: InitFrom = init_from;
    format: Format = word;
    train: String = Table::text;
    valid: String = Table::text;
    test: String = Table::text;
}

const ABOVE_0: &str = "above 0";

fn is_positive(number: f64) -> bool {
    number > 0.0
}

/// Where an adapter starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum InitFrom {
    Base,
    /// A folder, as written.
    Adapter(String),
}

fn init_from(table: &Table, key: &str) -> Result<Option<Given<InitFrom>>, ConfigError> {
    table.read(key, "\"base\" or \"adapter:<folder>\"", |value| match value.as_str()? {
        "base" => Some(InitFrom::Base),
        text => {
            let folder = text.strip_prefix("adapter:").filter(|folder| !folder.is_empty())?;
            Some(InitFrom::Adapter(folder.to_owned()))
        }
    })
}

fn targets(table: &Table, key: &str) -> Result<Option<Given<Targets>>, ConfigError> {
    table.read(key, "\"all-linear\" or a list of module names such as [\"q_proj\", \"v_proj\"]", |value| {
        if value.as_str() == Some("all-linear") {
            return Some(Targets::AllLinear);
        }
        let name = |value: &DeValue| value.as_str().filter(|name| !name.is_empty()).map(str::to_owned);
        let names: Vec<String> =
            value.as_array()?.iter().map(|item| name(item.get_ref())).collect::<Option<_>>()?;
        (!names.is_empty()).then_some(Targets::Named(names))
    })
}

fn betas(table: &Table, key: &str) -> Result<Option<Given<[f64; 2]>>, ConfigError> {
    table.read(key, "two numbers from 0, below 1", |value| {
        let beta = |value: &DeValue| number(value).filter(|beta| (0.0..1.0).contains(beta));
        match value.as_array()?.as_ref() {
            [first, second] => Some([beta(first.get_ref())?, beta(second.get_ref())?]),
            _ => None,
        }
    })
}

/// One of a setting's words.
pub(super) fn word<W: Word>(table: &Table, key: &str) -> Result<Option<Given<W>>, ConfigError> {
    table.read(key, &format!("one of {}", W::words()), |value| W::from_word(value.as_str()?))
}

impl JobKeys {
    /// What a table says.
    ///
    /// # Errors
    /// When a value has the wrong type or is out of range, or a thing is said in two ways.
    pub fn read(table: &Table) -> Result<Self, ConfigError> {
        let keys = Self::read_each(table)?;
        for (one, other) in [("warmup_steps", "warmup_ratio"), ("epochs", "steps")] {
            if let (Some(first), Some(second)) = (table.line_of(one), table.line_of(other)) {
                let problem =
                    format!("both `{one}` (line {first}) and `{other}` (line {second}); wanted one of them");
                return Err(table.document.refuse(first.max(second), problem));
            }
        }
        Ok(keys)
    }

    /// With `defaults` where a key is absent, and the other way of saying the same thing too.
    pub fn inherit(self, defaults: &Self) -> Self {
        let mut defaults = defaults.clone();
        if self.warmup_steps.is_some() || self.warmup_ratio.is_some() {
            (defaults.warmup_steps, defaults.warmup_ratio) = (None, None);
        }
        if self.epochs.is_some() || self.steps.is_some() {
            (defaults.epochs, defaults.steps) = (None, None);
        }
        self.or(defaults)
    }
}

/// What one `[[job.task]]` says.
#[derive(Clone, Debug)]
pub(super) struct TaskKeys {
    pub line: usize,
    pub name: Given<String>,
    pub train: Option<Given<String>>,
    pub valid: Option<Given<String>>,
    pub test: Option<Given<String>>,
    pub ratio: Option<Given<f64>>,
    pub format: Option<Given<Format>>,
}

impl TaskKeys {
    /// # Errors
    /// When a value has the wrong type or is out of range, or the name is missing.
    pub fn read(table: &Table) -> Result<Self, ConfigError> {
        let name = table.text("name")?.ok_or_else(|| table.missing("name", "the task's name"))?;
        let is_name = |name: &str| name.trim() == name && !name.contains(char::is_control);
        if !is_name(&name) {
            let problem = format!(
                "`name` is {:?}; wanted one without control characters or spaces at its ends",
                name.value
            );
            return Err(table.document.refuse(name.line, problem));
        }
        Ok(Self {
            line: table.line,
            name,
            train: table.text("train")?,
            valid: table.text("valid")?,
            test: table.text("test")?,
            ratio: table.number("ratio", "above 0, below 1", |ratio| ratio > 0.0 && ratio < 1.0)?,
            format: word(table, "format")?,
        })
    }
}

/// All kinds of tables, in the order in which messages name them.
pub(super) const KINDS: &[TableKind] = &[BASE, RUN, DEFAULTS, JOB, JOB_TASK];
pub(super) const ROOT: TableKind =
    TableKind { name: "the file", keys: &["base", "run", "defaults", "job", "mixture"] };
pub(super) const BASE: TableKind = TableKind { name: "[base]", keys: &["model", "device"] };
pub(super) const RUN: TableKind = TableKind {
    name: "[run]",
    keys: &["out", "seed", "max_tokens_per_step", "max_concurrent_jobs", "recompute", "tensorboard"],
};
pub(super) const DEFAULTS: TableKind = TableKind { name: "[defaults]", keys: DEFAULTS_KEYS };
pub(super) const JOB: TableKind = TableKind { name: "[[job]]", keys: JOB_KEYS };
pub(super) const JOB_TASK: TableKind = TableKind { name: "[[job.task]]", keys: TASK_KEYS };
pub(super) const DEFAULTS_TASK: TableKind = TableKind { name: "[[defaults.task]]", keys: TASK_KEYS };
const TASK_KEYS: &[&str] = &["name", "train", "valid", "test", "ratio", "format"];
