//! Log-probabilities from raw logits: `log p(t) = l_t − max l − ln Σ_v exp(l_v − max l)`.
//!
//! NaN counts as −inf here: these numbers report, drawing refuses.

use super::UNIT;

/// Log-probabilities at one position, from the raw logits (before temperature and penalties).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token at this position.
    pub token: u32,
    /// Its natural-log probability; −inf for an id outside the vocabulary.
    pub logprob: f32,
    /// How many tokens of the vocabulary are at least as likely (1 = the most likely).
    pub rank: usize,
    /// The most likely tokens, best first (the lower id on a tie), as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// What turns a logit into a log-probability: the largest one, and the sum relative to it.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct Normaliser {
    /// −inf when there is no number among the logits.
    largest: f32,
    log_sum: f64,
}

impl Normaliser {
    /// `sum` is of `exp(l − largest)`, in units of 1 / [`UNIT`]; an infinite largest logit counts as 1 itself.
    pub(in crate::backend) fn new(largest: f32, sum: u64) -> Self {
        Self { largest, log_sum: (sum as f64 / UNIT as f64).ln() }
    }

    pub(in crate::backend) fn logprob(&self, logit: f32) -> f32 {
        let logit = lowest_if_nan(logit);
        if logit == f32::NEG_INFINITY {
            return logit;
        }
        // An infinite largest logit takes all the probability.
        let relative = if logit == self.largest { 0.0 } else { logit - self.largest };
        (f64::from(relative) - self.log_sum) as f32
    }
}

pub(in crate::backend) fn lowest_if_nan(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}
