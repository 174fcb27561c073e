//! The training loop: rows of all running jobs in one forward and backward pass, one optimizer step per job.
//!
//! A pass takes whole samples of the jobs' current batches, as many as there is room for. A job whose batch is complete
//! takes its optimizer step and draws the next; the others go on with theirs. Gradients add up sample by sample in the
//! order of the batch, and every row is computed by itself, so when a sample is computed, and beside what, changes
//! nothing.

use std::sync::Arc;

use super::checkpoint::JobTensors;
use super::config::Recompute;
use super::data::Dataset;
use super::job::{Job, Taken};
use super::metrics::StepLine;
use super::{TrainError, balance};
use crate::adapter::Adapter;
use crate::backend::sampling::Philox;
use crate::backend::training::{AdamW, PairValues, Part, Training};
use crate::backend::{BackendError, PAGE, Rows};
use crate::model::training::{LearningBatch, RowTarget, Tape, TapeSize};
use crate::model::{Base, Transformer};

/// The model in training: one base, the adapters of the running jobs, and room for the rows of one pass.
pub struct Trainer<B: Training> {
    backend: B,
    base: Arc<Base>,
    transformer: Transformer<B>,
    tape: Tape<B>,
    trainees: Vec<Option<B::Trainee>>,
    max_rows: usize,
    max_sequences: usize,
    pass: Pass,
}

/// The rows of one pass and what is expected of them, kept from pass to pass.
#[derive(Default)]
struct Pass {
    rows: Rows,
    row_keys: Vec<u64>,
    targets: Vec<RowTarget>,
    losses: Vec<f32>,
    pages: Vec<u32>,
    /// Which job each sample is of, its task and weight, and how many targets it has.
    samples: Vec<PassSample>,
}

struct PassSample {
    job: usize,
    task: usize,
    weight: f32,
    targets: usize,
}

impl Pass {
    fn clear(&mut self) {
        self.rows.clear();
        self.row_keys.clear();
        self.targets.clear();
        self.losses.clear();
        self.samples.clear();
    }

    fn push(&mut self, taken: &Taken<'_>, job: usize, slot: usize, rotary_variant: usize) {
        let first = self.rows.len();
        let tokens = &taken.sample.tokens;
        // Keys and values of a pass need no pages of their own: every sequence starts anew.
        let first_page = self.rows.pages.len() as u32;
        self.pages.clear();
        self.pages.extend(first_page..first_page + tokens.len().div_ceil(PAGE) as u32);
        self.rows.push_sequence(tokens, 0, rotary_variant, &self.pages, &[(slot as u32, 1.0)]);
        self.row_keys.extend((0..tokens.len() as u64).map(|row| taken.row_key.wrapping_add(row)));
        let target = |target: &super::data::Target| RowTarget {
            row: first as u32 + target.row,
            token: target.token,
            weight: taken.weight,
        };
        self.targets.extend(taken.sample.targets.iter().map(target));
        let targets = taken.sample.targets.len();
        self.samples.push(PassSample { job, task: taken.task, weight: taken.weight, targets });
    }
}

/// A job that is being trained: what it computes, and where.
pub struct Seat {
    pub job: Job,
    /// One slot, or with PCGrad one for each trained task: each gathers its own gradient, all hold the same weights.
    slots: Vec<usize>,
    /// Of the job's tasks those that are trained, ascending.
    pub tasks: Vec<usize>,
    /// The adapter as it began: its sites, ranks and scales.
    template: Adapter,
    /// Steps that changed the weights.
    pub updates: u64,
}

/// What an optimizer step did.
pub struct Stepped {
    pub line: StepLine,
    /// Cosines between the trained tasks' gradients, with PCGrad.
    pub cosines: Option<Vec<Vec<Option<f64>>>>,
}

impl<B: Training> Trainer<B> {
    /// A model in training for passes of up to `max_rows` rows, of samples of up to that many tokens.
    ///
    /// # Errors
    /// When the base cannot be read or there is no room.
    pub fn new(
        mut backend: B,
        base: Arc<Base>,
        max_rows: usize,
        recompute: Recompute,
    ) -> Result<Self, TrainError> {
        let transformer = Transformer::new(&mut backend, &base.config, &base.checkpoint, max_rows)?;
        let logit_rows = (B::LOGITS_BYTES / (base.config.vocab_size * size_of::<f32>())).clamp(1, max_rows);
        // A sequence has two tokens at least: one that predicts and one that is predicted.
        let max_sequences = max_rows.div_ceil(2);
        let size = TapeSize { rows: max_rows, sequences: max_sequences, logit_rows };
        let tape = transformer.tape(&mut backend, size, recompute)?;
        let (trainees, pass) = (Vec::new(), Pass::default());
        Ok(Self { backend, base, transformer, tape, trainees, max_rows, max_sequences, pass })
    }

    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// Takes a job in, whose adapter is `template`; where it goes on, with the tensors of its checkpoint.
    ///
    /// # Errors
    /// When the adapter cannot be trained or there is no room.
    pub fn seat(
        &mut self,
        job: Job,
        template: Adapter,
        dropout: f32,
        resumed: Option<&JobTensors>,
    ) -> Result<Seat, TrainError> {
        let tasks: Vec<usize> = (0..job.data.len()).filter(|&task| job.data[task].train.is_some()).collect();
        let count = if job.config.pcgrad { tasks.len() } else { 1 };
        let mut seat = Seat { job, slots: Vec::new(), tasks, template, updates: 0 };
        for _ in 0..count {
            let slot = self.trainees.iter().position(Option::is_none).unwrap_or(self.trainees.len());
            let trainee = self.transformer.trainee(&mut self.backend, slot, &seat.template, dropout)?;
            if slot == self.trainees.len() {
                self.trainees.push(None);
            }
            self.trainees[slot] = Some(trainee);
            seat.slots.push(slot);
        }
        if let Some(tensors) = resumed {
            self.set_weights(&seat, &tensors.weights)?;
            self.write(seat.slots[0], Part::FirstMoments, &tensors.first_moments)?;
            self.write(seat.slots[0], Part::SecondMoments, &tensors.second_moments)?;
        }
        Ok(seat)
    }

    /// Lets a job go; its slots are free.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn leave(&mut self, seat: Seat) -> Result<Job, TrainError> {
        for slot in seat.slots {
            self.trainees[slot] = None;
            self.transformer.unload_adapter(&mut self.backend, slot)?;
        }
        Ok(seat.job)
    }

    /// One pass over samples of the jobs' batches. Jobs that come first take room first; the caller lets them take
    /// turns.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn pass(&mut self, seats: &mut [&mut Seat]) -> Result<(), TrainError> {
        let pass = &mut self.pass;
        pass.clear();
        // Rows of one slot are neighbours: each job's in its turn, with PCGrad each task's.
        for (index, seat) in seats.iter_mut().enumerate() {
            while pass.samples.len() < self.max_sequences {
                let Some(taken) = seat.job.peek(self.max_rows - pass.rows.len()) else { break };
                let place = seat.tasks.binary_search(&taken.task).unwrap_or(0);
                let slot = seat.slots[if seat.slots.len() > 1 { place } else { 0 }];
                let variant = self.base.config.rope.variant_for(taken.sample.tokens.len());
                pass.push(&taken, index, slot, variant);
                seat.job.take();
            }
        }
        let batch = LearningBatch { rows: &pass.rows, row_keys: &pass.row_keys, targets: &pass.targets };
        self.transformer.learn(
            &mut self.backend,
            &batch,
            &mut self.tape,
            &mut self.trainees,
            &mut pass.losses,
        )?;
        let mut losses = pass.losses.as_slice();
        for sample in &pass.samples {
            let (own, rest) = losses.split_at(sample.targets);
            seats[sample.job].job.add_losses(sample.task, sample.weight, own);
            losses = rest;
        }
        Ok(())
    }

    /// The optimizer step of a job whose batch is complete. Where its gradient is not finite, nothing changes but the
    /// step's number, and the line names the tensors.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn step(&mut self, seat: &mut Seat) -> Result<Stepped, TrainError> {
        let mut line = seat.job.end_batch();
        let cosines = if seat.slots.len() > 1 { Some(self.join_gradients(seat)?) } else { None };
        let slot = seat.slots[0];
        let squares = self.backend.squared_gradients(trainee(&self.trainees, slot))?;
        let norm = squares.iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            let gradients = self.backend.read_part(trainee(&self.trainees, slot), Part::Gradients)?;
            line.skipped = self.name_non_finite(&seat.template, &gradients);
            for &slot in &seat.slots {
                self.backend.clear_gradients(trainee_mut(&mut self.trainees, slot))?;
            }
            return Ok(Stepped { line, cosines });
        }
        line.grad_norm = Some(norm);
        seat.updates += 1;
        let config = &seat.job.config.optimizer;
        let clipped = config.max_grad_norm > 0.0 && norm > config.max_grad_norm;
        // As torch.nn.utils.clip_grad_norm_ divides.
        let gradient_scale = if clipped { (config.max_grad_norm / (norm + 1e-6)) as f32 } else { 1.0 };
        let step = AdamW {
            lr: line.lr,
            lr_b: line.lr * config.lr_b_ratio,
            weight_decay: config.weight_decay,
            betas: config.betas,
            eps: config.eps,
            step: seat.updates,
            gradient_scale,
        };
        self.transformer.adamw(&mut self.backend, slot, trainee_mut(&mut self.trainees, slot), &step)?;
        if seat.slots.len() > 1 {
            let weights = self.weights(seat)?;
            self.set_weights(seat, &weights)?;
        }
        Ok(Stepped { line, cosines })
    }

    /// PCGrad over the tasks' gradients, the result in the first slot's; returns their cosines.
    fn join_gradients(&mut self, seat: &Seat) -> Result<Vec<Vec<Option<f64>>>, TrainError> {
        let mut gradients = Vec::new();
        let mut shape = Vec::new();
        for &slot in &seat.slots {
            shape = self.backend.read_part(trainee(&self.trainees, slot), Part::Gradients)?;
            gradients.push(flat(&shape));
            self.backend.clear_gradients(trainee_mut(&mut self.trainees, slot))?;
        }
        let random = Philox::new(seat.job.config.seed);
        let tasks = seat.slots.len();
        let order = |task: usize| {
            let mut others: Vec<usize> = (0..tasks).collect();
            // The paper's random order, the same when the step is computed again.
            others.sort_by_key(|&other| random.bits(u64::MAX - seat.job.step, (task * tasks + other) as u64));
            others
        };
        let (joined, cosines) = balance::pcgrad(&gradients, order);
        unflatten(&joined, &mut shape);
        self.write(seat.slots[0], Part::Gradients, &shape)?;
        Ok(cosines)
    }

    fn name_non_finite(&self, template: &Adapter, gradients: &[PairValues]) -> Vec<String> {
        let sites = &self.base.checkpoint.sites().table;
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        let mut names = Vec::new();
        for (site, gradient) in template.sites.iter().zip(gradients) {
            let parts = [
                ("lora_A", &gradient.a),
                ("lora_B", &gradient.b),
                ("lora_magnitude_vector", &gradient.magnitude),
            ];
            for (name, _) in parts.into_iter().filter(|(_, values)| !finite(values)) {
                names.push(format!("{}.{name}", sites.get(site.site).module));
            }
        }
        names
    }

    /// Mean loss, in nats, of a data set's labelled tokens under a job's adapter, without dropout.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn loss(&mut self, seat: &Seat, data: &Dataset) -> Result<f64, TrainError> {
        let (mut sum, mut count) = (0.0, 0usize);
        let mut samples = data.samples.iter().peekable();
        while samples.peek().is_some() {
            let pass = &mut self.pass;
            pass.clear();
            while let Some(sample) = samples.next_if(|sample| {
                pass.samples.len() < self.max_sequences
                    && pass.rows.len() + sample.tokens.len() <= self.max_rows
            }) {
                let variant = self.base.config.rope.variant_for(sample.tokens.len());
                let taken = Taken { task: 0, sample, weight: 1.0, row_key: 0 };
                pass.push(&taken, 0, seat.slots[0], variant);
            }
            let batch = LearningBatch { rows: &pass.rows, row_keys: &pass.row_keys, targets: &pass.targets };
            self.transformer.assess(&mut self.backend, &batch, &mut self.tape, &mut pass.losses)?;
            sum += pass.losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            count += pass.losses.len();
        }
        Ok(sum / count as f64)
    }

    /// The adapter of a job as it is now.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn adapter(&mut self, seat: &Seat) -> Result<Adapter, TrainError> {
        let trainee = trainee(&self.trainees, seat.slots[0]);
        Ok(self.transformer.trained_adapter(&mut self.backend, trainee, &seat.template)?)
    }

    /// A job's weights, pair by pair.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn weights(&mut self, seat: &Seat) -> Result<Vec<PairValues>, TrainError> {
        Ok(self.backend.read_part(trainee(&self.trainees, seat.slots[0]), Part::Weights)?)
    }

    /// All of a job's tensors but the best weights.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn tensors(&mut self, seat: &Seat) -> Result<JobTensors, TrainError> {
        let trainee = trainee(&self.trainees, seat.slots[0]);
        Ok(JobTensors {
            weights: self.backend.read_part(trainee, Part::Weights)?,
            first_moments: self.backend.read_part(trainee, Part::FirstMoments)?,
            second_moments: self.backend.read_part(trainee, Part::SecondMoments)?,
            best: None,
        })
    }

    /// Replaces a job's weights.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn set_weights(&mut self, seat: &Seat, weights: &[PairValues]) -> Result<(), TrainError> {
        for &slot in &seat.slots {
            self.write(slot, Part::Weights, weights)?;
        }
        Ok(())
    }

    fn write(&mut self, slot: usize, part: Part, values: &[PairValues]) -> Result<(), BackendError> {
        let trainee = trainee_mut(&mut self.trainees, slot);
        self.transformer.write_part(&mut self.backend, slot, trainee, part, values)
    }
}

fn trainee<T>(trainees: &[Option<T>], slot: usize) -> &T {
    trainees[slot].as_ref().expect("a job's slots hold its adapter")
}

fn trainee_mut<T>(trainees: &mut [Option<T>], slot: usize) -> &mut T {
    trainees[slot].as_mut().expect("a job's slots hold its adapter")
}

/// All numbers of all pairs in a row.
fn flat(pairs: &[PairValues]) -> Vec<f32> {
    pairs.iter().flat_map(|pair| [&pair.a, &pair.b, &pair.magnitude]).flatten().copied().collect()
}

/// The reverse of [`flat`], into pairs of the same shape.
fn unflatten(mut values: &[f32], pairs: &mut [PairValues]) {
    for part in pairs.iter_mut().flat_map(|pair| [&mut pair.a, &mut pair.b, &mut pair.magnitude]) {
        let (own, rest) = values.split_at(part.len());
        part.copy_from_slice(own);
        values = rest;
    }
}
