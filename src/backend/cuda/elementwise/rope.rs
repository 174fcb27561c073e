//! Rotary positions and the store into the paged cache.

use bytemuck::Zeroable;

use super::super::params::{ROPE_HEADS, ROPE_THREADS, RopeStoreParams};
use super::super::{CudaError, DeviceBuffer, DeviceSlice, Half, Launch, Stream};
use super::{ElementwiseKernels, Matrix, RowCount, StepRows, access, check_rows};
use crate::backend::{AttentionShape, PAGE, RotaryTables};

/// Rotary tables on the device.
#[derive(Debug)]
pub struct Rotary {
    rotary_dim: usize,
    variants: usize,
    positions: usize,
    /// `[variants][positions][rotary_dim / 2]`
    cos: DeviceBuffer<f32>,
    sin: DeviceBuffer<f32>,
}

impl Rotary {
    /// Copies the tables, and waits for that.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for an odd `rotary_dim` and for variants of different sizes.
    pub fn new(stream: &Stream, tables: &RotaryTables) -> Result<Self, CudaError> {
        let (variants, half) = (tables.cos.len(), tables.rotary_dim / 2);
        let len = tables.cos.first().map_or(0, Vec::len);
        let same =
            tables.sin.len() == variants && tables.cos.iter().chain(&tables.sin).all(|t| t.len() == len);
        if !same || half == 0 || !tables.rotary_dim.is_multiple_of(2) || !len.is_multiple_of(half) {
            return Err(CudaError::Shape(format!(
                "rotary tables of {:?} and {:?} elements for {} rotated elements: wanted an even number of those, and \
                 tables of one size",
                tables.cos.iter().map(Vec::len).collect::<Vec<_>>(),
                tables.sin.iter().map(Vec::len).collect::<Vec<_>>(),
                tables.rotary_dim
            )));
        }
        let rotary = Self {
            rotary_dim: tables.rotary_dim,
            variants,
            positions: len / half,
            cos: DeviceBuffer::new(stream.device(), variants * len, "rotary tables")?,
            sin: DeviceBuffer::new(stream.device(), variants * len, "rotary tables")?,
        };
        stream.upload(&tables.cos.concat(), &rotary.cos)?;
        stream.upload(&tables.sin.concat(), &rotary.sin)?;
        Ok(rotary)
    }
}

/// Normalisation of every q and k head before the rotation, by weights `[head_dim]`.
#[derive(Clone, Copy)]
pub struct HeadNormWeights<'a> {
    pub q: DeviceSlice<'a, f32>,
    pub k: DeviceSlice<'a, f32>,
    pub epsilon: f32,
}

/// The pages of one transformer block: `[pages][kv_heads][16][head_dim]` of keys and of values.
#[derive(Clone, Copy)]
pub struct BlockPages<'a> {
    pub keys: DeviceSlice<'a, Half>,
    pub values: DeviceSlice<'a, Half>,
}

impl ElementwiseKernels {
    /// Normalises (where `norms` are given) and rotates q and k of rows of `q | k | v` in place, then stores k and v
    /// in the rows' pages. All in fp32; q and k are rounded once, and the cache holds the bits that the row does.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for an odd `head_dim`, for more rotated elements than a head has, and when tables or pages
    /// are smaller than the step's limits, or buffers than they have to be.
    #[expect(clippy::too_many_arguments, reason = "one launch, and each argument is its own thing")]
    pub fn rope_store(
        &self,
        stream: &Stream,
        qkv: Matrix<'_>,
        shape: AttentionShape,
        norms: Option<HeadNormWeights<'_>>,
        rotary: &Rotary,
        pages: BlockPages<'_>,
        steps: &StepRows,
        count: RowCount<'_>,
    ) -> Result<(), CudaError> {
        check_rows("q | k | v", qkv, count.bound, shape.qkv_width())?;
        count.check(Some(steps))?;
        check_shape(shape, norms, rotary, pages, steps)?;
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        let mut params = RopeStoreParams {
            qkv: qkv.data.address(),
            cos: rotary.cos.address(),
            sin: rotary.sin.address(),
            step_rows: steps.rows().address(),
            keys: pages.keys.address(),
            values: pages.values.address(),
            rows: count.count.address(),
            stride: qkv.stride as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            rotary_dim: rotary.rotary_dim as u32,
            positions: rotary.positions as u32,
            ..Zeroable::zeroed()
        };
        if let Some(HeadNormWeights { q, k, epsilon }) = norms {
            (params.q_norm, params.k_norm, params.epsilon) = (q.address(), k.address(), epsilon);
        }
        // Both halves of what is rotated, and of what is not, in whole accesses.
        let widths = [head_dim / 2, rotary.rotary_dim / 2, qkv.stride];
        params.access =
            access(&widths, &[params.qkv, params.keys, params.values, params.q_norm, params.k_norm]);
        let blocks = (heads + 2 * kv_heads).div_ceil(ROPE_HEADS);
        if count.bound == 0 || blocks == 0 {
            return Ok(());
        }
        let launch = Launch {
            overlap_previous: count.overlap,
            ..Launch::new([count.bound as u32, blocks as u32, 1], ROPE_THREADS as u32)
        };
        // SAFETY: the step's positions, variants and pages are within its limits, and tables and pages are that large.
        unsafe { stream.launch(&self.rope_store, &launch, &params) }
    }
}

fn check_shape(
    shape: AttentionShape,
    norms: Option<HeadNormWeights<'_>>,
    rotary: &Rotary,
    pages: BlockPages<'_>,
    steps: &StepRows,
) -> Result<(), CudaError> {
    let (head_dim, limits) = (shape.head_dim, steps.limits());
    let refuse = |what: String| Err(CudaError::Shape(what));
    if !head_dim.is_multiple_of(2) || rotary.rotary_dim > head_dim {
        let rotated = rotary.rotary_dim;
        return refuse(format!(
            "{rotated} rotated elements of heads of {head_dim}: wanted at most that, and even"
        ));
    }
    if rotary.positions < limits.positions || rotary.variants < limits.rotary_variants {
        return refuse(format!(
            "rotary tables of {} variants of {} positions, with steps of {} of {}",
            rotary.variants, rotary.positions, limits.rotary_variants, limits.positions
        ));
    }
    if let Some(HeadNormWeights { q, k, .. }) = norms
        && (q.len() != head_dim || k.len() != head_dim)
    {
        return refuse(format!("head norms of {} and {} for heads of {head_dim}", q.len(), k.len()));
    }
    let wanted = limits.cache_pages * shape.kv_heads * PAGE * head_dim;
    if pages.keys.len() < wanted || pages.values.len() < wanted {
        return refuse(format!(
            "pages of {} keys and {} values, wanted {wanted} for {} pages",
            pages.keys.len(),
            pages.values.len(),
            limits.cache_pages
        ));
    }
    Ok(())
}
