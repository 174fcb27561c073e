//! The kernels of a transformer step that memory bounds: what they move is their time.
//!
//! Activations are 16-bit `[rows, stride]`, all arithmetic is fp32, and a result is rounded once. An access is 16 bytes
//! where widths, strides and addresses are multiples of that, else one value. How many rows there are is read on the
//! device ([`RowCount`], [`StepRows`]), so one graph serves every step of a capacity. A row's bits depend on the row
//! alone: no thread block sees two rows, and sums run in an order that widths decide.
//!
//! # Bytes
//!
//! Per row, with width H, intermediate width I and heads of D elements; the time is for 8192 rows of Llama-3-8B
//! (H 4096, I 14336, 32 + 2 · 8 heads of 128) on an H100 that copies at 3.0 TB/s, computed from these bytes:
//!
//! | kernel | reads | writes | bytes a row | time |
//! |---|---|---|---|---|
//! | `embed` | 2H | 2H | 16 KiB | 45 µs |
//! | — each rank chunk a row uses | 32 + 32H, from L2 for the rows of a tile | | 128 KiB | |
//! | `rms_norm` | 2H | 2H | 16 KiB | 45 µs |
//! | `rope_store` | 2D (heads + 2 · kv_heads) | 2D (heads + kv_heads) + 4D · kv_heads | 26 KiB | 73 µs |
//! | `swiglu` | 4I | 2I | 84 KiB | 235 µs |
//! | `pick_rows` | 2H | 2H | 16 KiB | 45 µs |
//!
//! Norm weights (4H) and rotary tables (4 · rotary_dim a position) are read from L2. While few rows are decoded each of
//! these is shorter than a launch: two or three trips to memory, about 2 µs, partly hidden behind the kernel before.
//!
//! `rms_norm` does not add residuals. A product adds the residual where it writes its sums (four passes over rows of H
//! until the norm is written: residual, sum, sum, norm); added in the norm instead, the product's own output would be
//! written and read again (five).

mod embed;
mod rope;
mod step_rows;

use std::sync::Arc;

use super::params::{
    EmbedParams, PickRowsParams, ROW_COLUMNS, ROW_THREADS, RmsNormParams, RopeStoreParams, SwigluParams,
};
use super::{CudaError, Device, DeviceSlice, Element, Kernel, Launch, Stream};

pub use super::Matrix;
pub use super::params::StepRow;
pub use embed::{EmbeddingTable, LookupExperts};
pub use rope::{BlockPages, HeadNormWeights, Rotary};
pub use step_rows::{StepLimits, StepRows};

/// Warps of a thread block of `rms_norm`, which exchange a sum each.
const NORM_SHARED_BYTES: u32 = (ROW_THREADS / 32 * size_of::<f32>()) as u32;

/// How many rows a launch works on.
#[derive(Clone, Copy)]
pub struct RowCount<'a> {
    /// `[1]`: rows of the step, read on the device.
    pub count: DeviceSlice<'a, u32>,
    /// Most rows that the launch is made for: rows past it are not touched, whatever the count.
    pub bound: usize,
    /// Lets the launch begin before the one before it in the stream has ended (programmatic dependent launch).
    pub overlap: bool,
}

impl RowCount<'_> {
    /// That there is a count, and that the bound is one of steps where the launch reads a step's rows.
    fn check(&self, steps: Option<&StepRows>) -> Result<(), CudaError> {
        let room = steps.map_or(usize::MAX, |steps| steps.limits().rows);
        if self.count.len() != 1 || self.bound > room {
            return Err(CudaError::Shape(format!(
                "a launch for {} rows with {} counts: wanted one, and at most {room} rows",
                self.bound,
                self.count.len()
            )));
        }
        Ok(())
    }
}

/// The memory-bound kernels of a device.
#[derive(Clone, Debug)]
pub struct ElementwiseKernels {
    embed: Kernel<EmbedParams>,
    rms_norm: Kernel<RmsNormParams>,
    rope_store: Kernel<RopeStoreParams>,
    swiglu: Kernel<SwigluParams>,
    pick_rows: Kernel<PickRowsParams>,
}

impl ElementwiseKernels {
    /// The kernels for activations of this type.
    ///
    /// # Errors
    /// [`CudaError::UnknownKernel`] when the device was opened without this build's kernels.
    pub fn new(device: &Arc<Device>, element: Element) -> Result<Self, CudaError> {
        Ok(Self {
            embed: element.kernel(device, "embed")?,
            rms_norm: element.kernel(device, "rms_norm")?,
            rope_store: element.kernel(device, "rope_store")?,
            swiglu: element.kernel(device, "swiglu")?,
            pick_rows: element.kernel(device, "pick_rows")?,
        })
    }

    /// `y = x / √(mean(x²) + ε) ⊙ weight` for rows as wide as `weight` (Zhang & Sennrich 2019); y may be x.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for buffers that are too small.
    pub fn rms_norm(
        &self,
        stream: &Stream,
        x: Matrix<'_>,
        weight: DeviceSlice<'_, f32>,
        epsilon: f32,
        count: RowCount<'_>,
        y: Matrix<'_>,
    ) -> Result<(), CudaError> {
        let width = weight.len();
        check_rows("x", x, count.bound, width)?;
        check_rows("y", y, count.bound, width)?;
        count.check(None)?;
        let params = RmsNormParams {
            x: x.data.address(),
            weight: weight.address(),
            y: y.data.address(),
            rows: count.count.address(),
            width: width as u32,
            x_stride: x.stride as u32,
            y_stride: y.stride as u32,
            epsilon,
            access: access(
                &[width, x.stride, y.stride],
                &[x.data.address(), weight.address(), y.data.address()],
            ),
            reserved: 0,
        };
        if count.bound == 0 || width == 0 {
            return Ok(());
        }
        let launch = Launch {
            shared_bytes: NORM_SHARED_BYTES,
            overlap_previous: count.overlap,
            ..Launch::new([count.bound as u32, 1, 1], ROW_THREADS as u32)
        };
        // SAFETY: both sides hold `bound` rows of `width`.
        unsafe { stream.launch(&self.rms_norm, &launch, &params) }
    }

    /// `y = silu(gate) ⊙ up` for rows `gate | up` of x, each of `width` (Shazeer 2020).
    ///
    /// For products that cannot do so themselves ([`Epilogue::SwiGlu`](super::lora::Epilogue)).
    ///
    /// # Errors
    /// [`CudaError::Shape`] for buffers that are too small.
    pub fn swiglu(
        &self,
        stream: &Stream,
        x: Matrix<'_>,
        width: usize,
        count: RowCount<'_>,
        y: Matrix<'_>,
    ) -> Result<(), CudaError> {
        check_rows("gate | up", x, count.bound, 2 * width)?;
        check_rows("y", y, count.bound, width)?;
        count.check(None)?;
        let params = SwigluParams {
            x: x.data.address(),
            y: y.data.address(),
            rows: count.count.address(),
            width: width as u32,
            x_stride: x.stride as u32,
            y_stride: y.stride as u32,
            access: access(&[width, x.stride, y.stride], &[x.data.address(), y.data.address()]),
        };
        let Some(launch) = column_grid(count, width) else { return Ok(()) };
        // SAFETY: both sides hold `bound` rows.
        unsafe { stream.launch(&self.swiglu, &launch, &params) }
    }

    /// `y[i] = x[picked[i]]` for the picked rows of a step; `count` is of those, x holds all rows of the step.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for buffers that are too small.
    pub fn pick_rows(
        &self,
        stream: &Stream,
        x: Matrix<'_>,
        width: usize,
        steps: &StepRows,
        count: RowCount<'_>,
        y: Matrix<'_>,
    ) -> Result<(), CudaError> {
        let limits = steps.limits();
        check_rows("x", x, limits.rows, width)?;
        check_rows("y", y, count.bound, width)?;
        count.check(None)?;
        if count.bound > limits.picked {
            return Err(CudaError::Shape(format!("{} picked rows, at most {}", count.bound, limits.picked)));
        }
        let params = PickRowsParams {
            x: x.data.address(),
            picked: steps.picked().address(),
            y: y.data.address(),
            count: count.count.address(),
            width: width as u32,
            x_stride: x.stride as u32,
            y_stride: y.stride as u32,
            access: access(&[width, x.stride, y.stride], &[x.data.address(), y.data.address()]),
        };
        let Some(launch) = column_grid(count, width) else { return Ok(()) };
        // SAFETY: a step's picked rows are rows of the step, all of which x holds.
        unsafe { stream.launch(&self.pick_rows, &launch, &params) }
    }
}

/// A grid of rows and blocks of columns; none where there is nothing to do.
fn column_grid(count: RowCount<'_>, width: usize) -> Option<Launch> {
    (count.bound > 0 && width > 0).then(|| Launch {
        overlap_previous: count.overlap,
        ..Launch::new([count.bound as u32, width.div_ceil(ROW_COLUMNS) as u32, 1], ROW_THREADS as u32)
    })
}

/// That a matrix holds `rows` rows of `width`.
fn check_rows(name: &str, matrix: Matrix<'_>, rows: usize, width: usize) -> Result<(), CudaError> {
    let wanted = if rows == 0 { 0 } else { (rows - 1) * matrix.stride + width };
    if matrix.stride < width || matrix.data.len() < wanted {
        return Err(CudaError::Shape(format!(
            "{name} of {} elements, {} a row, for {rows} rows of {width}",
            matrix.data.len(),
            matrix.stride
        )));
    }
    Ok(())
}

/// Values of an access: 8 where all widths are in multiples of 8 and all addresses on 16-byte boundaries.
pub(super) fn access(widths: &[usize], addresses: &[u64]) -> u32 {
    let whole = widths.iter().all(|width| width.is_multiple_of(8));
    if whole && addresses.iter().all(|address| address.is_multiple_of(16)) { 8 } else { 1 }
}
