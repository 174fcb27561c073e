//! A small trainer: jobs in the slots of one transformer, step by step.

use loramux::adapter::Adapter;
use loramux::backend::Rows;
use loramux::backend::cpu::{Cpu, Isa};
use loramux::backend::training::{AdamW, PairValues, Part, Training};
use loramux::model::{Base, LearningBatch, Recompute, RowTarget, Tape, TapeSize, Transformer};

use crate::case::{Case, Job, Sample, Step};

type Trainee = <Cpu as Training>::Trainee;

/// How steps are run; none of it changes a bit.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub recompute: Recompute,
    /// Most samples of a forward pass.
    pub samples: usize,
    pub logit_rows: usize,
    pub threads: usize,
}

pub const WHOLE: Way =
    Way { recompute: Recompute::None, samples: usize::MAX, logit_rows: usize::MAX, threads: 2 };

/// What came of a job.
#[derive(Default)]
pub struct Trained {
    /// Before every update.
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
    pub first_gradients: Vec<PairValues>,
    pub weights: Vec<PairValues>,
}

impl Trained {
    pub fn assert_same_bits(&self, other: &Self, label: &str) {
        let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&self.losses), bits(&other.losses), "losses of {label}");
        assert_eq!(bits(&self.grad_norms), bits(&other.grad_norms), "gradient norms of {label}");
        let all = [(&self.first_gradients, &other.first_gradients), (&self.weights, &other.weights)];
        for (what, (one, other)) in ["gradients", "weights"].into_iter().zip(all) {
            assert_eq!(one.len(), other.len(), "{label}");
            for (pair, (one, other)) in one.iter().zip(other).enumerate() {
                for (one, other) in
                    [(&one.a, &other.a), (&one.b, &other.b), (&one.magnitude, &other.magnitude)]
                {
                    let same =
                        one.iter().map(|value| value.to_bits()).eq(other.iter().map(|value| value.to_bits()));
                    assert!(same, "{what} of pair {pair} of {label} differ");
                }
            }
        }
    }
}

pub struct Trainer {
    pub backend: Cpu,
    pub transformer: Transformer<Cpu>,
    pub tape: Tape<Cpu>,
    pub trainees: Vec<Option<Trainee>>,
    way: Way,
}

impl Trainer {
    /// With room for so many rows and sequences.
    pub fn new(base: &Base, rows: usize, sequences: usize, way: Way, isa: Isa) -> Self {
        let mut backend = Cpu::with_isa(isa, Some(way.threads)).unwrap();
        let transformer = Transformer::new(&mut backend, &base.config, &base.checkpoint, 64).unwrap();
        let size = TapeSize { rows, sequences, logit_rows: way.logit_rows };
        let tape = transformer.tape(&mut backend, size, way.recompute).unwrap();
        Self { backend, transformer, tape, trainees: Vec::new(), way }
    }

    /// Takes an adapter into training in the next slot.
    pub fn start(&mut self, adapter: &Adapter, dropout: f32) {
        let slot = self.trainees.len();
        let trainee = self.transformer.trainee(&mut self.backend, slot, adapter, dropout).unwrap();
        self.trainees.push(Some(trainee));
    }

    /// Forward and backward of some samples, each with its slot, its key and the weight of its targets. The losses are
    /// per sample.
    pub fn learn(&mut self, samples: &[(usize, u64, f32, &Sample)]) -> Vec<Vec<f32>> {
        let mut losses = Vec::new();
        for samples in samples.chunks(self.way.samples.min(samples.len().max(1))) {
            let step = StepRows::new(&self.transformer, samples);
            let mut all = Vec::new();
            let Self { backend, transformer, tape, trainees, .. } = self;
            transformer.learn(backend, &step.batch(), tape, trainees, &mut all).unwrap();
            let mut all = all.into_iter();
            losses.extend(
                samples.iter().map(|(.., sample)| all.by_ref().take(sample.targets().count()).collect()),
            );
            assert_eq!(all.next(), None, "a loss per target");
        }
        losses
    }

    pub fn read(&mut self, slot: usize, part: Part) -> Vec<PairValues> {
        self.backend.read_part(self.trainees[slot].as_ref().unwrap(), part).unwrap()
    }

    pub fn grad_norm(&mut self, slot: usize) -> f64 {
        let trainee = self.trainees[slot].as_ref().unwrap();
        self.backend.squared_gradients(trainee).unwrap().iter().sum::<f64>().sqrt()
    }

    pub fn update(&mut self, slot: usize, step: &AdamW) {
        let Self { backend, transformer, trainees, .. } = self;
        transformer.adamw(backend, slot, trainees[slot].as_mut().unwrap(), step).unwrap();
    }
}

/// The lists of one forward pass.
pub struct StepRows {
    pub rows: Rows,
    pub keys: Vec<u64>,
    pub targets: Vec<RowTarget>,
}

impl StepRows {
    pub fn new(transformer: &Transformer<Cpu>, samples: &[(usize, u64, f32, &Sample)]) -> Self {
        let mut step = Self { rows: Rows::default(), keys: Vec::new(), targets: Vec::new() };
        for &(slot, key, weight, sample) in samples {
            let first = step.rows.len();
            let target = |(row, token)| RowTarget { row: (first + row) as u32, token, weight };
            step.targets.extend(sample.targets().map(target));
            step.keys.extend((0..sample.tokens.len() as u64).map(|row| key << 32 | row));
            transformer.push_sample(&mut step.rows, &sample.tokens, Some(slot as u32));
        }
        step
    }

    pub fn batch(&self) -> LearningBatch<'_> {
        LearningBatch { rows: &self.rows, row_keys: &self.keys, targets: &self.targets }
    }
}

/// A job, or another adapter in its place.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub adapter: &'a Adapter,
    pub optimizer: &'a AdamW,
    pub steps: &'a [Step],
}

impl<'a> From<&'a Job> for Run<'a> {
    fn from(job: &'a Job) -> Self {
        Self { adapter: &job.initial, optimizer: &job.optimizer, steps: &job.steps }
    }
}

/// Trains some adapters side by side on the base of a case, each for as many steps as it has.
pub fn train(case: &Case, jobs: &[Run<'_>], dropout: f32, way: Way, isa: Isa) -> Vec<Trained> {
    let steps = jobs.iter().map(|job| job.steps.len()).max().unwrap();
    let samples = || jobs.iter().flat_map(|job| job.steps).flat_map(|step| &step.samples);
    let rows = samples().map(|sample| sample.tokens.len()).sum();
    let mut trainer = Trainer::new(&case.base, rows, samples().count(), way, isa);
    jobs.iter().for_each(|job| trainer.start(job.adapter, dropout));
    let mut trained: Vec<Trained> = jobs.iter().map(|_| Trained::default()).collect();
    for index in 0..steps {
        let active =
            || jobs.iter().enumerate().filter_map(|(slot, job)| Some((slot, job, job.steps.get(index)?)));
        let mut samples = Vec::new();
        for (slot, _, step) in active() {
            let weight = 1.0 / step.labelled() as f32;
            let key = |number: usize| (index * 100 + number) as u64;
            samples.extend(
                step.samples.iter().enumerate().map(|(number, sample)| (slot, key(number), weight, sample)),
            );
        }
        let losses = trainer.learn(&samples);
        for (slot, job, step) in active() {
            let trained = &mut trained[slot];
            let own = samples.iter().zip(&losses).filter(|(sample, _)| sample.0 == slot);
            let sum: f64 = own.flat_map(|(_, losses)| losses).map(|&loss| f64::from(loss)).sum();
            trained.losses.push(sum / step.labelled() as f64);
            trained.grad_norms.push(trainer.grad_norm(slot));
            if index == 0 {
                trained.first_gradients = trainer.read(slot, Part::Gradients);
            }
            trainer.update(slot, &AdamW { step: index as u64 + 1, ..*job.optimizer });
        }
    }
    for (slot, trained) in trained.iter_mut().enumerate() {
        trained.weights = trainer.read(slot, Part::Weights);
    }
    trained
}
