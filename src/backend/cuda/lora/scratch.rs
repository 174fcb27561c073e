//! Memory that the launches of one group share with the next group's.

use super::super::params::{
    GEMM_DECODE_COLUMNS, GEMM_RANK_EXT_COLUMNS, GemmDecodeCounters, RANK_CHUNK, ROW_TILE, SHRINK_GATE_16_ROWS,
};
use super::super::{CudaError, DeviceBuffer, DeviceSlice, Half, Stream};
use super::kernels::{DECODE_ROWS, FEW_ROWS, GEMM_BLOCKS};
use super::product::column_tiles;
use super::{SiteGroup, shrink_slices};

/// V, partial sums and the counters of those who leave them.
#[derive(Debug)]
pub struct Scratch {
    sizes: Sizes,
    multiprocessors: usize,
    /// `[capacity][128][16]`
    v: DeviceBuffer<Half>,
    partials: DeviceBuffer<f32>,
    arrived: DeviceBuffer<u32>,
    shrink_partials: DeviceBuffer<f32>,
    shrink_arrived: DeviceBuffer<u32>,
    /// `[1]`
    counters: DeviceBuffer<GemmDecodeCounters>,
}

impl Scratch {
    /// Enough for each of `groups`, one after the other on one stream.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(stream: &Stream, groups: &[&SiteGroup]) -> Result<Self, CudaError> {
        let device = stream.device();
        let multiprocessors = device.properties().multiprocessors as usize;
        let sizes = groups.iter().map(|group| Sizes::of_group(group, multiprocessors));
        let sizes = sizes.fold(Sizes::default(), Sizes::max);
        let scratch = Self {
            sizes,
            multiprocessors,
            v: DeviceBuffer::new(device, sizes.v, "V")?,
            partials: DeviceBuffer::new(device, sizes.partials, "partial sums")?,
            arrived: DeviceBuffer::new(device, sizes.arrived, "counters of partial sums")?,
            shrink_partials: DeviceBuffer::new(device, sizes.shrink_partials, "partial sums of V")?,
            shrink_arrived: DeviceBuffer::new(device, sizes.shrink_arrived, "counters of partial sums of V")?,
            counters: DeviceBuffer::new(device, 1, "counters of a decode product")?,
        };
        stream.upload(&vec![0; sizes.arrived], &scratch.arrived)?;
        stream.upload(&vec![0; sizes.shrink_arrived], &scratch.shrink_arrived)?;
        stream.upload(&[GemmDecodeCounters::default()], &scratch.counters)?;
        Ok(scratch)
    }

    /// `[chunks][128][16]`: V of the last group whose V was computed, in the order of its chunk list.
    pub fn v(&self) -> DeviceSlice<'_, Half> {
        self.v.slice(..)
    }

    pub(super) fn partials(&self) -> u64 {
        self.partials.address()
    }

    pub(super) fn arrived(&self) -> u64 {
        self.arrived.address()
    }

    pub(super) fn shrink_partials(&self) -> u64 {
        self.shrink_partials.address()
    }

    pub(super) fn shrink_arrived(&self) -> u64 {
        self.shrink_arrived.address()
    }

    /// `[1]`: what a decode product that computes V counts; zero between launches. For tests and tools.
    pub fn counters(&self) -> DeviceSlice<'_, GemmDecodeCounters> {
        self.counters.slice(..)
    }

    /// That a group's launches have room.
    pub(super) fn check_group(&self, group: &SiteGroup) -> Result<(), CudaError> {
        self.check(Sizes::of_group(group, self.multiprocessors))
    }

    /// Likewise a product to so many outputs, its K in `slices`.
    pub(super) fn check_product(&self, widths: &[usize], slices: usize) -> Result<(), CudaError> {
        self.check(Sizes::of_product(widths, slices, self.multiprocessors))
    }

    fn check(&self, wanted: Sizes) -> Result<(), CudaError> {
        if wanted.max(self.sizes) == self.sizes {
            return Ok(());
        }
        Err(CudaError::Shape("scratch memory that was made for smaller groups".to_owned()))
    }
}

/// Elements of a scratch memory's buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sizes {
    v: usize,
    partials: usize,
    arrived: usize,
    shrink_partials: usize,
    shrink_arrived: usize,
}

impl Sizes {
    fn of_group(group: &SiteGroup, multiprocessors: usize) -> Self {
        // Only steps of few rows leave partial sums of V: those of the first tiles' chunks.
        let few = group.capacity_of_rows(FEW_ROWS);
        let sums = match shrink_slices(group.in_features()) {
            1 => 0,
            slices => slices * ROW_TILE * RANK_CHUNK,
        };
        Self {
            v: group.capacity() * ROW_TILE * RANK_CHUNK,
            shrink_partials: few * sums,
            shrink_arrived: few * (ROW_TILE / SHRINK_GATE_16_ROWS),
            ..Self::of_product(&group.widths(), group.slices(), multiprocessors)
        }
    }

    fn of_product(widths: &[usize], slices: usize, multiprocessors: usize) -> Self {
        if slices == 1 {
            return Self::default();
        }
        let tiles = column_tiles(widths, GEMM_DECODE_COLUMNS, false);
        let decode = tiles * DECODE_ROWS * GEMM_DECODE_COLUMNS;
        let running = GEMM_BLOCKS * multiprocessors * ROW_TILE * GEMM_RANK_EXT_COLUMNS;
        Self {
            partials: slices * decode.max(running),
            arrived: tiles.max(multiprocessors),
            ..Self::default()
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            v: self.v.max(other.v),
            partials: self.partials.max(other.partials),
            arrived: self.arrived.max(other.arrived),
            shrink_partials: self.shrink_partials.max(other.shrink_partials),
            shrink_arrived: self.shrink_arrived.max(other.shrink_arrived),
        }
    }
}
