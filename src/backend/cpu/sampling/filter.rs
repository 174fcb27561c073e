//! `min_p`, `top_k` and `top_p` over unnormalised weights, without sorting and without a list of candidates.
//!
//! Order the tokens by weight, largest first, the lower id first on a tie. Each filter keeps a prefix of that order:
//! the first `k`, or the fewest whose weights add up to the fraction `p` of what is left. Where the prefix ends is
//! found by radix selection: the bits of a non-negative f32 order like the number, so three passes narrow the weight
//! at the cutoff down by 11, 11 and 10 bits, each time summing counts and weights per bucket and walking the buckets
//! from the top. The work is linear in the vocabulary whatever the distribution.

use super::lanes;
use crate::backend::sampling::Sampler;

/// Lowest bit and number of bits of a weight's pattern that each pass looks at.
const PASSES: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];
const BUCKETS: usize = 1 << 11;

/// The scratch of a selection.
pub(super) struct Buckets(Box<[Bucket; BUCKETS]>);

impl Default for Buckets {
    fn default() -> Self {
        Self(Box::new([Bucket::default(); BUCKETS]))
    }
}

/// What a group of tokens amounts to.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    count: u32,
    /// In units of 1 / [`UNIT`](crate::backend::sampling::UNIT).
    weight: u64,
}

/// How much to keep, more than nothing.
enum Quota {
    Tokens(u32),
    Weight(u64),
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

/// Zeroes the weights of the tokens that are not kept. Weights are in [0, 1] and the largest is 1.
pub(super) fn apply(sampler: &Sampler, weights: &mut [f32], buckets: &mut Buckets) {
    let min_p = sampler.min_p();
    if min_p > 0.0 {
        for weight in weights.iter_mut() {
            *weight = if *weight < min_p { 0.0 } else { *weight };
        }
    }
    if let Some(top_k) = sampler.top_k() {
        keep(weights, Quota::Tokens(top_k), buckets);
    }
    if let Some(top_p) = sampler.top_p() {
        let total = u128::from(lanes::sum(weights, |weight| weight));
        let least = (u128::from(top_p) * total).div_ceil(1 << 64) as u64;
        keep(weights, Quota::Weight(least.max(1)), buckets);
    }
}

/// Zeroes what comes after the shortest prefix that fills the quota.
fn keep(weights: &mut [f32], mut quota: Quota, buckets: &mut Buckets) {
    let buckets = &mut *buckets.0;
    let mut cutoff = 0;
    for (shift, width) in PASSES {
        buckets.fill(Bucket::default());
        for &weight in weights.iter() {
            let bits = weight.to_bits();
            // Only tokens that share the bits found so far; a zero weight is no candidate.
            if weight > 0.0 && u64::from(bits ^ cutoff) >> (shift + width) == 0 {
                let bucket = &mut buckets[(bits >> shift) as usize & ((1 << width) - 1)];
                bucket.count += 1;
                bucket.weight += lanes::units(weight);
            }
        }
        let mut filled = buckets.iter().enumerate().rev().filter(|(_, bucket)| bucket.count > 0);
        let Some((index, _)) = filled.find(|(_, bucket)| quota.ends_in(bucket)) else {
            // Fewer candidates than the quota: this is the first pass.
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
                Quota::Tokens(0) | Quota::Weight(0) => *weight = 0.0,
                Quota::Tokens(left) => *left -= 1,
                Quota::Weight(left) => *left = left.saturating_sub(lanes::units(at_cutoff)),
            }
        }
    }
}
