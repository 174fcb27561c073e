//! One job: its data, what comes next, and what a batch adds up to. Nothing here knows where it is computed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::balance::{Weighed, coba_weights, token_weights};
use super::config::{JobConfig, Sampling};
use super::data::{Dataset, Sample};
use super::metrics::StepLine;
use super::sampling::{Draw, Sampler, SamplingError, SamplingPlan};
use crate::backend::sampling::Philox;

/// The data of one task. Jobs share a file that they all read.
#[derive(Clone)]
pub struct TaskData {
    pub name: String,
    pub train: Option<Arc<Dataset>>,
    pub valid: Option<Arc<Dataset>>,
    pub test: Option<Arc<Dataset>>,
    /// Samples of `valid` and `test` that are in `train` too.
    pub leakage: [usize; 2],
}

impl TaskData {
    /// The answers that are classes in one of the task's files. The training data decides, because a small file may lack
    /// some of them, or have answers that are few by chance; what the file has beyond them is added.
    pub fn classes(&self, data: &Dataset) -> BTreeMap<String, usize> {
        match &self.train {
            Some(train) if train.classes.is_empty() => BTreeMap::new(),
            Some(train) => {
                train.classes.iter().chain(&data.classes).map(|(name, &n)| (name.clone(), n)).collect()
            }
            None => data.classes.clone(),
        }
    }
}

/// A batch in the making: drawn, and computed sample by sample.
pub struct Batch {
    draws: Vec<Draw>,
    weights: Vec<f32>,
    /// The next sample that no step has taken.
    next: usize,
    /// Weighted loss of the samples computed.
    loss: f64,
    /// Losses of labelled tokens by task, unweighted.
    task_losses: Vec<f64>,
}

/// A sample as a step takes it.
pub struct Taken<'a> {
    pub task: usize,
    pub sample: &'a Sample,
    /// Of every labelled token's loss.
    pub weight: f32,
    /// Of row 0; the others count on.
    pub row_key: u64,
}

/// What a job is about to compute.
pub struct Job {
    pub config: JobConfig,
    pub data: Vec<TaskData>,
    pub sampler: Sampler,
    pub batch: Option<Batch>,
    /// Steps done.
    pub step: u64,
    /// Task weights by CoBa.
    factors: Option<Vec<f64>>,
}

impl Job {
    /// A job before its first step.
    ///
    /// # Errors
    /// When nothing can be drawn from its data.
    pub fn new(config: JobConfig, data: Vec<TaskData>) -> Result<Self, SamplingError> {
        let plan = SamplingPlan {
            sampling: config.sampling,
            batch_tasks: config.batch_tasks,
            sizes: data.iter().map(|task| task.train.as_ref().map_or(0, |data| data.samples.len())).collect(),
            ratios: config.tasks.iter().map(|task| task.ratio).collect(),
            batch_size: config.batch_size,
            length: config.length,
            shuffle: config.shuffle,
            seed: config.seed,
        };
        Ok(Self { sampler: Sampler::new(plan)?, config, data, batch: None, step: 0, factors: None })
    }

    /// Steps in all, should nothing end it early.
    pub fn total_steps(&self) -> u64 {
        self.sampler.steps()
    }

    /// Draws the next batch; `false` when there is none.
    pub fn draw(&mut self) -> bool {
        let Some(draws) = self.sampler.next_batch() else { return false };
        let weighed = |draw: &Draw| Weighed { task: draw.task, labels: self.sample(draw).targets.len() };
        let weighed: Vec<Weighed> = draws.iter().map(weighed).collect();
        let weights = token_weights(&weighed, self.config.balance, self.factors.as_deref());
        let task_losses = vec![0.0; self.data.len()];
        self.batch = Some(Batch { draws, weights, next: 0, loss: 0.0, task_losses });
        true
    }

    fn sample(&self, draw: &Draw) -> &Sample {
        let train = self.data[draw.task].train.as_ref().expect("only tasks with training data are drawn");
        &train.samples[draw.sample]
    }

    /// The batch's next sample, if it has at most `rows` rows; it stays the next until it is [taken](Self::take).
    pub fn peek(&self, rows: usize) -> Option<Taken<'_>> {
        let batch = self.batch.as_ref()?;
        let draw = batch.draws.get(batch.next)?;
        let sample = self.sample(draw);
        let row_key = row_key(self.config.seed, self.step, batch.next);
        let weight = batch.weights[batch.next];
        (sample.tokens.len() <= rows).then_some(Taken { task: draw.task, sample, weight, row_key })
    }

    /// Moves on to the sample after the one that [`peek`](Self::peek) showed.
    pub fn take(&mut self) {
        if let Some(batch) = &mut self.batch {
            batch.next += 1;
        }
    }

    /// Adds a computed sample's losses, one per labelled token. Samples come in order.
    pub fn add_losses(&mut self, task: usize, weight: f32, losses: &[f32]) {
        if let Some(batch) = &mut self.batch {
            for &loss in losses {
                batch.loss += f64::from(weight) * f64::from(loss);
                batch.task_losses[task] += f64::from(loss);
            }
        }
    }

    /// Whether every sample of the batch has been taken.
    pub fn batch_is_taken(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| batch.next == batch.draws.len())
    }

    /// Ends the batch; the line lacks what the optimizer knows.
    pub fn end_batch(&mut self) -> StepLine {
        let batch = self.batch.take().expect("a batch that is computed");
        self.step += 1;
        let mut line = StepLine {
            job: self.config.name.clone(),
            step: self.step,
            epoch: self.sampler.epoch(),
            loss: batch.loss,
            grad_norm: None,
            lr: self.config.optimizer.lr_at(self.step, self.total_steps()),
            tokens: 0,
            labels: 0,
            samples: batch.draws.len(),
            tasks: BTreeMap::new(),
            skipped: Vec::new(),
        };
        for draw in &batch.draws {
            let sample = self.sample(draw);
            line.tokens += sample.tokens.len();
            line.labels += sample.targets.len();
            let task = line.tasks.entry(self.data[draw.task].name.clone()).or_default();
            task.samples += 1;
            task.labels += sample.targets.len();
        }
        for (index, (task, loss)) in self.data.iter().zip(&batch.task_losses).enumerate() {
            if let Some(entry) = line.tasks.get_mut(&task.name) {
                entry.loss = loss / entry.labels as f64;
                entry.weight = self.factors.as_ref().map(|factors| factors[index]);
            }
        }
        line
    }

    /// Takes validation losses into what depends on them: `history` is by task and evaluation, oldest first.
    pub fn follow_validation(&mut self, history: &[Vec<f64>]) {
        let relative = |losses: &Vec<f64>| losses.iter().map(|loss| loss / losses[0]).collect::<Vec<f64>>();
        let relative: Vec<Vec<f64>> = history.iter().map(relative).collect();
        if self.config.coba {
            // A guard task has a history and no weight.
            let trained: Vec<usize> =
                (0..self.data.len()).filter(|&task| self.data[task].train.is_some()).collect();
            let weights =
                coba_weights(&trained.iter().map(|&task| relative[task].clone()).collect::<Vec<_>>());
            let mut factors = vec![1.0; self.data.len()];
            trained.iter().zip(weights).for_each(|(&task, weight)| factors[task] = weight);
            self.factors = Some(factors);
        }
        if self.config.sampling == Sampling::EvenThenHard {
            let last = |losses: &Vec<f64>| losses.last().copied().unwrap_or(1.0);
            self.sampler.set_difficulties(&relative.iter().map(last).collect::<Vec<_>>());
        }
    }
}

/// A number for the first row of a sample: different for every sample of every step of every seed, but for chance.
fn row_key(seed: u64, step: u64, index: usize) -> u64 {
    Philox::new(seed).bits(step, index as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(classes: &[(&str, usize)]) -> Option<Arc<Dataset>> {
        let classes = classes.iter().map(|&(name, samples)| (name.to_owned(), samples)).collect();
        Some(Arc::new(Dataset { classes, ..Dataset::default() }))
    }

    #[test]
    fn the_training_data_says_what_the_classes_are() {
        let task = |train, test| TaskData { name: "t".to_owned(), train, valid: None, test, leakage: [0; 2] };
        let classes = |task: TaskData| {
            let test = task.test.clone().unwrap();
            task.classes(&test).into_keys().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            classes(task(data(&[("no", 5), ("yes", 9)]), data(&[]))),
            "no yes",
            "too few lines to tell"
        );
        assert_eq!(
            classes(task(data(&[("no", 5), ("yes", 9)]), data(&[("maybe", 1), ("no", 2)]))),
            "maybe no yes"
        );
        assert_eq!(classes(task(data(&[]), data(&[("Paris", 2)]))), "", "answers are alike by chance");
        assert_eq!(classes(task(None, data(&[("no", 2)]))), "no", "a guard task has no training data");
    }
}
