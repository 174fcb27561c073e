//! A run in words, before it begins: its jobs, what is in their data, and the memory that it takes.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use super::{BaseShape, Estimate, Evaluation, JobShape, Machine, PairShape, Step, training};
use crate::backend::PAGE;
use crate::engine::{EngineError, EngineOptions};
use crate::terminal::{Align, Table, bytes, clean};
use crate::train::config::{AdapterConfig, JobConfig, Length, RunConfig, Word};
use crate::train::data::{Dataset, Sample};

/// A job with its data in memory.
#[derive(Clone, Copy, Debug)]
pub struct JobData<'a> {
    pub config: &'a JobConfig,
    pub pairs: &'a [PairShape],
    /// Optimizer steps in all, should nothing end it early.
    pub steps: u64,
    /// In the configuration's order.
    pub tasks: &'a [TaskData<'a>],
}

/// The data of one task.
#[derive(Clone, Copy, Debug)]
pub struct TaskData<'a> {
    pub train: Option<&'a Dataset>,
    pub valid: Option<&'a Dataset>,
    pub test: Option<&'a Dataset>,
    /// Samples of `valid` and `test` that are in `train` too.
    pub leakage: [usize; 2],
}

impl<'a> TaskData<'a> {
    /// With what is not to be seen in training: leaked samples.
    fn files(&self) -> [(&'static str, Option<&'a Dataset>, Option<usize>); 3] {
        let [valid, test] = self.leakage;
        [("train", self.train, None), ("valid", self.valid, Some(valid)), ("test", self.test, Some(test))]
    }
}

/// What a run is about to do.
///
/// # Errors
/// When the base cannot be served to evaluate on it.
pub fn describe(
    run: &RunConfig,
    base: &BaseShape,
    jobs: &[JobData<'_>],
    notes: &[String],
    machine: Option<Machine>,
) -> Result<String, EngineError> {
    let mut text = String::new();
    let mut facts = Table::new(&[Align::Left, Align::Left]);
    facts.row(["base", &run.model.display().to_string()]);
    facts.row(["output", &run.out.display().to_string()]);
    let seats = run.max_concurrent_jobs.min(jobs.len());
    let rows = format!("up to {} rows of up to {seats} jobs", run.max_tokens_per_step);
    facts.row(["step", &format!("{rows}, recompute {}", run.recompute.word())]);
    let estimate = memory(run, base, jobs)?;
    for part in [facts.to_string(), table_of_jobs(base, jobs), table_of_data(jobs), estimate.to_string()] {
        text += &part;
        text += "\n";
    }
    text += &verdict(&estimate, machine);
    text += "\n";
    for note in notes {
        writeln!(text, "note: {}", clean(note)).expect("a string has room");
    }
    Ok(text)
}

/// Whether there is room, in a sentence.
pub fn verdict(estimate: &Estimate, machine: Option<Machine>) -> String {
    let wanted = bytes(estimate.total());
    let Some(machine) = machine else {
        return format!("about {wanted}; how much memory this machine has is not known");
    };
    let (total, available) = (bytes(machine.total), bytes(machine.available));
    if estimate.total() > machine.total {
        format!("does not fit: about {wanted}, and this machine has {total}")
    } else if estimate.total() > machine.available {
        format!(
            "fits, with other programs out of the way: about {wanted} of {total}, of which {available} are available"
        )
    } else {
        format!("fits: about {wanted} of {total}, of which {available} are available")
    }
}

fn table_of_jobs(base: &BaseShape, jobs: &[JobData<'_>]) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[Left, Left, Right, Right, Right, Right, Right, Right, Right, Right]);
    table.row([
        "job",
        "starts from",
        "rank",
        "sites",
        "parameters",
        "lr",
        "batch",
        "length",
        "epochs",
        "steps",
    ]);
    for job in jobs {
        let JobConfig { name, adapter, optimizer, batch_size, max_length, length, .. } = job.config;
        let start = match adapter {
            AdapterConfig::Fresh { .. } => "base".to_owned(),
            AdapterConfig::From { folder, .. } => folder.display().to_string(),
        };
        let ranks = job.pairs.iter().map(|pair| pair.rank);
        let rank = match (ranks.clone().min(), ranks.max()) {
            (Some(least), Some(most)) if least < most => format!("{least}-{most}"),
            (_, most) => most.unwrap_or(0).to_string(),
        };
        let parameters: u64 = job.pairs.iter().map(|pair| pair.parameters(&base.sites.table)).sum();
        let epochs = match length {
            Length::Epochs(epochs) => epochs.to_string(),
            Length::Steps(_) => String::new(),
        };
        table.row([
            name.clone(),
            start,
            rank,
            job.pairs.len().to_string(),
            parameters.to_string(),
            optimizer.lr.to_string(),
            batch_size.to_string(),
            max_length.min(&base.config.max_position_embeddings).to_string(),
            epochs,
            job.steps.to_string(),
        ]);
    }
    table.to_string()
}

fn table_of_data(jobs: &[JobData<'_>]) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[Left, Left, Left, Right, Right, Right, Right, Right, Right, Right, Right]);
    table.row([
        "job",
        "task",
        "file",
        "read",
        "kept",
        "dropped",
        "truncated",
        "duplicates",
        "leaked",
        "tokens",
        "labelled",
    ]);
    for job in jobs {
        for (config, task) in job.config.tasks.iter().zip(job.tasks) {
            for (split, data, leaked) in task.files() {
                let Some(Dataset { counts, .. }) = data else { continue };
                let dropped = counts.dropped_too_long + counts.dropped_without_target;
                let leaked = leaked.map_or_else(String::new, |leaked| leaked.to_string());
                let mut row = vec![job.config.name.clone(), config.name.clone(), split.to_owned()];
                row.extend([counts.read, counts.kept, dropped].map(|count| count.to_string()));
                row.extend([counts.truncated.to_string(), counts.duplicates.to_string(), leaked]);
                row.extend([counts.tokens, counts.targets].map(|count| count.to_string()));
                table.row(row);
            }
        }
    }
    table.to_string()
}

/// Memory of the run, as far as its data fills steps and caches.
fn memory(run: &RunConfig, base: &BaseShape, jobs: &[JobData<'_>]) -> Result<Estimate, EngineError> {
    let shapes: Vec<JobShape> =
        jobs.iter().map(|job| JobShape::new(job.config, job.pairs.to_vec())).collect();
    let files =
        || jobs.iter().flat_map(|job| job.tasks).flat_map(TaskData::files).filter_map(|(_, data, _)| data);
    let mut batches: Vec<usize> = jobs.iter().map(most_rows_of_batch).collect();
    batches.sort_unstable_by(|one, other| other.cmp(one));
    let trained = batches.iter().take(run.max_concurrent_jobs).sum();
    let evaluated = jobs.iter().flat_map(|job| job.tasks).flat_map(|task| [task.valid, task.test]).flatten();
    let evaluated = evaluated.map(|data| data.counts.tokens).max().unwrap_or(0);
    // A sample that is longer than steps are to be has one to itself.
    let longest = files().map(longest_sample).max().unwrap_or(0);
    let limit = run.max_tokens_per_step.max(longest);
    let (samples, tokens) = files()
        .fold((0, 0), |(samples, tokens), data| (samples + data.samples.len(), tokens + data.counts.tokens));
    let rows = limit.min(evaluated.max(trained));
    let labelled = |data: &Dataset| (rows * data.counts.targets).div_ceil(data.counts.tokens.max(1));
    let step = Step {
        limit,
        rows,
        labelled: files().map(labelled).max().unwrap_or(0),
        mean_length: tokens / samples.max(1),
        ..Step::of(run, base)
    };
    let evaluation = Evaluation::of(run, base).map(|_| Evaluation { tokens: most_tokens_asked(jobs) });
    let mut estimate = training(base, step, &shapes, evaluation)?;
    let mut seen: HashSet<&Path> = HashSet::new();
    let once = files().filter(|data| seen.insert(&data.path));
    estimate.add("data", "samples", once.map(data_bytes).sum());
    Ok(estimate)
}

/// Rows of a job's largest batch, at most.
fn most_rows_of_batch(job: &JobData<'_>) -> usize {
    let longest = job.tasks.iter().filter_map(|task| task.train).map(longest_sample).max();
    longest.unwrap_or(0).saturating_mul(job.config.batch_size)
}

fn longest_sample(data: &Dataset) -> usize {
    data.samples.iter().map(|sample| sample.tokens.len()).max().unwrap_or(0)
}

/// Tokens of the questions and answers that are in an engine at a time, at most: one job's.
fn most_tokens_asked(jobs: &[JobData<'_>]) -> usize {
    let of_job = |job: &JobData<'_>| -> usize {
        let most = job.config.eval_max_tokens;
        let files = job.tasks.iter().flat_map(|task| [task.valid, task.test]).flatten();
        let questions = files.flat_map(|data| &data.samples).filter_map(|sample| sample.question.as_ref());
        let tokens = questions.map(|question| (question.tokens.len() + most).next_multiple_of(PAGE));
        let mut tokens: Vec<usize> = tokens.collect();
        tokens.sort_unstable_by(|one, other| other.cmp(one));
        tokens.iter().take(EngineOptions::default().max_num_seqs).sum()
    };
    jobs.iter().filter(|job| job.config.eval_max_tokens > 0).map(of_job).max().unwrap_or(0)
}

/// Bytes of a data set in memory.
fn data_bytes(data: &Dataset) -> u64 {
    let of_sample = |sample: &Sample| {
        let question = sample.question.as_ref();
        let asked = question.map_or(0, |question| size_of_val(&*question.tokens) + question.answer.len());
        size_of::<Sample>() + size_of_val(&*sample.tokens) + size_of_val(&*sample.targets) + asked
    };
    data.samples.iter().map(of_sample).sum::<usize>() as u64
}
