//! A whole run: from its configuration to the folders it leaves behind.
//!
//! Jobs queue for seats. A seated job is evaluated, trained step by step beside the others, evaluated again, and writes
//! its results. What fails for one job (a disk that is full, gradients that stay bad) ends that job alone.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use super::TrainError;
use super::answer::{Answerer, Questions};
use super::checkpoint::{self, JobState, JobTensors, Outcome};
use super::config::{AdapterConfig, RunConfig};
use super::data::Dataset;
use super::evaluate::Scores;
use super::folder::{self, DataEntry, Existing, Found, Lock, Manifest};
use super::identity::{difference, identity, identity_of_manifest};
use super::job::Job;
use super::metrics::{Metrics, StepLine};
use super::plan::{self, BaseShape, JobData, Machine, PairShape};
use super::prepare::{PreparedJob, Reader};
use super::trainer::{Seat, Trainer};
use crate::adapter::peft::{WriteOptions, write_adapter};
use crate::backend::training::{PairValues, Training};
use crate::model::Base;

/// Everything that a run needs before it starts: checked configuration, an open base, data in memory.
pub struct Run {
    pub config: RunConfig,
    pub base: Arc<Base>,
    /// In the configuration's order.
    pub jobs: Vec<PreparedJob>,
    /// Jobs that cannot start, and why.
    pub refused: Vec<(String, TrainError)>,
    /// What is odd about the data, with file and line.
    pub warnings: Vec<String>,
}

/// What happens in a run, as it happens.
pub enum Event<'a> {
    Seated {
        job: &'a str,
        total_steps: u64,
        from_step: u64,
    },
    Stepped {
        line: &'a StepLine,
    },
    /// `eval` as in `metrics.jsonl`.
    Evaluated {
        job: &'a str,
        step: u64,
        eval: &'a Value,
    },
    Note {
        job: &'a str,
        text: &'a str,
    },
    Ended {
        job: &'a str,
        result: &'a JobResult,
    },
}

/// How a job ended.
#[derive(Clone, Debug)]
pub struct JobResult {
    pub name: String,
    pub outcome: Outcome,
    pub steps: u64,
    /// Losses of the first and last step of this run, where there was one.
    pub losses: Option<(f64, f64)>,
    /// Tokens computed in this run.
    pub tokens: u64,
    /// Why it failed.
    pub failure: Option<String>,
    /// Evaluations of step 0 and of the end, as in `metrics.jsonl`.
    pub evaluations: Vec<(u64, Value)>,
}

impl Run {
    /// Opens the base and reads all data. A job whose data or adapter is not what it should be is refused by itself.
    ///
    /// # Errors
    /// When the base cannot be read, or no job can start.
    pub fn open(config: RunConfig) -> Result<Self, TrainError> {
        let base = Arc::new(Base::open(&config.model)?);
        let mut reader = Reader::new(&base);
        let (mut jobs, mut refused) = (Vec::new(), Vec::new());
        for job in &config.jobs {
            match reader.prepare(job, config.resolved(job)) {
                Ok(job) => jobs.push(job),
                Err(error) => refused.push((job.name.clone(), error)),
            }
        }
        let warnings = reader.warnings;
        if jobs.is_empty() && !refused.is_empty() {
            let (job, error) = refused.swap_remove(0);
            return Err(TrainError::Refused { job, source: Box::new(error) });
        }
        Ok(Self { config, base, jobs, refused, warnings })
    }

    /// Rows that passes have room for: what the configuration says, but room for every sample.
    pub fn pass_rows(&self) -> usize {
        let tasks = self.jobs.iter().flat_map(|job| &job.data);
        let files = tasks.flat_map(|task| [&task.train, &task.valid, &task.test]).flatten();
        let longest = files.flat_map(|data| &data.samples).map(|sample| sample.tokens.len()).max();
        self.config.max_tokens_per_step.max(longest.unwrap_or(0))
    }

    /// What the run is about to do, in words; `notes` are the configuration's.
    ///
    /// # Errors
    /// When the base cannot be read or evaluated on, or nothing can be drawn from a job's data.
    pub fn describe(&self, notes: &[String]) -> Result<String, TrainError> {
        let base = BaseShape::new(&self.base.config, &self.base.checkpoint)?;
        let mut parts = Vec::new();
        for job in &self.jobs {
            let steps = Job::new(job.config.clone(), job.data.clone())?.total_steps();
            let tasks: Vec<_> = (job.data.iter())
                .map(|task| plan::TaskData {
                    train: task.train.as_deref(),
                    valid: task.valid.as_deref(),
                    test: task.test.as_deref(),
                    leakage: task.leakage,
                })
                .collect();
            parts.push((&job.config, PairShape::of(&job.template), steps, tasks));
        }
        let jobs: Vec<_> = (parts.iter())
            .map(|(config, pairs, steps, tasks)| JobData { config, pairs, steps: *steps, tasks })
            .collect();
        let notes: Vec<String> = notes.iter().chain(&self.warnings).cloned().collect();
        Ok(plan::describe(&self.config, &base, &jobs, &notes, Machine::this())?)
    }

    /// Trains all jobs on `backend`. `answerer` generates answers for evaluations; without, losses alone are evaluated.
    ///
    /// # Errors
    /// When results are there already and `existing` does not allow it, or the run as a whole cannot go on. What fails for
    /// one job is in that job's result.
    pub fn train<B: Training>(
        self,
        backend: B,
        answerer: Option<&dyn Answerer>,
        existing: Existing,
        observer: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<JobResult>, TrainError> {
        let _lock = Lock::take(&self.config.out)?;
        let base_hash = self.base.checkpoint.content_hash()?;
        let rows = self.pass_rows();
        let trainer = Trainer::new(backend, Arc::clone(&self.base), rows, self.config.recompute)?;
        let mut hall = Hall { trainer, answerer, base_hash, model: self.config.model.clone(), observer };
        let mut queue = VecDeque::new();
        let mut results: Vec<Option<JobResult>> = Vec::new();
        for (index, job) in self.jobs.into_iter().enumerate() {
            let folder = self.config.out.join(&job.config.name);
            let queued = Queued { index, folder, job };
            results.push(match hall.prepare(&queued, existing) {
                Ok(Found::Ended(manifest)) => Some(ended_before(&queued.job.config.name, &manifest)),
                Ok(Found::Nothing | Found::Begun) => {
                    queue.push_back(queued);
                    None
                }
                // Nothing has begun yet, and what to do about it is the user's to say.
                Err(error @ TrainError::Exists { .. }) => return Err(error),
                Err(error) => Some(hall.fail(&queued.job.config.name, error)?),
            });
        }
        for (name, error) in self.refused {
            results.push(Some(hall.fail(&name, error)?));
        }
        let mut seated: Vec<Seated> = Vec::new();
        let mut turn = 0;
        while !(queue.is_empty() && seated.is_empty()) {
            while seated.len() < self.config.max_concurrent_jobs
                && let Some(queued) = queue.pop_front()
            {
                let (index, name) = (queued.index, queued.job.config.name.clone());
                match hall.seat(queued) {
                    Ok(job) => seated.push(job),
                    Err(error) => results[index] = Some(hall.fail(&name, error)?),
                }
            }
            // Who has no batch draws one or leaves.
            let mut index = 0;
            while index < seated.len() {
                let job = &mut seated[index];
                if job.is_over() || (job.seat.job.batch.is_none() && !job.seat.job.draw()) {
                    let job = seated.remove(index);
                    let place = job.index;
                    results[place] = Some(hall.end(job)?);
                } else {
                    index += 1;
                }
            }
            if seated.is_empty() {
                continue;
            }
            // Turns, so that a pass that is full does not keep the last jobs waiting for ever.
            turn = (turn + 1) % seated.len();
            let (after, before) = seated.split_at_mut(turn);
            let mut seats: Vec<&mut Seat> = before.iter_mut().chain(after).map(|job| &mut job.seat).collect();
            hall.trainer.pass(&mut seats)?;
            let mut index = 0;
            while index < seated.len() {
                let complete = seated[index].seat.job.batch_is_taken();
                match complete.then(|| hall.step(&mut seated[index])) {
                    Some(Err(error)) => {
                        let job = seated.remove(index);
                        let (place, name) = (job.index, job.seat.job.config.name.clone());
                        hall.trainer.leave(job.seat)?;
                        results[place] = Some(hall.fail(&name, error)?);
                    }
                    _ => index += 1,
                }
            }
        }
        Ok(results.into_iter().flatten().collect())
    }
}

/// A job that waits for a seat.
struct Queued {
    index: usize,
    folder: PathBuf,
    job: PreparedJob,
}

/// A job in training, with what it has to remember and to write.
struct Seated {
    /// In the configuration.
    index: usize,
    folder: PathBuf,
    seat: Seat,
    state: JobState,
    metrics: Metrics,
    best: Option<Vec<PairValues>>,
    lineage: Vec<Value>,
    resolved: Value,
    use_rslora: bool,
    losses: Option<(f64, f64)>,
    tokens: u64,
    evaluations: Vec<(u64, Value)>,
    /// Tensors whose gradient was not finite, last time that happened.
    skipped: Vec<String>,
}

impl Seated {
    fn is_over(&self) -> bool {
        self.state.outcome.is_some()
    }

    fn name(&self) -> &str {
        &self.seat.job.config.name
    }
}

/// Where jobs sit: the model in training and what is around it.
struct Hall<'a, B: Training> {
    trainer: Trainer<B>,
    answerer: Option<&'a dyn Answerer>,
    base_hash: String,
    model: PathBuf,
    observer: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Training> Hall<'_, B> {
    /// Makes a job's folder ready; what has ended there must be what is asked for, and whole.
    fn prepare(&self, queued: &Queued, existing: Existing) -> Result<Found, TrainError> {
        let found = folder::prepare(&queued.folder, existing)?;
        if let Found::Ended(manifest) = &found {
            let (before, now) = (identity_of_manifest(manifest), self.identity(&queued.job));
            if let Some(what) = difference(&before, &now) {
                let folder = queued.folder.clone();
                return Err(TrainError::Changed { folder, found: "its results are", what });
            }
            folder::finish(&queued.folder)?;
        }
        Ok(found)
    }

    fn identity(&self, job: &PreparedJob) -> Value {
        identity(&job.resolved, &self.base_hash, &job.data, &job.lineage)
    }

    /// Seats a job: anew with an evaluation of what it begins with, or where its checkpoint was.
    fn seat(&mut self, queued: Queued) -> Result<Seated, TrainError> {
        let Queued { index, folder, job } = queued;
        let identity = self.identity(&job);
        let PreparedJob { config, data, template, lineage, resolved } = job;
        let (dropout, use_rslora) = match &config.adapter {
            AdapterConfig::Fresh { dropout, use_rslora, .. } => (*dropout, *use_rslora),
            AdapterConfig::From { dropout, .. } => (*dropout, false),
        };
        let mut job = Job::new(config, data)?;
        let resumed = checkpoint::load(&folder)?;
        let (state, tensors) = match resumed {
            Some((state, tensors)) => {
                if let Some(what) = difference(&state.identity, &identity) {
                    return Err(TrainError::Changed { folder, found: "its checkpoint is", what });
                }
                job.resume(&state)?;
                (state, Some(tensors))
            }
            None => (JobState::new(identity, job.sampler.state().clone(), job.data.len()), None),
        };
        let metrics = Metrics::open(&folder, state.metrics_bytes)?;
        let mut seat = self.trainer.seat(job, template, dropout, tensors.as_ref())?;
        seat.updates = state.updates;
        let mut job = Seated {
            index,
            folder,
            state,
            metrics,
            best: tensors.and_then(|tensors| tensors.best),
            lineage,
            resolved,
            use_rslora,
            losses: None,
            tokens: 0,
            evaluations: Vec::new(),
            skipped: Vec::new(),
            seat,
        };
        let (total_steps, from_step) = (job.seat.job.total_steps(), job.state.step);
        (self.observer)(Event::Seated { job: job.name(), total_steps, from_step });
        if job.metrics.is_empty()
            && let Err(error) = self.evaluate(&mut job, true).and_then(|_| Ok(job.metrics.sync()?))
        {
            self.trainer.leave(job.seat)?;
            return Err(error);
        }
        Ok(job)
    }

    /// The optimizer step of a job whose batch is complete, and what is due after it.
    fn step(&mut self, job: &mut Seated) -> Result<(), TrainError> {
        let stepped = self.trainer.step(&mut job.seat)?;
        let line = stepped.line;
        job.metrics.step(&line)?;
        (self.observer)(Event::Stepped { line: &line });
        let config = &job.seat.job.config;
        let (eval_every, save_every) = (config.eval_every, config.save_every);
        job.state.step = line.step;
        job.state.updates = job.seat.updates;
        job.tokens += line.tokens as u64;
        job.losses = Some((job.losses.map_or(line.loss, |(first, _)| first), line.loss));
        if let Some(cosines) = stepped.cosines {
            job.state.affinity.add(&cosines);
        }
        if !line.skipped.is_empty() {
            job.state.bad_steps += 1;
            let text = format!("step {}: the gradient is not finite in {}", line.step, few(&line.skipped));
            (self.observer)(Event::Note { job: &line.job, text: &text });
            job.skipped = line.skipped;
            if job.state.bad_steps >= config.max_bad_steps {
                job.state.outcome = Some(Outcome::Failed);
            }
        }
        let is_last = line.step >= job.seat.job.total_steps();
        if job.state.outcome.is_none() && !is_last && eval_every > 0 && line.step % eval_every == 0 {
            self.evaluate(job, false)?;
        }
        if is_last {
            job.state.outcome = job.state.outcome.or(Some(Outcome::Finished));
        }
        if job.is_over() {
            return Ok(());
        }
        if save_every > 0 && line.step % save_every == 0 {
            self.save(job)?;
        }
        Ok(())
    }

    /// Evaluates a job's adapter on the validation data of its tasks; at its beginning and end on the test data too.
    fn evaluate(&mut self, job: &mut Seated, with_test: bool) -> Result<(), TrainError> {
        let step = job.state.step;
        self.write_affinity(job, step)?;
        let tasks = job.seat.job.data.clone();
        let mut data: Vec<(usize, &'static str, &Dataset)> = Vec::new();
        for (index, task) in tasks.iter().enumerate() {
            data.extend(task.valid.as_deref().map(|data| (index, "valid", data)));
            data.extend(task.test.as_deref().filter(|_| with_test).map(|data| (index, "test", data)));
        }
        let max_tokens = job.seat.job.config.eval_max_tokens;
        let scores = match self.answerer.filter(|_| max_tokens > 0 && !data.is_empty()) {
            Some(answerer) => {
                let adapter = self.trainer.adapter(&job.seat)?;
                let questions: Vec<Questions<'_>> = (data.iter())
                    .map(|&(task, _, data)| Questions {
                        samples: &data.samples,
                        classes: tasks[task].classes(data),
                    })
                    .collect();
                answerer.scores(&adapter, &questions, max_tokens)?
            }
            None => vec![Scores::default(); data.len()],
        };
        let mut losses = Vec::new();
        for ((index, split, data), scores) in data.into_iter().zip(scores) {
            let task = &tasks[index];
            let loss = self.trainer.loss(&job.seat, data)?;
            if split == "valid" {
                losses.push((index, loss));
            }
            let scores = Scores {
                loss: Some(loss),
                perplexity: Some(loss.exp()),
                samples: data.samples.len(),
                ..scores
            };
            let mut eval = json!({"task": task.name, "split": split, "trained": task.train.is_some()});
            if let (Value::Object(eval), Value::Object(scores)) = (&mut eval, json!(scores)) {
                eval.extend(scores);
            }
            job.metrics.append(&json!({"job": job.name(), "step": step, "eval": &eval}))?;
            (self.observer)(Event::Evaluated { job: job.name(), step, eval: &eval });
            job.evaluations.push((step, eval));
        }
        self.follow(job, &losses)
    }

    /// The loss of each task that has validation data.
    fn validation_losses(&mut self, job: &Seated) -> Result<Vec<(usize, f64)>, TrainError> {
        let mut losses = Vec::new();
        for (index, task) in job.seat.job.data.iter().enumerate() {
            if let Some(data) = &task.valid {
                losses.push((index, self.trainer.loss(&job.seat, data)?));
            }
        }
        Ok(losses)
    }

    /// Lets validation losses act: on what is drawn and how it weighs, and on whether training goes on.
    fn follow(&mut self, job: &mut Seated, losses: &[(usize, f64)]) -> Result<(), TrainError> {
        for &(task, loss) in losses {
            job.state.validation[task].push(if loss.is_finite() { loss } else { f64::INFINITY });
        }
        job.seat.job.follow_validation(&job.state.validation);
        let trained: Vec<f64> = (losses.iter())
            .filter(|(task, _)| job.seat.job.data[*task].train.is_some())
            .map(|&(_, loss)| loss)
            .collect();
        let Some(patience) = job.seat.job.config.early_stop.filter(|_| !trained.is_empty()) else {
            return Ok(());
        };
        let mean = trained.iter().sum::<f64>() / trained.len() as f64;
        if mean.is_finite() && job.state.best.is_none_or(|(_, best)| mean < best) {
            job.state.best = Some((job.state.step, mean));
            job.state.since_best = 0;
            job.best = Some(self.trainer.weights(&job.seat)?);
        } else {
            job.state.since_best += 1;
            if job.state.since_best >= patience {
                job.state.outcome = Some(Outcome::StoppedEarly);
            }
        }
        Ok(())
    }

    fn write_affinity(&mut self, job: &mut Seated, step: u64) -> Result<(), TrainError> {
        let means = std::mem::take(&mut job.state.affinity).means();
        if means.is_empty() {
            return Ok(());
        }
        let name = |index: usize| &job.seat.job.data[job.seat.tasks[index]].name;
        let pairs: Vec<Value> = means.iter().map(|&(i, j, mean)| json!([name(i), name(j), mean])).collect();
        let line = json!({"job": job.name(), "step": step, "affinity": pairs});
        Ok(job.metrics.append(&line)?)
    }

    /// Writes a checkpoint, and the adapter as it is.
    fn save(&mut self, job: &mut Seated) -> Result<(), TrainError> {
        job.metrics.sync()?;
        job.state.metrics_bytes = job.metrics.len();
        job.state.sampler = job.seat.job.sampler.state().clone();
        let tensors = JobTensors { best: job.best.clone(), ..self.trainer.tensors(&job.seat)? };
        checkpoint::save(&job.folder, &job.state, &tensors)?;
        self.write_adapter(job)
    }

    fn write_adapter(&mut self, job: &Seated) -> Result<(), TrainError> {
        let adapter = self.trainer.adapter(&job.seat)?;
        let options = WriteOptions { use_rslora: job.use_rslora };
        let sites = &self.trainer.base().checkpoint.sites().table;
        Ok(write_adapter(&job.folder, &adapter, sites, options)?)
    }

    /// Ends a job: its last evaluation, its results, its manifest. Also of one that was resumed after its last step.
    fn end(&mut self, mut job: Seated) -> Result<JobResult, TrainError> {
        let name = job.name().to_owned();
        let result = match self.conclude(&mut job) {
            Ok(()) => {
                let result = JobResult {
                    name: name.clone(),
                    outcome: job.state.outcome.unwrap_or(Outcome::Finished),
                    steps: job.state.step,
                    losses: job.losses,
                    tokens: job.tokens,
                    failure: (job.state.outcome == Some(Outcome::Failed)).then(|| {
                        let (steps, tensors) = (job.state.bad_steps, few(&job.skipped));
                        format!("{steps} steps had a gradient that is not finite, the last in {tensors}")
                    }),
                    evaluations: std::mem::take(&mut job.evaluations),
                };
                (self.observer)(Event::Ended { job: &name, result: &result });
                result
            }
            Err(error) => self.fail(&name, error)?,
        };
        self.trainer.leave(job.seat)?;
        Ok(result)
    }

    fn conclude(&mut self, job: &mut Seated) -> Result<(), TrainError> {
        let evaluated = job.state.concluded;
        if !evaluated {
            job.state.outcome = job.state.outcome.or(Some(Outcome::Finished));
            let outcome = job.state.outcome;
            if outcome != Some(Outcome::Failed) {
                // The last weights take part in the choice of the best ones.
                if job.seat.job.config.early_stop.is_some() && outcome != Some(Outcome::StoppedEarly) {
                    let losses = self.validation_losses(job)?;
                    self.follow(job, &losses)?;
                    job.state.outcome = outcome;
                }
                if let Some(best) = job.best.clone() {
                    self.trainer.set_weights(&job.seat, &best)?;
                }
                let state = job.state.clone();
                self.evaluate(job, true)?;
                // The final evaluation reports; it decides nothing any more.
                job.state = state;
            }
            job.state.concluded = true;
            self.save(job)?;
        } else {
            self.write_adapter(job)?;
        }
        let config = &job.seat.job.config;
        let mut entries = Vec::new();
        for task in &job.seat.job.data {
            let splits = [
                ("train", &task.train, 0),
                ("valid", &task.valid, task.leakage[0]),
                ("test", &task.test, task.leakage[1]),
            ];
            for (split, data, leakage) in splits {
                if let Some(data) = data {
                    entries.push(DataEntry { task: &task.name, split, data, leakage });
                }
            }
        }
        let manifest = Manifest {
            job: &config.name,
            model: &self.model,
            base_hash: &self.base_hash,
            config: job.resolved.clone(),
            seed: config.seed,
            data: entries,
            lineage: job.lineage.clone(),
            steps: job.state.step,
            bad_steps: job.state.bad_steps,
            best_step: job.state.best.map(|(step, _)| step),
            outcome: job.state.outcome.unwrap_or(Outcome::Finished),
        };
        folder::write_manifest(&job.folder, &manifest)?;
        folder::finish(&job.folder)
    }

    /// The result of a job that failed by itself. An error of the backend is everybody's.
    fn fail(&mut self, name: &str, error: TrainError) -> Result<JobResult, TrainError> {
        if matches!(error, TrainError::Backend(_)) {
            return Err(error);
        }
        let failure = error.to_string();
        (self.observer)(Event::Note { job: name, text: &failure });
        let result = JobResult {
            name: name.to_owned(),
            outcome: Outcome::Failed,
            steps: 0,
            losses: None,
            tokens: 0,
            failure: Some(failure),
            evaluations: Vec::new(),
        };
        (self.observer)(Event::Ended { job: name, result: &result });
        Ok(result)
    }
}

impl Job {
    /// Goes on from a checkpoint.
    fn resume(&mut self, state: &JobState) -> Result<(), TrainError> {
        self.step = state.step;
        self.sampler.restore(state.sampler.clone())?;
        if state.validation.iter().any(|losses| !losses.is_empty()) {
            self.follow_validation(&state.validation);
        }
        Ok(())
    }
}

/// The first of some names, and how many there are.
fn few(names: &[String]) -> String {
    match names {
        [] => "an earlier run".to_owned(),
        [first, second, third, rest @ ..] if !rest.is_empty() => {
            format!("{first}, {second}, {third} and {} more", rest.len())
        }
        names => names.join(", "),
    }
}

fn ended_before(name: &str, manifest: &Value) -> JobResult {
    let outcome = serde_json::from_value(manifest["outcome"].clone()).unwrap_or(Outcome::Finished);
    JobResult {
        name: name.to_owned(),
        outcome,
        steps: manifest["steps"].as_u64().unwrap_or(0),
        losses: None,
        tokens: 0,
        failure: (outcome == Outcome::Failed).then(|| "it failed in an earlier run".to_owned()),
        evaluations: Vec::new(),
    }
}
