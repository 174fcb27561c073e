//! Adapter memory of one site: rank chunks that are handed out like the pages of a cache.

use std::sync::Arc;

use half::bf16;

use super::super::params::{RANK_CHUNK as CHUNK, SlotChunks};
use super::super::{CudaError, Device, DeviceBuffer, DeviceSlice, Stream};

/// What one adapter changes at one site: `scale · B · A`, and per column. Rank 0 where it only changes columns.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    pub rank: usize,
    /// `[rank, in_features]`
    pub a: &'a [bf16],
    /// `[out_features, rank]`
    pub b: &'a [bf16],
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

/// The low-rank pairs of one site's experts, by slot.
///
/// A pair of rank r takes ⌈r / 16⌉ chunks, any that are free. Chunk c of A is `[16, in_features]`, chunk c of B
/// `[out_features, 16]`; ranks beyond r are zeros. For a lookup, where `in_features` is the vocabulary, chunk c of A is
/// `[vocabulary, 16]`: the ranks of a token lie side by side.
#[derive(Debug)]
pub struct ChunkArena {
    in_features: usize,
    out_features: usize,
    lookup: bool,
    chunks_per_slot: usize,
    a: DeviceBuffer<bf16>,
    b: DeviceBuffer<bf16>,
    slots: DeviceBuffer<SlotChunks>,
    chunk_ids: DeviceBuffer<u32>,
    /// What the device knows of each slot.
    table: Vec<SlotChunks>,
    /// What each slot holds.
    held: Vec<Held>,
    free: Vec<u32>,
}

#[derive(Debug, Default)]
struct Held {
    chunks: Vec<u32>,
    column_scale: Option<DeviceBuffer<f32>>,
    bias: Option<DeviceBuffer<f32>>,
}

impl ChunkArena {
    /// Room for `chunks` chunks in `slots` slots of at most `max_rank` ranks each, all empty.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(
        stream: &Stream,
        [in_features, out_features]: [usize; 2],
        chunks: usize,
        slots: usize,
        max_rank: usize,
    ) -> Result<Self, CudaError> {
        let device: &Arc<Device> = stream.device();
        let chunks_per_slot = max_rank.div_ceil(CHUNK);
        let arena = Self {
            in_features,
            out_features,
            lookup: false,
            chunks_per_slot,
            a: DeviceBuffer::new(device, chunks * CHUNK * in_features, "rank chunks of A")?,
            b: DeviceBuffer::new(device, chunks * CHUNK * out_features, "rank chunks of B")?,
            slots: DeviceBuffer::new(device, slots, "slots of experts")?,
            chunk_ids: DeviceBuffer::new(device, slots * chunks_per_slot, "chunks of slots")?,
            table: vec![SlotChunks::default(); slots],
            held: (0..slots).map(|_| Held::default()).collect(),
            free: (0..chunks as u32).rev().collect(),
        };
        stream.upload(&arena.table, &arena.slots)?;
        Ok(arena)
    }

    /// The same for the experts of an embedding table `[vocabulary, width]`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn for_lookup(
        stream: &Stream,
        widths: [usize; 2],
        chunks: usize,
        slots: usize,
        max_rank: usize,
    ) -> Result<Self, CudaError> {
        Ok(Self { lookup: true, ..Self::new(stream, widths, chunks, slots, max_rank)? })
    }

    /// Makes `pair` the content of `slot`. Waits for the copies; work that uses the slot must be done.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for wrong lengths, a rank above the arena's bound or values that are not finite, and
    /// [`CudaError::OutOfChunks`]; the slot is then what it was.
    pub fn load(&mut self, stream: &Stream, slot: usize, pair: &LowRank<'_>) -> Result<(), CudaError> {
        self.check(slot, pair)?;
        let count = pair.rank.div_ceil(CHUNK);
        let available = self.free.len() + self.chunks_of(slot);
        if count > available {
            return Err(CudaError::OutOfChunks { wanted: count, available });
        }
        self.unload(stream, slot)?;
        let columns = |values: Option<&[f32]>| {
            let Some(values) = values else { return Ok(None) };
            let buffer = DeviceBuffer::new(stream.device(), values.len(), "an adapter's columns")?;
            stream.upload(values, &buffer)?;
            Ok::<_, CudaError>(Some(buffer))
        };
        let (column_scale, bias) = (columns(pair.column_scale)?, columns(pair.bias)?);
        let chunks = self.free.split_off(self.free.len() - count);
        self.held[slot] = Held { chunks, column_scale, bias };
        let result = self.copy(stream, slot, pair);
        if result.is_err() {
            self.free.append(&mut std::mem::take(&mut self.held[slot]).chunks);
        }
        result
    }

    /// Empties a slot. Rows that still name it use nothing.
    pub fn unload(&mut self, stream: &Stream, slot: usize) -> Result<(), CudaError> {
        self.set_slot(stream, slot, SlotChunks::default())?;
        self.free.append(&mut std::mem::take(&mut self.held[slot]).chunks);
        Ok(())
    }

    /// Chunks that no slot holds.
    pub fn free_chunks(&self) -> usize {
        self.free.len()
    }

    /// Rank chunks of the expert in a slot; 0 where it is empty.
    pub fn chunks_of(&self, slot: usize) -> usize {
        self.held[slot].chunks.len()
    }

    /// Whether an expert changes columns.
    pub(super) fn changes_columns(&self) -> bool {
        self.held.iter().any(|held| held.column_scale.is_some() || held.bias.is_some())
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Whether this is the arena of a lookup.
    pub fn is_lookup(&self) -> bool {
        self.lookup
    }

    /// All of A's chunks, and all of B's.
    pub(super) fn arenas(&self) -> [DeviceSlice<'_, bf16>; 2] {
        [self.a.slice(..), self.b.slice(..)]
    }

    pub(super) fn a(&self) -> u64 {
        self.a.address()
    }

    pub(super) fn b(&self) -> u64 {
        self.b.address()
    }

    pub(super) fn slots(&self) -> &DeviceBuffer<SlotChunks> {
        &self.slots
    }

    pub(super) fn chunk_ids(&self) -> &DeviceBuffer<u32> {
        &self.chunk_ids
    }

    pub(super) fn chunks_per_slot(&self) -> usize {
        self.chunks_per_slot
    }

    fn check(&self, slot: usize, pair: &LowRank<'_>) -> Result<(), CudaError> {
        let shape = |what: String| Err(CudaError::Shape(what));
        if slot >= self.table.len() {
            return shape(format!("slot {slot} of an arena with {}", self.table.len()));
        }
        if pair.rank.div_ceil(CHUNK) > self.chunks_per_slot {
            return shape(format!("rank {}, at most {} fit a slot", pair.rank, self.chunks_per_slot * CHUNK));
        }
        let lengths =
            [("A [rank, in]", pair.a, self.in_features), ("B [out, rank]", pair.b, self.out_features)];
        for (name, values, width) in lengths {
            if values.len() != pair.rank * width {
                return shape(format!("{name} has {} values, wanted {} x {width}", values.len(), pair.rank));
            }
            // A zero gate hides a row from an expert's finite values only: NaN times zero is NaN.
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return shape(format!("{name} has {} at {at}, not a finite value", values[at]));
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

    /// Copies a pair into the chunks that its slot holds.
    fn copy(&mut self, stream: &Stream, slot: usize, pair: &LowRank<'_>) -> Result<(), CudaError> {
        let Held { chunks: ids, column_scale, bias } = &self.held[slot];
        let mut a = vec![bf16::ZERO; CHUNK * self.in_features];
        let mut b = vec![bf16::ZERO; CHUNK * self.out_features];
        for (j, &id) in ids.iter().enumerate() {
            let ranks = j * CHUNK..pair.rank.min((j + 1) * CHUNK);
            let count = ranks.len();
            a.fill(bf16::ZERO);
            let of_chunk = &pair.a[ranks.start * self.in_features..ranks.end * self.in_features];
            if self.lookup {
                for (rank, values) in of_chunk.chunks_exact(self.in_features).enumerate() {
                    for (to, &value) in a[rank..].iter_mut().step_by(CHUNK).zip(values) {
                        *to = value;
                    }
                }
            } else {
                a[..of_chunk.len()].copy_from_slice(of_chunk);
            }
            for (row, of_row) in b.chunks_exact_mut(CHUNK).zip(pair.b.chunks_exact(pair.rank)) {
                row.fill(bf16::ZERO);
                row[..count].copy_from_slice(&of_row[ranks.clone()]);
            }
            let id = id as usize;
            stream.upload(&a, self.a.slice(id * a.len()..(id + 1) * a.len()))?;
            stream.upload(&b, self.b.slice(id * b.len()..(id + 1) * b.len()))?;
        }
        let first = slot * self.chunks_per_slot;
        stream.upload(ids, self.chunk_ids.slice(first..first + ids.len()))?;
        let address = |columns: &Option<DeviceBuffer<f32>>| columns.as_ref().map_or(0, DeviceBuffer::address);
        let entry = SlotChunks {
            count: ids.len() as u32,
            phase: pair.order as u32,
            scale: pair.scale,
            reserved: 0,
            column_scale: address(column_scale),
            bias: address(bias),
        };
        self.set_slot(stream, slot, entry)
    }

    fn set_slot(&mut self, stream: &Stream, slot: usize, entry: SlotChunks) -> Result<(), CudaError> {
        stream.upload(&[entry], self.slots.slice(slot..=slot))?;
        self.table[slot] = entry;
        Ok(())
    }
}
