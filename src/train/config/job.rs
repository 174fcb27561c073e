//! One job from its own table and `[defaults]`: absent keys get their values, keys are checked against each other.

use std::path::Path;

use super::document::{Document, Given, Table, TableKind};
use super::keys::{InitFrom, JobKeys, KINDS, TaskKeys};
use super::{
    AdapterConfig, Balance, BatchTasks, ConfigError, JobConfig, Length, OnOverlong, OptimizerConfig,
    Sampling, Schedule, Targets, TaskConfig, Warmup,
};

/// Tokens of a sample where nothing is said.
const MAX_LENGTH: usize = 1024;

/// What jobs need to know of the run.
pub(super) struct Run<'a> {
    pub document: &'a Document<'a>,
    /// What paths are relative to.
    pub folder: &'a Path,
    pub seed: u64,
    pub max_tokens_per_step: usize,
}

/// `[defaults]`, or a `[[job]]` by itself.
#[derive(Default)]
pub(super) struct Layer {
    /// Line of its header.
    pub line: usize,
    pub keys: JobKeys,
    tasks: Option<Vec<TaskKeys>>,
}

impl Layer {
    /// # Errors
    /// When a value has the wrong type or is out of range, or a thing is said in two ways.
    pub fn read(table: &Table, task: &TableKind) -> Result<Self, ConfigError> {
        let keys = JobKeys::read(table)?;
        let tables = table.tables("task", task, KINDS)?;
        if let Some(first) = tables.as_ref().and_then(|tables| tables.first()) {
            let data =
                ["train", "valid", "test"].into_iter().find_map(|key| Some((key, table.line_of(key)?)));
            if let Some((key, line)) = data {
                let problem = format!(
                    "both `{key}` and a list of tasks (line {}); wanted `{key}` in one of the tasks, or no list",
                    first.line
                );
                return Err(table.document.refuse(line, problem));
            }
        }
        let tasks = tables.map(|tables| tables.iter().map(TaskKeys::read).collect()).transpose()?;
        Ok(Self { line: table.line, keys, tasks })
    }
}

/// A job before it is checked against the others, with the keys that made it.
pub(super) struct Job {
    pub name: Given<String>,
    pub config: JobConfig,
    pub keys: JobKeys,
}

/// # Errors
/// When the job has no data, or keys that exclude or need each other.
pub(super) fn job(run: &Run, name: Given<String>, own: Layer, defaults: &Layer) -> Result<Job, ConfigError> {
    let (line, own_keys) = (own.line, own.keys.clone());
    let task_keys = tasks(run, &name, &own, defaults)?;
    let keys = own.keys.inherit(&defaults.keys);
    let path = |text: &Given<String>| run.folder.join(&text.value);
    let config = JobConfig {
        name: name.value.clone(),
        adapter: adapter(run, &name, &own_keys, &keys)?,
        optimizer: optimizer(&keys),
        batch_size: or(&keys.batch_size, 16),
        length: match (&keys.epochs, &keys.steps) {
            (_, Some(steps)) => Length::Steps(steps.value),
            (epochs, None) => Length::Epochs(or(epochs, 3.0)),
        },
        shuffle: or(&keys.shuffle, true),
        seed: or(&keys.seed, run.seed),
        max_length: max_length(run, &keys)?,
        on_overlong: or(&keys.on_overlong, OnOverlong::Truncate),
        packing: or(&keys.packing, false),
        sampling: sampling(run, &name, &own_keys, &keys)?,
        batch_tasks: or(&keys.batch_tasks, BatchTasks::Mixed),
        balance: or(&keys.balance, Balance::Token),
        coba: or(&keys.coba, false),
        pcgrad: or(&keys.pcgrad, false),
        eval_every: or(&keys.eval_every, 0),
        eval_max_tokens: or(&keys.eval_max_tokens, 64),
        early_stop: keys.early_stop.map(|patience| patience.value).filter(|&patience| patience > 0),
        save_every: or(&keys.save_every, 0),
        max_bad_steps: or(&keys.max_bad_steps, 10),
        tasks: (task_keys.iter())
            .map(|task| TaskConfig {
                name: task.name.value.clone(),
                train: task.train.as_ref().map(path),
                valid: task.valid.as_ref().map(path),
                test: task.test.as_ref().map(path),
                ratio: task.ratio.map(|ratio| ratio.value),
                format: task.format.or(keys.format).map(|format| format.value),
            })
            .collect(),
    };
    check_tasks(run, &name, line, &task_keys)?;
    check_methods(run, &config, &keys)?;
    Ok(Job { name, config, keys })
}

fn or<T: Clone>(given: &Option<Given<T>>, default: T) -> T {
    given.as_ref().map_or(default, |given| given.value.clone())
}

fn adapter(run: &Run, name: &str, own: &JobKeys, keys: &JobKeys) -> Result<AdapterConfig, ConfigError> {
    let dropout = or(&keys.dropout, 0.0) as f32;
    let Some(Given { value: InitFrom::Adapter(folder), line }) = &keys.init_from else {
        return Ok(AdapterConfig::Fresh {
            rank: or(&keys.rank, 8),
            alpha: or(&keys.alpha, 16.0),
            targets: or(&keys.targets, Targets::AllLinear),
            use_rslora: or(&keys.use_rslora, false),
            use_dora: or(&keys.use_dora, false),
            dropout,
        });
    };
    fn line_of<T>(given: &Option<Given<T>>) -> Option<usize> {
        given.as_ref().map(|given| given.line)
    }
    let shape = [
        ("rank", line_of(&own.rank)),
        ("alpha", line_of(&own.alpha)),
        ("targets", line_of(&own.targets)),
        ("use_rslora", line_of(&own.use_rslora)),
        ("use_dora", line_of(&own.use_dora)),
    ];
    if let Some((key, at)) = shape.into_iter().find_map(|(key, at)| Some((key, at?))) {
        let problem = format!(
            "job `{name}` has both `{key}` and `init_from` (line {line}), whose folder {folder:?} says what the adapter's \
             `{key}` is; wanted one of them"
        );
        return Err(run.document.refuse(at, problem));
    }
    Ok(AdapterConfig::From { folder: run.folder.join(folder), dropout })
}

fn optimizer(keys: &JobKeys) -> OptimizerConfig {
    OptimizerConfig {
        lr: or(&keys.lr, 1e-3),
        lr_b_ratio: or(&keys.lr_b_ratio, 1.0),
        weight_decay: or(&keys.weight_decay, 0.01),
        betas: or(&keys.betas, [0.9, 0.999]),
        eps: or(&keys.eps, 1e-8),
        schedule: or(&keys.schedule, Schedule::Cosine),
        warmup: match (&keys.warmup_ratio, &keys.warmup_steps) {
            (Some(ratio), _) => Warmup::Ratio(ratio.value),
            (None, steps) => Warmup::Steps(or(steps, 10)),
        },
        max_grad_norm: or(&keys.max_grad_norm, 1.0),
    }
}

/// A sample runs in one step: a length that is asked for has to fit.
fn max_length(run: &Run, keys: &JobKeys) -> Result<usize, ConfigError> {
    match keys.max_length {
        // What a job computes does not depend on how much fits a step: a longer sample has one to itself.
        None => Ok(MAX_LENGTH),
        Some(length) if length.value > run.max_tokens_per_step => {
            let problem = format!(
                "`max_length` is {}; wanted at most {}, `max_tokens_per_step` of [run]: a sample is never cut in two",
                length.value, run.max_tokens_per_step
            );
            Err(run.document.refuse(length.line, problem))
        }
        Some(length) => Ok(length.value),
    }
}

fn sampling(run: &Run, name: &str, own: &JobKeys, keys: &JobKeys) -> Result<Sampling, ConfigError> {
    let sampling = keys.sampling.map(|sampling| sampling.value);
    match (sampling, &keys.sampling, &keys.temperature) {
        (Some(Sampling::Temperature(_)), _, Some(temperature)) => {
            Ok(Sampling::Temperature(temperature.value))
        }
        (Some(Sampling::Temperature(_)), Some(given), None) => {
            let problem =
                format!("job `{name}` has `sampling` = \"temperature\" and no `temperature`; wanted both");
            Err(run.document.refuse(given.line, problem))
        }
        _ => match own.temperature {
            None => Ok(sampling.unwrap_or(Sampling::Proportional)),
            Some(temperature) => {
                let problem = format!(
                    "job `{name}` has `temperature`; wanted it with `sampling` = \"temperature\" only"
                );
                Err(run.document.refuse(temperature.line, problem))
            }
        },
    }
}

/// The tasks of a job: its own list, its own files as one task of its name, or the same of `[defaults]`.
fn tasks(
    run: &Run,
    name: &Given<String>,
    own: &Layer,
    defaults: &Layer,
) -> Result<Vec<TaskKeys>, ConfigError> {
    if let Some(tasks) = &own.tasks {
        return Ok(tasks.clone());
    }
    let keys = &own.keys;
    if let (Some(tasks), None) = (&defaults.tasks, &keys.train) {
        for (key, stray) in [("valid", &keys.valid), ("test", &keys.test)] {
            if let Some(stray) = stray {
                let job = &name.value;
                let problem = format!(
                    "job `{job}` has `{key}` and takes its tasks from [defaults]; wanted `{key}` there"
                );
                return Err(run.document.refuse(stray.line, problem));
            }
        }
        return Ok(tasks.clone());
    }
    let keys = own.keys.clone().inherit(&defaults.keys);
    Ok(vec![TaskKeys {
        line: own.line,
        name: name.clone(),
        train: keys.train,
        valid: keys.valid,
        test: keys.test,
        ratio: None,
        format: None,
    }])
}

/// Every task has something to do, and the shares of draws leave something for the others.
fn check_tasks(run: &Run, name: &str, line: usize, tasks: &[TaskKeys]) -> Result<(), ConfigError> {
    let refuse = |line, problem| Err(run.document.refuse(line, format!("job `{name}` {problem}")));
    if tasks.iter().all(|task| task.train.is_none()) {
        let guards = "has tasks that are only evaluated; wanted `train` in at least one";
        let problem = if tasks.len() > 1 { guards } else { "has no data; wanted `train` or [[job.task]]" };
        return refuse(line, problem.to_owned());
    }
    for (index, task) in tasks.iter().enumerate() {
        let given = &task.name.value;
        if let Some(first) = tasks[..index].iter().find(|other| other.name.value == *given) {
            let first = first.name.line;
            return refuse(task.name.line, format!("has two tasks `{given}`, the first in line {first}"));
        }
        if task.train.is_none() && task.valid.is_none() && task.test.is_none() {
            return refuse(
                task.line,
                format!("has no data for its task `{given}`; wanted `train`, `valid` or `test`"),
            );
        }
        if let (None, Some(ratio)) = (&task.train, task.ratio) {
            let problem =
                format!("has a `ratio` for its task `{given}`, which is never drawn: it has no `train`");
            return refuse(ratio.line, problem);
        }
    }
    let ratios: Vec<Given<f64>> = tasks.iter().filter_map(|task| task.ratio).collect();
    let Some(last) = ratios.last() else { return Ok(()) };
    let sum: f64 = ratios.iter().map(|ratio| ratio.value).sum();
    let trained = tasks.iter().filter(|task| task.train.is_some()).count();
    if ratios.len() == trained {
        let problem = "has a `ratio` for every task; wanted one without: it gets what is left".to_owned();
        return refuse(last.line, problem);
    }
    if sum >= 1.0 {
        return refuse(
            last.line,
            format!("has ratios that sum to {sum}; wanted less than 1, the rest is the others'"),
        );
    }
    Ok(())
}

/// What a method needs is there.
fn check_methods(run: &Run, config: &JobConfig, keys: &JobKeys) -> Result<(), ConfigError> {
    let name = &config.name;
    let refuse = |line, problem: String| Err(run.document.refuse(line, format!("job `{name}`: {problem}")));
    let trained: Vec<&TaskConfig> = config.tasks.iter().filter(|task| task.train.is_some()).collect();
    let is_on = |key: &Option<Given<bool>>| key.filter(|given| given.value).map(|given| given.line);
    for (key, line) in [("coba", is_on(&keys.coba)), ("pcgrad", is_on(&keys.pcgrad))] {
        if let (Some(line), 1) = (line, trained.len()) {
            let problem = format!(
                "`{key}` is about several tasks, and `{}` is the only one that is trained",
                trained[0].name
            );
            return refuse(line, problem);
        }
    }
    if let (Some(line), BatchTasks::One) = (is_on(&keys.pcgrad), config.batch_tasks) {
        let problem = "`pcgrad` compares the tasks of a batch, and with `batch_tasks` = \"one\" there is one";
        return refuse(line, problem.to_owned());
    }
    let hard = keys.sampling.filter(|_| config.sampling == Sampling::EvenThenHard && trained.len() > 1);
    let early = keys.early_stop.filter(|_| config.early_stop.is_some());
    for (method, line, every) in [
        ("`coba`", is_on(&keys.coba), true),
        ("`sampling` = \"even-then-hard\"", hard.map(|given| given.line), true),
        ("`early_stop`", early.map(|given| given.line), false),
    ] {
        let Some(line) = line else { continue };
        let without: Vec<_> = trained.iter().filter(|task| task.valid.is_none()).collect();
        if let Some(task) = without.first().filter(|_| every || without.len() == trained.len()) {
            let problem =
                format!("{method} goes by validation losses; wanted `valid` for task `{}`", task.name);
            return refuse(line, problem);
        }
        if config.eval_every == 0 {
            return refuse(
                line,
                format!("{method} goes by validation losses; wanted `eval_every` of at least 1"),
            );
        }
    }
    Ok(())
}
