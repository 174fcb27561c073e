//! Row-wise operations: normalisation, rotation with the cache write, gated activation.

use super::kv_cache::KvCache;
use super::parallel::{Shared, parallel_for};
use super::sampling::exp;
use super::simd::{Simd, multiversion};
use super::{Buffer, Isa};
use crate::backend::{AttentionShape, RotaryTables, Rows};

multiversion! {
    /// `y = x / √(mean(x²) + ε) ⊙ weight` for one row of `width`. `x` and `y` may be the same row.
    ///
    /// # Safety
    /// `x`, `weight` and `y` must hold `width` elements.
    fn norm_row(x: *const f32, weight: *const f32, width: usize, epsilon: f32, y: *mut f32) = norm_row_body
}

#[inline(always)]
unsafe fn norm_row_body<S: Simd>(x: *const f32, weight: *const f32, width: usize, epsilon: f32, y: *mut f32) {
    let whole = width / S::LANES * S::LANES;
    let rest = width - whole;
    // SAFETY: passed on from the caller.
    unsafe {
        let mut squares = S::zero();
        for i in (0..whole).step_by(S::LANES) {
            let v = S::load(x.add(i));
            squares = S::fma(v, v, squares);
        }
        if rest > 0 {
            let v = S::load_partial(x.add(whole), rest);
            squares = S::fma(v, v, squares);
        }
        let factor = S::splat(1.0 / (S::sum(squares) / width as f32 + epsilon).sqrt());
        for i in (0..whole).step_by(S::LANES) {
            let v = S::mul(S::load(x.add(i)), factor);
            S::store(y.add(i), S::mul(v, S::load(weight.add(i))));
        }
        if rest > 0 {
            let v = S::mul(S::load_partial(x.add(whole), rest), factor);
            S::store_partial(y.add(whole), S::mul(v, S::load_partial(weight.add(whole), rest)), rest);
        }
    }
}

pub(super) fn rms_norm(isa: Isa, x: &Buffer, rows: usize, weight: &[f32], epsilon: f32, y: &mut Buffer) {
    let width = x.width;
    assert!(width == y.width && width == weight.len(), "norm widths");
    assert!(x.data.len() >= rows * width && y.data.len() >= rows * width, "rows exceed the buffers");
    let (input, output) = (Shared::new(x.data.as_ptr().cast_mut()), Shared::new(y.data.as_mut_ptr()));
    parallel_for(rows, rows * width, |row| {
        // SAFETY: rows lie in both buffers (asserted above); each is written by one piece.
        unsafe {
            let (x, y) = (input.get().add(row * width), output.get().add(row * width));
            norm_row(isa, x, weight.as_ptr(), width, epsilon, y);
        }
    });
}

/// Norm weights `[head_dim]` of q and k heads, and their ε.
pub(super) struct NormWeights<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub epsilon: f32,
}

#[expect(clippy::too_many_arguments, reason = "the operation's own arguments")]
pub(super) fn rope_store(
    isa: Isa,
    qkv: &mut Buffer,
    shape: AttentionShape,
    norms: Option<NormWeights<'_>>,
    tables: &RotaryTables,
    rows: &Rows,
    cache: &mut KvCache,
    block: usize,
) {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    assert_eq!(qkv.width, shape.qkv_width(), "qkv width");
    assert!(qkv.data.len() >= rows.len() * qkv.width, "rows exceed the buffer");
    assert!(
        rows.sequences.iter().all(|sequence| sequence.rows.end <= rows.len()),
        "sequences exceed the rows"
    );
    let width = qkv.width;
    let data = Shared::new(qkv.data.as_mut_ptr());
    parallel_for(rows.sequences.len(), rows.len() * width, |index| {
        let sequence = &rows.sequences[index];
        for row in sequence.rows.clone() {
            let position = sequence.start + row - sequence.rows.start;
            let turned = (heads + kv_heads) * head_dim;
            // SAFETY: the row lies in the buffer (asserted above) and belongs to this sequence.
            let turned = unsafe { std::slice::from_raw_parts_mut(data.get().add(row * width), turned) };
            for (index, head) in turned.chunks_exact_mut(head_dim).enumerate() {
                if let Some(norms) = &norms {
                    let weight = if index < heads { norms.q } else { norms.k };
                    assert_eq!(weight.len(), head_dim, "head norm width");
                    // SAFETY: head and weight hold `head_dim` elements.
                    unsafe {
                        norm_row(
                            isa,
                            head.as_ptr(),
                            weight.as_ptr(),
                            head_dim,
                            norms.epsilon,
                            head.as_mut_ptr(),
                        );
                    }
                }
                rotate(head, tables, sequence.rotary_variant, position);
            }
        }
    });
    for sequence in &rows.sequences {
        let pages = &rows.pages[sequence.pages.clone()];
        for row in sequence.rows.clone() {
            let position = sequence.start + row - sequence.rows.start;
            let row = &qkv.data[row * width..(row + 1) * width];
            let (keys, values) = row[heads * head_dim..].split_at(kv_heads * head_dim);
            cache.store(block, pages, position, keys, values);
        }
    }
}

/// Rotates element `i` with element `i + rotary_dim / 2` by the position's angles (Su et al. 2021).
fn rotate(head: &mut [f32], tables: &RotaryTables, variant: usize, position: usize) {
    let half = tables.rotary_dim / 2;
    let angles = position * half..(position + 1) * half;
    let (cos, sin) = (&tables.cos[variant][angles.clone()], &tables.sin[variant][angles]);
    let (low, high) = head[..tables.rotary_dim].split_at_mut(half);
    for (((x, y), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*x, *y) = (*x * c - *y * s, *y * c + *x * s);
    }
}

/// `1 / (1 + exp(−x))`, within a few units in the last place.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    let small = exp(-x.abs());
    (if x < 0.0 { small } else { 1.0 }) / (1.0 + small)
}

multiversion! {
    fn swiglu_row(gate: &[f32], up: &[f32], y: &mut [f32]) => swiglu_row_body
}

#[inline(always)]
fn swiglu_row_body(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = gate * sigmoid(*gate) * up;
    }
}

pub(super) fn swiglu(isa: Isa, gate_up: &Buffer, rows: usize, y: &mut Buffer) {
    let width = y.width;
    assert_eq!(gate_up.width, 2 * width, "gate | up width");
    assert!(
        gate_up.data.len() >= rows * 2 * width && y.data.len() >= rows * width,
        "rows exceed the buffers"
    );
    let output = Shared::new(y.data.as_mut_ptr());
    // An exponential costs about as much as eight multiply-adds.
    parallel_for(rows, rows * width * 8, |row| {
        let (gate, up) = gate_up.data[row * 2 * width..(row + 1) * 2 * width].split_at(width);
        // SAFETY: the row lies in the buffer (asserted above) and is written by this piece only.
        let y = unsafe { std::slice::from_raw_parts_mut(output.get().add(row * width), width) };
        // SAFETY: plain code, compiled for the instruction set.
        unsafe { swiglu_row(isa, gate, up, y) };
    });
}
