//! Passes over a vocabulary, written so that the compiler turns them into vector instructions.
//!
//! A maximum in one variable is a chain that vectors may not reorder; with one variable per lane there is nothing to
//! reorder. The exponential is the CUDA backend's, too, operation by operation: no step may be fused with another.

use crate::backend::sampling::UNIT;

const LANES: usize = 16;

/// The largest value that is not NaN; −inf when there is none.
#[inline(always)]
pub(in crate::backend::cpu) fn largest(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &value| if value > most { value } else { most })
}

/// From here to its double, numbers of f64 are [`UNIT`]ths apart: adding it rounds a weight to a whole number of them, to
/// the nearest, ties to even, and leaves that number in the low bits. Every instruction set has this for vectors; not
/// every one has the conversion.
const ROUND: f64 = (1u64 << (f64::MANTISSA_DIGITS - 1)) as f64 / UNIT as f64;

/// A weight in [0, 1] in units of 1 / [`UNIT`].
pub(super) fn units(weight: f32) -> u64 {
    rounded_bits(weight) - ROUND.to_bits()
}

#[inline(always)]
fn rounded_bits(weight: f32) -> u64 {
    (f64::from(weight) + ROUND).to_bits()
}

/// The sum of the weights of all values in units of 1 / [`UNIT`], each in [0, 1] and rounded by itself.
pub(super) fn sum(values: &[f32], weight_of: impl Fn(f32) -> f32) -> u64 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0u64; LANES];
    // Modulo 2⁶⁴, in which the sum, of at most 2²⁴ weights, is exact whatever is added on the way.
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(rounded_bits(weight_of(value)));
        }
    }
    let of_rest = rest.iter().map(|&value| rounded_bits(weight_of(value)));
    let sum = lanes.into_iter().chain(of_rest).fold(0, u64::wrapping_add);
    sum.wrapping_sub(ROUND.to_bits().wrapping_mul(values.len() as u64))
}

/// `exp(x)` for `x ≤ 0`, within two units in the last place; 0 below −87 and for NaN.
///
/// `x = n ln 2 + r` with whole `n` and `|r| ≤ ln 2 / 2`, so that `exp(x) = 2ⁿ Σ rᵏ/k!` needs eight terms.
#[inline(always)]
pub(in crate::backend::cpu) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    /// Adding 1.5 · 2²³ rounds to a whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; `n` times the first is exact.
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    let bounded = if x > LOWEST { x } else { LOWEST };
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = bounded - n * LN_2[0] - n * LN_2[1];
    let mut series = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + factor;
    }
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x > LOWEST { series * power } else { 0.0 }
}

/// [`exp`] that keeps NaN: what is no number must not look like one in a result.
#[inline(always)]
pub(in crate::backend::cpu) fn exp_or_nan(x: f32) -> f32 {
    if x.is_nan() { x } else { exp(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        assert_eq!(exp(0.0), 1.0);
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}): {error}");
        }
        for x in [-87.5, -1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp(x), 0.0, "exp({x})");
        }
    }

    #[test]
    fn units_are_the_nearest_whole_number() {
        let one = UNIT as f32;
        for (weight, expected) in [(0.0, 0), (1.0, UNIT), (0.5, UNIT / 2), (1.0 / one, 1), (0.4 / one, 0)] {
            assert_eq!(units(weight), expected, "{weight}");
        }
        assert_eq!([0.5, 1.5, 2.5].map(|half| units(half / one)), [0, 2, 2]);
        let third = 1.0f32 / 3.0;
        assert_eq!(units(third) as f32 / one, third);
    }

    #[test]
    fn whole_chunks_and_the_rest_are_both_counted() {
        for length in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..length).map(|i| i as f32 - 50.0).collect();
            assert_eq!(sum(&values, |value| if value < 0.0 { 1.0 } else { 0.5 }), {
                let negative = length.min(50) as u64;
                negative * UNIT + (length as u64 - negative) * (UNIT / 2)
            });
            let last = values.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(largest(&values), last);
            assert_eq!(largest(&[&[f32::NAN], values.as_slice(), &[f32::NAN]].concat()), last);
        }
    }
}
