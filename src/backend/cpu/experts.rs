//! The resident experts of one site, as the CPU stores them.

use super::gemm::ChunkB;
use crate::backend::{CHUNK, ExpertWeights, SiteChange};
use crate::tensor::{DType, Tensor};

/// Expert slots of a site `[out, in]`.
pub struct Experts {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    slots: Vec<Option<Expert>>,
}

/// What one expert changes at a site.
pub struct Expert(pub(super) Change);

pub(super) enum Change {
    LowRank(LowRank),
    Replace(Tensor),
}

/// A low-rank pair in rank chunks.
pub(super) struct LowRank {
    /// `[rank, in]` as stored. Rows past the rank would be zero and are not kept.
    pub a: Tensor,
    pub rank: usize,
    /// `[chunks, out, 16]`, zero past the rank.
    b: Vec<u8>,
    b_dtype: DType,
    pub scale: f32,
    pub bias: Option<Vec<f32>>,
    pub column_scale: Option<Vec<f32>>,
}

impl Experts {
    pub(super) fn new(in_features: usize, out_features: usize) -> Self {
        Self { in_features, out_features, slots: Vec::new() }
    }

    pub(super) fn get(&self, slot: u32) -> Option<&Change> {
        self.slots.get(slot as usize).and_then(Option::as_ref).map(|expert| &expert.0)
    }

    pub(super) fn insert(&mut self, slot: usize, expert: Expert) {
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        self.slots[slot] = Some(expert);
    }

    /// Takes the content of a slot, which is empty then.
    pub(super) fn take(&mut self, slot: usize) -> Option<Change> {
        self.slots.get_mut(slot).and_then(Option::take).map(|expert| expert.0)
    }

    pub(super) fn unload(&mut self, slot: usize) {
        if let Some(entry) = self.slots.get_mut(slot) {
            *entry = None;
        }
    }
}

impl Expert {
    /// For a site with outputs `[out_features]`.
    pub(super) fn new(change: &SiteChange, out_features: usize) -> Self {
        Self(match change {
            SiteChange::LowRank(weights) => Change::LowRank(LowRank::new(weights, out_features)),
            SiteChange::Replace(weight) => Change::Replace(weight.clone()),
        })
    }
}

impl LowRank {
    fn new(weights: &ExpertWeights, out_features: usize) -> Self {
        let rank = weights.a.shape()[0];
        let dtype = weights.b.dtype();
        let size = dtype.size();
        let source = weights.b.bytes();
        let mut b = vec![0u8; rank.div_ceil(CHUNK) * out_features * CHUNK * size];
        for (index, chunk) in b.chunks_exact_mut(out_features * CHUNK * size).enumerate() {
            let first = index * CHUNK;
            let ranks = CHUNK.min(rank - first);
            for (n, row) in chunk.chunks_exact_mut(CHUNK * size).enumerate() {
                let from = (n * rank + first) * size;
                row[..ranks * size].copy_from_slice(&source[from..from + ranks * size]);
            }
        }
        Self {
            a: weights.a.clone(),
            rank,
            b,
            b_dtype: dtype,
            scale: weights.scale,
            bias: weights.bias.clone(),
            column_scale: weights.column_scale.clone(),
        }
    }

    /// A pair whose A lies in `a` `[rank, in]`; B is to be [set](Self::set_b).
    pub(super) fn with_a(a: Tensor, out_features: usize, scale: f32) -> Self {
        let rank = a.shape()[0];
        let b = vec![0; rank.div_ceil(CHUNK) * out_features * CHUNK * DType::F32.size()];
        Self { a, rank, b, b_dtype: DType::F32, scale, bias: None, column_scale: None }
    }

    /// Replaces B by the transpose of `[rank, out]`, output `n` times `scales[n]` where there are scales.
    pub(super) fn set_b(&mut self, transposed: &[f32], scales: Option<&[f32]>) {
        let out_features = transposed.len() / self.rank;
        let chunks = self.b.as_chunks_mut::<4>().0.chunks_exact_mut(out_features * CHUNK);
        for (chunk, ranks) in chunks.zip(transposed.chunks(out_features * CHUNK)) {
            for (rank, column) in ranks.chunks_exact(out_features).enumerate() {
                for (n, value) in column.iter().enumerate() {
                    let value = scales.map_or(*value, |scales| value * scales[n]);
                    chunk[n * CHUNK + rank] = value.to_le_bytes();
                }
            }
        }
    }

    pub fn chunks(&self) -> usize {
        self.rank.div_ceil(CHUNK)
    }

    /// Ranks in use in a chunk.
    pub fn ranks(&self, chunk: usize) -> usize {
        CHUNK.min(self.rank - chunk * CHUNK)
    }

    /// Chunk `[out, 16]` of B, as the product reads it.
    pub fn b_chunk(&self, chunk: usize, out_features: usize) -> ChunkB {
        let (rows, dtype) = self.b_rows(chunk, out_features);
        ChunkB { data: rows.as_ptr(), dtype, ranks: self.ranks(chunk) }
    }

    /// Chunk `[out, 16]` of B and its element type.
    pub fn b_rows(&self, chunk: usize, out_features: usize) -> (&[u8], DType) {
        let size = out_features * CHUNK * self.b_dtype.size();
        (&self.b[chunk * size..(chunk + 1) * size], self.b_dtype)
    }
}
