//! Sites: the linear layers (and embeddings) of a base that an adapter can change.

use std::collections::HashMap;

/// What kind of layer a site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SiteKind {
    /// `y = W x + bias`, weight `[out_features, in_features]`.
    Linear,
    /// A token lookup, weight `[in_features = vocabulary, out_features = hidden]`.
    Embedding,
}

/// One adaptable layer of a base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Path of the module in a Hugging Face model, e.g. `model.layers.3.self_attn.q_proj`.
    pub module: String,
    /// Block (decoder layer) index; `None` for `embed_tokens` and `lm_head`.
    pub block: Option<usize>,
    pub kind: SiteKind,
    /// Width of the input; the vocabulary for an embedding.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Whether the base layer has a bias.
    pub bias: bool,
}

impl Site {
    /// Last component of the module path, e.g. `q_proj`: the name PEFT's `target_modules` uses.
    pub fn name(&self) -> &str {
        self.module.rsplit('.').next().unwrap_or(&self.module)
    }
}

/// All sites of a base, in module order: `embed_tokens`, then block by block, then `lm_head`.
///
/// A site's position in this table is its id everywhere in the crate.
#[derive(Clone, Debug, Default)]
pub struct SiteTable {
    sites: Vec<Site>,
    by_module: HashMap<String, usize>,
}

impl SiteTable {
    pub fn new(sites: Vec<Site>) -> Self {
        let by_module = sites.iter().enumerate().map(|(id, site)| (site.module.clone(), id)).collect();
        Self { sites, by_module }
    }

    pub fn len(&self) -> usize {
        self.sites.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sites.is_empty()
    }

    pub fn get(&self, id: usize) -> &Site {
        &self.sites[id]
    }

    /// Id of the site with this module path.
    pub fn find(&self, module: &str) -> Option<usize> {
        self.by_module.get(module).copied()
    }

    /// Sites with their ids, in table order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Site)> {
        self.sites.iter().enumerate()
    }
}
