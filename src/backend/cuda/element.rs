//! The 16-bit type of weights, adapters, activations and the cache on a device. There is one set of kernels for each.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use super::{CudaError, Device, Kernel};
use crate::tensor::{DType, Tensor};

/// Sixteen bits in device memory: a number to who knows its [`Element`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Half(pub u16);

impl Half {
    /// Zero in either type.
    pub const ZERO: Self = Self(0);
}

/// What the bits of a [`Half`] mean.
///
/// Sums are fp32 in both. fp16 has three bits more of precision than bf16, and ends at 65504: activations of a model that
/// was not trained in it can become infinite there, which shows as logits that are not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Bf16,
    F16,
}

impl Element {
    /// The one of this name, if it has 16 bits.
    pub fn from_dtype(dtype: DType) -> Option<Self> {
        match dtype {
            DType::BF16 => Some(Self::Bf16),
            DType::F16 => Some(Self::F16),
            DType::F32 => None,
        }
    }

    /// The type that tensors on the host call the same.
    pub fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// The nearest value, ties to even; infinite where it is too large.
    pub fn round(self, value: f32) -> Half {
        Half(match self {
            Self::Bf16 => bf16::from_f32(value).to_bits(),
            Self::F16 => f16::from_f32(value).to_bits(),
        })
    }

    /// Exact.
    pub fn to_f32(self, Half(bits): Half) -> f32 {
        match self {
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
            Self::F16 => f16::from_bits(bits).to_f32(),
        }
    }

    /// The values of a tensor in row-major order: the bits that are stored where it has this type, else rounded.
    ///
    /// # Errors
    /// [`CudaError::Overflow`] when a finite value is too large for the type; `what` is in the message.
    pub fn values_of(self, tensor: &Tensor, what: &str) -> Result<Vec<Half>, CudaError> {
        if tensor.dtype() == self.dtype() {
            let (pairs, _) = tensor.bytes().as_chunks();
            return Ok(pairs.iter().map(|&pair| Half(u16::from_le_bytes(pair))).collect());
        }
        let of_value = |value: f32| {
            let rounded = self.round(value);
            if value.is_finite() && !self.to_f32(rounded).is_finite() {
                let (what, dtype) = (what.to_owned(), self.dtype());
                return Err(CudaError::Overflow { what, value: value.to_string(), dtype });
            }
            Ok(rounded)
        };
        tensor.to_f32().into_iter().map(of_value).collect()
    }

    /// The kernel of this name for this type.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub fn kernel<P: Pod>(self, device: &Arc<Device>, name: &str) -> Result<Kernel<P>, CudaError> {
        match self {
            Self::Bf16 => device.kernel(name),
            Self::F16 => device.kernel(&format!("{name}_f16")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Bytes;

    #[test]
    fn a_tensor_of_the_same_type_keeps_its_bits_and_others_are_rounded_to_the_nearest() {
        let bits = [0x3c01_u16, 0x0001, 0x7c00, 0xfe12];
        for element in [Element::Bf16, Element::F16] {
            let bytes = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<_>>();
            let stored = Tensor::new(element.dtype(), vec![4], Bytes::new(bytes));
            assert_eq!(element.values_of(&stored, "a weight").unwrap(), bits.map(Half));
        }
        let singles = Tensor::from_f32(vec![3], &[1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 1e-7]);
        let to_f32 = |element: Element| {
            let values = element.values_of(&singles, "a weight").unwrap();
            values.into_iter().map(|value| element.to_f32(value)).collect::<Vec<_>>()
        };
        assert_eq!(to_f32(Element::F16), [1.0, 1.0 + 2.0 / 1024.0, 2.0_f32.powi(-23)]);
        assert_eq!(to_f32(Element::Bf16)[..2], [1.0, 1.0]);
    }

    #[test]
    fn what_is_too_large_for_fp16_is_refused_by_name() {
        let tensor = Tensor::from_f32(vec![2], &[65519.0, -65520.0]);
        let refused = Element::F16.values_of(&tensor, "a weight").unwrap_err().to_string();
        assert!(
            refused.contains("a weight") && refused.contains("-65520") && refused.contains("F16"),
            "{refused}"
        );
        assert!(Element::Bf16.values_of(&tensor, "a weight").is_ok());
        // What was not finite before is for others to judge.
        let tensor = Tensor::from_f32(vec![1], &[f32::INFINITY]);
        assert_eq!(Element::F16.values_of(&tensor, "a weight").unwrap(), [Half(0x7c00)]);
    }
}
