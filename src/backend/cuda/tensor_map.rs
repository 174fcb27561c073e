//! Tensor maps: what the copy engine of Hopper (TMA) knows of a tensor in memory.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::CudaError;
use super::error::check;

/// Most dimensions.
const MAX_RANK: usize = 5;
/// Most elements of a box along one dimension.
const MAX_BOX: u32 = 256;
/// Addresses, strides and the inner extent of a box are multiples of this many bytes.
const GRANULE: u64 = 16;

/// An element's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapElement {
    /// Bytes: quantised weights.
    U8,
    /// bfloat16.
    Bf16,
    /// Single precision.
    F32,
}

impl MapElement {
    /// Bytes of one.
    pub fn size(self) -> u64 {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// How the 16-byte pieces of a box's inner rows are permuted in shared memory, so that a column of them is read without
/// bank conflicts. Named by the bytes after which the pattern repeats along a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows as they are.
    None,
    /// For rows of 32 bytes.
    Bytes32,
    /// For rows of 64 bytes.
    Bytes64,
    /// For rows of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Most bytes of a box's inner row.
    fn row_bytes(self) -> Option<u64> {
        match self {
            Self::None => None,
            Self::Bytes32 => Some(32),
            Self::Bytes64 => Some(64),
            Self::Bytes128 => Some(128),
        }
    }
}

/// A tensor in device memory and the box that one copy moves. Dimensions are listed from the innermost outwards.
///
/// What a box has outside of the tensor arrives as zeros.
#[derive(Clone, Copy, Debug)]
pub struct TiledTensor<'a> {
    /// Type of an element.
    pub element: MapElement,
    /// Of element 0; a multiple of 16.
    pub address: u64,
    /// Elements along each dimension: `[columns, rows]` for a matrix.
    pub extents: &'a [u64],
    /// Bytes from one index to the next along each dimension but the first, which is contiguous; multiples of 16.
    pub strides: &'a [u64],
    /// Elements of the box along each dimension, at most 256; the inner row a multiple of 16 bytes.
    pub tile: &'a [u32],
    /// Arrangement of the box in shared memory.
    pub swizzle: Swizzle,
}

/// A tensor map as kernels take it: by value, at a 64-byte boundary.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct TensorMap([u64; 16]);

impl TiledTensor<'_> {
    /// Encodes the map. Needs a driver, and a device that has the copy engine to use it on: compute capability 9.0.
    ///
    /// # Errors
    /// [`CudaError::TensorMap`] names the first precondition that does not hold.
    pub fn encode(&self) -> Result<TensorMap, CudaError> {
        self.validate().map_err(CudaError::TensorMap)?;
        use sys::{CUtensorMapDataType as Type, CUtensorMapSwizzle as Pattern};
        let element = match self.element {
            MapElement::U8 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            MapElement::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            MapElement::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match self.swizzle {
            Swizzle::None => Pattern::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes32 => Pattern::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes64 => Pattern::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => Pattern::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: `extents`, `tile` and the element strides have `rank` entries and `strides` one less; the address is
        // only written down.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                element,
                self.extents.len() as u32,
                self.address as *mut c_void,
                self.extents.as_ptr(),
                self.strides.as_ptr(),
                self.tile.as_ptr(),
                [1; MAX_RANK].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(result, || format!("encoding the tensor map {self:?}"))?;
        Ok(TensorMap(map.opaque))
    }

    /// The driver's preconditions: it answers all of them with one code.
    fn validate(&self) -> Result<(), String> {
        let rank = self.extents.len();
        if rank == 0 || rank > MAX_RANK {
            return Err(format!("{rank} dimensions, wanted 1 to {MAX_RANK}"));
        }
        if self.strides.len() != rank - 1 || self.tile.len() != rank {
            let (strides, tile) = (self.strides.len(), self.tile.len());
            return Err(format!(
                "{strides} strides and a box of {tile} dimensions for {rank} extents, wanted {} and {rank}",
                rank - 1
            ));
        }
        if self.address == 0 || !self.address.is_multiple_of(GRANULE) {
            return Err(format!("address {:#x}, wanted a multiple of {GRANULE}", self.address));
        }
        for (dimension, &extent) in self.extents.iter().enumerate() {
            if extent == 0 || extent > 1 << 32 {
                return Err(format!("extent {extent} of dimension {dimension}, wanted 1 to 2^32"));
            }
        }
        for (dimension, &stride) in (1..).zip(self.strides) {
            if !stride.is_multiple_of(GRANULE) || stride >= 1 << 40 {
                return Err(format!(
                    "stride {stride} of dimension {dimension}, wanted a multiple of {GRANULE} bytes below 2^40"
                ));
            }
        }
        for (dimension, &elements) in self.tile.iter().enumerate() {
            if elements == 0 || elements > MAX_BOX {
                return Err(format!(
                    "a box of {elements} along dimension {dimension}, wanted 1 to {MAX_BOX}"
                ));
            }
        }
        let row = u64::from(self.tile[0]) * self.element.size();
        if !row.is_multiple_of(GRANULE) {
            return Err(format!("{row} bytes in a row of the box, wanted a multiple of {GRANULE}"));
        }
        match self.swizzle.row_bytes() {
            Some(most) if row > most => {
                Err(format!("{row} bytes in a row of the box, at most {most} with {:?}", self.swizzle))
            }
            _ => Ok(()),
        }
    }
}
