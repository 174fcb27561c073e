//! An adapter in page-locked host memory, laid out as the arenas want it.

use std::sync::Arc;

use super::super::lora::{ArenaShape, LowRank, PairLayout, SiteGroup};
use super::super::params::SlotChunks;
use super::super::{CudaError, Device, Pinned, Stream};

/// Where blocks start, in a slab.
const ALIGNMENT: usize = 256;

/// A new slab doubles what an expert has, between these: a small one stays small, a large one has few slabs and little
/// left over. A pair that is larger has a slab of its own.
const SMALLEST_SLAB: usize = 64 << 10;
const LARGEST_SLAB: usize = 16 << 20;

/// Everything that one expert changes, ready to be copied. Needs a device only for page-locking, so that it can be made
/// on any thread, beside the one that runs steps, and [inserted](super::ExpertMemory::insert) there.
#[derive(Debug)]
pub struct StagedExpert {
    device: Arc<Device>,
    order: u64,
    slabs: Vec<Slab>,
    /// By ascending site.
    pairs: Vec<StagedPair>,
}

#[derive(Debug)]
struct Slab {
    memory: Pinned<u8>,
    used: usize,
}

/// One pair, and where its block is.
#[derive(Clone, Copy, Debug)]
pub(super) struct StagedPair {
    /// Group, and site within.
    pub site: [usize; 2],
    pub shape: ArenaShape,
    pub layout: PairLayout,
    slab: usize,
    start: usize,
    /// What the block could hold.
    bytes: usize,
}

impl StagedExpert {
    /// An expert that changes nothing yet.
    pub fn new(device: &Arc<Device>, order: u64) -> Self {
        Self { device: Arc::clone(device), order, slabs: Vec::new(), pairs: Vec::new() }
    }

    /// Lays out what the expert changes at `[group, site]`, whose arena has that shape, in place of what it changed
    /// there before. The order of the pair becomes that of the whole expert.
    ///
    /// Memory is freed with the expert, not with a pair.
    ///
    /// # Errors
    /// As [`ArenaShape::check`], and [`CudaError::Driver`] when there is no page-locked memory left; the expert is then
    /// what it was.
    pub fn add(&mut self, site: [usize; 2], shape: &ArenaShape, pair: &LowRank<'_>) -> Result<(), CudaError> {
        shape.check(pair)?;
        let layout = PairLayout::new(shape, pair);
        let place = self.pairs.binary_search_by_key(&site, |pair| pair.site);
        let bytes = layout.bytes();
        let room = match place {
            Ok(at) if self.pairs[at].bytes >= bytes => self.pairs[at],
            _ => {
                let (slab, start) = self.take(bytes)?;
                StagedPair { site, shape: *shape, layout, slab, start, bytes }
            }
        };
        let staged = StagedPair { shape: *shape, layout, ..room };
        layout.fill(pair, block(&mut self.slabs, &staged));
        match place {
            Ok(at) => self.pairs[at] = staged,
            Err(at) => self.pairs.insert(at, staged),
        }
        self.order = pair.order;
        Ok(())
    }

    /// See [`LowRank::order`].
    pub fn order(&self) -> u64 {
        self.order
    }

    /// Page-locked bytes, what is left over included.
    pub fn bytes(&self) -> usize {
        self.slabs.iter().map(|slab| slab.memory.len()).sum()
    }

    pub(super) fn pairs(&self) -> &[StagedPair] {
        &self.pairs
    }

    /// Queues all copies that make this the content of `seat`, and returns how many bytes they are. Sites that it does
    /// not change are emptied there.
    ///
    /// # Errors
    /// As [`ChunkArena::place`](super::super::lora::ChunkArena): copies may then be under way, and some sites may hold
    /// chunks.
    ///
    /// # Safety
    /// Until the stream has passed the copies, this is neither dropped nor placed again, and groups and `empty`, which
    /// is page-locked, are alive.
    pub(super) unsafe fn place(
        &mut self,
        groups: &mut [SiteGroup],
        seat: usize,
        stream: &Stream,
        empty: &[SlotChunks; 1],
    ) -> Result<usize, CudaError> {
        let mut bytes = 0;
        let mut pairs = self.pairs.iter().peekable();
        for (g, group) in groups.iter_mut().enumerate() {
            for (s, site) in group.sites_mut().iter_mut().enumerate() {
                let chunks = &mut site.chunks;
                // SAFETY: as the caller promises.
                match pairs.next_if(|pair| pair.site == [g, s]) {
                    Some(pair) => {
                        let block = block(&mut self.slabs, pair);
                        unsafe { chunks.place(stream, seat, &pair.layout, block, self.order) }?;
                        bytes += pair.layout.bytes();
                    }
                    None => unsafe { chunks.clear(stream, seat, empty) }?,
                }
            }
        }
        Ok(bytes)
    }

    /// Room for a block: slab and start.
    fn take(&mut self, bytes: usize) -> Result<(usize, usize), CudaError> {
        for (i, slab) in self.slabs.iter_mut().enumerate() {
            let start = slab.used.next_multiple_of(ALIGNMENT);
            if start + bytes <= slab.memory.len() {
                slab.used = start + bytes;
                return Ok((i, start));
            }
        }
        let len = bytes.max(self.bytes().clamp(SMALLEST_SLAB, LARGEST_SLAB));
        let memory = Pinned::new(&self.device, len, "an adapter")?;
        self.slabs.push(Slab { memory, used: bytes });
        Ok((self.slabs.len() - 1, 0))
    }
}

fn block<'a>(slabs: &'a mut [Slab], pair: &StagedPair) -> &'a mut [u8] {
    &mut slabs[pair.slab].memory[pair.start..pair.start + pair.layout.bytes()]
}
