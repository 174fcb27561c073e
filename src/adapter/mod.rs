//! Adapters: trained low-rank changes to a base.

mod change;
mod init;
pub mod merge;
pub mod peft;
mod site;
mod store;

use crate::tensor::Tensor;

pub use init::{Fresh, FreshError, all_linear, fresh_adapter, named_sites};
pub use site::{Site, SiteKind, SiteTable};
pub use store::{AdapterStore, StoreError};

/// One adapter as read from disk, checked against a base's sites.
///
/// For every adapted site `y = W x + bias + scale · (B A x + b_bias)`; with a DoRA magnitude `m`,
/// `y = m / ‖W + scale · B A‖_row ⊙ (W x + scale · B A x) + bias` (Liu et al. 2024, as PEFT computes it).
#[derive(Clone, Debug, Default)]
pub struct Adapter {
    /// SHA-256 of the adapter's content (configuration that matters and tensors), in hex: its identity.
    pub hash: String,
    /// Adapted sites, by ascending site id.
    pub sites: Vec<SiteAdapter>,
    /// Whole modules that replace the base's (`modules_to_save`): only `lm_head` and `embed_tokens`.
    pub saved_modules: Vec<SavedModule>,
    /// Biases that replace the base's (PEFT's `bias`), by ascending site id; also of sites that are not adapted.
    pub saved_biases: Vec<SavedBias>,
    /// `base_model_name_or_path` as written in the folder, for display.
    pub base_name: Option<String>,
}

/// The low-rank pair of one adapter at one site.
#[derive(Clone, Debug)]
pub struct SiteAdapter {
    /// Id in the base's [`SiteTable`].
    pub site: usize,
    pub rank: usize,
    /// `alpha / r`, or `alpha / √r` with rsLoRA.
    pub scale: f32,
    /// `[rank, in_features]`, dtype as stored. For an embedding site `[rank, vocabulary]` (PEFT's `lora_embedding_A`).
    pub a: Tensor,
    /// `[out_features, rank]`, dtype as stored. For an embedding site `[hidden, rank]` (PEFT's `lora_embedding_B`).
    pub b: Tensor,
    /// `lora_B.bias` `[out_features]` (`lora_bias = true`): adds `scale · bias` to the output.
    pub bias: Option<Vec<f32>>,
    /// DoRA magnitude `[out_features]`.
    pub magnitude: Option<Vec<f32>>,
}

/// A full weight that replaces the base's for rows of this adapter.
#[derive(Clone, Debug)]
pub struct SavedModule {
    /// Id of the `lm_head` or `embed_tokens` site.
    pub site: usize,
    /// Same shape as the base's weight.
    pub weight: Tensor,
}

/// A bias that replaces the base's for rows of this adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedBias {
    /// Id of a linear site whose base layer has a bias.
    pub site: usize,
    /// `[out_features]`.
    pub bias: Vec<f32>,
}
