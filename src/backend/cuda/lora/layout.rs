//! How an adapter's pair lies in rank chunks: in one block of host memory, whose parts are what a [`ChunkArena`] copies.
//!
//! [`ChunkArena`]: super::ChunkArena

use std::mem::size_of;

use bytemuck::Pod;

use super::super::params::{RANK_CHUNK as CHUNK, SlotChunks};
use super::super::{CudaError, Element, Half};

/// What one adapter changes at one site: `scale · B · A`, and per column. Rank 0 where it only changes columns.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    pub rank: usize,
    /// `[rank, in_features]`
    pub a: &'a [Half],
    /// `[out_features, rank]`
    pub b: &'a [Half],
    /// alpha / r, or alpha / √r.
    pub scale: f32,
    /// `[out_features]`: with gate g, the frozen product is multiplied by `1 + g · (column_scale − 1)` (DoRA).
    pub column_scale: Option<&'a [f32]>,
    /// `[out_features]`, added times the gate.
    pub bias: Option<&'a [f32]>,
    /// Where this adapter stands among all others, in every sum: made from its content, so that it is the same in
    /// every batch and every process. See [`WorkList`](super::WorkList).
    pub order: u64,
}

/// The sizes of a [`ChunkArena`](super::ChunkArena): what it takes on the device, and which pairs fit it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaShape {
    /// Of A and B.
    pub element: Element,
    /// For a lookup, the vocabulary.
    pub in_features: usize,
    pub out_features: usize,
    /// Whether A's chunks are `[vocabulary, 16]`, the ranks of a token side by side.
    pub lookup: bool,
    /// Rank chunks of all slots together.
    pub chunks: usize,
    pub slots: usize,
    /// Most ranks of a slot.
    pub max_rank: usize,
}

impl ArenaShape {
    /// Rank chunks of the largest pair.
    pub fn chunks_per_slot(&self) -> usize {
        self.max_rank.div_ceil(CHUNK)
    }

    /// Bytes of device memory that an arena has from the start.
    pub fn bytes(&self) -> usize {
        let tables = self.slots * (size_of::<SlotChunks>() + self.chunks_per_slot() * size_of::<u32>());
        self.chunks * CHUNK * (self.in_features + self.out_features) * size_of::<Half>() + tables
    }

    /// Bytes that the first pair with a column scale adds to an arena, for all slots; the first with a bias as many again.
    pub fn column_bytes(&self) -> usize {
        self.slots * self.out_features * size_of::<f32>()
    }

    /// Whether a slot of an empty arena takes `pair`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for wrong lengths, a rank above `max_rank` or values that are not finite, and
    /// [`CudaError::OutOfChunks`].
    pub fn check(&self, pair: &LowRank<'_>) -> Result<(), CudaError> {
        let shape = |what: String| Err(CudaError::Shape(what));
        let count = pair.rank.div_ceil(CHUNK);
        if count > self.chunks_per_slot() {
            return shape(format!(
                "rank {}, at most {} fit a slot",
                pair.rank,
                self.chunks_per_slot() * CHUNK
            ));
        }
        if count > self.chunks {
            return Err(CudaError::OutOfChunks { wanted: count, available: self.chunks });
        }
        let lengths =
            [("A [rank, in]", pair.a, self.in_features), ("B [out, rank]", pair.b, self.out_features)];
        for (name, values, width) in lengths {
            if values.len() != pair.rank * width {
                return shape(format!("{name} has {} values, wanted {} x {width}", values.len(), pair.rank));
            }
            // A zero gate hides a row from an expert's finite values only: NaN times zero is NaN.
            let mut values = values.iter().map(|&value| self.element.to_f32(value)).enumerate();
            if let Some((at, value)) = values.find(|(_, value)| !value.is_finite()) {
                return shape(format!("{name} has {value} at {at}, not a finite value"));
            }
        }
        for (name, values) in [("the column scale", pair.column_scale), ("the bias", pair.bias)] {
            let Some(values) = values else { continue };
            if values.len() != self.out_features {
                return shape(format!("{name} has {} values, wanted {}", values.len(), self.out_features));
            }
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return shape(format!("{name} has {} at {at}, not a finite value", values[at]));
            }
        }
        if !pair.scale.is_finite() {
            return shape(format!("scale {} is not finite", pair.scale));
        }
        Ok(())
    }
}

/// Where the parts of one pair lie in its block. Blocks start at multiples of 8 bytes.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct PairLayout {
    in_features: usize,
    out_features: usize,
    lookup: bool,
    pub scale: f32,
    /// Rank chunks.
    pub chunks: usize,
    pub column_scale: bool,
    pub bias: bool,
}

/// A block, cut into its parts. Larger alignments come first, so that there is nothing between them.
pub(super) struct Parts<'a> {
    /// `[chunks, 16, in_features]`; of a lookup `[chunks, vocabulary, 16]`.
    pub a: &'a mut [Half],
    /// `[chunks, out_features, 16]`
    pub b: &'a mut [Half],
    /// `[1]`, for the arena to fill in.
    pub entry: &'a mut [SlotChunks],
    /// `[out_features]`, or nothing.
    pub column_scale: &'a mut [f32],
    /// `[out_features]`, or nothing.
    pub bias: &'a mut [f32],
    /// `[chunks]`, for the arena to fill in.
    pub ids: &'a mut [u32],
}

impl PairLayout {
    /// For a pair that [`check`](ArenaShape::check) has passed.
    pub fn new(shape: &ArenaShape, pair: &LowRank<'_>) -> Self {
        Self {
            in_features: shape.in_features,
            out_features: shape.out_features,
            lookup: shape.lookup,
            scale: pair.scale,
            chunks: pair.rank.div_ceil(CHUNK),
            column_scale: pair.column_scale.is_some(),
            bias: pair.bias.is_some(),
        }
    }

    /// Bytes of the block.
    pub fn bytes(&self) -> usize {
        let of_chunks = self.chunks * CHUNK * (self.in_features + self.out_features) * size_of::<Half>();
        let of_columns = (usize::from(self.column_scale) + usize::from(self.bias)) * self.out_features;
        of_chunks + size_of::<SlotChunks>() + of_columns * size_of::<f32>() + self.chunks * size_of::<u32>()
    }

    pub(super) fn parts<'a>(&self, mut block: &'a mut [u8]) -> Parts<'a> {
        let columns = |present: bool| if present { self.out_features } else { 0 };
        Parts {
            a: take(&mut block, self.chunks * CHUNK * self.in_features),
            b: take(&mut block, self.chunks * CHUNK * self.out_features),
            entry: take(&mut block, 1),
            column_scale: take(&mut block, columns(self.column_scale)),
            bias: take(&mut block, columns(self.bias)),
            ids: take(&mut block, self.chunks),
        }
    }

    /// Writes a pair's values into its block. Ranks beyond the pair's are zeros.
    pub fn fill(&self, pair: &LowRank<'_>, block: &mut [u8]) {
        let Parts { a, b, column_scale, bias, .. } = self.parts(block);
        let [a_chunk, b_chunk] = [CHUNK * self.in_features, CHUNK * self.out_features];
        for (chunk, (a, b)) in a.chunks_exact_mut(a_chunk).zip(b.chunks_exact_mut(b_chunk)).enumerate() {
            let ranks = chunk * CHUNK..pair.rank.min((chunk + 1) * CHUNK);
            let count = ranks.len();
            let of_chunk = &pair.a[ranks.start * self.in_features..ranks.end * self.in_features];
            if self.lookup {
                a.fill(Half::ZERO);
                for (rank, values) in of_chunk.chunks_exact(self.in_features).enumerate() {
                    for (to, &value) in a[rank..].iter_mut().step_by(CHUNK).zip(values) {
                        *to = value;
                    }
                }
            } else {
                a[..of_chunk.len()].copy_from_slice(of_chunk);
                a[of_chunk.len()..].fill(Half::ZERO);
            }
            for (row, of_row) in b.chunks_exact_mut(CHUNK).zip(pair.b.chunks_exact(pair.rank)) {
                row[..count].copy_from_slice(&of_row[ranks.clone()]);
                row[count..].fill(Half::ZERO);
            }
        }
        column_scale.copy_from_slice(pair.column_scale.unwrap_or_default());
        bias.copy_from_slice(pair.bias.unwrap_or_default());
    }
}

/// Cuts the first `len` elements off a block.
fn take<'a, T: Pod>(block: &mut &'a mut [u8], len: usize) -> &'a mut [T] {
    let (part, rest) = std::mem::take(block).split_at_mut(len * size_of::<T>());
    *block = rest;
    bytemuck::cast_slice_mut(part)
}
