//! Bytes and floating-point operations of a step: the least that any implementation has to move and to do.

use super::cases::{Case, Model, Step};

/// Bytes that come from memory or go to it, and operations. Activations between layers are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Linear layers of the blocks.
    pub weights: u64,
    pub lm_head: u64,
    /// Pairs of the adapters that sequences use.
    pub adapters: u64,
    /// Keys and values: those of the step written, all others read.
    pub cache: u64,
    /// Logits in fp32, and rows of the embedding table.
    pub ends: u64,
    pub flops: u64,
}

impl Counts {
    pub fn of(model: &Model, case: &Case) -> Self {
        let (step, config) = (case.step, &model.config);
        let (rows, sequences) = (step.rows(), step.sequences());
        let lm_head = config.vocab_size * config.hidden_size;
        let products = rows * model.block_values() + sequences * lm_head;
        let low_rank = if case.adapters.count() > 0 { rows * case.adapters.rank() } else { 0 };
        let flops = 2 * (products + low_rank * model.adapted_values())
            + attention_flops(model, step) * config.num_layers;
        let pairs = case.adapters.count() * case.adapters.rank() * model.adapted_values();
        Self {
            weights: 2 * model.block_values() as u64,
            lm_head: 2 * lm_head as u64,
            adapters: 2 * pairs as u64,
            cache: (sequences * step.context() * model.cache_bytes()) as u64,
            ends: (sequences * config.vocab_size * 4 + rows * config.hidden_size * 2) as u64,
            flops: flops as u64,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.weights + self.lm_head + self.adapters + self.cache + self.ends
    }

    /// The larger of the two times, in seconds: at `bandwidth` bytes per second and, where it is known, `peak` FLOP/s.
    pub fn floor(&self, bandwidth: f64, peak: Option<f64>) -> f64 {
        let arithmetic = peak.map_or(0.0, |peak| self.flops as f64 / peak);
        (self.bytes() as f64 / bandwidth).max(arithmetic)
    }
}

/// Keys that the rows of a sequence see, each row its own and those before it.
pub fn keys_seen(step: Step) -> usize {
    let (tokens, context) = (step.tokens(), step.context());
    tokens * (context - tokens) + tokens * (tokens + 1) / 2
}

/// Operations of one block's attention: two products of `head_dim` for each key that a query head sees.
pub fn attention_flops(model: &Model, step: Step) -> usize {
    4 * step.sequences() * keys_seen(step) * model.config.query_width()
}
