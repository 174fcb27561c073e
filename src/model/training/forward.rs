//! The forward pass of a training step, and the losses of its labelled rows.

use std::ops::Range;
use std::sync::Arc;

use super::tape::{Attention, Buffers, Picked, Tape, index_in};
use super::{Depth, LearningBatch, Recompute, RowTarget};
use crate::backend::training::{Learning, Training};
use crate::backend::{BackendError, HeadNorms, Rows, Write};
use crate::model::Transformer;
use crate::model::transformer::Block;

/// What the operations of a step are about.
pub(super) struct Pass<'a, B: Training> {
    pub model: &'a Transformer<B>,
    pub backend: &'a mut B,
    pub rows: &'a Rows,
    /// Of all rows, or of the picked ones.
    pub learning: Learning<'a, B>,
    /// The lowest that a trainee of these rows adapts: above all where none of them is in training.
    pub lowest: Depth,
}

impl<B: Training> Transformer<B> {
    /// Losses of a batch, and gradients where there are trainees.
    pub(super) fn run(
        &self,
        backend: &mut B,
        batch: &LearningBatch<'_>,
        tape: &mut Tape<B>,
        trainees: &mut [Option<B::Trainee>],
        losses: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        let &LearningBatch { rows, row_keys, targets } = batch;
        assert!(Arc::ptr_eq(&self.identity, &tape.transformer), "a tape of another transformer");
        assert!(
            rows.len() <= tape.size.rows && rows.sequences.len() <= tape.size.sequences,
            "a batch larger than its tape"
        );
        assert!(rows.sequences.iter().all(|sequence| sequence.start == 0), "samples start at position 0");
        assert_eq!(row_keys.len(), rows.len(), "a key per row");
        assert!(targets.is_sorted_by(|one, next| one.row < next.row), "targets by ascending row");
        if targets.is_empty() {
            return Ok(());
        }
        let lowest = self.lowest(rows, trainees);
        let learning = Learning { gates: &rows.gates, row_keys, trainees, gate_gradients: None };
        backend.scope(|backend| {
            backend.begin_step(rows)?;
            let mut pass = Pass { model: self, backend, rows, learning, lowest };
            pass.forward(tape)?;
            if pass.losses(tape, targets, losses)? { pass.backward(tape) } else { Ok(()) }
        })
    }

    /// The lowest that any trainee of these rows adapts.
    pub(super) fn lowest(&self, rows: &Rows, trainees: &[Option<B::Trainee>]) -> Depth {
        let slots = rows.gates.runs().iter().flat_map(|run| rows.gates.experts_of(run));
        let trained = slots.filter(|&&slot| trainees.get(slot as usize).is_some_and(Option::is_some));
        trained.map(|&slot| self.trained_from[slot as usize]).min().unwrap_or(Depth::ABOVE_ALL)
    }
}

impl<'a, B: Training> Pass<'a, B> {
    /// How many rows the operations are about.
    pub fn count(&self) -> usize {
        self.learning.gates.rows()
    }

    pub fn block(&self, index: usize) -> &'a Block<B> {
        &self.model.blocks[index]
    }

    pub fn norm(&mut self, x: &B::Buffer, weight: &B::Vector, y: &mut B::Buffer) -> Result<(), BackendError> {
        self.backend.rms_norm(x, self.learning.gates.rows(), weight, self.model.config.rms_norm_eps, y)
    }

    pub fn head_norms(&self, index: usize) -> Option<HeadNorms<'a, B>> {
        let epsilon = self.model.config.rms_norm_eps;
        self.block(index).head_norms.as_ref().map(|(q, k)| HeadNorms { q, k, epsilon })
    }

    fn linear(
        &mut self,
        number: usize,
        x: &B::Buffer,
        write: Write,
        y: &mut B::Buffer,
        ranks: &mut B::Ranks,
    ) -> Result<(), BackendError> {
        let group = &self.model.groups[number];
        self.backend.linear_kept(group, number, x, &self.learning, write, y, ranks)
    }

    /// Runs all blocks. The residual streams stay on the tape, and with them what the backward pass is to find there.
    fn forward(&mut self, tape: &mut Tape<B>) -> Result<(), BackendError> {
        self.backend.embed(&self.model.embed_tokens, self.rows, &mut tape.buffers.streams[0])?;
        for index in 0..self.model.blocks.len() {
            self.attention(tape, index)?;
            self.gate_up(tape, index)?;
            self.output(tape, index)?;
        }
        Ok(())
    }

    /// Computes again what the backward pass of a block reads and the forward pass did not keep.
    pub fn recompute(&mut self, tape: &mut Tape<B>, index: usize) -> Result<(), BackendError> {
        // The last block's is still there.
        if index + 1 == self.model.blocks.len() {
            return Ok(());
        }
        if tape.recompute == Recompute::Block {
            self.attention(tape, index)?;
        }
        if tape.recompute != Recompute::None {
            self.gate_up(tape, index)?;
        }
        Ok(())
    }

    /// A block's first half, up to the residual stream after attention.
    fn attention(&mut self, tape: &mut Tape<B>, index: usize) -> Result<(), BackendError> {
        let (block, count) = (self.block(index), self.count());
        let Buffers { streams, attention, normed, .. } = &mut tape.buffers;
        let (stream, ranks) = (&streams[index], &mut tape.ranks[index]);
        let kept = index_in(attention, index);
        let Attention { raw, qkv, context, middle } = &mut attention[kept];

        self.norm(stream, &block.attention_norm, normed)?;
        let product = raw.as_mut().unwrap_or(qkv);
        self.linear(block.attention_in, normed, Write::Replace, product, &mut ranks.attention_in)?;
        if let Some(raw) = raw {
            self.backend.copy(raw, count, qkv)?;
        }
        let (model, rows, norms) = (self.model, self.rows, self.head_norms(index));
        self.backend.rope_store(qkv, model.shape, norms, &model.rotary, rows, &mut tape.cache, 0)?;
        self.backend.attention(qkv, block.window, rows, &tape.cache, 0, context)?;
        self.backend.copy(stream, count, middle)?;
        self.linear(block.attention_out, context, Write::Add, middle, &mut ranks.attention_out)
    }

    /// A block's gate and up products.
    fn gate_up(&mut self, tape: &mut Tape<B>, index: usize) -> Result<(), BackendError> {
        let block = self.block(index);
        let Buffers { attention, gate_up, normed, .. } = &mut tape.buffers;
        let kept = index_in(gate_up, index);

        self.norm(&attention[index_in(attention, index)].middle, &block.mlp_norm, normed)?;
        let ranks = &mut tape.ranks[index].mlp_in;
        self.linear(block.mlp_in, normed, Write::Replace, &mut gate_up[kept], ranks)
    }

    /// The residual stream after a block.
    fn output(&mut self, tape: &mut Tape<B>, index: usize) -> Result<(), BackendError> {
        let count = self.count();
        let Buffers { streams, attention, gate_up, gated, .. } = &mut tape.buffers;
        let stream = &mut streams[index + 1];

        self.backend.swiglu(&gate_up[index_in(gate_up, index)], count, gated)?;
        self.backend.copy(&attention[index_in(attention, index)].middle, count, stream)?;
        self.linear(self.block(index).mlp_out, gated, Write::Add, stream, &mut tape.ranks[index].mlp_out)
    }

    /// Appends the losses of the labelled rows, whose logits exist some rows at a time. Leaves the gradient of the last
    /// stream and says so, unless nothing below `lm_head` needs it.
    fn losses(
        &mut self,
        tape: &mut Tape<B>,
        targets: &[RowTarget],
        losses: &mut Vec<f32>,
    ) -> Result<bool, BackendError> {
        let (mut goes_on, mut start) = (false, 0);
        let mut chunks = targets.chunks(tape.size.logit_rows).peekable();
        while let Some(chunk) = chunks.next() {
            let end = chunks.peek().map_or(self.rows.len(), |next| next[0].row as usize);
            goes_on = self.chunk(tape, chunk, start..end, losses)?;
            start = end;
        }
        Ok(goes_on)
    }

    /// Losses of some targets. `span` are the rows of the gradient to fill: theirs, and unlabelled ones around them.
    fn chunk(
        &mut self,
        tape: &mut Tape<B>,
        targets: &[RowTarget],
        span: Range<usize>,
        losses: &mut Vec<f32>,
    ) -> Result<bool, BackendError> {
        let (model, rows, lowest) = (self.model, self.rows, self.lowest);
        let Buffers { streams, normed, picked: stream, d_picked, d_normed, d_stream, .. } = &mut tape.buffers;
        let Picked { rows: picked, tokens, weights, keys, gates } = &mut tape.picked;
        picked.clear();
        tokens.clear();
        weights.clear();
        keys.clear();
        for target in targets {
            picked.push(target.row);
            tokens.push(target.token);
            weights.push(target.weight);
            keys.push(self.learning.row_keys[target.row as usize]);
        }
        rows.gates.pick(picked, gates);
        self.backend.pick_rows(&streams[model.blocks.len()], picked, gates, stream)?;

        let trainees = &mut *self.learning.trainees;
        let learning = Learning { gates, row_keys: keys, trainees, gate_gradients: None };
        let mut head = Pass { model, backend: &mut *self.backend, rows, learning, lowest };
        let (number, logits) = (model.lm_head, &mut tape.logits);
        head.norm(stream, &model.final_norm, normed)?;
        head.linear(number, normed, Write::Replace, logits, &mut tape.head_ranks)?;
        if lowest > Depth::of_group(number) {
            head.backend.cross_entropy(logits, tokens, None, losses)?;
            return Ok(false);
        }
        head.backend.cross_entropy(logits, tokens, Some(weights), losses)?;
        if !head.linear_backward(number, normed, &tape.head_ranks, logits, d_normed)? {
            return Ok(false);
        }
        head.norm_backward(stream, &model.final_norm, d_normed, Write::Replace, d_picked)?;
        self.backend.scatter_rows(d_picked, picked, span, d_stream)?;
        Ok(true)
    }
}
