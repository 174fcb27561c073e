//! The forward pass of a training step, and the losses of its labelled rows.

use std::ops::Range;
use std::sync::Arc;

use super::tape::{Attention, Buffers, Half, Picked, Tape, index_in};
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

    /// Runs all blocks, the last up to its attention. The residual streams stay on the tape, and with them what the
    /// backward pass is to find there.
    fn forward(&mut self, tape: &mut Tape<B>) -> Result<(), BackendError> {
        self.backend.embed(&self.model.embed_tokens, self.rows, &mut tape.buffers.streams[0])?;
        let last = self.model.blocks.len() - 1;
        for index in 0..last {
            self.attention(tape, index)?;
            let mut half = tape.half(index);
            self.middle(index, &mut half)?;
            self.gate_up(index, &mut half)?;
            self.output(index, &mut half)?;
        }
        self.attention(tape, last)
    }

    /// Computes again what the backward pass of a block (not the last) reads and the forward pass did not keep.
    pub fn recompute(&mut self, tape: &mut Tape<B>, index: usize) -> Result<(), BackendError> {
        let recompute = tape.recompute;
        if recompute == Recompute::Block {
            self.attention(tape, index)?;
        }
        let mut half = tape.half(index);
        if recompute == Recompute::Block {
            self.middle(index, &mut half)?;
        }
        if recompute != Recompute::None {
            self.gate_up(index, &mut half)?;
        }
        Ok(())
    }

    /// A block's attention.
    fn attention(&mut self, tape: &mut Tape<B>, index: usize) -> Result<(), BackendError> {
        let (block, count) = (self.block(index), self.count());
        let Buffers { streams, attention, normed, .. } = &mut tape.buffers;
        let kept = index_in(attention, index);
        let Attention { raw, qkv, context } = &mut attention[kept];

        self.norm(&streams[index], &block.attention_norm, normed)?;
        let product = raw.as_mut().unwrap_or(qkv);
        let ranks = &mut tape.ranks[index].attention_in;
        self.linear(block.attention_in, normed, Write::Replace, product, ranks)?;
        if let Some(raw) = raw {
            self.backend.copy(raw, count, qkv)?;
        }
        let (model, rows, norms) = (self.model, self.rows, self.head_norms(index));
        self.backend.rope_store(qkv, model.shape, norms, &model.rotary, rows, &mut tape.cache, 0)?;
        self.backend.attention(qkv, block.window, rows, &tape.cache, 0, context)
    }

    /// The residual stream after a block's attention.
    fn middle(&mut self, index: usize, half: &mut Half<'_, B>) -> Result<(), BackendError> {
        let (number, count) = (self.block(index).attention_out, self.count());
        self.backend.copy(half.stream, count, half.middle)?;
        self.linear(number, half.context, Write::Add, half.middle, &mut half.ranks.attention_out)
    }

    /// A block's gate and up products.
    fn gate_up(&mut self, index: usize, half: &mut Half<'_, B>) -> Result<(), BackendError> {
        let block = self.block(index);
        self.norm(half.middle, &block.mlp_norm, half.normed)?;
        self.linear(block.mlp_in, half.normed, Write::Replace, half.gate_up, &mut half.ranks.mlp_in)
    }

    /// The residual stream after a block.
    fn output(&mut self, index: usize, half: &mut Half<'_, B>) -> Result<(), BackendError> {
        let (number, count) = (self.block(index).mlp_out, self.count());
        self.backend.swiglu(half.gate_up, count, half.gated)?;
        self.backend.copy(half.middle, count, half.after)?;
        self.linear(number, half.gated, Write::Add, half.after, &mut half.ranks.mlp_out)
    }

    /// Appends the losses of the labelled rows, some rows at a time. Leaves the gradients of the last block's attention
    /// and of the stream past it and says so, unless nothing below needs them.
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

    /// What follows the last block's attention in some targets' rows: the rest of the block, logits and losses; and all
    /// of that backwards. `span` are the rows of the gradients to fill: theirs, and unlabelled ones around them.
    fn chunk(
        &mut self,
        tape: &mut Tape<B>,
        targets: &[RowTarget],
        span: Range<usize>,
        losses: &mut Vec<f32>,
    ) -> Result<bool, BackendError> {
        let (model, rows, lowest) = (self.model, self.rows, self.lowest);
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
        let last = model.blocks.len() - 1;
        let (buffers, logits) = (&mut tape.buffers, &mut tape.logits);
        let context = &buffers.attention[index_in(&buffers.attention, last)].context;
        self.backend.pick_rows(context, picked, gates, &mut buffers.picked.context)?;
        self.backend.pick_rows(&buffers.streams[last], picked, gates, &mut buffers.picked.stream)?;

        let trainees = &mut *self.learning.trainees;
        let learning = Learning { gates, row_keys: keys, trainees, gate_gradients: None };
        let mut head = Pass { model, backend: &mut *self.backend, rows, learning, lowest };
        let mut half = Half::of_picked(buffers, &mut tape.ranks[last]);
        head.middle(last, &mut half)?;
        head.gate_up(last, &mut half)?;
        head.output(last, &mut half)?;
        let number = model.lm_head;
        head.norm(half.after, &model.final_norm, half.normed)?;
        head.linear(number, half.normed, Write::Replace, logits, &mut tape.head_ranks)?;
        if lowest > Depth::of_group(number) {
            head.backend.cross_entropy(logits, tokens, None, losses)?;
            return Ok(false);
        }
        head.backend.cross_entropy(logits, tokens, Some(weights), losses)?;
        if !head.linear_backward(number, half.normed, &tape.head_ranks, logits, half.d_normed)? {
            return Ok(false);
        }
        head.norm_backward(half.after, &model.final_norm, half.d_normed, Write::Replace, half.d_stream)?;
        if !head.half_backward(last, &mut half)? {
            return Ok(false);
        }
        let Buffers { d_stream, d_context, picked: picked_rows, .. } = buffers;
        self.backend.scatter_rows(&picked_rows.d_context, picked, span.clone(), d_context)?;
        self.backend.scatter_rows(&picked_rows.d_stream, picked, span, d_stream)?;
        Ok(true)
    }
}
