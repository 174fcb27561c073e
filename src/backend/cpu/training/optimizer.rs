//! AdamW and the norm of gradients.

use crate::backend::cpu::Isa;
use crate::backend::cpu::simd::multiversion;
use crate::backend::training::AdamW;

/// Some parameters and what belongs to them, all of one length.
pub(super) struct Parameters<'a> {
    pub weights: &'a mut [f32],
    pub gradients: &'a mut [f32],
    pub first_moments: &'a mut [f32],
    pub second_moments: &'a mut [f32],
}

/// The factors of one step, rounded to f32 where torch rounds them: before they meet an element.
struct Factors {
    gradient: f32,
    decay: f32,
    first: f32,
    second: f32,
    new_square: f32,
    second_correction: f32,
    eps: f32,
    step: f32,
}

/// One step of AdamW with the learning rate `lr`; the gradients are 0 afterwards.
pub(super) fn update(isa: Isa, parameters: Parameters<'_>, step: &AdamW, lr: f64) {
    let [beta_1, beta_2] = step.betas;
    let correction = |beta: f64| 1.0 - beta.powf(step.step as f64);
    let factors = Factors {
        gradient: step.gradient_scale,
        decay: (1.0 - lr * step.weight_decay) as f32,
        first: (1.0 - beta_1) as f32,
        second: beta_2 as f32,
        new_square: (1.0 - beta_2) as f32,
        second_correction: correction(beta_2).sqrt() as f32,
        eps: step.eps as f32,
        step: -(lr / correction(beta_1)) as f32,
    };
    // SAFETY: plain code, compiled for the instruction set.
    unsafe { update_with(isa, parameters, &factors) };
}

multiversion! {
    fn update_with(parameters: Parameters<'_>, factors: &Factors) => update_body
}

#[inline(always)]
fn update_body(parameters: Parameters<'_>, factors: &Factors) {
    let Parameters { weights, gradients, first_moments, second_moments } = parameters;
    let moments = first_moments.iter_mut().zip(second_moments);
    for ((weight, gradient), (first, second)) in weights.iter_mut().zip(gradients).zip(moments) {
        let g = *gradient * factors.gradient;
        *gradient = 0.0;
        let p = *weight * factors.decay;
        // The step from `a` to `b` by a share below and above one half: torch's `lerp`.
        *first = if factors.first < 0.5 {
            *first + factors.first * (g - *first)
        } else {
            g - (g - *first) * (1.0 - factors.first)
        };
        *second = *second * factors.second + factors.new_square * g * g;
        let denominator = second.sqrt() / factors.second_correction + factors.eps;
        *weight = p + factors.step * *first / denominator;
    }
}

/// `Σ v²` in f64, in an order that only the length decides.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(*value) * f64::from(*value);
    }
    lanes.iter().sum()
}
