//! Site groups on the device, and the lists of rank chunks that their products walk over.

use std::sync::Arc;

use bytemuck::Zeroable;

use super::super::elementwise::{EmbeddingTable, LookupExperts};
use super::super::params::{
    CHUNK_LISTS_THREADS, ChunkListGroup, ChunkListParams, ChunkListSite, GEMM_DECODE_COLUMNS, K_BLOCK,
    MAX_SHRINK_SLICES, MAX_SITES, MAX_SLICES, ROW_TILE, RankChunk,
};
use super::super::{CudaError, Device, DeviceBuffer, Half, Launch, Stream};
use super::product::check_layer;
use super::{ChunkArena, LoraKernels, WorkList};

/// Thread blocks that a decode product should at least have: about one for each multiprocessor of a large GPU.
const THREAD_BLOCKS: usize = 128;

/// Least values of a slice of K when V is computed.
const SHRINK_SLICE: usize = 1024;

/// K blocks that are worth a slice of their own.
const BLOCKS_PER_SLICE: usize = 8;

/// Into how many slices the K of a site group is cut: a property of its widths alone, and with it of every sum.
///
/// Each slice is summed from zero, and slices are added in ascending order. Groups with few outputs need slices to
/// keep a whole GPU busy while few rows are decoded; groups with many outputs have one.
pub fn k_slices(in_features: usize, out_features: impl IntoIterator<Item = usize>) -> usize {
    let tiles: usize = out_features.into_iter().map(|width| width.div_ceil(GEMM_DECODE_COLUMNS)).sum();
    let blocks = in_features.div_ceil(K_BLOCK);
    THREAD_BLOCKS.div_ceil(tiles.max(1)).min(blocks / BLOCKS_PER_SLICE).clamp(1, MAX_SLICES)
}

/// Into how many slices K is cut when V is computed: a property of its length alone, and with it of every sum. Slices of
/// 1024 values or more, each of which keeps a multiprocessor busy for about as long as a launch takes.
pub fn shrink_slices(in_features: usize) -> usize {
    (in_features / SHRINK_SLICE).clamp(1, MAX_SHRINK_SLICES)
}

/// One frozen linear layer and its experts.
#[derive(Debug)]
pub struct Site {
    /// `[out_features, in_features]`
    pub weight: DeviceBuffer<Half>,
    /// `[out_features]`
    pub bias: Option<DeviceBuffer<f32>>,
    pub chunks: ChunkArena,
}

/// Sites that read the same rows and run as one launch.
#[derive(Debug)]
pub struct SiteGroup {
    sites: Vec<Site>,
    slices: usize,
    chunks_per_tile: usize,
    /// `[tiles · slices · sites + 1]`
    starts: DeviceBuffer<u32>,
    /// `[capacity]`
    list: DeviceBuffer<RankChunk>,
    max_rows: usize,
}

impl SiteGroup {
    /// A group for steps of up to `max_rows` rows, of which a tile of 128 uses up to `chunks_per_tile` rank chunks.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for no or too many sites, for sites of different inputs, and for inputs that are no
    /// multiples of 8. A lookup is a group of its own, of any widths.
    pub fn new(
        device: &Arc<Device>,
        sites: Vec<Site>,
        max_rows: usize,
        chunks_per_tile: usize,
    ) -> Result<Self, CudaError> {
        if !(1..=MAX_SITES).contains(&sites.len()) {
            return Err(CudaError::Shape(format!(
                "a group of {} sites, wanted 1 to {MAX_SITES}",
                sites.len()
            )));
        }
        let in_features = sites[0].chunks.in_features();
        let lookup = sites[0].chunks.is_lookup();
        for site in &sites {
            let [input, output] = [site.chunks.in_features(), site.chunks.out_features()];
            let alone = sites.len() == 1;
            if input != in_features
                || (lookup || site.chunks.is_lookup()) && !alone
                || !lookup && !input.is_multiple_of(8)
            {
                return Err(CudaError::Shape(format!(
                    "a site from {input} to {output} in a group from {in_features}: wanted the same input, in \
                     multiples of 8"
                )));
            }
            check_layer(input, output, site.weight.len(), site.bias.as_ref().map(DeviceBuffer::len))?;
        }
        let slices = k_slices(in_features, sites.iter().map(|site| site.chunks.out_features()));
        let [starts, list] = list_lengths(max_rows, slices * sites.len(), chunks_per_tile);
        Ok(Self {
            starts: DeviceBuffer::new(device, starts, "starts of a chunk list")?,
            list: DeviceBuffer::new(device, list, "a chunk list")?,
            sites,
            slices,
            chunks_per_tile,
            max_rows,
        })
    }

    /// Makes room for the lists of steps of up to `max_rows` rows. What was made of the group before (lists, scratch
    /// memory, captured launches) is of no use afterwards.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`]; the group is then as it was.
    pub fn reserve(&mut self, max_rows: usize) -> Result<(), CudaError> {
        let device = Arc::clone(self.starts.device());
        let [starts, list] = list_lengths(max_rows, self.slices * self.sites.len(), self.chunks_per_tile);
        let starts = DeviceBuffer::new(&device, starts, "starts of a chunk list")?;
        self.list = DeviceBuffer::new(&device, list, "a chunk list")?;
        self.starts = starts;
        self.max_rows = max_rows;
        Ok(())
    }

    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    pub fn sites_mut(&mut self) -> &mut [Site] {
        &mut self.sites
    }

    pub fn in_features(&self) -> usize {
        self.sites[0].chunks.in_features()
    }

    /// Outputs of all sites together.
    pub fn out_features(&self) -> usize {
        self.sites.iter().map(|site| site.chunks.out_features()).sum()
    }

    /// See [`k_slices`].
    pub fn slices(&self) -> usize {
        self.slices
    }

    /// Most rank chunks that a step may use: those of a tile, for each tile.
    pub fn capacity(&self) -> usize {
        self.capacity_of_rows(self.max_rows)
    }

    /// The same of a step's first rows.
    pub(super) fn capacity_of_rows(&self, rows: usize) -> usize {
        rows.min(self.max_rows).div_ceil(ROW_TILE) * self.chunks_per_tile
    }

    /// Outputs of each site.
    pub(super) fn widths(&self) -> Vec<usize> {
        self.sites.iter().map(|site| site.chunks.out_features()).collect()
    }

    /// The table of a lookup, with the experts of the step in `work`: what `ElementwiseKernels::embed` takes.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for a group that is no lookup, or a work list for longer steps than the group's.
    pub fn lookup<'a>(&'a self, work: &'a WorkList) -> Result<EmbeddingTable<'a>, CudaError> {
        if !self.is_lookup() || work.max_rows() > self.max_rows {
            return Err(CudaError::Shape(format!(
                "a lookup in a group for {} rows by a work list for {}: wanted a group of an embedding table",
                self.max_rows,
                work.max_rows()
            )));
        }
        let site = &self.sites[0];
        let [a, b] = site.chunks.arenas();
        let experts = LookupExperts {
            a,
            b,
            chunks: self.list.slice(..),
            starts: self.starts.slice(..),
            cells: self.slices,
            gates: work.gates(),
        };
        Ok(EmbeddingTable {
            weight: site.weight.slice(..),
            vocabulary: site.chunks.in_features(),
            width: site.chunks.out_features(),
            experts: (self.chunks_per_tile > 0).then_some(experts),
        })
    }

    pub(super) fn is_lookup(&self) -> bool {
        self.sites[0].chunks.is_lookup()
    }

    /// The chunk list as it was built last: starts of the cells (row tile, K slice, site), then chunks. Waits for the
    /// stream; for tests and tools.
    pub fn read_list(&self, stream: &Stream) -> Result<(Vec<u32>, Vec<RankChunk>), CudaError> {
        let mut starts = vec![0; self.starts.len()];
        let mut chunks = vec![RankChunk::default(); self.capacity()];
        stream.download(&self.starts, &mut starts)?;
        stream.download(&self.list, &mut chunks)?;
        Ok((starts, chunks))
    }

    pub(super) fn max_rows(&self) -> usize {
        self.max_rows
    }

    pub(super) fn starts(&self) -> &DeviceBuffer<u32> {
        &self.starts
    }

    pub(super) fn list(&self) -> &DeviceBuffer<RankChunk> {
        &self.list
    }

    fn description(&self) -> ChunkListGroup {
        let mut group = ChunkListGroup {
            starts: self.starts.address(),
            chunks: self.list.address(),
            sites: self.sites.len() as u32,
            slices: self.slices as u32,
            tile_capacity: self.chunks_per_tile as u32,
            ..Zeroable::zeroed()
        };
        for (to, site) in group.site.iter_mut().zip(&self.sites) {
            *to = ChunkListSite {
                slots: site.chunks.slots().address(),
                chunk_ids: site.chunks.chunk_ids().address(),
                chunks_per_slot: site.chunks.chunks_per_slot() as u64,
            };
        }
        group
    }
}

/// How many starts and chunks the list of a step has: cells of every tile of rows, and an end.
fn list_lengths(max_rows: usize, cells_per_tile: usize, chunks_per_tile: usize) -> [usize; 2] {
    let tiles = max_rows.div_ceil(ROW_TILE);
    [tiles * cells_per_tile + 1, tiles * chunks_per_tile]
}

/// The chunk lists of all groups of a model.
#[derive(Debug)]
pub struct ChunkLists {
    groups: DeviceBuffer<ChunkListGroup>,
    /// `[1]`: 1 once a list did not fit.
    overflow: DeviceBuffer<u32>,
    max_rows: usize,
}

impl ChunkLists {
    /// Where the lists of `groups` are built. They must outlive it.
    pub fn new(stream: &Stream, groups: &[&SiteGroup]) -> Result<Self, CudaError> {
        let descriptions: Vec<_> = groups.iter().map(|group| group.description()).collect();
        let lists = Self {
            groups: DeviceBuffer::new(stream.device(), groups.len(), "site groups")?,
            overflow: DeviceBuffer::new(stream.device(), 1, "a flag")?,
            max_rows: groups.iter().map(|group| group.max_rows()).min().unwrap_or(0),
        };
        stream.upload(&descriptions, &lists.groups)?;
        stream.upload(&[0], &lists.overflow)?;
        Ok(lists)
    }

    /// Queues the launch that builds all lists of the step in `work`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the work list is for longer steps than a group.
    pub fn build(&self, stream: &Stream, kernels: &LoraKernels, work: &WorkList) -> Result<(), CudaError> {
        if work.max_rows() > self.max_rows {
            return Err(CudaError::Shape(format!(
                "a work list for {} rows with groups for {}",
                work.max_rows(),
                self.max_rows
            )));
        }
        let params = ChunkListParams {
            groups: self.groups.address(),
            rows: work.rows_address(),
            tile_entries: work.tile_entries_address(),
            entry_slots: work.entry_slots_address(),
            overflow: self.overflow.address(),
        };
        let launch = Launch::new([self.groups.len() as u32, 1, 1], CHUNK_LISTS_THREADS as u32);
        // SAFETY: the groups' own buffers, sized by the same numbers that the description tells the kernel.
        unsafe { stream.launch(&kernels.chunk_lists, &launch, &params) }
    }

    /// Whether a list has not fitted its group's capacity since the last call; such a step's results are wrong. Waits
    /// for the stream.
    pub fn take_overflow(&self, stream: &Stream) -> Result<bool, CudaError> {
        let mut flag = [0];
        stream.download(&self.overflow, &mut flag)?;
        if flag[0] != 0 {
            stream.upload(&[0], &self.overflow)?;
        }
        Ok(flag[0] != 0)
    }
}
