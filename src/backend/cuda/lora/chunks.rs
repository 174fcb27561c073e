//! Adapter memory of one site: rank chunks that are handed out like the pages of a cache.

use std::ops::Range;
use std::sync::Arc;

use super::super::params::{RANK_CHUNK as CHUNK, SlotChunks};
use super::super::{CudaError, Device, DeviceBuffer, DeviceSlice, Element, Half, Pinned, Stream};
use super::layout::{ArenaShape, LowRank, PairLayout, Parts};

/// The low-rank pairs of one site's experts, by slot.
///
/// A pair of rank r takes ⌈r / 16⌉ chunks, any that are free. Chunk c of A is `[16, in_features]`, chunk c of B
/// `[out_features, 16]`; ranks beyond r are zeros. For a lookup, where `in_features` is the vocabulary, chunk c of A is
/// `[vocabulary, 16]`: the ranks of a token lie side by side. Column scales and biases are `[slots, out_features]`,
/// allocated for the first pair that has any, and kept.
#[derive(Debug)]
pub struct ChunkArena {
    shape: ArenaShape,
    a: DeviceBuffer<Half>,
    b: DeviceBuffer<Half>,
    slots: DeviceBuffer<SlotChunks>,
    chunk_ids: DeviceBuffer<u32>,
    column_scales: Option<DeviceBuffer<f32>>,
    biases: Option<DeviceBuffer<f32>>,
    /// What the device knows of each slot, copies that are queued included.
    table: Vec<SlotChunks>,
    /// The chunks that each slot holds.
    held: Vec<Vec<u32>>,
    free: Vec<u32>,
}

/// A slot as the device has it. Read back to be compared: two slots are equal when no step can tell them apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlotContent {
    /// `[chunks, 16, in_features]`, or as the lookup has it.
    pub a: Vec<Half>,
    /// `[chunks, out_features, 16]`
    pub b: Vec<Half>,
    pub scale: f32,
    /// The order's lower half: which K slices the chunks extend.
    pub phase: u32,
    pub column_scale: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
}

impl ChunkArena {
    /// Room for `chunks` chunks in `slots` slots of at most `max_rank` ranks each, all empty.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(
        stream: &Stream,
        element: Element,
        [in_features, out_features]: [usize; 2],
        chunks: usize,
        slots: usize,
        max_rank: usize,
    ) -> Result<Self, CudaError> {
        let shape = ArenaShape { element, in_features, out_features, lookup: false, chunks, slots, max_rank };
        Self::with_shape(stream, shape)
    }

    /// The same for the experts of an embedding table `[vocabulary, width]`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn for_lookup(
        stream: &Stream,
        element: Element,
        [in_features, out_features]: [usize; 2],
        chunks: usize,
        slots: usize,
        max_rank: usize,
    ) -> Result<Self, CudaError> {
        let shape = ArenaShape { element, in_features, out_features, lookup: true, chunks, slots, max_rank };
        Self::with_shape(stream, shape)
    }

    /// An empty arena of that shape.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn with_shape(stream: &Stream, shape: ArenaShape) -> Result<Self, CudaError> {
        let device: &Arc<Device> = stream.device();
        let ArenaShape { in_features, out_features, chunks, slots, .. } = shape;
        let per_slot = shape.chunks_per_slot();
        let arena = Self {
            shape,
            a: DeviceBuffer::new(
                device,
                chunks * CHUNK * in_features,
                "room for adapters (rank chunks of A)",
            )?,
            b: DeviceBuffer::new(
                device,
                chunks * CHUNK * out_features,
                "room for adapters (rank chunks of B)",
            )?,
            slots: DeviceBuffer::new(device, slots, "slots of experts")?,
            chunk_ids: DeviceBuffer::new(device, slots * per_slot, "chunks of slots")?,
            column_scales: None,
            biases: None,
            table: vec![SlotChunks::default(); slots],
            held: (0..slots).map(|_| Vec::with_capacity(per_slot)).collect(),
            free: (0..chunks as u32).rev().collect(),
        };
        stream.upload(&arena.table, &arena.slots)?;
        Ok(arena)
    }

    /// Makes `pair` the content of `slot`. Waits for the copies; work that uses the slot must be done.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for wrong lengths, a rank above the arena's bound or values that are not finite, and
    /// [`CudaError::OutOfChunks`]; the slot is then what it was.
    pub fn load(&mut self, stream: &Stream, slot: usize, pair: &LowRank<'_>) -> Result<(), CudaError> {
        if slot >= self.table.len() {
            return Err(CudaError::Shape(format!("slot {slot} of an arena with {}", self.table.len())));
        }
        self.shape.check(pair)?;
        let layout = PairLayout::new(&self.shape, pair);
        let available = self.free.len() + self.chunks_of(slot);
        if layout.chunks > available {
            return Err(CudaError::OutOfChunks { wanted: layout.chunks, available });
        }
        self.reserve_columns(stream.device(), &layout)?;
        let mut block = Pinned::new(stream.device(), layout.bytes(), "an adapter's pair")?;
        layout.fill(pair, &mut block);
        self.unload(stream, slot)?;
        // SAFETY: the block is dropped after the stream has passed the copies, or has failed for good.
        let placed = unsafe { self.place(stream, slot, &layout, &mut block, pair.order) };
        let placed = stream.synchronize().and(placed);
        if placed.is_err() {
            self.give_back(slot);
        }
        placed
    }

    /// Empties a slot. Rows that still name it use nothing.
    pub fn unload(&mut self, stream: &Stream, slot: usize) -> Result<(), CudaError> {
        stream.upload(&[SlotChunks::default()], self.slots.slice(slot..=slot))?;
        self.table[slot] = SlotChunks::default();
        self.give_back(slot);
        Ok(())
    }

    /// Gets room for the column scales and biases of all slots, if a pair has any and there is none yet. Whether
    /// [`changes_columns`](Self::changes_columns) has changed.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub(in super::super) fn reserve_columns(
        &mut self,
        device: &Arc<Device>,
        layout: &PairLayout,
    ) -> Result<bool, CudaError> {
        let before = self.changes_columns();
        let count = self.shape.slots * self.shape.out_features;
        let room = |wanted: bool, there: &Option<DeviceBuffer<f32>>, purpose| match wanted && there.is_none()
        {
            true => DeviceBuffer::new(device, count, purpose).map(Some),
            false => Ok(None),
        };
        // Both or neither: after an error nothing has changed.
        let column_scales = room(layout.column_scale, &self.column_scales, "column scales of experts")?;
        let biases = room(layout.bias, &self.biases, "biases of experts")?;
        self.column_scales = self.column_scales.take().or(column_scales);
        self.biases = self.biases.take().or(biases);
        Ok(self.changes_columns() != before)
    }

    /// Queues the copies that make a filled block the content of a slot that holds nothing. Allocates nothing.
    ///
    /// # Errors
    /// [`CudaError::OutOfChunks`] before anything is queued; after an error of the driver, some copies may be under way.
    /// The slot then holds nothing that a step may use.
    ///
    /// # Panics
    /// When there is no room for the pair's columns: [`reserve_columns`](Self::reserve_columns) comes first.
    ///
    /// # Safety
    /// Until the stream has passed the copies, `block` is page-locked and neither freed nor written to, and the arena is
    /// alive.
    pub(in super::super) unsafe fn place(
        &mut self,
        stream: &Stream,
        slot: usize,
        layout: &PairLayout,
        block: &mut [u8],
        order: u64,
    ) -> Result<(), CudaError> {
        self.take(slot, layout.chunks)?;
        let Parts { a, b, entry, column_scale, bias, ids } = layout.parts(block);
        let held = &self.held[slot];
        ids.copy_from_slice(held);
        let of_slot = slot * self.shape.out_features..(slot + 1) * self.shape.out_features;
        let columns = |room: &Option<DeviceBuffer<f32>>, values: &[f32]| {
            if values.is_empty() {
                return Ok(0);
            }
            let part = room.as_ref().expect("reserved").slice(of_slot.clone());
            // SAFETY: as the caller promises.
            unsafe { stream.upload_async(values, part) }.map(|()| part.address())
        };
        let entry_of_slot = SlotChunks {
            count: ids.len() as u32,
            phase: order as u32,
            scale: layout.scale,
            reserved: 0,
            column_scale: columns(&self.column_scales, column_scale)?,
            bias: columns(&self.biases, bias)?,
        };
        entry[0] = entry_of_slot;
        self.table[slot] = entry_of_slot;
        let mut done = 0;
        for run in held.chunk_by(|id, next| id + 1 == *next) {
            for (width, values, arena) in
                [(self.shape.in_features, &*a, &self.a), (self.shape.out_features, &*b, &self.b)]
            {
                let chunks = |first: usize| first * CHUNK * width..(first + run.len()) * CHUNK * width;
                // SAFETY: as the caller promises.
                unsafe { stream.upload_async(&values[chunks(done)], arena.slice(chunks(run[0] as usize))) }?;
            }
            done += run.len();
        }
        // SAFETY: as the caller promises.
        unsafe {
            stream.upload_async(ids, self.chunk_ids.slice(self.ids_of(slot)))?;
            stream.upload_async(entry, self.slots.slice(slot..=slot))
        }
    }

    /// Queues a copy of an empty entry, unless that is what the device has.
    ///
    /// # Safety
    /// As of [`place`](Self::place), for the entry.
    pub(in super::super) unsafe fn clear(
        &mut self,
        stream: &Stream,
        slot: usize,
        empty: &[SlotChunks; 1],
    ) -> Result<(), CudaError> {
        if is_empty(&self.table[slot]) {
            return Ok(());
        }
        self.table[slot] = empty[0];
        // SAFETY: as the caller promises.
        unsafe { stream.upload_async(empty, self.slots.slice(slot..=slot)) }
    }

    /// Frees the chunks of a slot, which no later step may name until it is placed or cleared.
    pub(in super::super) fn give_back(&mut self, slot: usize) {
        self.free.extend(self.held[slot].drain(..).rev());
    }

    fn take(&mut self, slot: usize, count: usize) -> Result<(), CudaError> {
        let available = self.free.len();
        if count > available {
            return Err(CudaError::OutOfChunks { wanted: count, available });
        }
        let held = &mut self.held[slot];
        debug_assert!(held.is_empty(), "slot {slot} is in use");
        held.extend(self.free.drain(available - count..));
        // Neighbours are one copy.
        held.sort_unstable();
        Ok(())
    }

    /// What the device holds in a slot. Waits for the stream; for tests and tools.
    pub fn read(&self, stream: &Stream, slot: usize) -> Result<SlotContent, CudaError> {
        let mut entry = [SlotChunks::default()];
        stream.download(self.slots.slice(slot..=slot), &mut entry)?;
        let [entry] = entry;
        if is_empty(&entry) {
            return Ok(SlotContent::default());
        }
        let mut ids = vec![0; entry.count as usize];
        let first = self.ids_of(slot).start;
        stream.download(self.chunk_ids.slice(first..first + ids.len()), &mut ids)?;
        let chunks = |arena: &DeviceBuffer<Half>, width: usize| {
            let mut values = vec![Half::ZERO; ids.len() * CHUNK * width];
            for (&id, to) in ids.iter().zip(values.chunks_exact_mut(CHUNK * width)) {
                let id = id as usize;
                stream.download(arena.slice(id * CHUNK * width..(id + 1) * CHUNK * width), to)?;
            }
            Ok::<_, CudaError>(values)
        };
        let columns = |room: &Option<DeviceBuffer<f32>>, address: u64| {
            let Some(room) = room.as_ref().filter(|_| address != 0) else { return Ok(None) };
            let start = (address - room.address()) as usize / size_of::<f32>();
            let mut values = vec![0.0; self.shape.out_features];
            stream.download(room.slice(start..start + values.len()), &mut values)?;
            Ok::<_, CudaError>(Some(values))
        };
        Ok(SlotContent {
            a: chunks(&self.a, self.shape.in_features)?,
            b: chunks(&self.b, self.shape.out_features)?,
            scale: entry.scale,
            phase: entry.phase,
            column_scale: columns(&self.column_scales, entry.column_scale)?,
            bias: columns(&self.biases, entry.bias)?,
        })
    }

    /// Chunks that no slot holds.
    pub fn free_chunks(&self) -> usize {
        self.free.len()
    }

    /// Rank chunks of the expert in a slot; 0 where it is empty.
    pub fn chunks_of(&self, slot: usize) -> usize {
        self.held[slot].len()
    }

    /// Whether an expert may change columns: once one has had room for that, for good.
    pub(super) fn changes_columns(&self) -> bool {
        self.column_scales.is_some() || self.biases.is_some()
    }

    pub fn shape(&self) -> &ArenaShape {
        &self.shape
    }

    pub fn in_features(&self) -> usize {
        self.shape.in_features
    }

    pub fn out_features(&self) -> usize {
        self.shape.out_features
    }

    /// Whether this is the arena of a lookup.
    pub fn is_lookup(&self) -> bool {
        self.shape.lookup
    }

    /// All of A's chunks, and all of B's.
    pub(super) fn arenas(&self) -> [DeviceSlice<'_, Half>; 2] {
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
        self.shape.chunks_per_slot()
    }

    /// Where the ids of a slot's chunks lie.
    fn ids_of(&self, slot: usize) -> Range<usize> {
        let first = slot * self.shape.chunks_per_slot();
        first..first + self.held[slot].len()
    }
}

fn is_empty(entry: &SlotChunks) -> bool {
    entry.count == 0 && entry.column_scale == 0 && entry.bias == 0
}
