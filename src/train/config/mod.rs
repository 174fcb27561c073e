//! The configuration of a training run: what `CONFIG.toml` says, checked.
//!
//! Tables are `[base]`, `[run]`, `[defaults]`, `[[job]]` and `[[job.task]]`. A job's key that is absent stands in
//! `[defaults]`, or has a default of its own. Every message names the file, the line, what was found and what was wanted.

mod check;
mod document;
mod job;
mod keys;
mod notes;
mod read;
mod resolved;
#[cfg(test)]
mod tests;
mod words;

use std::path::PathBuf;

use crate::format::FormatError;

pub use crate::model::Recompute;
pub use words::Word;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Something in the file.
    #[error("{}:{line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: String },
}

/// A whole run: one base, many jobs. Paths are absolute or relative to the current folder.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// Folder of the file, which paths in it are relative to.
    pub folder: PathBuf,
    /// Folder of the base model.
    pub model: PathBuf,
    /// `auto`, `cpu`, `cuda` or `cuda:N`, as given.
    pub device: String,
    /// `<out>/<job>/…` is written.
    pub out: PathBuf,
    pub seed: u64,
    /// Most rows of all jobs in one forward pass.
    pub max_tokens_per_step: usize,
    pub max_concurrent_jobs: usize,
    pub recompute: Recompute,
    /// Write event files for TensorBoard.
    pub tensorboard: bool,
    /// In the file's order.
    pub jobs: Vec<JobConfig>,
}

/// One adapter to train, with its data and hyperparameters.
#[derive(Clone, Debug, PartialEq)]
pub struct JobConfig {
    /// Also the name of its folder.
    pub name: String,
    pub adapter: AdapterConfig,
    pub optimizer: OptimizerConfig,
    pub batch_size: usize,
    pub length: Length,
    pub shuffle: bool,
    /// The run's seed where the job has none.
    pub seed: u64,
    pub max_length: usize,
    pub on_overlong: OnOverlong,
    /// Documents of the format `text` are joined and cut into sequences of `max_length`.
    pub packing: bool,
    pub sampling: Sampling,
    pub batch_tasks: BatchTasks,
    pub balance: Balance,
    /// Weigh tasks by the slopes of their validation losses (CoBa, Gong et al. 2024).
    pub coba: bool,
    /// Project conflicting task gradients (PCGrad, Yu et al. 2020).
    pub pcgrad: bool,
    /// Optimizer steps between evaluations; 0 evaluates at the end alone.
    pub eval_every: u64,
    /// Most tokens of a generated answer in evaluations; 0 generates none.
    pub eval_max_tokens: usize,
    /// Evaluations without a better validation loss after which the job ends.
    pub early_stop: Option<u64>,
    /// Optimizer steps between checkpoints; 0 saves at the end alone.
    pub save_every: u64,
    /// Steps with a gradient that is not finite after which the job fails.
    pub max_bad_steps: u64,
    /// At least one that is trained.
    pub tasks: Vec<TaskConfig>,
}

/// Where the adapter starts and what shape it has.
#[derive(Clone, Debug, PartialEq)]
pub enum AdapterConfig {
    /// A fresh one: A as PEFT draws it, B zero.
    Fresh { rank: usize, alpha: f64, targets: Targets, use_rslora: bool, use_dora: bool, dropout: f32 },
    /// Goes on from a PEFT folder, whose rank, alpha and targets it keeps.
    From { folder: PathBuf, dropout: f32 },
}

/// Which sites get a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// All linear layers of all blocks.
    AllLinear,
    /// Last components or ends of module paths, as PEFT's `target_modules`.
    Named(Vec<String>),
}

/// AdamW, its schedule and clipping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    pub lr: f64,
    /// Learning rate of B over that of A (LoRA+); 1 is plain LoRA.
    pub lr_b_ratio: f64,
    pub weight_decay: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub schedule: Schedule,
    pub warmup: Warmup,
    /// 0: gradients are not clipped.
    pub max_grad_norm: f64,
}

/// How the learning rate goes from its peak to the last step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    Constant,
    /// To 0.
    Linear,
    /// Half a cosine, to 0.
    Cosine,
}

/// Steps over which the learning rate rises from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    Steps(u64),
    /// Of all steps.
    Ratio(f64),
}

/// How long a job trains.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    Epochs(f64),
    Steps(u64),
}

/// What happens to samples longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnOverlong {
    Truncate,
    Drop,
    Error,
}

/// Which task a sample is drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    Proportional,
    Uniform,
    RoundRobin,
    /// `p ∝ N^(1/T)`.
    Temperature(f64),
    /// `p ∝ N^α`, `α = 1 − 0.8 (e − 1) / (E − 1)` in epoch `e` of `E` (Stickland & Murray 2019).
    Annealed,
    EvenThenHard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchTasks {
    /// Samples of all tasks in a batch.
    Mixed,
    /// One task per batch.
    One,
}

/// What the loss of a batch is the mean of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Over labelled tokens.
    Token,
    /// Over samples, of their token means.
    Sample,
    /// Over tasks, of their token means.
    Task,
}

/// One task of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskConfig {
    pub name: String,
    /// Absent: a guard task that is evaluated and never trained.
    pub train: Option<PathBuf>,
    pub valid: Option<PathBuf>,
    pub test: Option<PathBuf>,
    /// Its share of all draws, 0 to 1; the others share the rest by `sampling`.
    pub ratio: Option<f64>,
    /// Named where it is not to be recognised.
    pub format: Option<Format>,
}

/// How a line of data is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    Messages,
    PromptCompletion,
    Alpaca,
    ShareGpt,
    Text,
    Tokens,
    Labelled,
}
