//! From a row of raw logits to a token: what every backend starts from and what it answers.
//!
//! The logits `l` pass, in vLLM's order, through `logit_bias`, the `min_tokens` ban and the penalties. Temperature 0
//! then takes the largest; otherwise they become weights `w = exp((l − max l) / T)` and are filtered by `min_p`,
//! `top_k` and `top_p`. Order the tokens by weight, largest first, the lower id first on a tie: each filter keeps a
//! prefix of that order. A draw takes the first token, in order of id, at which the sum of the kept weights passes a
//! random fraction of the whole.
//!
//! All backends choose the same token from the same logits: sums are of whole numbers, in units of 2⁻⁴⁰, and so have no
//! order, the exponential is one polynomial, and every other step is a single rounding of IEEE 754.
//!
//! The number behind a draw comes from a counter-based generator ([`Philox`]) keyed by the request's seed with the
//! choice and the token's position as its counter. It has no state, so neighbours, batching and preemption cannot
//! change it.

mod logprobs;
mod philox;

pub use logprobs::TokenLogprobs;
pub(super) use logprobs::{Normaliser, lowest_if_nan};
pub use philox::Philox;

/// What a weight of 1 counts in a sum; other weights are rounded to the nearest whole number, ties to even. The sum of
/// 2²⁴ weights fits a u64.
pub(super) const UNIT: u64 = 1 << 40;

/// How the next token is drawn from the logits. Field meanings and order of application follow vLLM.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 picks the most likely token (the lowest id on a tie).
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many most likely tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of every token generated so far.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from the logit of every token generated so far.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Added to the logits of these token ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seeds this request's random stream; `None` takes one from the engine's own seed.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// Why no token could be drawn. The request fails; its neighbours do not notice.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// The model, or a penalty's overflow, produced a number that has no place among logits (−inf has). The token is
    /// the first of them.
    #[error("the logit of token {token} is {value}; wanted a finite number or -inf")]
    NotFinite { token: u32, value: f32 },
    #[error("every token's logit is -inf: no token is left to choose")]
    NoTokenLeft,
}

/// One choice of a request: its parameters, its random stream, and the tokens its penalties look at.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    random: Philox,
    choice: u64,
    /// One entry a token, ascending.
    bias: Vec<(u32, f32)>,
    /// The same; empty when no penalty looks at it.
    history: Vec<Seen>,
    /// Entries that the first recorded token makes room for.
    room: usize,
}

/// A token that penalties know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub token: u32,
    /// How often it was generated; 0 for one that is in the prompt only.
    pub count: u32,
}

impl Sampler {
    /// A sampler for continuation number `choice` of `prompt`, which records at most `room` different tokens: all but
    /// the first without allocating.
    ///
    /// `seed` is the request's own seed, or one taken from the engine's. Ids outside the vocabulary have no logit and
    /// so no effect.
    pub fn new(params: &SamplingParams, prompt: &[u32], seed: u64, choice: usize, room: usize) -> Self {
        let mut sampler = Self {
            params: params.clone(),
            random: Philox::new(seed),
            choice: choice as u64,
            bias: merged(&params.logit_bias),
            history: Vec::new(),
            room,
        };
        // No other penalty looks at the prompt.
        if params.repetition_penalty != 1.0 {
            let mut seen = prompt.to_vec();
            seen.sort_unstable();
            seen.dedup();
            sampler.history.extend(seen.into_iter().map(|token| Seen { token, count: 0 }));
        }
        sampler
    }

    /// Takes a drawn token into the history.
    pub fn record(&mut self, token: u32) {
        let params = &self.params;
        if params.presence_penalty == 0.0
            && params.frequency_penalty == 0.0
            && params.repetition_penalty == 1.0
        {
            return;
        }
        // Not before: memory is for sequences that run. What is never written costs addresses, not pages.
        self.history.reserve_exact(std::mem::take(&mut self.room));
        match self.history.binary_search_by_key(&token, |seen| seen.token) {
            Ok(at) => self.history[at].count += 1,
            Err(at) => self.history.insert(at, Seen { token, count: 1 }),
        }
    }

    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// What is added to logits: one entry a token, ascending.
    pub fn bias(&self) -> &[(u32, f32)] {
        &self.bias
    }

    /// What penalties apply to: one entry a token, ascending.
    pub fn history(&self) -> &[Seen] {
        &self.history
    }

    /// Whether the most likely token is taken: no weights are needed, and no rounding of them.
    pub fn is_greedy(&self) -> bool {
        self.params.temperature == 0.0 || self.top_k().is_some_and(|top_k| top_k <= 1)
    }

    /// Least weight that is kept. The most likely token has 1, and stays.
    pub fn min_p(&self) -> f32 {
        self.params.min_p.min(1.0)
    }

    /// How many tokens are kept; `None` keeps all.
    pub fn top_k(&self) -> Option<u32> {
        self.params.top_k.map(|top_k| u32::try_from(top_k).unwrap_or(u32::MAX))
    }

    /// The fraction of the weight that is kept, in units of 2⁻⁶⁴; `None` keeps all.
    pub fn top_p(&self) -> Option<u64> {
        (self.params.top_p < 1.0).then(|| (f64::from(self.params.top_p) * 2f64.powi(64)) as u64)
    }

    /// The random fraction at `position` (0 for the first generated token), in units of 2⁻⁶⁴.
    pub fn fraction(&self, position: usize) -> u64 {
        self.random.bits(self.choice, position as u64)
    }
}

/// The sums for each token, ascending.
fn merged(bias: &[(u32, f32)]) -> Vec<(u32, f32)> {
    let mut merged = bias.to_vec();
    // Stable, so that a token's values are added as they are listed.
    merged.sort_by_key(|&(token, _)| token);
    merged.dedup_by(|next, sum| {
        let same = next.0 == sum.0;
        if same {
            sum.1 += next.1;
        }
        same
    });
    merged
}

/// What to do with one row of logits.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// Row of the buffer of logits.
    pub row: usize,
    pub token: TokenSource<'a>,
    /// Report the token's log-probability and this many of the most likely tokens.
    pub logprobs: Option<usize>,
}

/// Which token a [`Draw`] is about.
#[derive(Clone, Copy, Debug)]
pub enum TokenSource<'a> {
    /// The next one, at `position` (0 for the first generated one). `banned` are the tokens that may not be drawn yet:
    /// end and stop tokens before `min_tokens`.
    Sampler { sampler: &'a Sampler, position: usize, banned: &'a [u32] },
    /// This one: a token of the prompt, whose log-probability is asked for.
    Given(u32),
}

/// What a [`Draw`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The drawn or given token.
    pub token: Result<u32, SamplingError>,
    /// Where asked for and there is a token; from the raw logits, before bias, penalties and temperature.
    pub logprobs: Option<TokenLogprobs>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(sampler: &Sampler) -> Vec<(u32, u32)> {
        sampler.history().iter().map(|seen| (seen.token, seen.count)).collect()
    }

    #[test]
    fn history_counts_what_penalties_look_at() {
        let repetition = SamplingParams { repetition_penalty: 2.0, ..Default::default() };
        let mut sampler = Sampler::new(&repetition, &[7, 2, 7], 0, 0, 3);
        assert_eq!(seen(&sampler), [(2, 0), (7, 0)]);
        sampler.record(9);
        let capacity = sampler.history.capacity();
        sampler.record(7);
        sampler.record(1);
        assert_eq!(seen(&sampler), [(1, 1), (2, 0), (7, 1), (9, 1)]);
        assert_eq!(sampler.history.capacity(), capacity);

        let presence = SamplingParams { presence_penalty: 0.5, ..Default::default() };
        let mut sampler = Sampler::new(&presence, &[7, 2], 0, 0, 3);
        sampler.record(7);
        sampler.record(7);
        assert_eq!(seen(&sampler), [(7, 2)], "the prompt does not matter");

        let mut sampler = Sampler::new(&SamplingParams::default(), &[7, 2], 0, 0, 3);
        sampler.record(7);
        assert_eq!(seen(&sampler), []);
    }

    #[test]
    fn biases_of_a_token_add_up() {
        let logit_bias = vec![(2, 1.5), (9, 5.0), (2, 1.0), (0, -4.0)];
        let sampler = Sampler::new(&SamplingParams { logit_bias, ..Default::default() }, &[], 0, 0, 0);
        assert_eq!(sampler.bias(), [(0, -4.0), (2, 2.5), (9, 5.0)]);
    }

    #[test]
    fn fractions_are_of_two_to_the_64() {
        let kept =
            |top_p| Sampler::new(&SamplingParams { top_p, ..Default::default() }, &[], 0, 0, 0).top_p();
        assert_eq!(kept(1.0), None);
        assert_eq!(kept(0.5), Some(1 << 63));
        assert_eq!(kept(1.0 - f32::EPSILON / 2.0), Some(u64::MAX << 40));
        assert_eq!(kept(f32::MIN_POSITIVE), Some(0));
    }
}
