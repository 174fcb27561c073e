//! Memory, estimated before anything is loaded.
//!
//! What takes memory is known from headers: sizes of tensors, sites and ranks of adapters, rows of a step. The functions
//! here only count; they follow what the trainer and the engine allocate on the CPU, in f32 where nothing else is said.
//! Memory that the system gives lazily counts as far as it can be used.

mod describe;
mod machine;
mod serving;
mod training;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::adapter::peft::{AdapterError, Limits, read_adapter};
use crate::adapter::{Adapter, FreshError, SiteAdapter, SiteTable, all_linear, named_sites};
use crate::backend::CHUNK;
use crate::engine::EngineError;
use crate::model::{BlockSites, Checkpoint, ModelConfig, ModelError, ModelSites};
use crate::terminal::{Align, Table, bytes};
use crate::train::config::{AdapterConfig, JobConfig, RunConfig, Targets};

pub use describe::{JobData, TaskData, describe, verdict};
pub use machine::Machine;
pub use serving::{ServedAdapter, serving};
pub use training::{Evaluation, JobShape, Step, training};

/// Bytes of most numbers.
const F32: u64 = size_of::<f32>() as u64;

/// Why there is no estimate.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A fresh adapter that this base has no place for.
    #[error("job `{job}`: {source}")]
    Fresh { job: String, source: FreshError },
}

/// Something that takes memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// `base`, `adapters`, `step`, `evaluation` or `data`.
    pub kind: &'static str,
    pub name: String,
    pub bytes: u64,
}

/// All that takes memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Estimate {
    pub items: Vec<Item>,
}

impl Estimate {
    pub fn total(&self) -> u64 {
        self.items.iter().map(|item| item.bytes).sum()
    }

    /// Adds what takes any memory.
    pub fn add(&mut self, kind: &'static str, name: impl Into<String>, bytes: u64) {
        if bytes > 0 {
            self.items.push(Item { kind, name: name.into(), bytes });
        }
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&[Align::Left, Align::Left, Align::Right]);
        let mut last = "";
        for Item { kind, name, bytes: count } in &self.items {
            table.row([if *kind == last { "" } else { kind }, name.as_str(), bytes(*count).as_str()]);
            last = kind;
        }
        table.row(["total", "", bytes(self.total()).as_str()]);
        table.fmt(f)
    }
}

/// A base as its files describe it.
pub struct BaseShape {
    pub config: ModelConfig,
    pub sites: ModelSites,
    /// Bytes of stored weights by element type; they are mapped.
    pub weights: BTreeMap<String, u64>,
}

impl BaseShape {
    /// # Errors
    /// None for a checkpoint that has been opened.
    pub fn new(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let sites = checkpoint.sites();
        let mut weights = BTreeMap::new();
        for (id, _) in
            sites.table.iter().filter(|&(id, _)| !(config.tie_word_embeddings && id == sites.lm_head))
        {
            let weight = checkpoint.site_weight(id)?;
            *weights.entry(weight.dtype().to_string()).or_insert(0) += weight.bytes().len() as u64;
        }
        Ok(Self { config: config.clone(), sites: sites.clone(), weights })
    }

    /// Weights as they are mapped, and what is kept beside them as f32: norms, biases, and rotary tables.
    fn add_to(&self, estimate: &mut Estimate, positions: usize) {
        for (dtype, bytes) in &self.weights {
            estimate.add("base", format!("weights, {dtype}"), *bytes);
        }
        let config = &self.config;
        let head_norms = if config.qk_norm { 2 * config.head_dim } else { 0 };
        let norms = config.num_layers * (2 * config.hidden_size + head_norms) + config.hidden_size;
        let biased = self.sites.table.iter().filter(|(_, site)| site.bias);
        let biases: usize = biased.map(|(_, site)| site.out_features).sum();
        let rotary = config.rope.variants() * positions * config.rotary_dim();
        estimate.add("base", "norms, biases, rotary tables", (norms + biases + rotary) as u64 * F32);
    }

    /// Ids of the sites of each group: what one launch computes.
    fn groups(&self) -> impl Iterator<Item = Vec<usize>> + '_ {
        let of_block = |block: &BlockSites| {
            [block.attention_in.clone(), vec![block.attention_out], block.mlp_in.clone(), vec![block.mlp_out]]
        };
        self.sites.blocks.iter().flat_map(of_block).chain([vec![self.sites.lm_head]])
    }
}

/// The pair of an adapter at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairShape {
    /// Id in the base's table.
    pub site: usize,
    pub rank: usize,
    /// Whether it has a DoRA magnitude.
    pub dora: bool,
}

impl PairShape {
    /// The pairs of an adapter.
    pub fn of(adapter: &Adapter) -> Vec<Self> {
        let pair =
            |pair: &SiteAdapter| Self { site: pair.site, rank: pair.rank, dora: pair.magnitude.is_some() };
        adapter.sites.iter().map(pair).collect()
    }

    /// The pairs that a fresh adapter would have.
    ///
    /// # Errors
    /// When a target names no module of the base.
    pub fn fresh(
        targets: &Targets,
        rank: usize,
        dora: bool,
        sites: &SiteTable,
    ) -> Result<Vec<Self>, FreshError> {
        let chosen = match targets {
            Targets::AllLinear => all_linear(sites),
            Targets::Named(names) => named_sites(sites, names)?,
        };
        Ok(chosen.into_iter().map(|site| Self { site, rank, dora }).collect())
    }

    /// Numbers of A, B and the magnitude.
    pub fn parameters(self, sites: &SiteTable) -> u64 {
        let site = sites.get(self.site);
        let magnitude = if self.dora { site.out_features } else { 0 };
        (self.rank * (site.in_features + site.out_features) + magnitude) as u64
    }

    /// Ranks as they are laid out: whole chunks.
    fn padded_rank(self) -> usize {
        self.rank.next_multiple_of(CHUNK)
    }
}

/// The jobs of a run: fresh adapters by their configuration, others by their folders.
///
/// # Errors
/// When a target names no module of the base, or a folder is refused.
pub fn jobs(config: &RunConfig, checkpoint: &Checkpoint) -> Result<Vec<JobShape>, PlanError> {
    let sites = &checkpoint.sites().table;
    let job = |config: &JobConfig| {
        let pairs = match &config.adapter {
            AdapterConfig::Fresh { rank, targets, use_dora, .. } => {
                PairShape::fresh(targets, *rank, *use_dora, sites)
                    .map_err(|source| PlanError::Fresh { job: config.name.clone(), source })?
            }
            AdapterConfig::From { folder, .. } => {
                let limits = Limits { max_rank: usize::MAX };
                PairShape::of(&read_adapter(folder, sites, checkpoint, limits)?)
            }
        };
        Ok(JobShape::new(config, pairs))
    };
    config.jobs.iter().map(job).collect()
}

#[cfg(test)]
mod tests;
