//! Cross-entropy and its gradient.

use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::sampling::{exp_or_nan, largest};
use crate::backend::cpu::simd::multiversion;
use crate::backend::cpu::{Buffer, Isa};

const LANES: usize = 16;

multiversion! {
    /// The loss of one row, into `loss`; with a weight the row becomes its gradient.
    fn cross_entropy_row(logits: &mut [f32], target: usize, weight: Option<f32>, loss: &mut f32) => row_body
}

#[inline(always)]
fn row_body(logits: &mut [f32], target: usize, weight: Option<f32>, loss: &mut f32) {
    let maximum = largest(logits);
    let of_target = logits[target] - maximum;
    let (chunks, rest) = logits.as_chunks_mut::<LANES>();
    let mut lanes = [0f64; LANES];
    // One sum per lane: a chain that vectors need not reorder.
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *logit = exp_or_nan(*logit - maximum);
            *lane += f64::from(*logit);
        }
    }
    for (lane, logit) in lanes.iter_mut().zip(rest) {
        *logit = exp_or_nan(*logit - maximum);
        *lane += f64::from(*logit);
    }
    let sum: f64 = lanes.iter().sum();
    *loss = (sum.ln() - f64::from(of_target)) as f32;
    if let Some(weight) = weight {
        let factor = (f64::from(weight) / sum) as f32;
        for logit in &mut *logits {
            *logit *= factor;
        }
        logits[target] -= weight;
    }
}

pub(super) fn cross_entropy(
    isa: Isa,
    logits: &mut Buffer,
    targets: &[u32],
    weights: Option<&[f32]>,
    losses: &mut Vec<f32>,
) {
    let (rows, width) = (targets.len(), logits.width);
    assert!(logits.data.len() >= rows * width, "rows exceed the buffer");
    assert!(weights.is_none_or(|weights| weights.len() == rows), "a weight for every target");
    let first = losses.len();
    losses.resize(first + rows, 0.0);
    let losses = Shared::new(losses[first..].as_mut_ptr());
    let logits = Shared::new(logits.data.as_mut_ptr());
    parallel_for(rows, rows * width * 8, |row| {
        // SAFETY: row and loss lie in their buffers (asserted above) and belong to this piece.
        unsafe {
            let logits = std::slice::from_raw_parts_mut(logits.get().add(row * width), width);
            let weight = weights.map(|weights| weights[row]);
            cross_entropy_row(isa, logits, targets[row] as usize, weight, &mut *losses.get().add(row));
        }
    });
}
