//! Launches of the LoRA kernels, with every shape checked before it becomes an address.

use std::sync::Arc;

use bytemuck::Zeroable;

use super::super::elementwise::RowCount;
use super::super::params::{
    ChunkListParams, GEMM_DECODE_16_SHARED_BYTES, GEMM_DECODE_32_SHARED_BYTES, GEMM_DECODE_64_SHARED_BYTES,
    GEMM_DECODE_COLUMNS, GEMM_DECODE_THREADS, GEMM_RANK_EXT_SHARED_BYTES, GEMM_RANK_EXT_THREADS,
    GemmDecodeParams, GemmParams, SHRINK_GATE_16_CHUNKS, SHRINK_GATE_16_ROWS, SHRINK_GATE_16_SHARED_BYTES,
    SHRINK_GATE_16_THREADS, SHRINK_GATE_64_CHUNKS, SHRINK_GATE_64_ROWS, SHRINK_GATE_64_SHARED_BYTES,
    SHRINK_GATE_64_THREADS, ShrinkGateParams,
};
use super::super::{CudaError, Device, Element, Kernel, Launch, Matrix, Stream};
use super::product::{Epilogue, FrozenLayer, Outputs, Product, check_step};
use super::{Scratch, SiteGroup, WorkList, shrink_slices};

/// Most rows of a decode product.
pub(super) const DECODE_ROWS: usize = 64;

/// Most rows whose V is computed in slices of K that meet in memory.
pub(super) const FEW_ROWS: usize = 512;

/// Thread blocks of `gemm_rank_ext` that an SM holds.
pub(super) const GEMM_BLOCKS: usize = 2;

/// Thread blocks of `shrink_gate` that an SM holds.
const SHRINK_BLOCKS: usize = 2;

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
        if rows <= FEW_ROWS { Self::Rows16 } else { Self::Rows64 }
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
    kernel: Kernel<GemmDecodeParams>,
}

impl LoraKernels {
    /// The kernels for weights, adapters and activations of this type.
    ///
    /// # Errors
    /// [`CudaError::UnknownKernel`] when the device was opened without this build's kernels.
    pub fn new(device: &Arc<Device>, element: Element) -> Result<Self, CudaError> {
        let decode = |rows, shared_bytes| {
            let kernel = element
                .kernel(device, &format!("gemm_decode_{rows}"))?
                .with_shared_memory(shared_bytes as u32)?;
            Ok::<_, CudaError>(Decode { rows, shared_bytes, kernel })
        };
        let gemm = |name| element.kernel(device, name)?.with_shared_memory(GEMM_RANK_EXT_SHARED_BYTES as u32);
        let shrink =
            |name, shared_bytes| element.kernel(device, name)?.with_shared_memory(shared_bytes as u32);
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

    /// `Y = X · Wᵀ + bias + gate · scale · (X · Aᵀ) · Bᵀ`, the sites' outputs side by side (for SwiGLU: one site's width):
    /// [`shrink_gate`](Self::shrink_gate) and [`product`](Self::product), in one launch for steps of up to 64 rows.
    ///
    /// `x` is `[rows, in_features]`.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn linear<'a>(
        &self,
        stream: &Stream,
        group: &SiteGroup,
        x: Matrix<'_>,
        y: impl Into<Outputs<'a>>,
        epilogue: Epilogue<'_>,
        step: &Step<'_>,
    ) -> Result<(), CudaError> {
        let product = Product::of_group(group, x, y.into(), epilogue, step)?;
        let has_experts = group.capacity() > 0;
        if step.row_bound <= DECODE_ROWS {
            let shrink =
                has_experts.then(|| (shrink_params(group, x, step), step.scratch.counters().address()));
            return self.decode(stream, &product, shrink);
        }
        if has_experts {
            self.shrink_gate(stream, group, x, step)?;
        }
        self.launch(self.kernel_for(&product), stream, &product)
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
    pub fn product<'a>(
        &self,
        stream: &Stream,
        group: &SiteGroup,
        x: Matrix<'_>,
        y: impl Into<Outputs<'a>>,
        epilogue: Epilogue<'_>,
        step: &Step<'_>,
    ) -> Result<(), CudaError> {
        let product = Product::of_group(group, x, y.into(), epilogue, step)?;
        self.launch(self.kernel_for(&product), stream, &product)
    }

    /// [`product`](Self::product) by a certain kernel.
    #[expect(clippy::too_many_arguments, reason = "those of `product`, and the kernel")]
    pub fn product_by<'a>(
        &self,
        kernel: ProductKernel,
        stream: &Stream,
        group: &SiteGroup,
        x: Matrix<'_>,
        y: impl Into<Outputs<'a>>,
        epilogue: Epilogue<'_>,
        step: &Step<'_>,
    ) -> Result<(), CudaError> {
        self.launch(kernel, stream, &Product::of_group(group, x, y.into(), epilogue, step)?)
    }

    /// `Y = X · Wᵀ + bias` for a run of rows whose adapter has a layer of its own in the place of a group's, with the
    /// bits of a group that has this layer and no adapters.
    ///
    /// `x` `[rows, in_features]` and `y` `[rows, out_features]` begin at the run's first row; `rows` are the run's.
    ///
    /// # Errors
    /// [`CudaError::Shape`], also where the scratch memory was made for smaller groups than one of this layer.
    pub fn frozen_product<'a>(
        &self,
        stream: &Stream,
        layer: FrozenLayer<'_>,
        x: Matrix<'_>,
        y: impl Into<Outputs<'a>>,
        rows: RowCount<'_>,
        scratch: &Scratch,
    ) -> Result<(), CudaError> {
        let product = Product::of_layer(layer, x, y.into(), rows, scratch)?;
        self.launch(self.kernel_for(&product), stream, &product)
    }

    fn kernel_for(&self, product: &Product) -> ProductKernel {
        if product.row_bound <= DECODE_ROWS {
            ProductKernel::Decode
        } else if product.params.slices > 1 && product.tiles() <= self.multiprocessors {
            ProductKernel::RankExtSplit
        } else {
            ProductKernel::RankExt
        }
    }

    fn launch(&self, kernel: ProductKernel, stream: &Stream, product: &Product) -> Result<(), CudaError> {
        let params = &product.params;
        let (tiles, slices) = (product.tiles(), params.slices);
        let (kernel, grid) = match kernel {
            ProductKernel::Decode => return self.decode(stream, product, None),
            // One that parks its sums has memory for as many thread blocks as run at once.
            ProductKernel::RankExt => match slices {
                1 => (&self.gemm_rank_ext, [tiles as u32, 1, 1]),
                _ => {
                    let blocks = tiles.min(GEMM_BLOCKS * self.multiprocessors);
                    (&self.gemm_rank_ext_sliced, [blocks as u32, 1, 1])
                }
            },
            ProductKernel::RankExtSplit if slices > 1 && tiles > self.multiprocessors => {
                let most = self.multiprocessors;
                return Err(CudaError::Shape(format!("{tiles} tiles in slices, at most {most}")));
            }
            ProductKernel::RankExtSplit => {
                (&self.gemm_rank_ext_split, [params.column_tiles, slices, params.row_tiles])
            }
        };
        if product.row_bound == 0 {
            return Ok(());
        }
        let launch = Launch {
            shared_bytes: GEMM_RANK_EXT_SHARED_BYTES as u32,
            overlap_previous: product.overlap,
            ..Launch::new(grid, GEMM_RANK_EXT_THREADS as u32)
        };
        // SAFETY: `Product` has checked every extent that the kernel derives from the parameters, and that partial sums
        // have room.
        unsafe { stream.launch(kernel, &launch, params) }
    }

    /// A decode product; with `shrink` and its counters it computes V too.
    fn decode(
        &self,
        stream: &Stream,
        product: &Product,
        shrink: Option<(ShrinkGateParams, u64)>,
    ) -> Result<(), CudaError> {
        let rows = product.row_bound;
        let Some(decode) = self.gemm_decode.iter().find(|decode| rows <= decode.rows) else {
            return Err(CudaError::Shape(format!("{rows} rows to decode, at most {DECODE_ROWS}")));
        };
        if rows == 0 {
            return Ok(());
        }
        let tiles = product.column_tiles(GEMM_DECODE_COLUMNS);
        let launch = Launch {
            shared_bytes: decode.shared_bytes as u32,
            overlap_previous: product.overlap,
            ..Launch::new([tiles as u32, product.params.slices, 1], GEMM_DECODE_THREADS as u32)
        };
        let (shrink, counters) = shrink.unwrap_or((Zeroable::zeroed(), 0));
        let params = GemmDecodeParams { product: product.params, shrink, counters };
        // SAFETY: as in `launch`; V and its partial sums have room for the chunks of a row tile.
        unsafe { stream.launch(&decode.kernel, &launch, &params) }
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
        if kernel == ShrinkKernel::Rows16 && step.row_bound > FEW_ROWS {
            let rows = step.row_bound;
            return Err(CudaError::Shape(format!("V of {rows} rows in K slices, at most {FEW_ROWS}")));
        }
        if step.row_bound == 0 {
            return Ok(());
        }
        let params = shrink_params(group, x, step);
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

fn shrink_params(group: &SiteGroup, x: Matrix<'_>, step: &Step<'_>) -> ShrinkGateParams {
    let mut params = ShrinkGateParams {
        x: x.data.address(),
        v: step.scratch.v().address(),
        gates: step.work.gates_address(),
        chunks: group.list().address(),
        starts: group.starts().address(),
        rows: step.work.rows_address(),
        partials: step.scratch.shrink_partials(),
        arrived: step.scratch.shrink_arrived(),
        in_features: group.in_features() as u32,
        x_stride: x.stride as u32,
        slices: shrink_slices(group.in_features()) as u32,
        cells: (group.slices() * group.sites().len()) as u32,
        ..Zeroable::zeroed()
    };
    for (a, site) in params.a.iter_mut().zip(group.sites()) {
        *a = site.chunks.a();
    }
    params
}
