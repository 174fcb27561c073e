//! Activations on the device.

use half::bf16;

use super::DeviceSlice;

/// Rows of activations `[rows, stride]`, of which the first elements are used.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T = bf16> {
    pub data: DeviceSlice<'a, T>,
    /// Elements from row to row; for the inputs of products a multiple of 8.
    pub stride: usize,
}
