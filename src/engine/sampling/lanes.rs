//! Passes over a vocabulary, written so that the compiler turns them into vector instructions.
//!
//! A sum or maximum in one variable is a chain that vectors may not reorder; with one variable per lane there is
//! nothing to reorder, and the order is the same on every machine.

const LANES: usize = 16;

/// The largest value that is not NaN; −inf when there is none.
pub(super) fn largest(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &value| if value > most { value } else { most })
}

/// The sum of `term` over all values.
pub(super) fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f64 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(term(value));
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(term(value))).sum::<f64>()
}

/// `exp(x)` for `x ≤ 0`, within two units in the last place; 0 below −87 and for NaN.
///
/// `x = n ln 2 + r` with whole `n` and `|r| ≤ ln 2 / 2`, so that `exp(x) = 2ⁿ Σ rᵏ/k!` needs eight terms.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
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
    fn whole_chunks_and_the_rest_are_both_counted() {
        for length in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..length).map(|i| i as f32 - 50.0).collect();
            let expected: f64 = values.iter().map(|&value| f64::from(value)).sum();
            assert_eq!(sum(&values, |value| value), expected);
            let last = values.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(largest(&values), last);
            assert_eq!(largest(&[&[f32::NAN], values.as_slice(), &[f32::NAN]].concat()), last);
        }
    }
}
