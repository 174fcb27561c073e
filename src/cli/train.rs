//! `loramux train`: many jobs from one configuration file, trained side by side.

use std::path::PathBuf;
use std::sync::Arc;

use super::output::print;
use super::{Failure, Outcome, Verbosity};
use crate::backend::cpu::Cpu;
use crate::train::TrainError;
use crate::train::answer::EngineAnswerer;
use crate::train::checkpoint;
use crate::train::config::RunConfig;
use crate::train::folder::Existing;
use crate::train::run::{Event, JobResult, Run, write_reports};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Configuration of the run: base, jobs, data, hyperparameters
    #[arg(value_name = "CONFIG.toml")]
    config: PathBuf,
    /// Print the plan and what is in the data, train nothing
    #[arg(long, conflicts_with_all = ["resume", "force"])]
    dry_run: bool,
    /// Go on from the checkpoints of an earlier run; what is finished stays
    #[arg(long, conflicts_with = "force")]
    resume: bool,
    /// Replace the results of an earlier run
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
    let results = run.train(backend, answerer, existing, &mut |_: Event<'_>| {}).map_err(failure)?;
    write_reports(&out).map_err(Failure::failed)?;
    if verbosity.talks() {
        eprintln!("{}", out.display());
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
