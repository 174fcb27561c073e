//! Causal attention backward (Dao 2023, section 3), a sequence and key head at a time.
//!
//! A block of rows of one query head has its scores computed again, then `ds = p ⊙ (dy Vᵀ − dy · y)`; the gradients of
//! keys and values are added up over query heads and rows, ascending. So a sequence's bits depend on it alone.

use std::cell::RefCell;
use std::ops::Range;

use super::elementwise::exp_or_nan;
use super::linear::grow;
use super::product::{Product, accumulate};
use crate::backend::cpu::gemm::{Block, compute_block};
use crate::backend::cpu::linear::blocks;
use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::sampling::largest;
use crate::backend::cpu::simd::{Simd, multiversion};
use crate::backend::cpu::{Buffer, Isa};
use crate::backend::{AttentionShape, Rows, SequenceRows, Write};
use crate::tensor::DType;

/// Rows whose scores are held at a time.
const ROW_BLOCK: usize = 48;

#[derive(Default)]
struct Scratch {
    /// `[keys, head_dim]` of one head.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `[rows, keys]`: scores, then probabilities; their gradients.
    scores: Vec<f32>,
    d_scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct Attention<'a> {
    isa: Isa,
    qkv: &'a Buffer,
    shape: AttentionShape,
    window: Option<usize>,
    y: &'a Buffer,
    dy: &'a Buffer,
    d_qkv: Shared,
}

#[expect(clippy::too_many_arguments, reason = "the operation's own arguments")]
pub(super) fn attention_backward(
    isa: Isa,
    qkv: &Buffer,
    shape: AttentionShape,
    window: Option<usize>,
    rows: &Rows,
    y: &Buffer,
    dy: &Buffer,
    d_qkv: &mut Buffer,
) {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    let width = shape.qkv_width();
    assert!(qkv.width == width && d_qkv.width == width, "qkv widths");
    assert!(y.width == heads * head_dim && dy.width == y.width, "attention widths");
    for buffer in [qkv, y, dy, d_qkv] {
        assert!(buffer.data.len() >= rows.len() * buffer.width, "rows exceed the buffers");
    }
    assert!(rows.sequences.iter().all(|sequence| sequence.start == 0), "sequences in training are whole");
    let work = rows.sequences.iter().map(|s| s.rows.len() * s.rows.len() * heads * head_dim * 3).sum();
    let attention = Attention { isa, qkv, shape, window, y, dy, d_qkv: Shared::new(d_qkv.data.as_mut_ptr()) };
    parallel_for(rows.sequences.len() * kv_heads, work, |index| {
        let sequence = &rows.sequences[index / kv_heads];
        // SAFETY: buffers cover all rows (asserted above); a piece writes its own rows and heads.
        SCRATCH.with_borrow_mut(|scratch| unsafe {
            attention.backward(sequence, index % kv_heads, scratch);
        });
    });
}

impl Attention<'_> {
    unsafe fn backward(&self, sequence: &SequenceRows, kv_head: usize, scratch: &mut Scratch) {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let (width, group, first) = (self.qkv.width, heads / kv_heads, sequence.rows.start);
        let key_column = (heads + kv_head) * head_dim;
        let value_column = key_column + kv_heads * head_dim;
        scratch.keys.clear();
        scratch.values.clear();
        for row in sequence.rows.clone() {
            let row = row * width;
            scratch.keys.extend_from_slice(&self.qkv.data[row + key_column..][..head_dim]);
            scratch.values.extend_from_slice(&self.qkv.data[row + value_column..][..head_dim]);
            for column in [key_column, value_column] {
                // SAFETY: this piece's rows and heads, as the caller promises.
                unsafe { self.d_qkv.get().add(row + column).write_bytes(0, head_dim) };
            }
        }
        grow(&mut scratch.scores, ROW_BLOCK * sequence.rows.len());
        grow(&mut scratch.d_scores, ROW_BLOCK * sequence.rows.len());
        for head in kv_head * group..(kv_head + 1) * group {
            for positions in blocks(0..sequence.rows.len(), ROW_BLOCK) {
                // SAFETY: passed on from the caller.
                unsafe { self.head_rows(first, head, key_column, value_column, positions, scratch) };
            }
        }
    }

    /// What the rows at some positions add, for one query head.
    unsafe fn head_rows(
        &self,
        first: usize,
        head: usize,
        key_column: usize,
        value_column: usize,
        positions: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let AttentionShape { head_dim, .. } = self.shape;
        let width = self.qkv.width;
        let first_key =
            |position: usize| self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let keys = first_key(positions.start)..positions.end;
        let (rows, count) = (positions.len(), keys.len());
        let scale = 1.0 / (head_dim as f32).sqrt();
        let row = first + positions.start;
        let q = self.qkv.data[row * width + head * head_dim..].as_ptr();
        let dy = self.dy.data[row * self.dy.width + head * head_dim..].as_ptr();
        let at = |vectors: &[f32]| vectors[keys.start * head_dim..].as_ptr();
        let scores = |x: *const f32, x_stride: usize, w: *const f32, to: &mut [f32]| {
            let block = Block {
                x,
                x_stride,
                w: w.cast(),
                dtype: DType::F32,
                k: head_dim,
                rows: 0..rows,
                columns: 0..count,
                y: to.as_mut_ptr(),
                y_stride: count,
                write: Write::Replace,
                bias: None,
                terms: None,
                v: std::ptr::null(),
            };
            // SAFETY: `rows` vectors of q or dy, `count` of keys or values; scores have room for both.
            unsafe { compute_block(self.isa, &block) };
        };
        scores(q, width, at(&scratch.keys), &mut scratch.scores);
        scores(dy, self.dy.width, at(&scratch.values), &mut scratch.d_scores);
        for (index, position) in positions.clone().enumerate() {
            let row = (first + position) * self.dy.width + head * head_dim;
            let (y, dy) = (&self.y.data[row..row + head_dim], &self.dy.data[row..row + head_dim]);
            let own = first_key(position) - keys.start..position + 1 - keys.start;
            let p = &mut scratch.scores[index * count..(index + 1) * count];
            let ds = &mut scratch.d_scores[index * count..(index + 1) * count];
            for outside in [0..own.start, own.end..count] {
                p[outside.clone()].fill(0.0);
                ds[outside].fill(0.0);
            }
            // SAFETY: plain code, compiled for the instruction set.
            unsafe { softmax_row(self.isa, &mut p[own.clone()], &mut ds[own], y, dy, scale) };
        }
        let product = |p: &[f32], p_row, p_column, w: *const f32, w_stride, depth, rows, y, write| {
            let product = Product {
                p: p.as_ptr(),
                p_row,
                p_column,
                w: w.cast(),
                dtype: DType::F32,
                w_stride,
                depth,
                rows: 0..rows,
                columns: 0..head_dim,
                y,
                y_stride: width,
                write,
            };
            // SAFETY: scores are `[rows, count]`, vectors `[rows]` or `[count]`; the output is this piece's.
            unsafe { accumulate(self.isa, &product) };
        };
        let (p, ds) = (&scratch.scores, &scratch.d_scores);
        let to = |row: usize, column: usize| self.d_qkv.get().wrapping_add(row * width + column);
        let key_row = first + keys.start;
        product(p, 1, count, dy, self.dy.width, rows, count, to(key_row, value_column), Write::Add);
        product(ds, 1, count, q, width, rows, count, to(key_row, key_column), Write::Add);
        product(
            ds,
            count,
            1,
            at(&scratch.keys),
            head_dim,
            count,
            rows,
            to(row, head * head_dim),
            Write::Replace,
        );
    }
}

multiversion! {
    /// One query's scores become probabilities, and the gradients of these those of scaled scores.
    ///
    /// # Safety
    /// `isa` must be available.
    fn softmax_row(scores: &mut [f32], d_scores: &mut [f32], y: &[f32], dy: &[f32], scale: f32) = softmax_row_body
}

#[inline(always)]
unsafe fn softmax_row_body<S: Simd>(
    scores: &mut [f32],
    d_scores: &mut [f32],
    y: &[f32],
    dy: &[f32],
    scale: f32,
) {
    let maximum = largest(scores);
    for score in &mut *scores {
        *score = exp_or_nan((*score - maximum) * scale);
    }
    // SAFETY: the lengths are those of the slices.
    let (sum, along) = unsafe { (sum::<S>(scores), dot::<S>(y, dy)) };
    let norm = 1.0 / sum;
    for (p, ds) in scores.iter_mut().zip(d_scores) {
        *p *= norm;
        *ds = *p * (*ds - along) * scale;
    }
}

#[inline(always)]
unsafe fn sum<S: Simd>(values: &[f32]) -> f32 {
    let whole = values.len() / S::LANES * S::LANES;
    // SAFETY: passed on from the caller.
    unsafe {
        let mut sums = S::zero();
        for i in (0..whole).step_by(S::LANES) {
            sums = S::add(sums, S::load(values.as_ptr().add(i)));
        }
        if whole < values.len() {
            sums = S::add(sums, S::load_partial(values.as_ptr().add(whole), values.len() - whole));
        }
        S::sum(sums)
    }
}

#[inline(always)]
unsafe fn dot<S: Simd>(one: &[f32], other: &[f32]) -> f32 {
    let whole = one.len() / S::LANES * S::LANES;
    let rest = one.len() - whole;
    let (one, other) = (one.as_ptr(), other.as_ptr());
    // SAFETY: passed on from the caller.
    unsafe {
        let mut sums = S::zero();
        for i in (0..whole).step_by(S::LANES) {
            sums = S::fma(S::load(one.add(i)), S::load(other.add(i)), sums);
        }
        if rest > 0 {
            let (one, other) = (one.add(whole), other.add(whole));
            sums = S::fma(S::load_partial(one, rest), S::load_partial(other, rest), sums);
        }
        S::sum(sums)
    }
}
