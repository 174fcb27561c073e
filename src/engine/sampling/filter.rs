//! `min_p`, `top_k` and `top_p` over unnormalised weights, without sorting and without a list of candidates.
//!
//! Order the tokens by weight, largest first, the lower id first on a tie. Each filter keeps a prefix of that order:
//! the first `k`, or the fewest whose weights add up to the fraction `p` of what is left. Where the prefix ends is
//! found by radix selection: the bits of a non-negative f32 order like the number, so three passes narrow the weight
//! at the cutoff down by 11, 11 and 10 bits, each time summing counts and weights per bucket and walking the buckets
//! from the top. The work is linear in the vocabulary whatever the distribution.

use super::lanes;
use crate::engine::request::SamplingParams;

/// Lowest bit and number of bits of a weight's pattern that each pass looks at.
const PASSES: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];
const BUCKETS: usize = 1 << 11;

/// The filters of one request and their scratch.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    min_p: f32,
    top_k: Option<usize>,
    top_p: f32,
    buckets: Box<[Bucket; BUCKETS]>,
}

/// What a group of tokens amounts to.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    count: usize,
    weight: f64,
}

/// How much to keep.
enum Quota {
    Tokens(usize),
    Weight(f64),
}

impl Quota {
    /// Whether the prefix ends within `bucket`; otherwise all of it is kept and the rest of the quota remains.
    fn ends_in(&mut self, bucket: &Bucket) -> bool {
        match self {
            Quota::Tokens(left) if *left > bucket.count => *left -= bucket.count,
            Quota::Weight(left) if *left > bucket.weight => *left -= bucket.weight,
            _ => return true,
        }
        false
    }
}

impl Filter {
    /// `None` when `params` keep every token.
    pub(super) fn new(params: &SamplingParams) -> Option<Self> {
        let &SamplingParams { min_p, top_k, top_p, .. } = params;
        (min_p > 0.0 || top_k.is_some() || top_p < 1.0).then(|| Self {
            min_p,
            top_k,
            top_p,
            buckets: Box::new([Bucket::default(); BUCKETS]),
        })
    }

    /// Zeroes the weights of the tokens that are not kept. Weights are in [0, 1] and the largest is 1.
    pub(super) fn apply(&mut self, weights: &mut [f32]) {
        if self.min_p > 0.0 {
            for weight in weights.iter_mut() {
                *weight = if *weight < self.min_p { 0.0 } else { *weight };
            }
        }
        if let Some(top_k) = self.top_k {
            self.keep(weights, Quota::Tokens(top_k));
        }
        if self.top_p < 1.0 {
            let total = lanes::sum(weights, |weight| weight);
            self.keep(weights, Quota::Weight(total * f64::from(self.top_p)));
        }
    }

    /// Zeroes what comes after the shortest prefix that fills the quota.
    fn keep(&mut self, weights: &mut [f32], mut quota: Quota) {
        let mut cutoff = 0;
        for (shift, width) in PASSES {
            self.buckets.fill(Bucket::default());
            for &weight in weights.iter() {
                let bits = weight.to_bits();
                // Only tokens that share the bits found so far; a zero weight is no candidate.
                if weight > 0.0 && u64::from(bits ^ cutoff) >> (shift + width) == 0 {
                    let bucket = &mut self.buckets[(bits >> shift) as usize & ((1 << width) - 1)];
                    bucket.count += 1;
                    bucket.weight += f64::from(weight);
                }
            }
            let end = self
                .buckets
                .iter()
                .enumerate()
                .rev()
                .find(|(_, bucket)| bucket.count > 0 && quota.ends_in(bucket));
            let Some((index, _)) = end else {
                // Fewer candidates than the quota, or a remainder that is only rounding. This is the first pass: the
                // weights of one of its buckets share an exponent, so that later sums and differences are exact.
                return;
            };
            cutoff |= (index as u32) << shift;
        }
        let at_cutoff = f32::from_bits(cutoff);
        for weight in weights.iter_mut() {
            if *weight < at_cutoff {
                *weight = 0.0;
            } else if *weight == at_cutoff {
                // The tied tokens take what is left of the quota, in order of id.
                match &mut quota {
                    Quota::Tokens(0) => *weight = 0.0,
                    Quota::Tokens(left) => *left -= 1,
                    Quota::Weight(left) if *left <= 0.0 => *weight = 0.0,
                    Quota::Weight(left) => *left -= f64::from(at_cutoff),
                }
            }
        }
    }
}
