//! Activations on the device.

use bytemuck::Pod;

use super::{DeviceSlice, Half};

/// Rows of activations `[rows, stride]`, of which the first elements are used.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T = Half> {
    pub data: DeviceSlice<'a, T>,
    /// Elements from row to row; for the inputs of products a multiple of 8.
    pub stride: usize,
}

impl<'a, T: Pod> Matrix<'a, T> {
    /// The rows from `first` on.
    ///
    /// # Panics
    /// When there are fewer rows.
    pub fn from_row(self, first: usize) -> Self {
        Self { data: self.data.slice(first * self.stride..), stride: self.stride }
    }
}
