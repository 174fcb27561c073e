//! `loramux train`: many jobs from one configuration file, trained side by side.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use super::output::print;
use super::{Failure, Outcome, Verbosity};
use crate::backend::cpu::Cpu;
use crate::format::FormatError;
use crate::train::TrainError;
use crate::train::answer::EngineAnswerer;
use crate::train::checkpoint;
use crate::train::config::RunConfig;
use crate::train::folder::Existing;
use crate::train::progress::{JobSummary, Progress, StepProgress, TaskScore, summary};
use crate::train::report::{REPORT_FILE, write_run_report};
use crate::train::run::{Event, JobResult, Run};
use crate::train::tensorboard::EventWriter;

/// What `--help` says beyond flags.
const EXAMPLE: &str = r#"The least that a configuration says; paths are relative to it:

    [base]
    model = "examples/base"             # Hugging Face folder

    [run]
    out = "runs/first"                  # results go to runs/first/<job>/

    [[job]]                             # one for each adapter
    name = "ticket-routing"
    train = "examples/tasks/ticket-routing/train.jsonl"
    test = "examples/tasks/ticket-routing/test.jsonl"

Each job leaves a PEFT folder with metrics.jsonl, report.html and manifest.json; <out>/report.html compares all jobs.
All keys, data formats and files: docs/training.md. Without `save_every` there is nothing to resume from before a job
ends. Exit code 3: some jobs failed, the others are done."#;

#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Configuration of the run: base, jobs, data, hyperparameters
    #[arg(value_name = "CONFIG.toml")]
    config: PathBuf,
    /// Read base and data, print jobs, sizes of data, steps and memory; train and write nothing
    #[arg(long, conflicts_with_all = ["resume", "force"])]
    dry_run: bool,
    /// Go on from the checkpoints of an earlier run; jobs that have ended stay as they are
    #[arg(long, conflicts_with = "force")]
    resume: bool,
    /// Remove the results of an earlier run of these jobs and start anew
    #[arg(long)]
    force: bool,
    /// Threads of the CPU backend [default: all cores]
    #[arg(long, env = "LORAMUX_THREADS", value_name = "N")]
    threads: Option<usize>,
}

pub(crate) fn run(args: &Args, verbosity: Verbosity) -> Result<Outcome, Failure> {
    let (config, notes) = RunConfig::read(&args.config).map_err(Failure::usage)?;
    if config.device.starts_with("cuda") {
        let message = format!(
            "{}: `device` is {:?}; training runs on the CPU: use \"auto\" or \"cpu\"",
            args.config.display(),
            config.device
        );
        return Err(Failure::Usage(message));
    }
    let run = Run::open(config).map_err(Failure::usage)?;
    if args.dry_run {
        let refused = run.refused.iter().map(|(job, error)| format!("job {job}: {error}"));
        let refused: Vec<String> = refused.collect();
        if !refused.is_empty() {
            return Err(Failure::Usage(refused.join("\nerror: ")));
        }
        print(&run.describe(&notes).map_err(Failure::usage)?)?;
        return Ok(Outcome::Done);
    }
    if verbosity.talks() {
        for warning in notes.iter().chain(&run.warnings) {
            eprintln!("warning: {warning}");
        }
    }
    let existing = match (args.force, args.resume) {
        (true, _) => Existing::Replace,
        (_, true) => Existing::Resume,
        _ => Existing::Refuse,
    };
    let results = train(run, args.threads, existing, verbosity)?;
    let is_failed = |result: &JobResult| result.outcome == checkpoint::Outcome::Failed;
    Ok(if results.iter().any(is_failed) { Outcome::Partly } else { Outcome::Done })
}

/// Trains the jobs of a run and writes its report; says what happens on standard error.
pub(super) fn train(
    run: Run,
    threads: Option<usize>,
    existing: Existing,
    verbosity: Verbosity,
) -> Result<Vec<JobResult>, Failure> {
    let out = run.config.out.clone();
    let backend = Cpu::new(threads).map_err(Failure::failed)?;
    let asks = run.jobs.iter().any(|job| job.config.eval_max_tokens > 0);
    let answerer = match asks {
        true => Some(EngineAnswerer::start(Arc::clone(&run.base), threads).map_err(Failure::failed)?),
        false => None,
    };
    let answerer = answerer.as_ref().map(|answerer| answerer as _);
    let mut watch = Watch::new(&run, verbosity);
    let results = run.train(backend, answerer, existing, &mut |event| watch.see(&event)).map_err(failure)?;
    write_run_report(&out).map_err(Failure::failed)?;
    if verbosity.talks() {
        eprintln!("{}", summary(&watch.summaries));
        eprintln!("report: {}", out.join(REPORT_FILE).display());
    }
    if let Some(error) = watch.failure {
        eprintln!("warning: TensorBoard's events are incomplete: {error}");
    }
    for result in results.iter().filter(|result| result.outcome == checkpoint::Outcome::Failed) {
        eprintln!("error: job {}: {}", result.name, result.failure.as_deref().unwrap_or("failed"));
    }
    Ok(results)
}

/// What is there already, or what another run has, is for the user to decide.
fn failure(error: TrainError) -> Failure {
    match error {
        TrainError::Exists { .. } | TrainError::Busy { .. } | TrainError::Changed { .. } => {
            Failure::usage(error)
        }
        _ => Failure::failed(error),
    }
}

/// Shows what happens, and remembers what the last table says.
struct Watch {
    progress: Progress,
    seats: HashMap<String, Seat>,
    summaries: Vec<JobSummary>,
    /// Where event files go, if they are wanted.
    events: Option<PathBuf>,
    /// The first reason why events could not be written.
    failure: Option<FormatError>,
}

/// A job in training.
struct Seat {
    started: Instant,
    events: Option<EventWriter>,
}

impl Watch {
    fn new(run: &Run, verbosity: Verbosity) -> Self {
        Self {
            progress: Progress::new(verbosity.talks()),
            seats: HashMap::new(),
            summaries: Vec::new(),
            events: run.config.tensorboard.then(|| run.config.out.clone()),
            failure: None,
        }
    }

    fn see(&mut self, event: &Event<'_>) {
        match event {
            Event::Seated { job, total_steps, from_step } => {
                self.progress.start(job, *total_steps, *from_step);
                let events = self.events.as_ref().map(|out| EventWriter::create(&out.join(job)));
                let events = events.and_then(|writer| self.keep(writer));
                self.seats.insert((*job).to_owned(), Seat { started: Instant::now(), events });
            }
            Event::Stepped { line } => {
                let progress = StepProgress { step: line.step, loss: line.loss, tokens: line.tokens as u64 };
                self.progress.step(&line.job, &progress);
                let norm = line.grad_norm.map(|norm| ("grad_norm".to_owned(), norm));
                let tasks = line.tasks.iter().map(|(task, step)| (format!("loss/{task}"), step.loss));
                let own = [("loss".to_owned(), line.loss), ("lr".to_owned(), line.lr)];
                self.write(&line.job, line.step, own.into_iter().chain(norm).chain(tasks));
            }
            Event::Evaluated { job, step, eval } => {
                self.progress.evaluated(job, *step, eval);
                let text = |key: &str| eval[key].as_str().unwrap_or_default().to_owned();
                let place = format!("{}/{}", text("split"), text("task"));
                let scalar = |key: &&str| Some((format!("{place}/{key}"), eval[*key].as_f64()?));
                let keys = ["loss", "perplexity", "exact_match", "label_accuracy", "f1"];
                self.write(job, *step, keys.iter().filter_map(scalar));
            }
            Event::Note { job, text } => self.progress.note(job, text),
            Event::Ended { job, result } => {
                self.progress.finish(job, &result.outcome.to_string());
                let seat = self.seats.remove(*job);
                let seconds = seat.as_ref().map_or(0.0, |seat| seat.started.elapsed().as_secs_f64());
                if let Some(mut events) = seat.and_then(|seat| seat.events) {
                    let flushed = events.flush();
                    self.keep(flushed);
                }
                self.summaries.push(job_summary(result, seconds));
            }
        }
    }

    fn write(&mut self, job: &str, step: u64, scalars: impl Iterator<Item = (String, f64)>) {
        let Some(mut events) = self.seats.get_mut(job).and_then(|seat| seat.events.take()) else { return };
        let mut written = Ok(());
        for (tag, value) in scalars {
            written = written.and_then(|()| events.scalar(&tag, step, value));
        }
        if self.keep(written).is_some()
            && let Some(seat) = self.seats.get_mut(job)
        {
            seat.events = Some(events);
        }
    }

    /// Events are a convenience: where they fail, training goes on without.
    fn keep<T>(&mut self, result: Result<T, FormatError>) -> Option<T> {
        result.map_err(|error| self.failure.get_or_insert(error).to_string()).ok()
    }
}

fn job_summary(result: &JobResult, seconds: f64) -> JobSummary {
    let evaluations = || result.evaluations.iter().map(|(step, eval)| (*step, eval));
    let split_of = |eval: &Value| eval["split"].as_str().map(str::to_owned);
    let mut scores: Vec<TaskScore> = Vec::new();
    for (step, eval) in evaluations() {
        let Some(share) = eval["exact_match"].as_f64() else { continue };
        let task = eval["task"].as_str().unwrap_or_default();
        // Test data where there is some.
        let tested = |eval: &Value| eval["task"] == task && split_of(eval).as_deref() == Some("test");
        if split_of(eval).as_deref() == Some("valid") && evaluations().any(|(_, eval)| tested(eval)) {
            continue;
        }
        let place = scores.iter().position(|score| score.task == task).unwrap_or(scores.len());
        if place == scores.len() {
            scores.push(TaskScore { task: task.to_owned(), before: None, after: None });
        }
        *(if step == 0 { &mut scores[place].before } else { &mut scores[place].after }) = Some(share);
    }
    let last_step = evaluations().map(|(step, _)| step).max();
    let losses: Vec<f64> = evaluations()
        .filter(|(step, eval)| {
            Some(*step) == last_step && eval["split"] == "valid" && eval["trained"] == true
        })
        .filter_map(|(_, eval)| eval["loss"].as_f64())
        .collect();
    JobSummary {
        name: result.name.clone(),
        outcome: result.outcome.to_string(),
        steps: result.steps,
        loss: result.losses,
        valid_loss: (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64),
        scores,
        tokens: result.tokens,
        seconds,
    }
}
