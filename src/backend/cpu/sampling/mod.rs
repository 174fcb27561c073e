//! Sampling: see [`crate::backend::sampling`] for what is computed.
//!
//! A row is copied once and then changed in place. Every filter keeps the most likely tokens down to some cutoff
//! (`filter`), so nothing is sorted: rejected weights become zero, and a draw walks the weights in order of id.

mod filter;
mod lanes;
mod logprobs;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

use rayon::prelude::*;

use super::Buffer;
use super::parallel::pays;
use crate::backend::sampling::{Draw, Drawn, Sampler, SamplingError, Seen, TokenSource};
use filter::Buckets;
pub(super) use lanes::{exp, exp_or_nan, largest};

/// Operations on each logit of a row: a few passes, of which the exponential is the longest.
const WORK: usize = 64;

/// Tokens that a draw passes over at a time.
const BLOCK: usize = 1024;

/// What a thread works on, kept so that drawing allocates nothing.
#[derive(Default)]
struct Scratch {
    /// The row as it is changed: logits, then weights.
    row: Vec<f32>,
    buckets: Buckets,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

pub(super) fn sample(logits: &Buffer, draws: &[Draw<'_>], drawn: &mut Vec<Drawn>) {
    drawn.clear();
    let sample = |draw: &Draw<'_>| sample_row(&logits.data[draw.row * logits.width..][..logits.width], draw);
    if draws.len() > 1 && pays(draws.len() * logits.width * WORK) {
        draws.par_iter().map(sample).collect_into_vec(drawn);
    } else {
        drawn.extend(draws.iter().map(sample));
    }
}

/// One draw from its row `[vocabulary]`.
pub(in crate::backend) fn sample_row(logits: &[f32], draw: &Draw<'_>) -> Drawn {
    let token = match draw.token {
        TokenSource::Given(token) => Ok(token),
        TokenSource::Sampler { sampler, position, banned } => {
            SCRATCH.with_borrow_mut(|scratch| next_token(logits, sampler, position, banned, scratch))
        }
    };
    let logprobs = match (&token, draw.logprobs) {
        (&Ok(token), Some(top)) => Some(logprobs::token_logprobs(logits, token, top)),
        _ => None,
    };
    Drawn { token, logprobs }
}

fn next_token(
    logits: &[f32],
    sampler: &Sampler,
    position: usize,
    banned: &[u32],
    scratch: &mut Scratch,
) -> Result<u32, SamplingError> {
    let Scratch { row, buckets } = scratch;
    row.clear();
    row.extend_from_slice(logits);
    adjust(row, sampler, banned);
    let best = argmax(row)?;
    if sampler.is_greedy() {
        return Ok(best);
    }
    let largest = row[best as usize];
    let temperature = sampler.params().temperature;
    for logit in row.iter_mut() {
        *logit = lanes::exp((*logit - largest) / temperature);
    }
    filter::apply(sampler, row, buckets);
    Ok(draw(row, sampler.fraction(position)))
}

/// Applies what changes logits: bias, ban and penalties.
fn adjust(logits: &mut [f32], sampler: &Sampler, banned: &[u32]) {
    for &(token, bias) in sampler.bias() {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    for &token in banned {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    let params = sampler.params();
    for &Seen { token, count } in sampler.history() {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        let repetition = params.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        if count > 0 {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
}

/// The token with the largest logit, the lowest id on a tie.
fn argmax(logits: &[f32]) -> Result<u32, SamplingError> {
    // Without a branch per value, for vectors; only a NaN or +inf needs to be found.
    let usable = logits.iter().fold(true, |usable, &value| usable & (value < f32::INFINITY));
    if !usable && let Some(token) = logits.iter().position(|&value| value.is_nan() || value == f32::INFINITY)
    {
        return Err(SamplingError::NotFinite { token: token as u32, value: logits[token] });
    }
    let largest = lanes::largest(logits);
    let best = logits.iter().position(|&value| value == largest && value > f32::NEG_INFINITY);
    best.map(|token| token as u32).ok_or(SamplingError::NoTokenLeft)
}

/// The first token at which the sum of the weights passes `fraction` (of 2⁶⁴) of the whole, which is not zero.
fn draw(weights: &[f32], fraction: u64) -> u32 {
    let total = lanes::sum(weights, |weight| weight);
    let mut left = ((u128::from(fraction) * u128::from(total)) >> 64) as u64;
    for (index, block) in weights.chunks(BLOCK).enumerate() {
        let of_block = lanes::sum(block, |weight| weight);
        if left >= of_block {
            left -= of_block;
            continue;
        }
        for (offset, &weight) in block.iter().enumerate() {
            let weight = lanes::units(weight);
            if left < weight {
                return (index * BLOCK + offset) as u32;
            }
            left -= weight;
        }
    }
    unreachable!("a part of the sum is less than the sum")
}
