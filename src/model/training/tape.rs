//! The memory of training steps.

use std::sync::Arc;

use crate::backend::training::Training;
use crate::backend::{BackendError, Gates, PAGE, StepLimits};
use crate::model::{ModelConfig, Transformer};

/// What the backward pass computes again instead of keeping it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    #[default]
    None,
    /// The gate and up products of every block.
    Mlp,
    /// All of a block but its input.
    Block,
}

/// How large the batches of a tape may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapeSize {
    /// Most rows of a batch.
    pub rows: usize,
    /// Most sequences of a batch.
    pub sequences: usize,
    /// Most labelled rows whose logits exist at a time.
    pub logit_rows: usize,
}

impl TapeSize {
    /// Bytes of a tape, where an activation and an element of the cache take `element_bytes`. What the adapters' ranks
    /// take comes on top: a number per row, adapted site and rank.
    pub fn bytes(self, config: &ModelConfig, recompute: Recompute, element_bytes: usize) -> usize {
        let size = self.bounded();
        let mut elements = size.pages() * PAGE * 2 * config.kv_width();
        let count = |rows, width| {
            elements += rows * width;
            Ok::<_, std::convert::Infallible>(())
        };
        let Ok(_) = Buffers::new(config, size, recompute, count);
        elements * element_bytes + size.logit_rows * config.vocab_size * size_of::<f32>()
    }

    /// No more rows give logits than there are.
    fn bounded(self) -> Self {
        Self { logit_rows: self.logit_rows.min(self.rows), ..self }
    }

    /// Pages of the cache that the sequences of any batch fit in.
    fn pages(self) -> usize {
        (self.rows + self.sequences * (PAGE - 1)) / PAGE
    }
}

/// What training steps keep and work in, made once for the largest.
pub struct Tape<B: Training> {
    /// Of the transformer that it was made for.
    pub(super) transformer: Arc<()>,
    pub(super) size: TapeSize,
    pub(super) recompute: Recompute,
    pub(super) buffers: Buffers<B::Buffer>,
    pub(super) logits: B::Buffer,
    /// Keys and values of one block at a time.
    pub(super) cache: B::KvCache,
    /// Per block.
    pub(super) ranks: Vec<BlockRanks<B>>,
    pub(super) head_ranks: B::Ranks,
    pub(super) picked: Picked,
}

/// `V` of a block's four groups.
pub(super) struct BlockRanks<B: Training> {
    pub attention_in: B::Ranks,
    pub attention_out: B::Ranks,
    pub mlp_in: B::Ranks,
    pub mlp_out: B::Ranks,
}

/// Lists of the labelled rows whose logits exist.
#[derive(Default)]
pub(super) struct Picked {
    pub rows: Vec<u32>,
    pub tokens: Vec<u32>,
    pub weights: Vec<f32>,
    pub keys: Vec<u64>,
    pub gates: Gates,
}

/// The activations of a tape, each `[rows, width]`, and with `d_` their gradients.
pub(super) struct Buffers<T> {
    /// The residual stream before each block.
    pub streams: Vec<T>,
    /// Of each block, or of one at a time.
    pub attention: Vec<Attention<T>>,
    /// The residual stream after attention, of each block but the last, or of one at a time.
    pub middles: Vec<T>,
    /// The gate and up products, of each block but the last, or of one at a time.
    pub gate_up: Vec<T>,
    /// Output of a norm: of all rows, or of the picked ones.
    pub normed: T,
    pub gated: T,
    pub d_stream: T,
    pub d_normed: T,
    pub d_qkv: T,
    pub d_context: T,
    pub d_gate_up: T,
    pub d_gated: T,
    pub picked: PickedRows<T>,
}

/// What is kept of a block's attention.
pub(super) struct Attention<T> {
    /// `q | k | v` before the heads' normalisation, where there is one.
    pub raw: Option<T>,
    /// As attention reads it.
    pub qkv: T,
    /// As attention leaves it.
    pub context: T,
}

/// Of the picked rows, which alone go through the last block from its attention on: nobody reads the others.
pub(super) struct PickedRows<T> {
    /// The residual stream before the last block, after its attention, and after it.
    pub stream: T,
    pub middle: T,
    pub after: T,
    pub context: T,
    pub gate_up: T,
    pub d_stream: T,
    pub d_context: T,
}

/// What a block computes after its attention, and the gradients of that: of all rows, or of the picked ones.
pub(super) struct Half<'a, B: Training> {
    pub stream: &'a B::Buffer,
    pub context: &'a B::Buffer,
    pub middle: &'a mut B::Buffer,
    pub gate_up: &'a mut B::Buffer,
    pub after: &'a mut B::Buffer,
    pub normed: &'a mut B::Buffer,
    pub gated: &'a mut B::Buffer,
    pub d_stream: &'a mut B::Buffer,
    pub d_normed: &'a mut B::Buffer,
    pub d_context: &'a mut B::Buffer,
    pub d_gate_up: &'a mut B::Buffer,
    pub d_gated: &'a mut B::Buffer,
    pub ranks: &'a mut BlockRanks<B>,
}

impl<T> Buffers<T> {
    /// Makes every buffer by `make(rows, width)`.
    fn new<E>(
        config: &ModelConfig,
        size: TapeSize,
        recompute: Recompute,
        mut make: impl FnMut(usize, usize) -> Result<T, E>,
    ) -> Result<Self, E> {
        let TapeSize { rows, logit_rows, .. } = size;
        let (hidden, gated) = (config.hidden_size, config.intermediate_size);
        let (query, qkv) = (config.query_width(), config.query_width() + 2 * config.kv_width());
        let layers = config.num_layers;
        let but_last = layers - 1;
        let (kept_attention, kept_middles, kept_gate_up) = match recompute {
            Recompute::None => (layers, but_last, but_last),
            Recompute::Mlp => (layers, but_last, 1.min(but_last)),
            Recompute::Block => (1, 1.min(but_last), 1.min(but_last)),
        };
        let mut several =
            |count: usize, width| (0..count).map(|_| make(rows, width)).collect::<Result<Vec<T>, E>>();
        Ok(Self {
            streams: several(layers, hidden)?,
            middles: several(kept_middles, hidden)?,
            gate_up: several(kept_gate_up, 2 * gated)?,
            attention: (0..kept_attention)
                .map(|_| {
                    Ok(Attention {
                        raw: if config.qk_norm { Some(make(rows, qkv)?) } else { None },
                        qkv: make(rows, qkv)?,
                        context: make(rows, query)?,
                    })
                })
                .collect::<Result<_, E>>()?,
            normed: make(rows, hidden)?,
            gated: make(rows, gated)?,
            d_stream: make(rows, hidden)?,
            d_normed: make(rows, hidden)?,
            d_qkv: make(rows, qkv)?,
            d_context: make(rows, query)?,
            d_gate_up: make(rows, 2 * gated)?,
            d_gated: make(rows, gated)?,
            picked: PickedRows {
                stream: make(logit_rows, hidden)?,
                middle: make(logit_rows, hidden)?,
                after: make(logit_rows, hidden)?,
                context: make(logit_rows, query)?,
                gate_up: make(logit_rows, 2 * gated)?,
                d_stream: make(logit_rows, hidden)?,
                d_context: make(logit_rows, query)?,
            },
        })
    }
}

impl<B: Training> Tape<B> {
    /// A block's second half, of all rows; not of the last block.
    pub(super) fn half(&mut self, index: usize) -> Half<'_, B> {
        let buffers = &mut self.buffers;
        let [attention, middle, gate_up] =
            [buffers.attention.len(), buffers.middles.len(), buffers.gate_up.len()]
                .map(|kept| index.min(kept - 1));
        let (until, after) = buffers.streams.split_at_mut(index + 1);
        Half {
            stream: &until[index],
            context: &buffers.attention[attention].context,
            middle: &mut buffers.middles[middle],
            gate_up: &mut buffers.gate_up[gate_up],
            after: &mut after[0],
            normed: &mut buffers.normed,
            gated: &mut buffers.gated,
            d_stream: &mut buffers.d_stream,
            d_normed: &mut buffers.d_normed,
            d_context: &mut buffers.d_context,
            d_gate_up: &mut buffers.d_gate_up,
            d_gated: &mut buffers.d_gated,
            ranks: &mut self.ranks[index],
        }
    }
}

impl<B: Training> Half<'_, B> {
    /// The last block's, of the picked rows.
    pub(super) fn of_picked<'a>(
        buffers: &'a mut Buffers<B::Buffer>,
        ranks: &'a mut BlockRanks<B>,
    ) -> Half<'a, B> {
        let PickedRows { stream, middle, after, context, gate_up, d_stream, d_context } = &mut buffers.picked;
        Half {
            stream,
            context,
            middle,
            gate_up,
            after,
            normed: &mut buffers.normed,
            gated: &mut buffers.gated,
            d_stream,
            d_normed: &mut buffers.d_normed,
            d_context,
            d_gate_up: &mut buffers.d_gate_up,
            d_gated: &mut buffers.d_gated,
            ranks,
        }
    }
}

/// Which of `kept` belongs to a block: its own, or the one that all share.
pub(super) fn index_in<T>(kept: &[T], block: usize) -> usize {
    block.min(kept.len() - 1)
}

impl<B: Training> Transformer<B> {
    /// Memory for batches of up to `size`.
    ///
    /// # Errors
    /// When the backend has no room.
    pub fn tape(
        &self,
        backend: &mut B,
        size: TapeSize,
        recompute: Recompute,
    ) -> Result<Tape<B>, BackendError> {
        let config = &self.config;
        let size = size.bounded();
        backend.reserve(&StepLimits {
            rows: size.rows,
            sequences: size.sequences,
            picked: size.logit_rows,
            vocabulary: config.vocab_size,
            positions: self.positions,
            rotary_variants: config.rope.variants(),
            cache_pages: size.pages(),
            attention: self.shape,
            gated_width: config.intermediate_size,
        })?;
        let ranks = || BlockRanks {
            attention_in: B::Ranks::default(),
            attention_out: B::Ranks::default(),
            mlp_in: B::Ranks::default(),
            mlp_out: B::Ranks::default(),
        };
        Ok(Tape {
            transformer: Arc::clone(&self.identity),
            size,
            recompute,
            buffers: Buffers::new(config, size, recompute, |rows, width| backend.buffer(rows, width))?,
            logits: backend.logits_buffer(size.logit_rows, config.vocab_size)?,
            cache: backend.kv_cache(1, size.pages(), self.shape)?,
            ranks: self.blocks.iter().map(|_| ranks()).collect(),
            head_ranks: B::Ranks::default(),
            picked: Picked::default(),
        })
    }
}
