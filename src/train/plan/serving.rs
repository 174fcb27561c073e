//! Memory of serving.

use super::{BaseShape, Estimate, F32, PairShape};
use crate::adapter::Adapter;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, PAGE};
use crate::engine::{EngineError, EngineOptions};
use crate::tensor::Tensor;

/// An adapter to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedAdapter {
    pub name: String,
    pub pairs: Vec<PairShape>,
    /// Of its tensors as stored, and of B once more as it is laid out.
    pub bytes: u64,
}

impl ServedAdapter {
    pub fn new(name: &str, adapter: &Adapter) -> Self {
        let stored = |tensor: &Tensor| tensor.bytes().len();
        let vector =
            |vector: &Option<Vec<f32>>| vector.as_ref().map_or(0, |vector| vector.len() * size_of::<f32>());
        let pairs = PairShape::of(adapter);
        let of_sites = adapter.sites.iter().zip(&pairs).map(|(site, pair)| {
            let laid_out = site.b.shape()[0] * pair.padded_rank() * site.b.dtype().size();
            // Bias and magnitude as stored and, folded into bias and column scale, as laid out.
            stored(&site.a) + stored(&site.b) + laid_out + 2 * (vector(&site.bias) + vector(&site.magnitude))
        });
        let saved = adapter.saved_modules.iter().map(|saved| stored(&saved.weight));
        let biases = adapter.saved_biases.iter().map(|saved| saved.bias.len() * size_of::<f32>());
        let bytes = of_sites.chain(saved).chain(biases).sum::<usize>() as u64;
        Self { name: name.to_owned(), pairs, bytes }
    }
}

/// Memory of an engine on the CPU that serves `adapters`.
///
/// # Errors
/// When an option is out of range.
pub fn serving(
    base: &BaseShape,
    options: &EngineOptions,
    adapters: &[ServedAdapter],
) -> Result<Estimate, EngineError> {
    let config = &base.config;
    options.check(config)?;
    let mut estimate = Estimate::default();
    base.add_to(&mut estimate, options.most_positions(config));
    for adapter in adapters {
        estimate.add("adapters", format!("`{}`", adapter.name), adapter.bytes);
    }
    add_engine(&mut estimate, "step", base, options, usize::MAX)?;
    let ranks_of = |adapter: &ServedAdapter| {
        let of_group = |group: Vec<usize>| -> usize {
            let pairs = adapter.pairs.iter().filter(|pair| group.contains(&pair.site));
            pairs.map(|pair| pair.padded_rank()).sum()
        };
        base.groups().map(of_group).max().unwrap_or(0)
    };
    let ranks = adapters.iter().map(ranks_of).max().unwrap_or(0);
    estimate.add("step", "ranks of its rows", (options.max_num_batched_tokens * ranks) as u64 * F32);
    Ok(estimate)
}

/// What an engine works in: buffers of the largest step, logits, and the part of its cache of keys and values that
/// `most_tokens` need.
pub(super) fn add_engine(
    estimate: &mut Estimate,
    kind: &'static str,
    base: &BaseShape,
    options: &EngineOptions,
    most_tokens: usize,
) -> Result<(), EngineError> {
    let config = &base.config;
    let rows = options.max_num_batched_tokens;
    let logit_rows = (Cpu::LOGITS_BYTES / (config.vocab_size * size_of::<f32>())).clamp(1, rows);
    let qkv = config.query_width() + 2 * config.kv_width();
    // The gate and up products stand side by side before they become one.
    let widths = 2 * config.hidden_size + qkv + config.query_width() + 3 * config.intermediate_size;
    let picked = logit_rows * config.hidden_size;
    estimate.add(kind, format!("activations of {rows} rows"), (rows * widths + picked) as u64 * F32);
    estimate.add(kind, format!("logits of {logit_rows} rows"), (logit_rows * config.vocab_size) as u64 * F32);
    let pages = options.cache_pages(config, Cpu::CACHE_ELEMENT_BYTES, None)?;
    let token = 2 * config.num_layers * config.kv_width() * Cpu::CACHE_ELEMENT_BYTES;
    let tokens = (pages * PAGE).min(most_tokens);
    estimate.add(kind, format!("keys and values of up to {tokens} tokens"), (tokens * token) as u64);
    Ok(())
}
