//! The engine's settings and what a request may ask of it.

use super::EngineError;
use super::request::Request;
use crate::backend::PAGE;
use crate::model::ModelConfig;

/// Bounds and sizes of an engine. Names follow vLLM's flags.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// Threads of the CPU backend; `None` takes all cores.
    pub threads: Option<usize>,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most rows in one step: a longer prompt runs in pieces.
    pub max_num_batched_tokens: usize,
    /// Most tokens of a prompt and its continuation; `None` takes the model's own context length, cut to what the cache
    /// can hold.
    pub max_model_len: Option<usize>,
    /// Most distinct adapters in one step; `None` sets no bound.
    pub max_loras: Option<usize>,
    /// Largest rank of an adapter at any site.
    pub max_lora_rank: usize,
    /// Memory for the KV cache, in bytes. Pages take memory when they are first used.
    pub kv_cache_bytes: usize,
    /// Seed of requests that bring none.
    pub seed: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: None,
            max_num_seqs: 256,
            max_num_batched_tokens: 512,
            max_model_len: None,
            max_loras: None,
            max_lora_rank: 512,
            kv_cache_bytes: 4 << 30,
            seed: 0,
        }
    }
}

impl EngineOptions {
    /// # Errors
    /// Naming the option that is out of range.
    pub fn check(&self, config: &ModelConfig) -> Result<(), EngineError> {
        let positive = |option, value: usize| match value {
            0 => Err(EngineError::Option { option, found: "0".to_owned(), wanted: "at least 1".to_owned() }),
            _ => Ok(()),
        };
        positive("max-num-seqs", self.max_num_seqs)?;
        positive("max-num-batched-tokens", self.max_num_batched_tokens)?;
        positive("max-loras", self.max_loras.unwrap_or(1))?;
        positive("max-lora-rank", self.max_lora_rank)?;
        positive("threads", self.threads.unwrap_or(1))?;
        let page = page_bytes(config);
        if self.kv_cache_bytes < page {
            return Err(EngineError::Option {
                option: "kv-cache-memory-bytes",
                found: self.kv_cache_bytes.to_string(),
                wanted: format!("at least {page}, one page of {PAGE} tokens"),
            });
        }
        if let Some(wanted) = self.max_model_len {
            positive("max-model-len", wanted)?;
            let most = config.max_position_embeddings.min(self.kv_cache_bytes / page * PAGE);
            if wanted > most {
                let (context, cached) = (config.max_position_embeddings, self.kv_cache_bytes / page * PAGE);
                return Err(EngineError::Option {
                    option: "max-model-len",
                    found: wanted.to_string(),
                    wanted: format!(
                        "at most {most}: the model's context is {context}, the cache holds {cached} tokens"
                    ),
                });
            }
        }
        Ok(())
    }

    /// Most tokens of a prompt and its continuation.
    pub fn max_model_len(&self, config: &ModelConfig) -> usize {
        let cached = self.kv_cache_bytes / page_bytes(config) * PAGE;
        self.max_model_len.unwrap_or(config.max_position_embeddings.min(cached))
    }

    /// Pages of the KV cache: as many as the memory holds, but no more than all sequences can fill.
    pub fn pages(&self, config: &ModelConfig) -> usize {
        let useful = self.max_num_seqs.saturating_mul(self.max_model_len(config).div_ceil(PAGE));
        (self.kv_cache_bytes / page_bytes(config)).min(useful)
    }
}

/// Bytes of one page over all blocks: keys and values in f32.
fn page_bytes(config: &ModelConfig) -> usize {
    config.num_layers * 2 * config.num_kv_heads * config.head_dim * PAGE * 4
}

/// Refuses a request that the engine cannot run, naming the field.
pub(super) fn check_request(
    request: &Request,
    vocab_size: usize,
    max_model_len: usize,
) -> Result<(), EngineError> {
    let refuse = |field, found: String, wanted: String| Err(EngineError::Request { field, found, wanted });
    let within = |field, value: f32, range: std::ops::RangeInclusive<f32>| {
        if range.contains(&value) {
            return Ok(());
        }
        refuse(field, value.to_string(), format!("{} to {}", range.start(), range.end()))
    };
    let prompt = request.prompt.len();
    if prompt == 0 || prompt >= max_model_len {
        return refuse("prompt", format!("{prompt} tokens"), format!("1 to {} tokens", max_model_len - 1));
    }
    let tokens = [&request.prompt, &request.stop.stop_token_ids].into_iter().flatten();
    if let Some(token) = tokens
        .chain(request.sampling.logit_bias.iter().map(|(token, _)| token))
        .find(|&&token| token as usize >= vocab_size)
    {
        return refuse("token id", token.to_string(), format!("below {vocab_size}, the vocabulary's size"));
    }
    if request.n == 0 {
        return refuse("n", "0".to_owned(), "at least 1".to_owned());
    }
    if request.stop.max_tokens == Some(0) {
        return refuse("max_tokens", "0".to_owned(), "at least 1".to_owned());
    }
    if request.stop.stop.iter().any(String::is_empty) {
        return refuse("stop", "an empty string".to_owned(), "strings of at least one character".to_owned());
    }
    let sampling = &request.sampling;
    within("temperature", sampling.temperature, 0.0..=f32::MAX)?;
    within("min_p", sampling.min_p, 0.0..=1.0)?;
    within("top_p", sampling.top_p, f32::MIN_POSITIVE..=1.0)?;
    within("repetition_penalty", sampling.repetition_penalty, f32::MIN_POSITIVE..=f32::MAX)?;
    within("presence_penalty", sampling.presence_penalty, f32::MIN..=f32::MAX)?;
    within("frequency_penalty", sampling.frequency_penalty, f32::MIN..=f32::MAX)?;
    if sampling.top_k == Some(0) {
        return refuse("top_k", "0".to_owned(), "at least 1".to_owned());
    }
    for (_, bias) in &sampling.logit_bias {
        within("logit_bias", *bias, f32::MIN..=f32::MAX)?;
    }
    Ok(())
}
