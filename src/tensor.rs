//! Host tensors: a dtype, a shape and shared bytes.
//!
//! A [`Tensor`] is how numbers travel between files, adapters and backends. Its bytes are either a
//! window into a memory-mapped file or a vector; cloning shares them. Values are little-endian and
//! may start at any byte (a safetensors file aligns nothing), so they are read through
//! [`Tensor::to_f32`] or by a backend that loads unaligned.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
        })
    }
}

/// Something that owns bytes for as long as a [`Bytes`] window looks at them.
type Owner = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A shared, immutable window of bytes.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

impl Bytes {
    /// A window over everything `owner` holds (a `Vec<u8>`, a memory map).
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        let range = 0..owner.as_ref().len();
        Self { owner: Arc::new(owner), range }
    }

    /// A narrower window, relative to this one.
    ///
    /// # Panics
    /// When `range` leaves this window.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len(), "slice outside its bytes");
        Self {
            owner: Arc::clone(&self.owner),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

/// A dense row-major tensor on the host.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Bytes,
}

impl Tensor {
    /// # Panics
    /// When `bytes` is not exactly `shape` elements of `dtype`.
    pub fn new(dtype: DType, shape: Vec<usize>, bytes: Bytes) -> Self {
        let elements: usize = shape.iter().product();
        assert_eq!(bytes.len(), elements * dtype.size(), "bytes do not fill shape {shape:?}");
        Self { dtype, shape, bytes }
    }

    /// An owned F32 tensor.
    ///
    /// # Panics
    /// When `values` does not fill `shape`.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        Self::new(DType::F32, shape, Bytes::new(bytemuck::cast_slice(values).to_vec()))
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Raw little-endian bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Every element as f32, in row-major order (exact for all stored dtypes).
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.elements(f32::from_le_bytes),
            DType::F16 => self.elements(|b| half::f16::from_le_bytes(b).to_f32()),
            DType::BF16 => self.elements(|b| half::bf16::from_le_bytes(b).to_f32()),
        }
    }

    fn elements<const SIZE: usize>(&self, read: impl Fn([u8; SIZE]) -> f32) -> Vec<f32> {
        self.bytes.as_chunks::<SIZE>().0.iter().map(|&bytes| read(bytes)).collect()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype, self.shape)
    }
}
