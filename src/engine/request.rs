//! What goes into the engine and what comes out of it.

pub use crate::backend::sampling::{SamplingParams, TokenLogprobs};

/// When a sequence ends.
#[derive(Clone, Debug, PartialEq)]
pub struct StopParams {
    /// Most tokens to generate; `None` generates up to the context length.
    pub max_tokens: Option<usize>,
    /// No end token and no stop before this many tokens.
    pub min_tokens: usize,
    /// Ends before the first of these strings appears in the output text.
    pub stop: Vec<String>,
    /// Ends after one of these tokens, beside the model's own end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's end tokens.
    pub ignore_eos: bool,
}

impl Default for StopParams {
    fn default() -> Self {
        Self {
            max_tokens: Some(16),
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// One request: a prompt, the adapters its rows use, and how to continue it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Adapter names with their gates; empty for the base alone, one entry with gate 1 for a plain adapter.
    pub adapters: Vec<(String, f32)>,
    /// Independent continuations of the prompt.
    pub n: usize,
    pub sampling: SamplingParams,
    pub stop: StopParams,
    /// Report each generated token's log-probability and this many of the most likely alternatives.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Request {
    /// A request with default sampling for `prompt` through the base alone.
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            adapters: Vec::new(),
            n: 1,
            sampling: SamplingParams::default(),
            stop: StopParams::default(),
            logprobs: None,
            prompt_logprobs: None,
            skip_special_tokens: true,
        }
    }
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model's own end token.
    EndToken,
    /// A token of `stop_token_ids`.
    StopToken(u32),
    /// A string of `stop`.
    StopString(String),
    /// `max_tokens` or the context length was reached.
    Length,
    /// The request was cancelled.
    Aborted,
}

/// What the engine reports about a request while it runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Once, before the first token, when asked for; `None` for the first prompt token.
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    /// One generated token. `text` is the newly complete part of the output text and may be empty.
    Token { choice: usize, token: u32, text: String, logprobs: Option<TokenLogprobs> },
    /// The choice ended; `text` is what was held back until then.
    Finished { choice: usize, text: String, reason: FinishReason },
    /// The request failed; nothing follows.
    Failed(String),
}

/// One finished continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub index: usize,
    /// Generated tokens, the ending token included.
    pub token_ids: Vec<u32>,
    /// Decoded text, without the end token or stop string.
    pub text: String,
    /// One entry per generated token when asked for.
    pub logprobs: Option<Vec<TokenLogprobs>>,
    pub finish_reason: FinishReason,
}

/// A finished request.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    pub prompt_token_ids: Vec<u32>,
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// By index, `n` of them.
    pub choices: Vec<Choice>,
}
