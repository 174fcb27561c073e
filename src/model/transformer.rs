//! The forward pass, written once for every family and every backend.
//!
//! A decoder block with pre-normalisation (Touvron et al. 2023): `h += O(attention(QKV(norm(h))))`, then
//! `h += Down(swiglu(GateUp(norm(h))))`. What differs between families is in the configuration and in the table of
//! sites. One call computes one step: the rows of many sequences, prompts and single tokens alike.

use super::{ModelConfig, ModelError, ModelSites};
use crate::adapter::Adapter;
use crate::backend::{AttentionShape, Backend, BackendError, FrozenLinear, Gates, HeadNorms, Rows, Write};
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
    config: ModelConfig,
    shape: AttentionShape,
    embed_tokens: B::Table,
    groups: Vec<B::Group>,
    /// By site id.
    places: Vec<Place>,
    blocks: Vec<Block<B>>,
    final_norm: B::Vector,
    lm_head: usize,
    rotary: B::Rotary,
}

/// Where a site is.
#[derive(Clone, Copy)]
enum Place {
    EmbedTokens,
    /// Number of the group, and of the site in it.
    Group(usize, usize),
}

/// One decoder block, with the numbers of its groups.
struct Block<B: Backend> {
    attention_norm: B::Vector,
    attention_in: usize,
    head_norms: Option<(B::Vector, B::Vector)>,
    attention_out: usize,
    mlp_norm: B::Vector,
    mlp_in: usize,
    mlp_out: usize,
    window: Option<usize>,
}

/// The buffers of a step, made once for the largest one.
pub struct Activations<B: Backend> {
    hidden: B::Buffer,
    normed: B::Buffer,
    qkv: B::Buffer,
    context: B::Buffer,
    gate_up: B::Buffer,
    gated: B::Buffer,
    picked: B::Buffer,
    logits: B::Buffer,
    picked_gates: Gates,
    logit_rows: usize,
}

impl<B: Backend> Activations<B> {
    /// How many rows give logits at a time.
    pub fn logit_rows(&self) -> usize {
        self.logit_rows
    }
}

impl<B: Backend> Transformer<B> {
    /// Puts the frozen tensors of `weights` on `backend`, with rotary tables for `positions` positions.
    ///
    /// # Errors
    /// When a tensor is absent or of another shape, or the backend has no room.
    pub fn new(
        backend: &B,
        config: &ModelConfig,
        weights: &impl Weights,
        positions: usize,
    ) -> Result<Self, ModelError> {
        let table = weights.sites();
        let vector = |tensor: Tensor| backend.vector(tensor.to_f32());
        let norm = |name: &str, width| Ok::<_, ModelError>(vector(weights.norm(name, width)?)?);
        let embedding = backend.weight(&weights.site_weight(table.embed_tokens)?)?;
        let mut groups = Vec::new();
        let mut places = vec![Place::EmbedTokens; table.table.iter().count()];
        let mut group = |sites: &[usize]| {
            let frozen = sites.iter().enumerate().map(|(index, &id)| {
                places[id] = Place::Group(groups.len(), index);
                let shared = id == table.lm_head && config.tie_word_embeddings;
                let weight =
                    if shared { embedding.clone() } else { backend.weight(&weights.site_weight(id)?)? };
                Ok(FrozenLinear { weight, bias: weights.site_bias(id)?.map(vector).transpose()? })
            });
            let frozen = frozen.collect::<Result<_, ModelError>>()?;
            groups.push(backend.group(frozen)?);
            Ok::<_, ModelError>(groups.len() - 1)
        };
        let blocks = (table.blocks.iter().zip(&table.norms).enumerate())
            .map(|(index, (block, norms))| {
                let head_norms = norms.query_key.as_ref();
                Ok(Block {
                    attention_norm: norm(&norms.attention, config.hidden_size)?,
                    attention_in: group(&block.attention_in)?,
                    head_norms: head_norms
                        .map(|(q, k)| {
                            Ok::<_, ModelError>((norm(q, config.head_dim)?, norm(k, config.head_dim)?))
                        })
                        .transpose()?,
                    attention_out: group(&[block.attention_out])?,
                    mlp_norm: norm(&norms.mlp, config.hidden_size)?,
                    mlp_in: group(&block.mlp_in)?,
                    mlp_out: group(&[block.mlp_out])?,
                    window: config.windows[index],
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let lm_head = group(&[table.lm_head])?;
        Ok(Self {
            shape: AttentionShape {
                heads: config.num_heads,
                kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
            },
            embed_tokens: backend.table(embedding)?,
            groups,
            places,
            blocks,
            final_norm: norm(&table.final_norm, config.hidden_size)?,
            lm_head,
            rotary: backend.rotary(config.rope.tables(config.rotary_dim(), positions))?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A cache of `pages` pages for all blocks.
    ///
    /// # Errors
    /// When the backend has no room.
    pub fn kv_cache(&self, backend: &B, pages: usize) -> Result<B::KvCache, BackendError> {
        backend.kv_cache(self.blocks.len(), pages, self.shape)
    }

    /// Buffers for steps of at most `rows` rows, of which at most `logit_rows` at a time give logits.
    ///
    /// # Errors
    /// When the backend has no room.
    pub fn activations(
        &self,
        backend: &B,
        rows: usize,
        logit_rows: usize,
    ) -> Result<Activations<B>, BackendError> {
        let config = &self.config;
        let query_width = config.num_heads * config.head_dim;
        Ok(Activations {
            hidden: backend.buffer(rows, config.hidden_size)?,
            normed: backend.buffer(rows.max(logit_rows), config.hidden_size)?,
            qkv: backend.buffer(rows, self.shape.qkv_width())?,
            context: backend.buffer(rows, query_width)?,
            gate_up: backend.buffer(rows, 2 * config.intermediate_size)?,
            gated: backend.buffer(rows, config.intermediate_size)?,
            picked: backend.buffer(logit_rows, config.hidden_size)?,
            logits: backend.buffer(logit_rows, config.vocab_size)?,
            picked_gates: Gates::default(),
            logit_rows,
        })
    }

    /// Makes an adapter the content of an expert slot at all its sites; `weights` are the base's own.
    ///
    /// # Errors
    /// When a frozen tensor cannot be read or the backend has no room; the slot is empty then.
    pub fn load_adapter(
        &mut self,
        backend: &B,
        slot: usize,
        adapter: &Adapter,
        weights: &impl Weights,
    ) -> Result<(), ModelError> {
        let changes = adapter.changes(|site| weights.site_weight(site), |site| weights.site_bias(site))?;
        for (site, change) in changes {
            let loaded = match self.places[site] {
                Place::EmbedTokens => backend.load_table_expert(&mut self.embed_tokens, slot, &change),
                Place::Group(group, index) => {
                    backend.load_expert(&mut self.groups[group], index, slot, &change)
                }
            };
            if let Err(error) = loaded {
                self.unload_adapter(backend, slot);
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Empties an expert slot.
    pub fn unload_adapter(&mut self, backend: &B, slot: usize) {
        backend.unload_table_expert(&mut self.embed_tokens, slot);
        for group in &mut self.groups {
            backend.unload_expert(group, slot);
        }
    }

    /// Runs all blocks over the step's rows, storing their keys and values; the hidden states stay in `activations`.
    pub fn forward(
        &self,
        backend: &mut B,
        rows: &Rows,
        cache: &mut B::KvCache,
        activations: &mut Activations<B>,
    ) {
        let Activations { hidden, normed, qkv, context, gate_up, gated, .. } = activations;
        let (count, epsilon) = (rows.len(), self.config.rms_norm_eps);
        backend.embed(&self.embed_tokens, rows, hidden);
        for (index, block) in self.blocks.iter().enumerate() {
            backend.rms_norm(hidden, count, &block.attention_norm, epsilon, normed);
            backend.linear(&self.groups[block.attention_in], normed, &rows.gates, Write::Replace, qkv);
            let norms = block.head_norms.as_ref().map(|(q, k)| HeadNorms { q, k, epsilon });
            backend.rope_store(qkv, self.shape, norms, &self.rotary, rows, cache, index);
            backend.attention(qkv, block.window, rows, cache, index, context);
            backend.linear(&self.groups[block.attention_out], context, &rows.gates, Write::Add, hidden);
            backend.rms_norm(hidden, count, &block.mlp_norm, epsilon, normed);
            backend.linear(&self.groups[block.mlp_in], normed, &rows.gates, Write::Replace, gate_up);
            backend.swiglu(gate_up, count, gated);
            backend.linear(&self.groups[block.mlp_out], gated, &rows.gates, Write::Add, hidden);
        }
    }

    /// Logits `[picked, vocabulary]` of some of the last step's rows (ascending, at most as many as `activations` has
    /// room for), where the backend can go on with them.
    pub fn logits<'a>(
        &self,
        backend: &mut B,
        rows: &Rows,
        picked: &[u32],
        activations: &'a mut Activations<B>,
    ) -> &'a B::Buffer {
        let Activations { hidden, normed, picked: chosen, logits, picked_gates, logit_rows, .. } =
            activations;
        assert!(picked.len() <= *logit_rows, "more rows than the buffer has room for");
        backend.pick_rows(hidden, picked, chosen);
        rows.gates.pick(picked, picked_gates);
        backend.rms_norm(chosen, picked.len(), &self.final_norm, self.config.rms_norm_eps, normed);
        backend.linear(&self.groups[self.lm_head], normed, picked_gates, Write::Replace, logits);
        logits
    }
}
