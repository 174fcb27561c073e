//! The forward pass, written once for every family and every backend.
//!
//! A decoder block with pre-normalisation (Touvron et al. 2023): `h += O(attention(QKV(norm(h))))`, then
//! `h += Down(swiglu(GateUp(norm(h))))`. What differs between families is in the configuration and in the table of
//! sites. One call computes one step: the rows of many sequences, prompts and single tokens alike.

use std::sync::Arc;

use super::sites::{BlockNorms, BlockSites};
use super::training::Depth;
use super::{ModelConfig, ModelError, ModelSites};
use crate::adapter::Adapter;
use crate::backend::{
    AttentionShape, Backend, BackendError, FrozenLinear, Gates, HeadNorms, Rows, SitePlace, StepLimits, Write,
};
use crate::tensor::Tensor;

/// Where the frozen tensors come from.
pub trait Weights {
    fn sites(&self) -> &ModelSites;
    /// Weight of a site: `[out, in]`, for the embedding `[vocabulary, hidden]`.
    fn site_weight(&self, site: usize) -> Result<Tensor, ModelError>;
    /// Bias `[out]` of a site that has one.
    fn site_bias(&self, site: usize) -> Result<Option<Tensor>, ModelError>;
    /// A norm's weight `[width]`.
    fn norm(&self, name: &str, width: usize) -> Result<Tensor, ModelError>;
}

/// A frozen model on a backend, with the experts resident at its sites.
pub struct Transformer<B: Backend> {
    /// Shared with its workspaces alone.
    pub(super) identity: Arc<()>,
    pub(super) positions: usize,
    pub(super) config: ModelConfig,
    pub(super) shape: AttentionShape,
    pub(super) embed_tokens: B::Table,
    pub(super) groups: Vec<B::Group>,
    /// By site id.
    pub(super) places: Vec<SitePlace>,
    pub(super) blocks: Vec<Block<B>>,
    pub(super) final_norm: B::Vector,
    pub(super) lm_head: usize,
    pub(super) rotary: B::Rotary,
    /// By slot, the lowest that the trainee there adapts.
    pub(super) trained_from: Vec<Depth>,
}

/// Lays out adapters for a transformer; see [`Transformer::loader`].
pub struct AdapterLoader<B: Backend> {
    places: Vec<SitePlace>,
    loader: B::Loader,
}

impl<B: Backend> AdapterLoader<B> {
    /// What an adapter changes, as the backend takes it; `weights` are the base's own.
    ///
    /// # Errors
    /// When a frozen tensor cannot be read, or the backend has no room.
    pub fn lay_out(&self, adapter: &Adapter, weights: &impl Weights) -> Result<B::Expert, ModelError> {
        let changes = adapter.changes(|site| weights.site_weight(site), |site| weights.site_bias(site))?;
        let placed = changes.into_iter().map(|(site, change)| (self.places[site], change));
        Ok(B::lay_out(&self.loader, placed.collect())?)
    }
}

/// One decoder block, with the numbers of its groups.
pub(super) struct Block<B: Backend> {
    pub attention_norm: B::Vector,
    pub attention_in: usize,
    pub head_norms: Option<(B::Vector, B::Vector)>,
    pub attention_out: usize,
    pub mlp_norm: B::Vector,
    pub mlp_in: usize,
    pub mlp_out: usize,
    pub window: Option<usize>,
}

/// A transformer in the making.
struct Build<'a, B: Backend, W> {
    backend: &'a mut B,
    config: &'a ModelConfig,
    weights: &'a W,
    embedding: B::Weight,
    groups: Vec<B::Group>,
    places: Vec<SitePlace>,
}

impl<B: Backend, W: Weights> Build<'_, B, W> {
    fn norm(&self, name: &str, width: usize) -> Result<B::Vector, ModelError> {
        Ok(self.backend.vector(self.weights.norm(name, width)?.to_f32())?)
    }

    /// Makes a group of sites; returns its number.
    fn group(&mut self, sites: &[usize]) -> Result<usize, ModelError> {
        let mut frozen = Vec::new();
        for (index, &id) in sites.iter().enumerate() {
            self.places[id] = SitePlace::Group(self.groups.len(), index);
            let shared = id == self.weights.sites().lm_head && self.config.tie_word_embeddings;
            let weight = match shared {
                true => self.embedding.clone(),
                false => self.backend.weight(&self.weights.site_weight(id)?)?,
            };
            let bias = self.weights.site_bias(id)?.map(|bias| self.backend.vector(bias.to_f32()));
            frozen.push(FrozenLinear { weight, bias: bias.transpose()? });
        }
        self.groups.push(self.backend.group(frozen)?);
        Ok(self.groups.len() - 1)
    }

    fn block(
        &mut self,
        sites: &BlockSites,
        norms: &BlockNorms,
        window: Option<usize>,
    ) -> Result<Block<B>, ModelError> {
        let (hidden, head_dim) = (self.config.hidden_size, self.config.head_dim);
        let head_norms = match &norms.query_key {
            Some((q, k)) => Some((self.norm(q, head_dim)?, self.norm(k, head_dim)?)),
            None => None,
        };
        Ok(Block {
            attention_norm: self.norm(&norms.attention, hidden)?,
            attention_in: self.group(&sites.attention_in)?,
            head_norms,
            attention_out: self.group(&[sites.attention_out])?,
            mlp_norm: self.norm(&norms.mlp, hidden)?,
            mlp_in: self.group(&sites.mlp_in)?,
            mlp_out: self.group(&[sites.mlp_out])?,
            window,
        })
    }
}

/// What the steps of one transformer work in, made once for the largest: activations, and the cache of keys and values.
pub struct Workspace<B: Backend> {
    /// Of the transformer that it was made for.
    transformer: Arc<()>,
    hidden: B::Buffer,
    normed: B::Buffer,
    qkv: B::Buffer,
    context: B::Buffer,
    gated: B::Buffer,
    picked: B::Buffer,
    logits: B::Buffer,
    cache: B::KvCache,
    recorded: B::Recorded,
    picked_gates: Gates,
    logit_rows: usize,
}

/// How large steps may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkspaceSize {
    /// Most rows of a step.
    pub rows: usize,
    /// Most sequences of a step.
    pub sequences: usize,
    /// Most rows that give logits at a time.
    pub logit_rows: usize,
}

impl<B: Backend> Workspace<B> {
    /// How many rows give logits at a time.
    pub fn logit_rows(&self) -> usize {
        self.logit_rows
    }

    /// The logits computed last: `[logit_rows, vocabulary]`.
    pub fn logits(&self) -> &B::Buffer {
        &self.logits
    }
}

impl<B: Backend> Transformer<B> {
    /// Puts the frozen tensors of `weights` on `backend`, with rotary tables for `positions` positions.
    ///
    /// # Errors
    /// When a tensor is absent or of another shape, or the backend has no room.
    pub fn new(
        backend: &mut B,
        config: &ModelConfig,
        weights: &impl Weights,
        positions: usize,
    ) -> Result<Self, ModelError> {
        let table = weights.sites();
        let embedding = backend.weight(&weights.site_weight(table.embed_tokens)?)?;
        let places = vec![SitePlace::Table; table.table.iter().count()];
        let mut build = Build { backend, config, weights, embedding, groups: Vec::new(), places };
        let blocks = (table.blocks.iter().zip(&table.norms).zip(&config.windows))
            .map(|((sites, norms), &window)| build.block(sites, norms, window))
            .collect::<Result<_, _>>()?;
        let final_norm = build.norm(&table.final_norm, config.hidden_size)?;
        let lm_head = build.group(&[table.lm_head])?;
        let Build { embedding, groups, places, .. } = build;
        Ok(Self {
            identity: Arc::new(()),
            positions,
            shape: AttentionShape {
                heads: config.num_heads,
                kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
            },
            embed_tokens: backend.table(embedding)?,
            groups,
            places,
            trained_from: Vec::new(),
            blocks,
            final_norm,
            lm_head,
            rotary: backend.rotary(config.rope.tables(config.rotary_dim(), positions))?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Memory for steps of up to `size`. `pages` says how many pages the cache has; it is told how many bytes the
    /// backend has left for it, where the backend knows.
    ///
    /// # Errors
    /// When the backend has no room, and those of `pages`.
    pub fn workspace<E: From<BackendError>>(
        &self,
        backend: &mut B,
        size: WorkspaceSize,
        pages: impl FnOnce(Option<usize>) -> Result<usize, E>,
    ) -> Result<Workspace<B>, E> {
        let WorkspaceSize { rows, sequences, logit_rows } = size;
        let config = &self.config;
        let hidden = backend.buffer(rows, config.hidden_size)?;
        let normed = backend.buffer(rows.max(logit_rows), config.hidden_size)?;
        let qkv = backend.buffer(rows, self.shape.qkv_width())?;
        let context = backend.buffer(rows, config.num_heads * config.head_dim)?;
        let gated = backend.buffer(rows, config.intermediate_size)?;
        let picked = backend.buffer(logit_rows, config.hidden_size)?;
        let logits = backend.logits_buffer(logit_rows, config.vocab_size)?;
        let mut limits = StepLimits {
            rows,
            sequences,
            picked: logit_rows,
            vocabulary: config.vocab_size,
            positions: self.positions,
            rotary_variants: config.rope.variants(),
            cache_pages: 0,
            attention: self.shape,
            gated_width: config.intermediate_size,
        };
        limits.cache_pages = pages(backend.cache_room(&limits)?)?;
        backend.reserve(&limits)?;
        Ok(Workspace {
            cache: backend.kv_cache(self.blocks.len(), limits.cache_pages, self.shape)?,
            transformer: Arc::clone(&self.identity),
            hidden,
            normed,
            qkv,
            context,
            gated,
            picked,
            logits,
            recorded: B::Recorded::default(),
            picked_gates: Gates::default(),
            logit_rows,
        })
    }

    /// What lays adapters out for this transformer, on any thread.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn loader(&self, backend: &B) -> Result<AdapterLoader<B>, BackendError> {
        let loader = backend.loader(&self.groups, &self.embed_tokens)?;
        Ok(AdapterLoader { places: self.places.clone(), loader })
    }

    /// Makes an adapter that has been laid out the content of an empty expert slot.
    ///
    /// # Errors
    /// When the backend fails; the slot is empty then.
    pub fn insert_adapter(
        &mut self,
        backend: &mut B,
        slot: usize,
        expert: B::Expert,
    ) -> Result<(), BackendError> {
        let inserted = backend.insert_expert(&mut self.groups, &mut self.embed_tokens, slot, expert);
        if inserted.is_err() {
            self.unload_adapter(backend, slot)?;
        }
        inserted
    }

    /// Lays an adapter out and makes it the content of an empty expert slot; `weights` are the base's own.
    ///
    /// # Errors
    /// When a frozen tensor cannot be read or the backend has no room; the slot is empty then.
    pub fn load_adapter(
        &mut self,
        backend: &mut B,
        slot: usize,
        adapter: &Adapter,
        weights: &impl Weights,
    ) -> Result<(), ModelError> {
        let expert = self.loader(backend)?.lay_out(adapter, weights)?;
        Ok(self.insert_adapter(backend, slot, expert)?)
    }

    /// Empties an expert slot.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn unload_adapter(&mut self, backend: &mut B, slot: usize) -> Result<(), BackendError> {
        backend.unload_expert(&mut self.groups, &mut self.embed_tokens, slot)
    }

    /// Runs all blocks over the rows of the step that the backend has [begun](Backend::begin_step), storing their keys and
    /// values; the hidden states stay in `workspace`.
    ///
    /// # Errors
    /// When the backend fails; the sequences of the step cannot go on then.
    ///
    /// # Panics
    /// When the workspace is another transformer's.
    pub fn forward(
        &self,
        backend: &mut B,
        rows: &Rows,
        workspace: &mut Workspace<B>,
    ) -> Result<(), BackendError> {
        assert!(Arc::ptr_eq(&self.identity, &workspace.transformer), "a workspace of another transformer");
        let Workspace { hidden, normed, qkv, context, gated, cache, recorded, .. } = workspace;
        let (count, epsilon, gates) = (rows.len(), self.config.rms_norm_eps, &rows.gates);
        backend.embed(&self.embed_tokens, rows, hidden)?;
        backend.record(recorded, |backend| {
            for (index, block) in self.blocks.iter().enumerate() {
                let group = |index: usize| &self.groups[index];
                backend.rms_norm(hidden, count, &block.attention_norm, epsilon, normed)?;
                backend.linear(group(block.attention_in), normed, gates, Write::Replace, qkv)?;
                let norms = block.head_norms.as_ref().map(|(q, k)| HeadNorms { q, k, epsilon });
                backend.rope_store(qkv, self.shape, norms, &self.rotary, rows, cache, index)?;
                backend.attention(qkv, block.window, rows, cache, index, context)?;
                backend.linear(group(block.attention_out), context, gates, Write::Add, hidden)?;
                backend.rms_norm(hidden, count, &block.mlp_norm, epsilon, normed)?;
                backend.linear_swiglu(group(block.mlp_in), normed, gates, gated)?;
                backend.linear(group(block.mlp_out), gated, gates, Write::Add, hidden)?;
            }
            Ok(())
        })
    }

    /// Leaves the logits `[picked, vocabulary]` of some of the last step's rows (ascending, at most
    /// [`Workspace::logit_rows`]) in `workspace`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn logits(
        &self,
        backend: &mut B,
        rows: &Rows,
        picked: &[u32],
        workspace: &mut Workspace<B>,
    ) -> Result<(), BackendError> {
        let Workspace { hidden, normed, picked: chosen, logits, picked_gates, logit_rows, .. } = workspace;
        assert!(picked.len() <= *logit_rows, "more rows than the buffer has room for");
        rows.gates.pick(picked, picked_gates);
        backend.pick_rows(hidden, picked, picked_gates, chosen)?;
        backend.rms_norm(chosen, picked.len(), &self.final_norm, self.config.rms_norm_eps, normed)?;
        backend.linear(&self.groups[self.lm_head], normed, picked_gates, Write::Replace, logits)
    }
}
