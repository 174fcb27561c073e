//! Which samples come next.
//!
//! A draw picks a task, then that task's next sample. With N the number of a task's samples:
//!
//! | strategy | share of a task |
//! |---|---|
//! | proportional | ∝ N |
//! | uniform | equal, drawn |
//! | round-robin | equal, in turn |
//! | temperature T | ∝ N^(1/T) |
//! | annealed | ∝ N^α, α = 1 − 0.8 (e − 1)/(E − 1) in epoch e of E (Stickland & Murray 2019) |
//! | even-then-hard | equal, then ∝ validation loss over its start once that is known |
//!
//! Tasks with a ratio take that share of all draws, the others divide the rest by the strategy. An epoch is as many
//! draws as the trained tasks have samples. A task's samples come in a new random order on every pass over them, or in
//! the file's order; none comes twice within a pass.
//!
//! A job with one trained task sees every sample exactly once per epoch, so its last batch may be smaller. Where tasks
//! are drawn, no pass ends with the run anyway, and all batches are full.
//!
//! Every choice is a function of the seed and of counters (Philox): the state to resume from is the counters alone, and
//! neither the platform nor other jobs can change a draw. Shares are whole numbers for the same reason: a last bit of
//! `pow` that differs does not show.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::backend::sampling::Philox;
use crate::train::config::{BatchTasks, Length, Sampling};

/// Stream of the choice of tasks; task t's orders are stream `TASKS + 1 + t`. Whoever else draws by a job's seed counts
/// streams from 0.
const TASKS: u64 = 1 << 63;
/// What a share of 1 counts.
const WHOLE: f64 = (1u64 << 40) as f64;
/// What a difficulty of 1 counts, and the largest that does.
const DIFFICULTY: f64 = (1u64 << 32) as f64;
const HARDEST: f64 = 1e6;

/// Why a job's samples cannot be drawn.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("no task has samples to train on")]
    NothingToTrain,
    #[error("task {task} has {size} samples; at most {} are supported", u32::MAX)]
    TooMany { task: usize, size: usize },
    #[error("{field} is {found}; wanted {wanted}")]
    Plan { field: &'static str, found: String, wanted: &'static str },
    #[error("the state to resume from is not of this job: {0}")]
    State(String),
}

/// What to draw from and how.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingPlan {
    pub sampling: Sampling,
    pub batch_tasks: BatchTasks,
    /// Training samples of each task; 0 for a guard, which is never drawn.
    pub sizes: Vec<usize>,
    /// Each task's fixed share of all draws, where it has one.
    pub ratios: Vec<Option<f64>>,
    /// Samples per optimizer step.
    pub batch_size: usize,
    pub length: Length,
    pub shuffle: bool,
    pub seed: u64,
}

/// A sample that was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Draw {
    /// Index into the plan's sizes.
    pub task: usize,
    /// Index into the task's samples.
    pub sample: usize,
}

/// How far a sampler has come: all that is needed to go on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerState {
    /// Batches drawn.
    pub steps: u64,
    /// Samples drawn from each task.
    pub draws: Vec<u64>,
    /// Each task's difficulty, in units of 2⁻³².
    pub difficulties: Option<Vec<u64>>,
}

/// What a job has seen of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pub draws: u64,
    /// Different samples among them.
    pub distinct: u64,
    /// Draws of samples that had been drawn before.
    pub repeats: u64,
}

/// Draws a job's batches.
#[derive(Clone, Debug)]
pub struct Sampler {
    plan: SamplingPlan,
    random: Philox,
    /// Draws of an epoch, and of the whole run.
    epoch_draws: u64,
    run_draws: u64,
    epochs: u64,
    state: SamplerState,
    orders: Vec<Order>,
}

/// The order of a task's samples in one pass over them.
#[derive(Clone, Debug, Default)]
struct Order {
    pass: u64,
    /// Empty before it is needed.
    samples: Vec<u32>,
}

impl Sampler {
    /// A sampler at the start of its run.
    ///
    /// # Errors
    /// When the plan has no training sample or a number out of range.
    pub fn new(plan: SamplingPlan) -> Result<Self, SamplingError> {
        check(&plan)?;
        let batch = plan.batch_size as u64;
        let epoch_draws: u64 = plan.sizes.iter().map(|&size| size as u64).sum();
        let (wanted, epochs) = match plan.length {
            Length::Steps(steps) => {
                let draws = steps.saturating_mul(batch);
                (draws, draws.div_ceil(epoch_draws))
            }
            Length::Epochs(epochs) => {
                ((epochs * epoch_draws as f64).round().max(1.0) as u64, epochs.ceil() as u64)
            }
        };
        let single = plan.sizes.iter().filter(|&&size| size > 0).count() == 1;
        let run_draws = if single { wanted } else { wanted.div_ceil(batch).saturating_mul(batch) };
        let tasks = plan.sizes.len();
        Ok(Self {
            random: Philox::new(plan.seed),
            epoch_draws,
            run_draws,
            epochs,
            state: SamplerState { draws: vec![0; tasks], ..SamplerState::default() },
            orders: vec![Order::default(); tasks],
            plan,
        })
    }

    /// Optimizer steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.run_draws.div_ceil(self.plan.batch_size as u64)
    }

    /// The next batch, in the order of its draws; `None` at the end of the run.
    pub fn next_batch(&mut self) -> Option<Vec<Draw>> {
        let left = self.run_draws - self.drawn();
        if left == 0 {
            return None;
        }
        let count = left.min(self.plan.batch_size as u64);
        let shares = self.shares();
        let batch = match self.plan.batch_tasks {
            BatchTasks::Mixed => (0..count)
                .map(|_| {
                    let task = self.choose_task(&shares, self.drawn());
                    self.draw(task)
                })
                .collect(),
            BatchTasks::One => {
                let task = self.choose_task(&shares, self.state.steps);
                (0..count).map(|_| self.draw(task)).collect()
            }
        };
        self.state.steps += 1;
        Some(batch)
    }

    /// Epochs done: samples drawn over samples of an epoch.
    pub fn epoch(&self) -> f64 {
        self.drawn() as f64 / self.epoch_draws as f64
    }

    /// What [`Self::restore`] needs to go on from here.
    pub fn state(&self) -> &SamplerState {
        &self.state
    }

    /// Goes on where another sampler of the same plan was.
    ///
    /// # Errors
    /// When the counters cannot be those of this plan.
    pub fn restore(&mut self, state: SamplerState) -> Result<(), SamplingError> {
        let tasks = self.plan.sizes.len();
        let counted = state.draws.len();
        if counted != tasks || state.difficulties.as_ref().is_some_and(|list| list.len() != tasks) {
            return Err(SamplingError::State(format!("it counts {counted} tasks, the job has {tasks}")));
        }
        let guards = state.draws.iter().zip(&self.plan.sizes).filter(|(_, size)| **size == 0);
        let drawn = state.draws.iter().fold(0u64, |sum, &draws| sum.saturating_add(draws));
        let wanted = state.steps.saturating_mul(self.plan.batch_size as u64).min(self.run_draws);
        if drawn != wanted || state.steps > self.steps() || guards.into_iter().any(|(&draws, _)| draws > 0) {
            return Err(SamplingError::State(format!("{drawn} samples in {} steps", state.steps)));
        }
        self.state = state;
        Ok(())
    }

    /// Tells `even-then-hard` how hard each task is: its validation loss over the one before training. What is no
    /// number of at least 0, as for a task without validation data, counts 1. Other strategies do not ask.
    pub fn set_difficulties(&mut self, difficulties: &[f64]) {
        let counted = |difficulty: Option<&f64>| {
            let known = difficulty.copied().filter(|value| *value >= 0.0).unwrap_or(1.0);
            (known.min(HARDEST) * DIFFICULTY).round() as u64
        };
        let tasks = 0..self.plan.sizes.len();
        self.state.difficulties = Some(tasks.map(|task| counted(difficulties.get(task))).collect());
    }

    /// What has been drawn from each task.
    pub fn seen(&self) -> Vec<Seen> {
        let tasks = self.state.draws.iter().zip(&self.plan.sizes);
        tasks
            .map(|(&draws, &size)| {
                let distinct = draws.min(size as u64);
                Seen { draws, distinct, repeats: draws - distinct }
            })
            .collect()
    }

    fn drawn(&self) -> u64 {
        self.state.draws.iter().sum()
    }

    /// Tasks that the strategy divides draws between.
    fn unfixed(&self) -> impl Iterator<Item = usize> {
        let tasks = self.plan.sizes.iter().zip(&self.plan.ratios).enumerate();
        tasks.filter(|(_, (size, ratio))| **size > 0 && ratio.is_none()).map(|(task, _)| task)
    }

    /// Each task's share of the draws, as whole numbers: at least 1 for a trained task, so that none is lost to rounding.
    fn shares(&self) -> Vec<u64> {
        let plan = &self.plan;
        let counted = |share: f64| ((share * WHOLE).round() as u64).max(1);
        let largest = self.unfixed().map(|task| plan.sizes[task]).max().unwrap_or(1) as f64;
        // Relative to the largest, for no power to overflow.
        let size = |task: usize| plan.sizes[task] as f64 / largest;
        let weight = |task: usize| match plan.sampling {
            Sampling::Uniform | Sampling::RoundRobin => 1.0,
            Sampling::Proportional => size(task),
            Sampling::Temperature(temperature) => size(task).powf(1.0 / temperature),
            Sampling::Annealed => size(task).powf(self.annealed_exponent()),
            Sampling::EvenThenHard => self.state.difficulties.as_ref().map_or(1.0, |list| list[task] as f64),
        };
        let mut weights: Vec<(usize, f64)> = self.unfixed().map(|task| (task, weight(task))).collect();
        let mut sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
        // Nothing is hard any more.
        if sum == 0.0 {
            weights.iter_mut().for_each(|(_, weight)| *weight = 1.0);
            sum = weights.len() as f64;
        }
        let mut left = 1.0;
        let mut shares = vec![0; plan.sizes.len()];
        for (task, ratio) in plan.ratios.iter().enumerate() {
            if let Some(ratio) = ratio.filter(|_| plan.sizes[task] > 0) {
                shares[task] = counted(ratio);
                left -= ratio;
            }
        }
        for (task, weight) in weights {
            shares[task] = counted(left * weight / sum);
        }
        shares
    }

    /// α of the current epoch: 1 in the first, 0.2 in the last.
    fn annealed_exponent(&self) -> f64 {
        let epoch = (self.drawn() / self.epoch_draws).min(self.epochs - 1);
        if self.epochs > 1 { 1.0 - 0.8 * epoch as f64 / (self.epochs - 1) as f64 } else { 1.0 }
    }

    /// The task of choice number `turn`.
    fn choose_task(&self, shares: &[u64], turn: u64) -> usize {
        let mut point = below(self.random.bits(TASKS, turn), shares.iter().sum());
        let chosen = shares.iter().position(|&share| {
            let inside = point < share;
            point = point.saturating_sub(share);
            inside
        });
        let task = chosen.expect("a plan has a share to draw from");
        if self.plan.sampling == Sampling::RoundRobin && self.plan.ratios[task].is_none() {
            let draws: u64 = self.unfixed().map(|task| self.state.draws[task]).sum();
            let turns = match self.plan.batch_tasks {
                BatchTasks::Mixed => draws,
                BatchTasks::One => draws / self.plan.batch_size as u64,
            };
            let others: Vec<usize> = self.unfixed().collect();
            return others[(turns % others.len() as u64) as usize];
        }
        task
    }

    fn draw(&mut self, task: usize) -> Draw {
        let size = self.plan.sizes[task] as u64;
        let (pass, index) = (self.state.draws[task] / size, (self.state.draws[task] % size) as usize);
        self.state.draws[task] += 1;
        if !self.plan.shuffle {
            return Draw { task, sample: index };
        }
        let order = &mut self.orders[task];
        if order.samples.is_empty() || order.pass != pass {
            *order = Order::new(self.random, TASKS + 1 + task as u64, pass, size as u32);
        }
        Draw { task, sample: order.samples[index] as usize }
    }
}

impl Order {
    /// A random permutation (Fisher–Yates).
    fn new(random: Philox, stream: u64, pass: u64, size: u32) -> Self {
        let mut samples: Vec<u32> = (0..size).collect();
        for last in (1..size).rev() {
            let bits = random.bits(stream, pass << 32 | u64::from(last));
            samples.swap(last as usize, below(bits, u64::from(last) + 1) as usize);
        }
        Self { pass, samples }
    }
}

/// A number below `limit` from 64 random bits.
fn below(bits: u64, limit: u64) -> u64 {
    ((u128::from(bits) * u128::from(limit)) >> 64) as u64
}

fn check(plan: &SamplingPlan) -> Result<(), SamplingError> {
    let refuse = |field, found: String, wanted| Err(SamplingError::Plan { field, found, wanted });
    let positive = |value: f64| value.is_finite() && value > 0.0;
    if plan.ratios.len() != plan.sizes.len() {
        return refuse("ratios", format!("a list of {}", plan.ratios.len()), "one for each task");
    }
    if plan.batch_size == 0 {
        return refuse("batch_size", "0".to_owned(), "at least 1");
    }
    match plan.length {
        Length::Epochs(epochs) if !positive(epochs) => {
            return refuse("epochs", epochs.to_string(), "a number above 0");
        }
        Length::Steps(0) => return refuse("steps", "0".to_owned(), "at least 1"),
        _ => {}
    }
    if let Sampling::Temperature(temperature) = plan.sampling
        && !positive(temperature)
    {
        return refuse("temperature", temperature.to_string(), "a number above 0");
    }
    let sizes = plan.sizes.iter().copied().enumerate();
    if let Some((task, size)) = sizes.into_iter().find(|(_, size)| u32::try_from(*size).is_err()) {
        return Err(SamplingError::TooMany { task, size });
    }
    let trained = || plan.sizes.iter().zip(&plan.ratios).filter(|(size, _)| **size > 0).map(|(_, r)| *r);
    if trained().next().is_none() {
        return Err(SamplingError::NothingToTrain);
    }
    if let Some(ratio) = trained().flatten().find(|ratio| !positive(*ratio) || *ratio > 1.0) {
        return refuse("ratio", ratio.to_string(), "a share above 0 and at most 1");
    }
    let fixed: f64 = trained().flatten().sum();
    if fixed >= 1.0 && trained().any(|ratio| ratio.is_none()) {
        return refuse("the sum of ratios", fixed.to_string(), "less than 1: other tasks have none");
    }
    Ok(())
}
