//! What benches share: a random model in memory, in the shape of a given configuration, with adapters; and what is run,
//! counted and predicted on a GPU.

pub mod gpu;

use std::collections::HashMap;

use loramux::adapter::{Adapter, SiteAdapter, SiteKind};
use loramux::backend::cpu::Cpu;
use loramux::backend::{Backend, BackendError, PAGE, Rows};
use loramux::model::{ModelConfig, ModelError, ModelSites, Transformer, Weights, Workspace, WorkspaceSize};
use loramux::tensor::{Bytes, DType, Tensor};
use rayon::prelude::*;
use serde_json::json;

/// Llama 3.2 1B: the shape of the published model.
/// `blocks` shortens it: quicker, and the same kernels.
pub fn llama_1b(blocks: usize) -> ModelConfig {
    ModelConfig::from_json(&llama_1b_json(blocks), "llama-1b").expect("a valid configuration")
}

/// Its config.json.
pub fn llama_1b_json(blocks: usize) -> serde_json::Value {
    json!({
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": blocks,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001,
    })
}

/// The processor's name and how many logical cores there are.
pub fn device() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cores} logical cores", name.map_or("unknown processor", |(_, name)| name.trim()))
}

/// The commit that is measured, `unknown` outside a checkout.
pub fn commit() -> String {
    let output = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    text.map_or("unknown".to_owned(), |text| String::from_utf8_lossy(&text).trim().to_owned())
}

/// Uniform bf16 values in (-scale, scale), the same for the same seed.
pub fn random_bf16(shape: [usize; 2], scale: f32, seed: u64) -> Tensor {
    let mut bytes = vec![0u8; shape[0] * shape[1] * 2];
    bytes.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, bytes)| {
        let mut state = (seed << 32 ^ chunk as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for value in bytes.chunks_exact_mut(2) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            value.copy_from_slice(&half::bf16::from_f32(unit * scale).to_le_bytes());
        }
    });
    Tensor::new(DType::BF16, shape.to_vec(), Bytes::new(bytes))
}

/// Frozen weights of a random model.
pub struct RandomWeights {
    sites: ModelSites,
    weights: HashMap<usize, Tensor>,
}

impl RandomWeights {
    pub fn new(config: &ModelConfig) -> Self {
        let sites = ModelSites::new(config);
        let mut weights = HashMap::new();
        for (id, site) in sites.table.iter() {
            let shape = match site.kind {
                SiteKind::Linear => [site.out_features, site.in_features],
                SiteKind::Embedding => [site.in_features, site.out_features],
            };
            let weight = if id == sites.lm_head && config.tie_word_embeddings {
                Tensor::clone(&weights[&sites.embed_tokens])
            } else {
                random_bf16(shape, 1.7 / (site.in_features.min(8192) as f32).sqrt(), id as u64 + 1)
            };
            weights.insert(id, weight);
        }
        Self { sites, weights }
    }

    /// Bytes that one decode step reads: every linear weight once (a tied embedding is the output layer).
    pub fn decode_bytes(&self) -> usize {
        let linear = |(id, site): (usize, &loramux::adapter::Site)| {
            (site.kind == SiteKind::Linear).then(|| self.weights[&id].bytes().len())
        };
        self.sites.table.iter().filter_map(linear).sum()
    }

    /// All stored tensors under their names in a checkpoint; a tied weight once.
    pub fn tensors(&self, config: &ModelConfig) -> Vec<(String, Tensor)> {
        let stored = self
            .sites
            .table
            .iter()
            .filter(|(id, _)| *id != self.sites.lm_head || !config.tie_word_embeddings);
        let mut tensors: Vec<(String, Tensor)> =
            stored.map(|(id, site)| (format!("{}.weight", site.module), self.weights[&id].clone())).collect();
        let ones = || Tensor::from_f32(vec![config.hidden_size], &vec![1.0; config.hidden_size]);
        for norms in &self.sites.norms {
            tensors.extend([(norms.attention.clone(), ones()), (norms.mlp.clone(), ones())]);
        }
        tensors.push((self.sites.final_norm.clone(), ones()));
        tensors
    }

    pub fn linear_weights(&self) -> Vec<Tensor> {
        let linear = self.sites.table.iter().filter(|(_, site)| site.kind == SiteKind::Linear);
        linear.map(|(id, _)| self.weights[&id].clone()).collect()
    }
}

impl Weights for RandomWeights {
    fn sites(&self) -> &ModelSites {
        &self.sites
    }

    fn site_weight(&self, site: usize) -> Result<Tensor, ModelError> {
        Ok(self.weights[&site].clone())
    }

    fn site_bias(&self, _site: usize) -> Result<Option<Tensor>, ModelError> {
        Ok(None)
    }

    fn norm(&self, _name: &str, width: usize) -> Result<Tensor, ModelError> {
        Ok(Tensor::from_f32(vec![width], &vec![1.0; width]))
    }
}

/// A random adapter over all linear layers of the blocks.
pub fn random_adapter(sites: &ModelSites, rank: usize, seed: u64) -> Adapter {
    let adapted = sites.table.iter().filter(|(_, site)| site.block.is_some());
    let sites = adapted
        .map(|(id, site)| SiteAdapter {
            site: id,
            rank,
            scale: 2.0,
            a: random_bf16([rank, site.in_features], 0.02, seed * 1000 + id as u64),
            b: random_bf16([site.out_features, rank], 0.02, seed * 2000 + id as u64),
            bias: None,
            magnitude: None,
        })
        .collect();
    Adapter { hash: format!("random-{seed}"), sites, ..Adapter::default() }
}

/// What a step of a [`Bench`] has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub sequences: usize,
    /// Rows of each sequence.
    pub tokens: usize,
    /// Position of the first of them.
    pub start: usize,
    /// Sequences have pages from this one on, one after the other.
    pub first_page: usize,
    /// Sequence `i` uses the expert in slot `first_slot + i % adapters`; none where there are no adapters.
    pub adapters: usize,
    pub first_slot: usize,
}

/// A model ready to step.
pub struct Bench<B: Backend> {
    pub transformer: Transformer<B>,
    workspace: Workspace<B>,
    rows: Rows,
    picked: Vec<u32>,
}

impl<B: Backend> Bench<B> {
    /// For steps of up to `size` and sequences of up to `positions` tokens. `pages` says how many pages the cache has.
    ///
    /// # Errors
    /// Those of [`Transformer::new`] and of `pages`.
    pub fn new(
        backend: &mut B,
        config: &ModelConfig,
        weights: &impl Weights,
        size: WorkspaceSize,
        positions: usize,
        pages: impl FnOnce(Option<usize>) -> usize,
    ) -> Result<Self, ModelError> {
        let transformer = Transformer::new(backend, config, weights, positions)?;
        let workspace = transformer.workspace::<BackendError>(backend, size, |room| Ok(pages(room)))?;
        Ok(Self { transformer, workspace, rows: Rows::default(), picked: Vec::new() })
    }

    /// Makes `plan` what steps do from now on.
    pub fn plan(&mut self, plan: Plan) {
        let Plan { sequences, tokens, start, first_page, adapters, first_slot } = plan;
        let vocabulary = self.transformer.config().vocab_size;
        let pages_each = (start + tokens).div_ceil(PAGE);
        self.rows.clear();
        self.picked.clear();
        // Sequences with the same adapter are neighbours.
        let mut order: Vec<usize> = (0..sequences).collect();
        order.sort_by_key(|sequence| (sequence % adapters.max(1), *sequence));
        for sequence in order {
            let first = first_page + sequence * pages_each;
            let pages: Vec<u32> = (first..first + pages_each).map(|page| page as u32).collect();
            let ids: Vec<u32> =
                (0..tokens).map(|i| ((i * 7919 + sequence * 31 + start) % vocabulary) as u32).collect();
            let entry = (adapters > 0).then(|| ((first_slot + sequence % adapters) as u32, 1.0));
            self.rows.push_sequence(&ids, start, 0, &pages, entry.as_slice());
            self.picked.push(self.rows.len() as u32 - 1);
        }
    }

    /// Queues one step: all blocks and the logits of every sequence's last row.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn queue(&mut self, backend: &mut B) -> Result<(), BackendError> {
        let Self { transformer, workspace, rows, picked } = self;
        backend.scope(|backend| {
            backend.begin_step(rows)?;
            transformer.forward(backend, rows, workspace)?;
            transformer.logits(backend, rows, picked, workspace)
        })
    }

    /// The logits of the step that was queued last: `[sequences, vocabulary]`.
    ///
    /// # Errors
    /// As [`queue`](Self::queue).
    pub fn logits<'a>(&'a self, backend: &'a mut B) -> Result<&'a [f32], BackendError> {
        backend.read(self.workspace.logits(), self.picked.len())
    }

    /// One step, waited for; its first logit.
    ///
    /// # Panics
    /// When the backend fails.
    pub fn step(&mut self, backend: &mut B) -> f32 {
        self.queue(backend).expect("a step");
        self.logits(backend).expect("logits")[0]
    }
}

impl Bench<Cpu> {
    /// For 16 sequences of up to 640 tokens, in steps of up to 512 rows.
    ///
    /// # Panics
    /// When there is no memory for it.
    pub fn on_cpu(cpu: &mut Cpu, config: &ModelConfig, weights: &RandomWeights) -> Self {
        let size = WorkspaceSize { rows: 512, sequences: 16, logit_rows: 16 };
        Self::new(cpu, config, weights, size, 640, |_| 16 * 640 / PAGE).expect("random weights fit")
    }
}
