//! What the trait's operations hold: activations, weights and caches in device memory.

use std::sync::Arc;

use super::super::lora::Outputs;
use super::super::{CudaError, Device, DeviceBuffer, DeviceSlice, Element, Half, Matrix, Stream};
use crate::backend::{AttentionShape, PAGE};
use crate::tensor::Tensor;

/// Rows of products are read in pieces of so many values; what is narrower is padded with zeros.
const PIECE: usize = 8;

/// A width in whole pieces.
pub(super) fn padded(width: usize) -> usize {
    width.next_multiple_of(PIECE)
}

/// A frozen matrix, `[rows, stride]`: rows are padded with zeros. Clones share it.
#[derive(Clone, Debug)]
pub struct Weight {
    pub(super) data: DeviceBuffer<Half>,
    pub(super) rows: usize,
    pub(super) stride: usize,
}

impl Weight {
    /// Copies a matrix to the device, rounded where it is not stored as `element`.
    pub(super) fn new(stream: &Stream, element: Element, tensor: &Tensor) -> Result<Self, CudaError> {
        let &[rows, width] = tensor.shape() else {
            return Err(CudaError::Shape(format!("a weight of shape {:?}, wanted a matrix", tensor.shape())));
        };
        let what = format!("a weight of shape [{rows}, {width}]");
        let stride = padded(width);
        let data = DeviceBuffer::new(stream.device(), rows * stride, "weights")?;
        let (row_bytes, parts) = (width * tensor.dtype().size(), UPLOAD.div_ceil(stride.max(1)));
        for first in (0..rows).step_by(parts) {
            let last = rows.min(first + parts);
            let bytes = tensor.bytes().slice(first * row_bytes..last * row_bytes);
            let to = data.slice(first * stride..last * stride);
            if tensor.dtype() == element.dtype()
                && width == stride
                && let Ok(values) = bytemuck::try_cast_slice::<u8, Half>(&bytes)
            {
                stream.upload(values, to)?;
                continue;
            }
            let part = Tensor::new(tensor.dtype(), vec![last - first, width], bytes);
            stream.upload(&padded_values(element, &part, stride, &what)?, to)?;
        }
        Ok(Self { data, rows, stride })
    }
}

/// Values that are converted and copied at a time.
const UPLOAD: usize = 16 << 20;

/// The values of a matrix, rows padded to `stride` with zeros.
pub(super) fn padded_values(
    element: Element,
    matrix: &Tensor,
    stride: usize,
    what: &str,
) -> Result<Vec<Half>, CudaError> {
    let width = *matrix.shape().last().expect("a matrix has a width");
    let values = element.values_of(matrix, what)?;
    if width == stride {
        return Ok(values);
    }
    let mut rows = vec![Half::ZERO; matrix.shape()[0] * stride];
    for (to, from) in rows.chunks_exact_mut(stride).zip(values.chunks_exact(width.max(1))) {
        to[..width].copy_from_slice(from);
    }
    Ok(rows)
}

/// Activations `[capacity, stride]`, of which the first `width` are used and the rest is zero.
#[derive(Debug)]
pub struct Buffer {
    pub(super) data: Data,
    pub(super) width: usize,
    pub(super) stride: usize,
}

/// A buffer's elements.
#[derive(Debug)]
pub(super) enum Data {
    Half(DeviceBuffer<Half>),
    /// Logits: without padding.
    Single(DeviceBuffer<f32>),
}

impl Buffer {
    pub(super) fn half(stream: &Stream, rows: usize, width: usize) -> Result<Self, CudaError> {
        let stride = padded(width);
        let data = DeviceBuffer::<Half>::new(stream.device(), rows * stride, "activations")?;
        // SAFETY: the buffer is alive until the stream has been waited for.
        unsafe { stream.fill_async(&data, 0) }?;
        stream.synchronize()?;
        Ok(Self { data: Data::Half(data), width, stride })
    }

    pub(super) fn single(device: &Arc<Device>, rows: usize, width: usize) -> Result<Self, CudaError> {
        let data = DeviceBuffer::new(device, rows * width, "logits")?;
        Ok(Self { data: Data::Single(data), width, stride: width })
    }

    /// Rows of activations.
    pub(super) fn matrix(&self) -> Result<Matrix<'_>, CudaError> {
        match &self.data {
            Data::Half(data) => Ok(Matrix { data: data.slice(..), stride: self.stride }),
            Data::Single(_) => Err(CudaError::Shape("logits in the place of activations".to_owned())),
        }
    }

    /// Rows from `first` on, as a product writes them.
    pub(super) fn outputs(&self, first: usize) -> Outputs<'_> {
        match &self.data {
            Data::Half(data) => Matrix { data: data.slice(..), stride: self.stride }.from_row(first).into(),
            Data::Single(data) => Matrix { data: data.slice(..), stride: self.stride }.from_row(first).into(),
        }
    }

    /// The elements of a buffer of logits.
    pub(super) fn logits(&self) -> Result<DeviceSlice<'_, f32>, CudaError> {
        match &self.data {
            Data::Single(data) => Ok(data.slice(..)),
            Data::Half(_) => Err(CudaError::Shape("activations in the place of logits".to_owned())),
        }
    }
}

/// Keys and values of all blocks, `[pages, kv_heads, 16, head_dim]` each.
#[derive(Debug)]
pub struct KvCache {
    blocks: Vec<[DeviceBuffer<Half>; 2]>,
}

impl KvCache {
    pub(super) fn new(
        device: &Arc<Device>,
        blocks: usize,
        pages: usize,
        shape: AttentionShape,
    ) -> Result<Self, CudaError> {
        let len = pages * shape.kv_heads * PAGE * shape.head_dim;
        let half = || DeviceBuffer::new(device, len, "the KV cache");
        let blocks = (0..blocks).map(|_| Ok([half()?, half()?])).collect::<Result<_, CudaError>>()?;
        Ok(Self { blocks })
    }

    /// Keys and values of a block.
    pub(super) fn block(&self, block: usize) -> [DeviceSlice<'_, Half>; 2] {
        self.blocks[block].each_ref().map(|half| half.slice(..))
    }
}
