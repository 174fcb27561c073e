//! Log-probabilities of a row, and the most likely tokens.

use std::cmp::Ordering;

use super::lanes;
use crate::backend::sampling::{Normaliser, TokenLogprobs, UNIT, lowest_if_nan};

/// Log-probability and rank of `token`, and the `top` most likely tokens of raw logits `[vocabulary]`.
pub(super) fn token_logprobs(logits: &[f32], token: u32, top: usize) -> TokenLogprobs {
    let normaliser = normaliser(logits);
    let own = logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| lowest_if_nan(logit));
    TokenLogprobs {
        token,
        logprob: normaliser.logprob(own),
        rank: logits.iter().filter(|&&logit| lowest_if_nan(logit) >= own).count(),
        top: most_likely(logits, top)
            .into_iter()
            .map(|(logit, token)| (token, normaliser.logprob(logit)))
            .collect(),
    }
}

fn normaliser(logits: &[f32]) -> Normaliser {
    let largest = lanes::largest(logits);
    let sum = if largest.is_finite() {
        lanes::sum(logits, |logit| lanes::exp(logit - largest))
    } else {
        // All probability lies with the infinite ones; there are none when the largest is −inf.
        logits.iter().filter(|&&logit| logit == f32::INFINITY).count() as u64 * UNIT
    };
    Normaliser::new(largest, sum)
}

/// The `top` largest logits with their ids, in order.
fn most_likely(logits: &[f32], top: usize) -> Vec<(f32, u32)> {
    let top = top.min(logits.len());
    if top == 0 {
        return Vec::new();
    }
    let by_likelihood = |a: &(f32, u32), b: &(f32, u32)| {
        // No NaN is left, and 0 and −0 are equally likely.
        b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
    };
    // Keeping up to twice as many candidates makes the pruning linear overall, in any order of logits.
    let mut kept: Vec<(f32, u32)> = Vec::with_capacity(2 * top);
    let mut threshold = None;
    for (token, &logit) in logits.iter().enumerate() {
        let candidate = (lowest_if_nan(logit), token as u32);
        if threshold.is_some_and(|last| by_likelihood(&candidate, &last).is_gt()) {
            continue;
        }
        kept.push(candidate);
        if kept.len() == 2 * top {
            threshold = Some(*kept.select_nth_unstable_by(top - 1, by_likelihood).1);
            kept.truncate(top);
        }
    }
    kept.sort_unstable_by(by_likelihood);
    kept.truncate(top);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: f32 = f32::NEG_INFINITY;

    fn logprob(logits: &[f32], token: u32) -> f32 {
        token_logprobs(logits, token, 0).logprob
    }

    #[test]
    fn logprobs_are_the_log_of_the_softmax() {
        // Probabilities 1/8, 1/2, 1/4, 1/8, whatever is added to all logits.
        for shift in [0.0, 50.0, -80.0] {
            let logits = [1f32, 4.0, 2.0, 1.0].map(|weight| weight.ln() + shift);
            let result = token_logprobs(&logits, 3, 3);
            assert!((result.logprob - 0.125f32.ln()).abs() < 1e-5);
            assert_eq!(result.rank, 4, "the tied token counts as at least as likely");
            let (ids, values): (Vec<u32>, Vec<f32>) = result.top.into_iter().unzip();
            assert_eq!(ids, [1, 2, 0], "best first, lower id on a tie");
            for (value, expected) in values.iter().zip([0.5f32, 0.25, 0.125]) {
                assert!((value - expected.ln()).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let result = token_logprobs(&[3e38, -3e38, 3e38], 0, 1);
        assert_eq!(result.logprob, 0.5f32.ln());
        assert_eq!((result.rank, result.top), (2, vec![(0, 0.5f32.ln())]));
        assert_eq!(logprob(&[3e38, -3e38], 1), NONE);
    }

    #[test]
    fn masked_nan_and_infinite_logits_give_numbers_or_minus_infinity() {
        assert_eq!(logprob(&[0.0, NONE], 1), NONE);
        assert_eq!(logprob(&[0.0, f32::NAN], 0), 0.0);
        assert_eq!(logprob(&[0.0, f32::NAN], 1), NONE);
        assert_eq!(logprob(&[0.0, f32::INFINITY], 1), 0.0);
        assert_eq!(logprob(&[0.0, f32::INFINITY], 0), NONE);
        assert_eq!(logprob(&[NONE, NONE], 0), NONE);
        assert_eq!(logprob(&[f32::NAN], 0), NONE);
        assert_eq!(logprob(&[], 0), NONE);
        assert_eq!(logprob(&[0.0], 9), NONE);
        let result = token_logprobs(&[f32::NAN, 0.0, NONE], 0, 9);
        assert_eq!((result.logprob, result.rank), (NONE, 3));
        assert_eq!(result.top, [(1, 0.0), (0, NONE), (2, NONE)]);
    }

    #[test]
    fn the_top_tokens_are_those_of_a_full_sort() {
        let logits: Vec<f32> = (0..1000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as f32).collect();
        let mut sorted: Vec<u32> = (0..1000).collect();
        sorted.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        for top in [0, 1, 2, 5, 20, 999, 1000, 5000] {
            let found: Vec<u32> =
                token_logprobs(&logits, 0, top).top.iter().map(|&(token, _)| token).collect();
            assert_eq!(found, sorted[..top.min(1000)]);
        }
    }
}
