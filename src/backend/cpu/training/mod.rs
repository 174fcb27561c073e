//! Training on the CPU: the operations of the backward pass.
//!
//! Rows are computed by themselves, in blocks that threads share out; parameters' gradients are added up row by row,
//! ascending, and threads share out the parameters. So neither the cut of a batch into steps, nor what else is in it, nor
//! the number of threads changes a bit.

mod attention;
mod dora;
mod dropout;
mod elementwise;
mod embed;
mod forward;
mod linear;
mod loss;
mod optimizer;
mod product;
mod trainee;
mod uses;

use std::ops::Range;

use rayon::prelude::*;

use super::parallel::pays;
use super::{Buffer, Cpu, Group, Site};
use crate::backend::training::{AdamW, Learning, Pair, PairValues, Part, Training};
use crate::backend::{AttentionShape, BackendError, HeadNorms, RotaryTables, Rows, Write};

pub(super) use linear::Workspace;
pub use trainee::Trainee;

/// Elements that a thread copies at a time.
const COPIED: usize = 1 << 14;

/// V of every row at the sites of one group.
#[derive(Default)]
pub struct Ranks {
    v: Vec<f32>,
}

/// Makes room for `len` elements.
fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

impl Training for Cpu {
    type Trainee = Trainee;
    type Ranks = Ranks;

    fn trainee(
        &mut self,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
        pairs: &[Pair],
        dropout: f32,
    ) -> Result<Trainee, BackendError> {
        let mut trainee = Trainee::new(pairs, dropout);
        trainee.change(self.isa, groups, table, slot, |_, _| {});
        Ok(trainee)
    }

    fn read_part(&mut self, trainee: &Trainee, part: Part) -> Result<Vec<PairValues>, BackendError> {
        Ok(trainee.read(part))
    }

    fn write_part(
        &mut self,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
        trainee: &mut Trainee,
        part: Part,
        values: &[PairValues],
    ) -> Result<(), BackendError> {
        trainee.write(self.isa, groups, table, slot, part, values);
        Ok(())
    }

    fn squared_gradients(&mut self, trainee: &Trainee) -> Result<Vec<f64>, BackendError> {
        Ok(trainee.squared_gradients())
    }

    fn adamw(
        &mut self,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
        trainee: &mut Trainee,
        step: &AdamW,
    ) -> Result<(), BackendError> {
        trainee.adamw(self.isa, groups, table, slot, step);
        Ok(())
    }

    fn clear_gradients(&mut self, trainee: &mut Trainee) -> Result<(), BackendError> {
        trainee.clear_gradients();
        Ok(())
    }

    fn copy(&mut self, x: &Buffer, rows: usize, y: &mut Buffer) -> Result<(), BackendError> {
        assert_eq!(x.width, y.width, "widths of a copy");
        let len = rows * x.width;
        let (y, x) = (&mut y.data[..len], &x.data[..len]);
        if pays(len) {
            let pieces = y.par_chunks_mut(COPIED).zip(x.par_chunks(COPIED));
            pieces.for_each(|(y, x)| y.copy_from_slice(x));
        } else {
            y.copy_from_slice(x);
        }
        Ok(())
    }

    fn linear_kept(
        &mut self,
        group: &Group,
        number: usize,
        x: &Buffer,
        learning: &Learning<'_, Self>,
        write: Write,
        y: &mut Buffer,
        ranks: &mut Ranks,
    ) -> Result<(), BackendError> {
        linear::linear_kept(self, group, number, x, learning, write, y, ranks);
        Ok(())
    }

    fn linear_backward(
        &mut self,
        group: &Group,
        number: usize,
        x: &Buffer,
        ranks: &Ranks,
        dy: &Buffer,
        learning: &mut Learning<'_, Self>,
        dx: Option<&mut Buffer>,
    ) -> Result<(), BackendError> {
        linear::linear_backward(self, group, number, x, ranks, dy, learning, dx);
        Ok(())
    }

    fn swiglu(&mut self, gate_up: &Buffer, rows: usize, y: &mut Buffer) -> Result<(), BackendError> {
        super::elementwise::swiglu(self.isa, gate_up, rows, y);
        Ok(())
    }

    fn swiglu_backward(
        &mut self,
        gate_up: &Buffer,
        dy: &Buffer,
        rows: usize,
        d_gate_up: &mut Buffer,
    ) -> Result<(), BackendError> {
        elementwise::swiglu_backward(self.isa, gate_up, dy, rows, d_gate_up);
        Ok(())
    }

    fn rms_norm_backward(
        &mut self,
        x: &Buffer,
        rows: usize,
        weight: &Vec<f32>,
        epsilon: f32,
        dy: &Buffer,
        write: Write,
        dx: &mut Buffer,
    ) -> Result<(), BackendError> {
        elementwise::rms_norm_backward(self.isa, x, rows, weight, epsilon, dy, write, dx);
        Ok(())
    }

    fn attention_backward(
        &mut self,
        qkv: &Buffer,
        shape: AttentionShape,
        window: Option<usize>,
        rows: &Rows,
        y: &Buffer,
        dy: &Buffer,
        d_qkv: &mut Buffer,
    ) -> Result<(), BackendError> {
        attention::attention_backward(self.isa, qkv, shape, window, rows, y, dy, d_qkv);
        Ok(())
    }

    fn rope_backward(
        &mut self,
        qkv: &Buffer,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Self>>,
        tables: &RotaryTables,
        rows: &Rows,
        d_qkv: &mut Buffer,
    ) -> Result<(), BackendError> {
        elementwise::rope_backward(self.isa, qkv, shape, norms, tables, rows, d_qkv);
        Ok(())
    }

    fn embed_backward(
        &mut self,
        table: &Site,
        rows: &Rows,
        dy: &Buffer,
        learning: &mut Learning<'_, Self>,
    ) -> Result<(), BackendError> {
        embed::embed_backward(self.isa, table, rows, dy, learning);
        Ok(())
    }

    fn scatter_rows(
        &mut self,
        x: &Buffer,
        picked: &[u32],
        span: Range<usize>,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        assert_eq!(x.width, y.width, "widths of a scatter");
        let width = x.width;
        y.data[span.start * width..span.end * width].fill(0.0);
        for (from, &row) in x.data.chunks_exact(width).zip(picked) {
            let row = row as usize;
            assert!(span.contains(&row), "picked rows lie in the span");
            y.data[row * width..(row + 1) * width].copy_from_slice(from);
        }
        Ok(())
    }

    fn cross_entropy(
        &mut self,
        logits: &mut Buffer,
        targets: &[u32],
        weights: Option<&[f32]>,
        losses: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        loss::cross_entropy(self.isa, logits, targets, weights, losses);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
