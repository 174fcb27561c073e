//! Training: the forward and backward pass of a whole transformer, written once for every family and every backend.
//!
//! The rows of a step are whole samples of many jobs, one sequence after another. The forward pass keeps on a [`Tape`]
//! what the backward pass reads. What follows the last block's attention (the rest of the block, logits, losses) is
//! computed of the labelled rows alone, some at a time, forwards and at once backwards. The backward pass takes the
//! gradient of the residual stream from there to the lowest that any job of the step adapts; the base's own parameters
//! get none.
//!
//! What is not kept is computed again by the same operations in the same order, so a gradient has the same bits
//! whatever is kept. What a job's rows get does not depend on the others': they share no sum.

mod backward;
mod forward;
mod tape;

use super::sites::ModelSites;
use super::{ModelError, Transformer};
use crate::adapter::peft::content_hash;
use crate::adapter::{Adapter, SiteAdapter};
use crate::backend::training::{AdamW, Pair, PairValues, Part, Training};
use crate::backend::{BackendError, PAGE, Rows, SitePlace};
use crate::tensor::Tensor;

pub use tape::{Recompute, Tape, TapeSize};

/// The rows of one forward and backward pass.
pub struct LearningBatch<'a> {
    /// Whole samples, each a sequence from position 0 (see [`Transformer::push_sample`]), those with the same adapter
    /// neighbours.
    pub rows: &'a Rows,
    /// One number per row, the same in whatever step the row is computed: dropout is drawn from it.
    pub row_keys: &'a [u64],
    /// By ascending row, at most one of each row.
    pub targets: &'a [RowTarget],
}

/// What should follow a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowTarget {
    /// Number of the row in the batch.
    pub row: u32,
    pub token: u32,
    /// What the target's loss counts: its gradient is multiplied with this.
    pub weight: f32,
}

impl<B: Training> Transformer<B> {
    /// Appends a sample, of at most as many tokens as the transformer has positions, as the next sequence of a training
    /// batch for the adapter in `slot` (`None`: for the base alone).
    pub fn push_sample(&self, rows: &mut Rows, tokens: &[u32], slot: Option<u32>) {
        let first = rows.pages.len() as u32;
        let pages: Vec<u32> = (first..first + tokens.len().div_ceil(PAGE) as u32).collect();
        let entries = slot.map(|slot| (slot, 1.0));
        rows.push_sequence(tokens, 0, self.config.rope.variant_for(tokens.len()), &pages, entries.as_slice());
    }

    /// Takes an adapter into training and makes it the content of `slot`, which is empty; see [`Training::trainee`].
    /// Its pairs are the adapter's sites, in order.
    ///
    /// # Errors
    /// When the adapter has something that is not trained (see [`ModelError::Untrainable`]), or the backend has no room;
    /// the slot is empty then.
    pub fn trainee(
        &mut self,
        backend: &mut B,
        slot: usize,
        adapter: &Adapter,
        dropout: f32,
    ) -> Result<B::Trainee, ModelError> {
        let refuse = |problem: &str| Err(ModelError::Untrainable { problem: problem.to_owned() });
        if !adapter.saved_modules.is_empty() {
            return refuse("it replaces whole modules (`modules_to_save`), which are not trained");
        }
        if !adapter.saved_biases.is_empty() {
            return refuse("it replaces biases of the base (`bias`), which are not trained");
        }
        let pairs: Vec<Pair> = adapter.sites.iter().map(|site| self.pair(site)).collect::<Result<_, _>>()?;
        let Some(lowest) = pairs.iter().map(|pair| Depth::of(pair.place)).min() else {
            return refuse("it adapts nothing");
        };
        let (groups, table) = (&mut self.groups, &mut self.embed_tokens);
        let trainee = backend.scope(|backend| backend.trainee(groups, table, slot, &pairs, dropout));
        if trainee.is_err() {
            self.unload_adapter(backend, slot)?;
        }
        let trainee = trainee?;
        if self.trained_from.len() <= slot {
            self.trained_from.resize(slot + 1, Depth::ABOVE_ALL);
        }
        self.trained_from[slot] = lowest;
        Ok(trainee)
    }

    fn pair(&self, adapted: &SiteAdapter) -> Result<Pair, ModelError> {
        let place = self.places[adapted.site];
        let refuse = |what: &str| {
            let sites = ModelSites::new(&self.config);
            let module = &sites.table.get(adapted.site).module;
            Err(ModelError::Untrainable { problem: format!("`{module}` has {what}, which is not trained") })
        };
        if adapted.bias.is_some() {
            return refuse("a bias of its own (`lora_bias`)");
        }
        if adapted.magnitude.is_some() && place == SitePlace::Table {
            return refuse("a DoRA magnitude");
        }
        let weights = PairValues {
            a: adapted.a.to_f32(),
            b: adapted.b.to_f32(),
            magnitude: adapted.magnitude.clone().unwrap_or_default(),
        };
        Ok(Pair { place, rank: adapted.rank, scale: adapted.scale, weights })
    }

    /// The adapter that a trainee is by now, in f32; `template` is what it was made from.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn trained_adapter(
        &self,
        backend: &mut B,
        trainee: &B::Trainee,
        template: &Adapter,
    ) -> Result<Adapter, BackendError> {
        let parts = backend.read_part(trainee, Part::Weights)?;
        let site = |(adapted, values): (&SiteAdapter, PairValues)| SiteAdapter {
            a: Tensor::from_f32(adapted.a.shape().to_vec(), &values.a),
            b: Tensor::from_f32(adapted.b.shape().to_vec(), &values.b),
            magnitude: adapted.magnitude.is_some().then_some(values.magnitude),
            ..adapted.clone()
        };
        let sites = template.sites.iter().zip(parts).map(site).collect();
        let adapter = Adapter { sites, ..template.clone() };
        Ok(Adapter { hash: content_hash(&adapter, &ModelSites::new(&self.config).table), ..adapter })
    }

    /// One optimizer step; see [`Training::adamw`].
    ///
    /// # Errors
    /// When the backend fails.
    pub fn adamw(
        &mut self,
        backend: &mut B,
        slot: usize,
        trainee: &mut B::Trainee,
        step: &AdamW,
    ) -> Result<(), BackendError> {
        let (groups, table) = (&mut self.groups, &mut self.embed_tokens);
        backend.scope(|backend| backend.adamw(groups, table, slot, trainee, step))
    }

    /// Replaces one part of an adapter in training; see [`Training::write_part`].
    ///
    /// # Errors
    /// When the backend fails.
    pub fn write_part(
        &mut self,
        backend: &mut B,
        slot: usize,
        trainee: &mut B::Trainee,
        part: Part,
        values: &[PairValues],
    ) -> Result<(), BackendError> {
        let (groups, table) = (&mut self.groups, &mut self.embed_tokens);
        backend.scope(|backend| backend.write_part(groups, table, slot, trainee, part, values))
    }

    /// Losses (nats) of a batch without gradients, one per target, appended in order. The adapters in the slots of the
    /// rows need not be in training; nothing is dropped.
    ///
    /// # Errors
    /// When the backend fails.
    ///
    /// # Panics
    /// When the batch is larger than the tape, or the tape another transformer's.
    pub fn assess(
        &self,
        backend: &mut B,
        batch: &LearningBatch<'_>,
        tape: &mut Tape<B>,
        losses: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        self.run(backend, batch, tape, &mut [], losses)
    }

    /// Forward and backward: appends the loss (nats) of every target in order, and adds the batch's gradients to those
    /// of the trainees in the slots that its rows use. Begins the backend's step by itself.
    ///
    /// However a job's samples are cut into batches, in the same order, its gradients have the same bits. Of a batch
    /// without targets nothing is computed.
    ///
    /// # Errors
    /// When the backend fails; gradients are incomplete then.
    ///
    /// # Panics
    /// As [`assess`](Self::assess).
    pub fn learn(
        &self,
        backend: &mut B,
        batch: &LearningBatch<'_>,
        tape: &mut Tape<B>,
        trainees: &mut [Option<B::Trainee>],
        losses: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        self.run(backend, batch, tape, trainees, losses)
    }
}

/// Where something stands in the forward pass: the greater, the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Depth(usize);

impl Depth {
    pub const ABOVE_ALL: Self = Self(usize::MAX);

    fn of(place: SitePlace) -> Self {
        match place {
            SitePlace::Table => Self(0),
            SitePlace::Group(number, _) => Self::of_group(number),
        }
    }

    /// Groups are numbered as the forward pass meets them.
    fn of_group(number: usize) -> Self {
        Self(number + 1)
    }
}

#[cfg(test)]
mod tests;
