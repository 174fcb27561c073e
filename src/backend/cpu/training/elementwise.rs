//! Row-wise operations backward: normalisation, rotation, gated activation.

use crate::backend::cpu::elementwise::sigmoid;
use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::simd::{Simd, multiversion};
use crate::backend::cpu::{Buffer, Cpu, Isa};
use crate::backend::{AttentionShape, HeadNorms, RotaryTables, Rows, Write};

multiversion! {
    /// The gradient of one row of [`Backend::rms_norm`](crate::backend::Backend::rms_norm). `dy` and `dx` may be the same.
    ///
    /// # Safety
    /// All pointers must cover `width` elements.
    fn norm_row(
        x: *const f32,
        weight: *const f32,
        width: usize,
        epsilon: f32,
        dy: *const f32,
        write: Write,
        dx: *mut f32,
    ) = norm_row_body
}

#[inline(always)]
unsafe fn norm_row_body<S: Simd>(
    x: *const f32,
    weight: *const f32,
    width: usize,
    epsilon: f32,
    dy: *const f32,
    write: Write,
    dx: *mut f32,
) {
    let whole = width / S::LANES * S::LANES;
    let rest = width - whole;
    // SAFETY: passed on from the caller.
    unsafe {
        let (mut squares, mut products) = (S::zero(), S::zero());
        for i in (0..whole).step_by(S::LANES) {
            let x = S::load(x.add(i));
            squares = S::fma(x, x, squares);
            products = S::fma(S::mul(S::load(weight.add(i)), S::load(dy.add(i))), x, products);
        }
        if rest > 0 {
            let x = S::load_partial(x.add(whole), rest);
            squares = S::fma(x, x, squares);
            let u = S::mul(S::load_partial(weight.add(whole), rest), S::load_partial(dy.add(whole), rest));
            products = S::fma(u, x, products);
        }
        let factor = 1.0 / (S::sum(squares) / width as f32 + epsilon).sqrt();
        let along = S::splat(-factor * factor * factor * (S::sum(products) / width as f32));
        let factor = S::splat(factor);
        for i in (0..whole).step_by(S::LANES) {
            let u = S::mul(S::load(weight.add(i)), S::load(dy.add(i)));
            let value = S::fma(along, S::load(x.add(i)), S::mul(factor, u));
            S::store(dx.add(i), if write == Write::Add { S::add(S::load(dx.add(i)), value) } else { value });
        }
        if rest > 0 {
            let u = S::mul(S::load_partial(weight.add(whole), rest), S::load_partial(dy.add(whole), rest));
            let value = S::fma(along, S::load_partial(x.add(whole), rest), S::mul(factor, u));
            let to = dx.add(whole);
            let value = if write == Write::Add { S::add(S::load_partial(to, rest), value) } else { value };
            S::store_partial(to, value, rest);
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the operation's own arguments")]
pub(super) fn rms_norm_backward(
    isa: Isa,
    x: &Buffer,
    rows: usize,
    weight: &[f32],
    epsilon: f32,
    dy: &Buffer,
    write: Write,
    dx: &mut Buffer,
) {
    let width = x.width;
    assert!(width == dy.width && width == dx.width && width == weight.len(), "norm widths");
    for buffer in [x, dy, dx] {
        assert!(buffer.data.len() >= rows * width, "rows exceed the buffers");
    }
    let output = Shared::new(dx.data.as_mut_ptr());
    parallel_for(rows, rows * width * 2, |row| {
        let (x, dy) = (&x.data[row * width..], &dy.data[row * width..]);
        // SAFETY: rows lie in all buffers (asserted above); each is written by one piece.
        unsafe {
            let dx = output.get().add(row * width);
            norm_row(isa, x.as_ptr(), weight.as_ptr(), width, epsilon, dy.as_ptr(), write, dx);
        }
    });
}

pub(super) fn rope_backward(
    isa: Isa,
    qkv: &Buffer,
    shape: AttentionShape,
    norms: Option<HeadNorms<'_, Cpu>>,
    tables: &RotaryTables,
    rows: &Rows,
    d_qkv: &mut Buffer,
) {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    let width = shape.qkv_width();
    assert_eq!(d_qkv.width, width, "qkv width");
    assert!(d_qkv.data.len() >= rows.len() * width, "rows exceed the buffer");
    if let Some(norms) = &norms {
        assert!(qkv.width == width && qkv.data.len() >= rows.len() * width, "rows exceed the buffer");
        assert!(norms.q.len() == head_dim && norms.k.len() == head_dim, "head norm width");
    }
    let output = Shared::new(d_qkv.data.as_mut_ptr());
    parallel_for(rows.sequences.len(), rows.len() * width * 2, |index| {
        let sequence = &rows.sequences[index];
        for row in sequence.rows.clone() {
            let position = sequence.start + row - sequence.rows.start;
            for head in 0..heads + kv_heads {
                let at = row * width + head * head_dim;
                // SAFETY: the row lies in the buffer (asserted above) and belongs to this piece.
                let d = unsafe { std::slice::from_raw_parts_mut(output.get().add(at), head_dim) };
                turn_back(d, tables, sequence.rotary_variant, position);
                let Some(norms) = &norms else { continue };
                let weight = if head < heads { norms.q } else { norms.k };
                let (x, d) = (qkv.data[at..at + head_dim].as_ptr(), d.as_mut_ptr());
                // SAFETY: all hold `head_dim` elements.
                unsafe {
                    norm_row(isa, x, weight.as_ptr(), head_dim, norms.epsilon, d, Write::Replace, d);
                }
            }
        }
    });
}

/// Rotates element `i` with element `i + rotary_dim / 2` by the position's angles, backwards.
fn turn_back(head: &mut [f32], tables: &RotaryTables, variant: usize, position: usize) {
    let half = tables.rotary_dim / 2;
    let angles = position * half..(position + 1) * half;
    let (cos, sin) = (&tables.cos[variant][angles.clone()], &tables.sin[variant][angles]);
    let (low, high) = head[..tables.rotary_dim].split_at_mut(half);
    for (((x, y), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*x, *y) = (*x * c + *y * s, *y * c - *x * s);
    }
}

multiversion! {
    fn swiglu_row(gate_up: &[f32], dy: &[f32], d_gate_up: &mut [f32]) => swiglu_row_body
}

#[inline(always)]
fn swiglu_row_body(gate_up: &[f32], dy: &[f32], d_gate_up: &mut [f32]) {
    let (gate, up) = gate_up.split_at(dy.len());
    let (d_gate, d_up) = d_gate_up.split_at_mut(dy.len());
    for ((((d_gate, d_up), gate), up), dy) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dy) {
        let sigmoid = sigmoid(*gate);
        *d_up = dy * (gate * sigmoid);
        *d_gate = dy * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)));
    }
}

pub(super) fn swiglu_backward(isa: Isa, gate_up: &Buffer, dy: &Buffer, rows: usize, d_gate_up: &mut Buffer) {
    let width = dy.width;
    assert!(gate_up.width == 2 * width && d_gate_up.width == 2 * width, "gate | up width");
    assert!(d_gate_up.data.len() >= rows * 2 * width, "rows exceed the buffers");
    let output = Shared::new(d_gate_up.data.as_mut_ptr());
    parallel_for(rows, rows * width * 8, |row| {
        let gate_up = &gate_up.data[row * 2 * width..(row + 1) * 2 * width];
        let dy = &dy.data[row * width..(row + 1) * width];
        // SAFETY: the row lies in the buffer (asserted above) and is written by this piece only.
        unsafe {
            let d = std::slice::from_raw_parts_mut(output.get().add(row * 2 * width), 2 * width);
            swiglu_row(isa, gate_up, dy, d);
        }
    });
}
