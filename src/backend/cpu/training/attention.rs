//! Causal attention backward (Dao 2023, section 3), a sequence and key head at a time.
//!
//! A block of rows of one query head has its scores computed again, then `ds = p ⊙ (dy Vᵀ − dy · y)`; the gradients of
//! keys and values are added up over query heads and rows, ascending. So a sequence's bits depend on it alone.

use std::cell::RefCell;
use std::ops::Range;

use super::grow;
use super::product::{Along, Product, Sum, accumulate};
use crate::backend::cpu::linear::blocks;
use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::sampling::{exp_or_nan, largest};
use crate::backend::cpu::simd::{Simd, multiversion};
use crate::backend::cpu::{Buffer, Isa};
use crate::backend::{AttentionShape, Rows, SequenceRows, Write};
use crate::tensor::DType;

/// Rows whose scores are held at a time.
const ROW_BLOCK: usize = 32;

/// Keys are laid out in lines of so many: whole vectors of every instruction set.
const LINE: usize = 16;

#[derive(Default)]
struct Scratch {
    /// Keys `[keys, head_dim]` of one head; keys and values `[head_dim, keys]`, zeros up to a whole line of keys.
    keys: Vec<f32>,
    keys_across: Vec<f32>,
    values_across: Vec<f32>,
    /// `[rows, keys]`: scores, then probabilities; their gradients.
    scores: Vec<f32>,
    d_scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Rows at some positions of a sequence, and one of their query heads.
struct HeadRows {
    /// The sequence's first row.
    first: usize,
    head: usize,
    /// Where the head's keys and values start in a row.
    key_column: usize,
    value_column: usize,
    positions: Range<usize>,
    /// From one row of scores to the next.
    stride: usize,
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
        let (width, group, rows) = (self.qkv.width, heads / kv_heads, sequence.rows.clone());
        let key_column = (heads + kv_head) * head_dim;
        let value_column = key_column + kv_heads * head_dim;
        let stride = rows.len().next_multiple_of(LINE);
        let vectors = |column: usize| {
            let first = &self.qkv.data[rows.start * width + column..];
            first.chunks(width).map(|row| &row[..head_dim]).take(rows.len())
        };
        scratch.keys.clear();
        vectors(key_column).for_each(|key| scratch.keys.extend_from_slice(key));
        lay_across(vectors(key_column), head_dim, stride, &mut scratch.keys_across);
        lay_across(vectors(value_column), head_dim, stride, &mut scratch.values_across);
        for (row, column) in rows.clone().flat_map(|row| [(row, key_column), (row, value_column)]) {
            // SAFETY: this piece's rows and heads, as the caller promises.
            unsafe { self.d_qkv.get().add(row * width + column).write_bytes(0, head_dim) };
        }
        grow(&mut scratch.scores, ROW_BLOCK * stride);
        grow(&mut scratch.d_scores, ROW_BLOCK * stride);
        for head in kv_head * group..(kv_head + 1) * group {
            for positions in blocks(0..rows.len(), ROW_BLOCK) {
                let piece = HeadRows { first: rows.start, head, key_column, value_column, positions, stride };
                // SAFETY: passed on from the caller.
                unsafe { self.head_rows(&piece, scratch) };
            }
        }
    }

    /// What the rows at some positions add, for one query head.
    unsafe fn head_rows(&self, piece: &HeadRows, scratch: &mut Scratch) {
        let &HeadRows { first, head, key_column, value_column, ref positions, stride } = piece;
        let (width, head_dim) = (self.qkv.width, self.shape.head_dim);
        let first_key =
            |position: usize| self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        // From a whole line on, so that vectors of keys stay whole.
        let keys = first_key(positions.start) / LINE * LINE..positions.end;
        let row = first + positions.start;
        let q = self.qkv.data[row * width + head * head_dim..].as_ptr();
        let dy = self.dy.data[row * self.dy.width + head * head_dim..].as_ptr();
        let product = Product {
            p: std::ptr::null(),
            p_row: 1,
            p_column: 1,
            w: std::ptr::null(),
            dtype: DType::F32,
            along: Along::Columns,
            w_stride: head_dim,
            depth: head_dim,
            rows: 0..positions.len(),
            columns: 0..head_dim,
            y: std::ptr::null_mut(),
            y_stride: width,
            write: Write::Replace,
            sum: Sum::Running,
        };
        for (p, p_row, across, y) in [
            (q, width, &scratch.keys_across, &mut scratch.scores),
            (dy, self.dy.width, &scratch.values_across, &mut scratch.d_scores),
        ] {
            let product = Product {
                p,
                p_row,
                w: across.as_ptr().cast(),
                w_stride: stride,
                columns: keys.start..keys.end.next_multiple_of(LINE),
                y: y.as_mut_ptr(),
                y_stride: stride,
                ..product.clone()
            };
            // SAFETY: vectors of q or dy; keys or values `[head_dim, stride]`; scores `[rows, stride]`.
            unsafe { accumulate(self.isa, &product) };
        }
        for (index, position) in positions.clone().enumerate() {
            let row = (first + position) * self.dy.width + head * head_dim;
            let (y, dy) = (&self.y.data[row..row + head_dim], &self.dy.data[row..row + head_dim]);
            let own = first_key(position)..position + 1;
            let p = &mut scratch.scores[index * stride..(index + 1) * stride];
            let ds = &mut scratch.d_scores[index * stride..(index + 1) * stride];
            for outside in [keys.start..own.start, own.end..keys.end] {
                p[outside.clone()].fill(0.0);
                ds[outside].fill(0.0);
            }
            let scale = 1.0 / (head_dim as f32).sqrt();
            // SAFETY: all lengths are those of the slices.
            unsafe { softmax_row(self.isa, &mut p[own.clone()], &mut ds[own], y, dy, scale) };
        }
        let to = |row: usize, column: usize| self.d_qkv.get().wrapping_add(row * width + column);
        let of_keys = Product {
            p_column: stride,
            depth: positions.len(),
            rows: keys.clone(),
            write: Write::Add,
            ..product.clone()
        };
        let [values, keys_gradient, queries] = [
            Product {
                p: scratch.scores.as_ptr(),
                w: dy.cast(),
                w_stride: self.dy.width,
                y: to(first, value_column),
                ..of_keys.clone()
            },
            Product {
                p: scratch.d_scores.as_ptr(),
                w: q.cast(),
                w_stride: width,
                y: to(first, key_column),
                ..of_keys
            },
            Product {
                p: scratch.d_scores[keys.start..].as_ptr(),
                p_row: stride,
                w: scratch.keys[keys.start * head_dim..].as_ptr().cast(),
                depth: keys.len(),
                y: to(row, head * head_dim),
                ..product
            },
        ];
        for product in [values, keys_gradient, queries] {
            // SAFETY: scores are `[rows, stride]`, vectors `[rows]` or `[keys]`; the output is this piece's.
            unsafe { accumulate(self.isa, &product) };
        }
    }
}

/// Lays vectors of `head_dim` out as `[head_dim, stride]`.
fn lay_across<'a>(
    vectors: impl Iterator<Item = &'a [f32]>,
    head_dim: usize,
    stride: usize,
    to: &mut Vec<f32>,
) {
    to.clear();
    to.resize(head_dim * stride, 0.0);
    for (index, vector) in vectors.enumerate() {
        for (d, value) in vector.iter().enumerate() {
            to[d * stride + index] = *value;
        }
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
