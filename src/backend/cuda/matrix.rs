//! Activations on the device.

use half::bf16;

use super::DeviceSlice;

/// Rows of activations `[rows, stride]`, of which the first elements are used.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub data: DeviceSlice<'a, bf16>,
    /// Elements from row to row; for products a multiple of 8.
    pub stride: usize,
}
