//! The backward pass of a training step.
//!
//! `d_stream` is the gradient of the residual stream: it passes every block unchanged, and grows by what comes back
//! through the block's two branches.

use super::Depth;
use super::forward::Pass;
use super::tape::{Attention, Buffers, Tape, index_in};
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

    /// From the gradient of the last stream down to the lowest that is adapted.
    pub fn backward(&mut self, tape: &mut Tape<B>) -> Result<(), BackendError> {
        for index in (0..self.model.blocks.len()).rev() {
            self.recompute(tape, index)?;
            if !self.mlp_backward(tape, index)? || !self.attention_backward(tape, index)? {
                return Ok(());
            }
        }
        let d_stream = &tape.buffers.d_stream;
        self.backend.embed_backward(&self.model.embed_tokens, self.rows, d_stream, &mut self.learning)
    }

    fn mlp_backward(&mut self, tape: &mut Tape<B>, index: usize) -> Result<bool, BackendError> {
        let (block, count, ranks) = (self.block(index), self.count(), &tape.ranks[index]);
        let Buffers { attention, gate_up, normed, gated, d_stream, d_normed, d_gate_up, d_gated, .. } =
            &mut tape.buffers;
        let gate_up = &gate_up[index_in(gate_up, index)];
        let middle = &attention[index_in(attention, index)].middle;

        self.backend.swiglu(gate_up, count, gated)?;
        if !self.linear_backward(block.mlp_out, gated, &ranks.mlp_out, d_stream, d_gated)? {
            return Ok(false);
        }
        self.backend.swiglu_backward(gate_up, d_gated, count, d_gate_up)?;
        self.norm(middle, &block.mlp_norm, normed)?;
        if !self.linear_backward(block.mlp_in, normed, &ranks.mlp_in, d_gate_up, d_normed)? {
            return Ok(false);
        }
        self.norm_backward(middle, &block.mlp_norm, d_normed, Write::Add, d_stream)?;
        Ok(true)
    }

    fn attention_backward(&mut self, tape: &mut Tape<B>, index: usize) -> Result<bool, BackendError> {
        let (model, rows, block, norms) = (self.model, self.rows, self.block(index), self.head_norms(index));
        let Buffers { streams, attention, normed, d_stream, d_normed, d_context, d_qkv, .. } =
            &mut tape.buffers;
        let (stream, ranks) = (&streams[index], &tape.ranks[index]);
        let Attention { raw, qkv, context, .. } = &attention[index_in(attention, index)];

        if !self.linear_backward(block.attention_out, context, &ranks.attention_out, d_stream, d_context)? {
            return Ok(false);
        }
        self.backend.attention_backward(qkv, model.shape, block.window, rows, context, d_context, d_qkv)?;
        let raw = raw.as_ref().unwrap_or(qkv);
        self.backend.rope_backward(raw, model.shape, norms, &model.rotary, rows, d_qkv)?;
        self.norm(stream, &block.attention_norm, normed)?;
        if !self.linear_backward(block.attention_in, normed, &ranks.attention_in, d_qkv, d_normed)? {
            return Ok(false);
        }
        self.norm_backward(stream, &block.attention_norm, d_normed, Write::Add, d_stream)?;
        Ok(true)
    }
}
