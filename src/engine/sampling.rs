//! From one row of raw logits to the next token.
//!
//! The logits `l` pass, in vLLM's order, through `logit_bias`, the `min_tokens` ban and the penalties. Temperature 0
//! then takes the largest; otherwise they become weights `w = exp((l − max l) / T)` and are filtered by `min_p`,
//! `top_k` and `top_p`. Every filter keeps the most likely tokens down to some cutoff (`filter`), so nothing is
//! sorted: rejected weights become zero, in place, and a draw walks the weights in order of id.
//!
//! The uniform number behind a draw comes from a counter-based generator ([`Philox`]) keyed by the request's seed with
//! the choice and the token's position as its counter. It has no state, so neighbours, batching and preemption cannot
//! change it.

mod filter;
mod lanes;
mod logprobs;
mod philox;
#[cfg(test)]
mod tests;

use super::request::SamplingParams;
use filter::Filter;

pub use logprobs::{log_softmax_at, token_logprobs};
pub use philox::Philox;

/// Why no token could be drawn. The request fails; its neighbours do not notice.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// The model, or a penalty's overflow, produced a number that has no place among logits (−inf has).
    #[error("the logit of token {token} is {value}; wanted a finite number or -inf")]
    NotFinite { token: u32, value: f32 },
    #[error("every token's logit is -inf: no token is left to choose")]
    NoTokenLeft,
    #[error("got {found} logits, wanted one for each of the {wanted} tokens of the vocabulary")]
    VocabularySize { found: usize, wanted: usize },
}

/// Draws the tokens of one choice of a request.
///
/// Nothing is allocated after [`Sampler::new`].
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    vocab_size: usize,
    random: Philox,
    choice: u64,
    /// Per token, how often it was generated, with [`IN_PROMPT`] set for tokens of the prompt; empty when no penalty
    /// looks at it.
    history: Vec<u32>,
    /// `None` when every token stays.
    filter: Option<Filter>,
}

/// The bit of [`Sampler::history`] that marks a token of the prompt.
const IN_PROMPT: u32 = 1 << 31;

/// Tokens that a draw passes over at a time.
const BLOCK: usize = 1024;

impl Sampler {
    /// A sampler for continuation number `choice` of `prompt`, over logits `[vocab_size]`.
    ///
    /// `seed` is the request's own seed, or one taken from the engine's. Prompt ids outside the vocabulary have no
    /// logit and so no effect.
    pub fn new(params: &SamplingParams, prompt: &[u32], vocab_size: usize, seed: u64, choice: usize) -> Self {
        let penalised = params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0
            || params.repetition_penalty != 1.0;
        let mut history = vec![0; if penalised { vocab_size } else { 0 }];
        for &token in prompt {
            if let Some(entry) = history.get_mut(token as usize) {
                *entry |= IN_PROMPT;
            }
        }
        Self {
            params: params.clone(),
            vocab_size,
            random: Philox::new(seed),
            choice: choice as u64,
            history,
            filter: Filter::new(params),
        }
    }

    /// The token at `position` (0 for the first generated one), recorded for the penalties of later positions.
    ///
    /// `logits` is the model's row `[vocab_size]` and is overwritten. `banned` are the tokens that may not be drawn
    /// yet: end and stop tokens before `min_tokens`.
    ///
    /// # Errors
    /// When a logit is NaN or +inf, when all are −inf, or when there are not `vocab_size` of them.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        position: usize,
        banned: &[u32],
    ) -> Result<u32, SamplingError> {
        if logits.len() != self.vocab_size {
            return Err(SamplingError::VocabularySize { found: logits.len(), wanted: self.vocab_size });
        }
        self.adjust(logits, banned);
        let best = argmax(logits)?;
        // A single survivor is the most likely token: no weights needed, and no rounding of them.
        let token = if self.params.temperature == 0.0 || self.params.top_k == Some(1) {
            best
        } else {
            self.draw(logits, best, position)
        };
        if let Some(entry) = self.history.get_mut(token as usize) {
            *entry += 1;
        }
        Ok(token)
    }

    /// Applies what changes logits: bias, ban and penalties.
    fn adjust(&self, logits: &mut [f32], banned: &[u32]) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for &token in banned {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        let SamplingParams { presence_penalty, frequency_penalty, repetition_penalty, .. } = self.params;
        for (logit, &entry) in logits.iter_mut().zip(&self.history) {
            if entry == 0 {
                continue;
            }
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            let count = entry & !IN_PROMPT;
            if count > 0 {
                *logit -= frequency_penalty * count as f32 + presence_penalty;
            }
        }
    }

    /// Draws from the filtered softmax of `logits`, whose largest is at `best`. Overwrites the logits with weights.
    fn draw(&mut self, logits: &mut [f32], best: u32, position: usize) -> u32 {
        let largest = logits[best as usize];
        let temperature = self.params.temperature;
        for logit in logits.iter_mut() {
            *logit = lanes::exp((*logit - largest) / temperature);
        }
        let weights = logits;
        if let Some(filter) = &mut self.filter {
            filter.apply(weights);
        }
        let total: f64 = weights.chunks(BLOCK).map(|block| lanes::sum(block, |weight| weight)).sum();
        let mut left = self.random.uniform(self.choice, position as u64) * total;
        let mut drawn = best;
        for (index, block) in weights.chunks(BLOCK).enumerate() {
            let weight = lanes::sum(block, |weight| weight);
            if left >= weight {
                left -= weight;
                continue;
            }
            for (offset, &weight) in block.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                drawn = (index * BLOCK + offset) as u32;
                left -= f64::from(weight);
                if left < 0.0 {
                    break;
                }
            }
            break;
        }
        // Rounding may leave a remainder after a block's last token, which is drawn then, or after the last block.
        drawn
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
