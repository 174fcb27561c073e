//! The backward pass of a training step.
//!
//! `d_stream` is the gradient of the residual stream: it passes every block unchanged, and grows by what comes back
//! through the block's two branches.

use super::Depth;
use super::forward::Pass;
use super::tape::{Attention, Buffers, Half, Tape, index_in};
use crate::backend::training::Training;
use crate::backend::{BackendError, Write};

impl<B: Training> Pass<'_, B> {
    /// The gradient of a group's input, and those of its pairs. Says whether anything below needs the former; if not,
    /// it is not computed.
    pub fn linear_backward(
        &mut self,
        number: usize,
        x: &B::Buffer,
        ranks: &B::Ranks,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
    ) -> Result<bool, BackendError> {
        let goes_on = self.lowest < Depth::of_group(number);
        let (group, dx) = (&self.model.groups[number], goes_on.then_some(dx));
        self.backend.linear_backward(group, number, x, ranks, dy, &mut self.learning, dx)?;
        Ok(goes_on)
    }

    pub fn norm_backward(
        &mut self,
        x: &B::Buffer,
        weight: &B::Vector,
        dy: &B::Buffer,
        write: Write,
        dx: &mut B::Buffer,
    ) -> Result<(), BackendError> {
        let epsilon = self.model.config.rms_norm_eps;
        self.backend.rms_norm_backward(x, self.count(), weight, epsilon, dy, write, dx)
    }

    /// From the gradients that the last block's attention and the stream past it have, down to the lowest that is
    /// adapted.
    pub fn backward(&mut self, tape: &mut Tape<B>) -> Result<(), BackendError> {
        let last = self.model.blocks.len() - 1;
        if !self.attention_backward(tape, last)? {
            return Ok(());
        }
        for index in (0..last).rev() {
            self.recompute(tape, index)?;
            if !self.half_backward(index, &mut tape.half(index))? || !self.attention_backward(tape, index)? {
                return Ok(());
            }
        }
        let d_stream = &tape.buffers.d_stream;
        self.backend.embed_backward(&self.model.embed_tokens, self.rows, d_stream, &mut self.learning)
    }

    /// What a block computes after its attention, backwards; says whether attention needs its gradient.
    pub fn half_backward(&mut self, index: usize, half: &mut Half<'_, B>) -> Result<bool, BackendError> {
        let (block, count) = (self.block(index), self.count());
        self.backend.swiglu(half.gate_up, count, half.gated)?;
        if !self.linear_backward(
            block.mlp_out,
            half.gated,
            &half.ranks.mlp_out,
            half.d_stream,
            half.d_gated,
        )? {
            return Ok(false);
        }
        self.backend.swiglu_backward(half.gate_up, half.d_gated, count, half.d_gate_up)?;
        self.norm(half.middle, &block.mlp_norm, half.normed)?;
        if !self.linear_backward(
            block.mlp_in,
            half.normed,
            &half.ranks.mlp_in,
            half.d_gate_up,
            half.d_normed,
        )? {
            return Ok(false);
        }
        self.norm_backward(half.middle, &block.mlp_norm, half.d_normed, Write::Add, half.d_stream)?;
        let ranks = &half.ranks.attention_out;
        self.linear_backward(block.attention_out, half.context, ranks, half.d_stream, half.d_context)
    }

    fn attention_backward(&mut self, tape: &mut Tape<B>, index: usize) -> Result<bool, BackendError> {
        let (model, rows, block, norms) = (self.model, self.rows, self.block(index), self.head_norms(index));
        let Buffers { streams, attention, normed, d_stream, d_normed, d_context, d_qkv, .. } =
            &mut tape.buffers;
        let (stream, ranks) = (&streams[index], &tape.ranks[index].attention_in);
        let Attention { raw, qkv, context } = &attention[index_in(attention, index)];

        self.backend.attention_backward(qkv, model.shape, block.window, rows, context, d_context, d_qkv)?;
        let raw = raw.as_ref().unwrap_or(qkv);
        self.backend.rope_backward(raw, model.shape, norms, &model.rotary, rows, d_qkv)?;
        self.norm(stream, &block.attention_norm, normed)?;
        if !self.linear_backward(block.attention_in, normed, ranks, d_qkv, d_normed)? {
            return Ok(false);
        }
        self.norm_backward(stream, &block.attention_norm, d_normed, Write::Add, d_stream)?;
        Ok(true)
    }
}
