//! Launches of the LoRA kernels, with every shape checked before it becomes an address.

use std::sync::Arc;

use bytemuck::Zeroable;
use half::bf16;

use super::super::params::{
    self, ChunkListParams, GEMM_DECODE_16_SHARED_BYTES, GEMM_DECODE_32_SHARED_BYTES,
    GEMM_DECODE_64_SHARED_BYTES, GEMM_DECODE_COLUMNS, GEMM_DECODE_THREADS, GEMM_RANK_EXT_COLUMNS,
    GEMM_RANK_EXT_SHARED_BYTES, GEMM_RANK_EXT_THREADS, GemmParams, GemmSite, RANK_CHUNK, ROW_TILE,
    SHRINK_GATE_16_CHUNKS, SHRINK_GATE_16_ROWS, SHRINK_GATE_16_SHARED_BYTES, SHRINK_GATE_16_THREADS,
    SHRINK_GATE_64_CHUNKS, SHRINK_GATE_64_ROWS, SHRINK_GATE_64_SHARED_BYTES, SHRINK_GATE_64_THREADS,
    ShrinkGateParams,
};
use super::super::{CudaError, Device, DeviceBuffer, DeviceSlice, Kernel, Launch, Matrix, Stream};
use super::{SiteGroup, WorkList, shrink_slices};

/// Most rows of a decode product.
const DECODE_ROWS: usize = 64;

/// Thread blocks of `gemm_rank_ext` that an SM holds.
const GEMM_BLOCKS: usize = 2;

/// Thread blocks of `shrink_gate` that an SM holds.
const SHRINK_BLOCKS: usize = 2;

/// What becomes of the sums of a product.
#[derive(Clone, Copy)]
pub enum Epilogue<'a> {
    /// `y = sum + bias`
    Store,
    /// `y = residual + sum + bias`, both with the stride of y; the residual may be y.
    AddResidual(DeviceSlice<'a, bf16>),
    /// `y = silu(sum₀ + bias₀) ⊙ (sum₁ + bias₁)` for a group of two sites with equal outputs (Shazeer 2020).
    SwiGlu,
}

/// Memory that one group's launches share with the next group's.
#[derive(Debug)]
pub struct Scratch {
    /// `[capacity][128][16]`
    v: DeviceBuffer<bf16>,
    partials: DeviceBuffer<f32>,
    arrived: DeviceBuffer<u32>,
    shrink_partials: DeviceBuffer<f32>,
    shrink_arrived: DeviceBuffer<u32>,
}

impl Scratch {
    /// Enough for each of `groups`, one after the other on one stream.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(stream: &Stream, groups: &[&SiteGroup]) -> Result<Self, CudaError> {
        let device = stream.device();
        let most = |of: &dyn Fn(&SiteGroup) -> usize| groups.iter().map(|group| of(group)).max().unwrap_or(0);
        let v = most(&|group| group.capacity()) * ROW_TILE * RANK_CHUNK;
        let multiprocessors = device.properties().multiprocessors as usize;
        let tiles = most(&|group| column_tiles(group, GEMM_DECODE_COLUMNS, false).max(multiprocessors));
        let partials = most(&|group| match group.slices() {
            1 => 0,
            slices => {
                let decode =
                    column_tiles(group, GEMM_DECODE_COLUMNS, false) * DECODE_ROWS * GEMM_DECODE_COLUMNS;
                slices * decode.max(GEMM_BLOCKS * multiprocessors * ROW_TILE * GEMM_RANK_EXT_COLUMNS)
            }
        });
        let shrink_partials = most(&|group| match shrink_slices(group.in_features()) {
            1 => 0,
            slices => group.capacity() * slices * ROW_TILE * RANK_CHUNK,
        });
        let parts = most(&|group| group.capacity()) * (ROW_TILE / SHRINK_GATE_16_ROWS);
        let scratch = Self {
            v: DeviceBuffer::new(device, v, "V")?,
            partials: DeviceBuffer::new(device, partials, "partial sums")?,
            arrived: DeviceBuffer::new(device, tiles, "counters of partial sums")?,
            shrink_partials: DeviceBuffer::new(device, shrink_partials, "partial sums of V")?,
            shrink_arrived: DeviceBuffer::new(device, parts, "counters of partial sums of V")?,
        };
        stream.upload(&vec![0; tiles], &scratch.arrived)?;
        stream.upload(&vec![0; parts], &scratch.shrink_arrived)?;
        Ok(scratch)
    }

    /// `[chunks][128][16]`: what `shrink_gate` has left, in the order of the chunk list.
    pub fn v(&self) -> DeviceSlice<'_, bf16> {
        self.v.slice(..)
    }
}

/// What all launches of a step have in common.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    pub work: &'a WorkList,
    /// Most rows that the launches are made for. The step's own number of rows is read on the device.
    pub row_bound: usize,
    pub scratch: &'a Scratch,
    /// Lets each launch begin before the one before it in the stream has ended (programmatic dependent launch).
    pub overlap: bool,
}

/// How a product is spread over the device. It decides the time, not the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKernel {
    /// `gemm_decode_*`: up to 64 rows.
    Decode,
    /// `gemm_rank_ext`: a thread block for each tile.
    RankExt,
    /// `gemm_rank_ext_split`: a thread block for each K slice of each tile, of which there may be no more than the
    /// device has multiprocessors.
    RankExtSplit,
}

/// How V is spread over the device. It decides the time, not the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShrinkKernel {
    /// `shrink_gate_16`: 16 rows, one rank chunk and one K slice for each thread block.
    Rows16,
    /// `shrink_gate_64`: 64 rows, four rank chunks and the whole of K.
    Rows64,
}

impl ShrinkKernel {
    /// The one for steps of up to so many rows: few are spread over K slices, for many X is read once for several chunks.
    pub fn for_rows(rows: usize) -> Self {
        if rows <= 512 { Self::Rows16 } else { Self::Rows64 }
    }
}

/// The LoRA kernels of a device.
#[derive(Clone, Debug)]
pub struct LoraKernels {
    pub(super) chunk_lists: Kernel<ChunkListParams>,
    shrink_gate_16: Kernel<ShrinkGateParams>,
    shrink_gate_64: Kernel<ShrinkGateParams>,
    gemm_rank_ext: Kernel<GemmParams>,
    gemm_rank_ext_sliced: Kernel<GemmParams>,
    gemm_rank_ext_split: Kernel<GemmParams>,
    gemm_decode: [Decode; 3],
    multiprocessors: usize,
}

/// A decode kernel and its most rows.
#[derive(Clone, Debug)]
struct Decode {
    rows: usize,
    shared_bytes: usize,
    kernel: Kernel<GemmParams>,
}

impl LoraKernels {
    /// # Errors
    /// [`CudaError::UnknownKernel`] when the device was opened without this build's kernels.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let decode = |rows, shared_bytes| {
            let kernel =
                device.kernel(&format!("gemm_decode_{rows}"))?.with_shared_memory(shared_bytes as u32)?;
            Ok::<_, CudaError>(Decode { rows, shared_bytes, kernel })
        };
        let gemm = |name| device.kernel(name)?.with_shared_memory(GEMM_RANK_EXT_SHARED_BYTES as u32);
        let shrink = |name, shared_bytes| device.kernel(name)?.with_shared_memory(shared_bytes as u32);
        Ok(Self {
            chunk_lists: device.kernel("chunk_lists")?,
            shrink_gate_16: shrink("shrink_gate_16", SHRINK_GATE_16_SHARED_BYTES)?,
            shrink_gate_64: shrink("shrink_gate_64", SHRINK_GATE_64_SHARED_BYTES)?,
            gemm_rank_ext: gemm("gemm_rank_ext")?,
            gemm_rank_ext_sliced: gemm("gemm_rank_ext_sliced")?,
            gemm_rank_ext_split: gemm("gemm_rank_ext_split")?,
            gemm_decode: [
                decode(16, GEMM_DECODE_16_SHARED_BYTES)?,
                decode(32, GEMM_DECODE_32_SHARED_BYTES)?,
                decode(64, GEMM_DECODE_64_SHARED_BYTES)?,
            ],
            multiprocessors: device.properties().multiprocessors as usize,
        })
    }

    /// `V = gate · scale · (X · Aᵀ)` for the group's chunks of this step, into the step's scratch memory.
    ///
    /// `x` is `[rows, in_features]`.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn shrink_gate(
        &self,
        stream: &Stream,
        group: &SiteGroup,
        x: Matrix<'_>,
        step: &Step<'_>,
    ) -> Result<(), CudaError> {
        self.shrink_gate_by(ShrinkKernel::for_rows(step.row_bound), stream, group, x, step)
    }

    /// `Y = X · Wᵀ + bias + V · Bᵀ`, the sites' outputs side by side (for SwiGLU: one site's width).
    ///
    /// `x` is `[rows, in_features]`; V must have been left in the scratch memory by
    /// [`shrink_gate`](Self::shrink_gate) for the same rows.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn product(
        &self,
        stream: &Stream,
        group: &SiteGroup,
        x: Matrix<'_>,
        y: Matrix<'_>,
        epilogue: Epilogue<'_>,
        step: &Step<'_>,
    ) -> Result<(), CudaError> {
        let tiles = gemm_tiles(group, epilogue, step.row_bound);
        let kernel = if step.row_bound <= DECODE_ROWS {
            ProductKernel::Decode
        } else if group.slices() > 1 && tiles <= self.multiprocessors {
            ProductKernel::RankExtSplit
        } else {
            ProductKernel::RankExt
        };
        self.product_by(kernel, stream, group, x, y, epilogue, step)
    }

    /// [`product`](Self::product) by a certain kernel.
    #[expect(clippy::too_many_arguments, reason = "those of `product`, and the kernel")]
    pub fn product_by(
        &self,
        kernel: ProductKernel,
        stream: &Stream,
        group: &SiteGroup,
        x: Matrix<'_>,
        y: Matrix<'_>,
        epilogue: Epilogue<'_>,
        step: &Step<'_>,
    ) -> Result<(), CudaError> {
        let params = gemm_params(group, x, y, epilogue, step)?;
        let tiles = gemm_tiles(group, epilogue, step.row_bound);
        let slices = params.slices;
        let (kernel, grid, threads, shared_bytes) = match kernel {
            ProductKernel::Decode => {
                let fits = |decode: &&Decode| step.row_bound <= decode.rows;
                let Some(decode) = self.gemm_decode.iter().find(fits) else {
                    let rows = step.row_bound;
                    return Err(CudaError::Shape(format!("{rows} rows to decode, at most {DECODE_ROWS}")));
                };
                let tiles = column_tiles(group, GEMM_DECODE_COLUMNS, matches!(epilogue, Epilogue::SwiGlu));
                (&decode.kernel, [tiles as u32, slices, 1], GEMM_DECODE_THREADS, decode.shared_bytes)
            }
            ProductKernel::RankExt => {
                // One that parks its sums has memory for as many thread blocks as run at once.
                let (kernel, blocks) = match slices {
                    1 => (&self.gemm_rank_ext, tiles),
                    _ => (&self.gemm_rank_ext_sliced, tiles.min(GEMM_BLOCKS * self.multiprocessors)),
                };
                (kernel, [blocks as u32, 1, 1], GEMM_RANK_EXT_THREADS, GEMM_RANK_EXT_SHARED_BYTES)
            }
            ProductKernel::RankExtSplit if slices > 1 && tiles > self.multiprocessors => {
                let most = self.multiprocessors;
                return Err(CudaError::Shape(format!("{tiles} tiles in slices, at most {most}")));
            }
            ProductKernel::RankExtSplit => {
                let grid = [params.column_tiles, slices, params.row_tiles];
                (&self.gemm_rank_ext_split, grid, GEMM_RANK_EXT_THREADS, GEMM_RANK_EXT_SHARED_BYTES)
            }
        };
        if step.row_bound == 0 {
            return Ok(());
        }
        let launch = Launch {
            shared_bytes: shared_bytes as u32,
            overlap_previous: step.overlap,
            ..Launch::new(grid, threads as u32)
        };
        // SAFETY: `gemm_params` has checked every extent that the kernel derives from the parameters, and partial sums
        // are sized for the tiles.
        unsafe { stream.launch(kernel, &launch, &params) }
    }

    /// [`shrink_gate`](Self::shrink_gate) by a certain kernel.
    pub fn shrink_gate_by(
        &self,
        kernel: ShrinkKernel,
        stream: &Stream,
        group: &SiteGroup,
        x: Matrix<'_>,
        step: &Step<'_>,
    ) -> Result<(), CudaError> {
        check_step(group, x, step)?;
        if step.row_bound == 0 {
            return Ok(());
        }
        let mut params = ShrinkGateParams {
            x: x.data.address(),
            v: step.scratch.v.address(),
            gates: step.work.gates_address(),
            chunks: group.list().address(),
            starts: group.starts().address(),
            rows: step.work.rows_address(),
            partials: step.scratch.shrink_partials.address(),
            arrived: step.scratch.shrink_arrived.address(),
            in_features: group.in_features() as u32,
            x_stride: x.stride as u32,
            slices: shrink_slices(group.in_features()) as u32,
            cells: (group.slices() * group.sites().len()) as u32,
            ..Zeroable::zeroed()
        };
        for (a, site) in params.a.iter_mut().zip(group.sites()) {
            *a = site.chunks.a();
        }
        let (kernel, rows, chunks, slices, threads, shared_bytes) = match kernel {
            ShrinkKernel::Rows16 => {
                let slices = params.slices as usize;
                let bytes = SHRINK_GATE_16_SHARED_BYTES;
                (
                    &self.shrink_gate_16,
                    SHRINK_GATE_16_ROWS,
                    SHRINK_GATE_16_CHUNKS,
                    slices,
                    SHRINK_GATE_16_THREADS,
                    bytes,
                )
            }
            ShrinkKernel::Rows64 => {
                let bytes = SHRINK_GATE_64_SHARED_BYTES;
                (
                    &self.shrink_gate_64,
                    SHRINK_GATE_64_ROWS,
                    SHRINK_GATE_64_CHUNKS,
                    1,
                    SHRINK_GATE_64_THREADS,
                    bytes,
                )
            }
        };
        let parts = step.row_bound.div_ceil(rows);
        // Thread blocks beside each other share a tile's chunks; as many as the device holds at once.
        let most = group.capacity().div_ceil(chunks).max(1);
        let beside = (SHRINK_BLOCKS * self.multiprocessors / (parts * slices)).clamp(1, most);
        let launch = Launch {
            shared_bytes: shared_bytes as u32,
            overlap_previous: step.overlap,
            ..Launch::new([parts as u32, beside as u32, slices as u32], threads as u32)
        };
        // SAFETY: X has been checked; V, lists and gates are sized by the group and the work list.
        unsafe { stream.launch(kernel, &launch, &params) }
    }
}

/// Tiles of `gemm_rank_ext` that cover a product's outputs.
fn gemm_tiles(group: &SiteGroup, epilogue: Epilogue<'_>, rows: usize) -> usize {
    column_tiles(group, GEMM_RANK_EXT_COLUMNS, matches!(epilogue, Epilogue::SwiGlu)) * rows.div_ceil(ROW_TILE)
}

/// Tiles of `columns` columns that cover a group's outputs: no tile straddles sites, unless it pairs them.
fn column_tiles(group: &SiteGroup, columns: usize, paired: bool) -> usize {
    if paired {
        return group.sites()[0].chunks.out_features().div_ceil(columns / 2);
    }
    group.sites().iter().map(|site| site.chunks.out_features().div_ceil(columns)).sum()
}

/// Checks that a matrix has `rows` rows of `width` that 16-byte accesses can take.
fn check_matrix(matrix: Matrix<'_>, name: &str, rows: usize, width: usize) -> Result<(), CudaError> {
    let wanted = if rows == 0 { 0 } else { (rows - 1) * matrix.stride + width };
    if matrix.stride < width || !matrix.stride.is_multiple_of(8) || matrix.data.len() < wanted {
        return Err(CudaError::Shape(format!(
            "{name} of {} elements, {} a row, for {rows} rows of {width}: wanted at least that, and rows in multiples \
             of 8",
            matrix.data.len(),
            matrix.stride
        )));
    }
    Ok(())
}

fn check_step(group: &SiteGroup, x: Matrix<'_>, step: &Step<'_>) -> Result<(), CudaError> {
    if step.row_bound > step.work.max_rows() || step.work.max_rows() > group.max_rows() {
        return Err(CudaError::Shape(format!(
            "a step of {} rows, with a work list for {} and a group for {}",
            step.row_bound,
            step.work.max_rows(),
            group.max_rows()
        )));
    }
    if group.is_lookup() {
        return Err(CudaError::Shape("a product of an embedding table, which is looked up".to_owned()));
    }
    if step.scratch.v.len() < group.capacity() * ROW_TILE * RANK_CHUNK {
        return Err(CudaError::Shape("scratch memory that was made for smaller groups".to_owned()));
    }
    check_matrix(x, "x", step.row_bound, group.in_features())
}

fn gemm_params(
    group: &SiteGroup,
    x: Matrix<'_>,
    y: Matrix<'_>,
    epilogue: Epilogue<'_>,
    step: &Step<'_>,
) -> Result<GemmParams, CudaError> {
    check_step(group, x, step)?;
    let widths: Vec<usize> = group.sites().iter().map(|site| site.chunks.out_features()).collect();
    let width = match epilogue {
        Epilogue::SwiGlu if widths.len() != 2 || widths[0] != widths[1] => {
            return Err(CudaError::Shape(format!("SwiGLU of outputs {widths:?}, wanted two of equal width")));
        }
        Epilogue::SwiGlu => widths[0],
        Epilogue::Store | Epilogue::AddResidual(_) => widths.iter().sum(),
    };
    check_matrix(y, "y", step.row_bound, width)?;
    let mut to = GemmParams {
        x: x.data.address(),
        y: y.data.address(),
        v: step.scratch.v.address(),
        chunks: group.list().address(),
        starts: group.starts().address(),
        partials: step.scratch.partials.address(),
        arrived: step.scratch.arrived.address(),
        rows: step.work.rows_address(),
        tile_entries: step.work.tile_entries_address(),
        entry_slots: step.work.entry_slots_address(),
        gates: step.work.gates_address(),
        sites: widths.len() as u32,
        slices: group.slices() as u32,
        in_features: group.in_features() as u32,
        x_stride: x.stride as u32,
        y_stride: y.stride as u32,
        row_tiles: step.row_bound.div_ceil(ROW_TILE) as u32,
        column_tiles: column_tiles(group, GEMM_RANK_EXT_COLUMNS, matches!(epilogue, Epilogue::SwiGlu)) as u32,
        changes_columns: group.sites().iter().any(|site| site.chunks.changes_columns()).into(),
        ..Zeroable::zeroed()
    };
    to.epilogue = match epilogue {
        Epilogue::Store => params::Epilogue::Store,
        Epilogue::AddResidual(residual) => {
            check_matrix(Matrix { data: residual, stride: y.stride }, "the residual", step.row_bound, width)?;
            to.residual = residual.address();
            params::Epilogue::AddResidual
        }
        Epilogue::SwiGlu => params::Epilogue::Swiglu,
    } as u32;
    let mut column = 0;
    for (of_site, site) in to.site.iter_mut().zip(group.sites()) {
        *of_site = GemmSite {
            weight: site.weight.address(),
            bias: site.bias.as_ref().map_or(0, DeviceBuffer::address),
            b: site.chunks.b(),
            slots: site.chunks.slots().address(),
            out_features: site.chunks.out_features() as u32,
            y_column: column,
        };
        column += site.chunks.out_features() as u32;
    }
    Ok(to)
}
