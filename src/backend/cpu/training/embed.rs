//! The lookup backward: `dA[:, token] += du`, `dB += dy vᵀ` with `v = g · s · A[:, token]`, as the forward pass computed it.
//!
//! Nothing is dropped here: PEFT leaves tokens alone, too.

use super::product::{Along, Product, Sum, accumulate};
use crate::backend::cpu::experts::{Change, LowRank};
use crate::backend::cpu::linear::{blocks, element};
use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::{Buffer, Cpu, Isa, Site};
use crate::backend::training::Learning;
use crate::backend::{CHUNK, GateRun, Rows, SitePlace, Write};
use crate::tensor::DType;

/// Columns of B's gradient that are one piece of work.
const COLUMN_BLOCK: usize = 64;

pub(super) fn embed_backward(
    isa: Isa,
    table: &Site,
    rows: &Rows,
    dy: &Buffer,
    learning: &mut Learning<'_, Cpu>,
) {
    let width = table.experts.out_features;
    assert!(dy.width == width && dy.data.len() >= rows.len() * width, "rows exceed the buffer");
    for run in rows.gates.runs() {
        for (index, &slot) in rows.gates.experts_of(run).iter().enumerate() {
            let Some(Change::LowRank(expert)) = table.experts.get(slot) else { continue };
            let trainee = learning.trainees.get_mut(slot as usize).and_then(Option::as_mut);
            let number = trainee.as_ref().and_then(|trainee| trainee.find(SitePlace::Table));
            if number.is_none() && learning.gate_gradients.is_none() {
                continue;
            }
            let lookup = Lookup { isa, expert, rows, run, dy };
            let (a, mut du) = (lookup.columns_of_a(), lookup.outputs_by_b());
            let gate = |row: usize| rows.gates.gates_of(run, row)[index];
            if let Some(gradients) = &mut learning.gate_gradients {
                let width = rows.gates.experts_of(run).len();
                let pairs = a.chunks_exact(expert.rank).zip(du.chunks_exact(expert.rank));
                for (at, (a, du)) in pairs.enumerate() {
                    let product: f32 = a.iter().zip(du).map(|(a, du)| a * du).sum();
                    gradients[rows.gates.first_value(run) + at * width + index] += expert.scale * product;
                }
            }
            let Some((trainee, number)) = trainee.zip(number) else { continue };
            let pair = &mut trainee.pairs[number];
            let mut v = a;
            for (values, row) in [&mut v, &mut du]
                .iter_mut()
                .flat_map(|all| all.chunks_exact_mut(expert.rank).zip(run.rows.clone()))
            {
                values.iter_mut().for_each(|value| *value *= gate(row) * expert.scale);
            }
            let (a, b) = (pair.a_range(), pair.b_range());
            let vocabulary = pair.in_features;
            let gradient = &mut pair.gradients[a];
            for (du, row) in du.chunks_exact(expert.rank).zip(run.rows.clone()) {
                for (rank, du) in du.iter().enumerate() {
                    gradient[rank * vocabulary + rows.tokens[row] as usize] += du;
                }
            }
            lookup.add_b(&v, &mut pair.gradients[b]);
        }
    }
}

/// One expert's part in the lookups of a run.
struct Lookup<'a> {
    isa: Isa,
    expert: &'a LowRank,
    rows: &'a Rows,
    run: &'a GateRun,
    dy: &'a Buffer,
}

impl Lookup<'_> {
    /// `A[:, token]` of every row, `[rows, rank]`.
    fn columns_of_a(&self) -> Vec<f32> {
        let (a, vocabulary) = (&self.expert.a, self.expert.a.shape()[1]);
        let bytes = a.bytes();
        let tokens = &self.rows.tokens[self.run.rows.clone()];
        let column = |&token: &u32| {
            (0..self.expert.rank)
                .map(move |rank| element(bytes, rank * vocabulary + token as usize, a.dtype()))
        };
        tokens.iter().flat_map(column).collect()
    }

    /// `Bᵀ dy` of every row, `[rows, rank]`.
    fn outputs_by_b(&self) -> Vec<f32> {
        let (rank, width) = (self.expert.rank, self.dy.width);
        let mut du = vec![0.0; self.run.rows.len() * rank];
        let y = du.as_mut_ptr().wrapping_sub(self.run.rows.start * rank);
        for chunk in 0..self.expert.chunks() {
            let (b, dtype) = self.expert.b_rows(chunk, width);
            let product = Product {
                p: self.dy.data.as_ptr(),
                p_row: width,
                p_column: 1,
                w: b.as_ptr(),
                dtype,
                along: Along::Columns,
                w_stride: CHUNK,
                depth: width,
                rows: self.run.rows.clone(),
                columns: 0..self.expert.ranks(chunk),
                y: y.wrapping_add(chunk * CHUNK),
                y_stride: rank,
                write: Write::Replace,
                sum: Sum::Running,
            };
            // SAFETY: the run's rows of dy (asserted by the caller); a chunk is `[out, 16]`.
            unsafe { accumulate(self.isa, &product) };
        }
        du
    }

    /// `dBᵀ += Vᵀ dY`.
    fn add_b(&self, v: &[f32], gradient: &mut [f32]) {
        let (rank, width) = (self.expert.rank, self.dy.width);
        let dy = &self.dy.data[self.run.rows.start * width..];
        let gradient = Shared::new(gradient.as_mut_ptr());
        let columns: Vec<_> = blocks(0..width, COLUMN_BLOCK).collect();
        parallel_for(columns.len(), v.len() * width, |index| {
            let product = Product {
                p: v.as_ptr(),
                p_row: 1,
                p_column: rank,
                w: dy.as_ptr().cast(),
                dtype: DType::F32,
                along: Along::Columns,
                w_stride: width,
                depth: self.run.rows.len(),
                rows: 0..rank,
                columns: columns[index].clone(),
                y: gradient.get(),
                y_stride: width,
                write: Write::Add,
                sum: Sum::Running,
            };
            // SAFETY: the run's rows of V and dy; these columns are this piece's.
            unsafe { accumulate(self.isa, &product) };
        });
    }
}
