//! Buffers on the device, and how far from a plain loop in f64 a correct kernel can be.

use std::sync::Arc;

use loramux::backend::cuda::elementwise::{ElementwiseKernels, Matrix, RowCount, StepLimits};
use loramux::backend::cuda::{Device, DeviceBuffer, Half, Stream};

use crate::cuda_device::device;
pub use crate::element::{bits, f};
use crate::element::{element, half_of_smallest, half_ulp};
pub use crate::random::Random;

/// What no kernel writes, no number in either type: where it stays, nobody has written.
pub const UNTOUCHED: Half = Half(0x7fa5);

/// Rows of `width` with something between them, and behind them, that is neither read nor written.
#[derive(Clone)]
pub struct Padded {
    pub width: usize,
    pub stride: usize,
    pub values: Vec<Half>,
}

impl Padded {
    /// `values` `[rows, width]`, and `room` rows that hold nothing.
    pub fn new(values: &[Half], width: usize, stride: usize, room: usize) -> Self {
        let rows = values.len() / width;
        let mut padded = vec![UNTOUCHED; (rows + room) * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(width)) {
            to[..width].copy_from_slice(from);
        }
        Self { width, stride, values: padded }
    }

    pub fn row(&self, row: usize) -> &[Half] {
        &self.values[row * self.stride..][..self.width]
    }

    /// Panics unless everything but the first `rows` rows is untouched.
    pub fn assert_untouched_past(&self, rows: usize) {
        for (i, value) in self.values.iter().enumerate() {
            if i / self.stride >= rows || i % self.stride >= self.width {
                let (row, column) = (i / self.stride, i % self.stride);
                assert_eq!(*value, UNTOUCHED, "row {row}, column {column} of {rows} rows");
            }
        }
    }
}

/// The kernels and a stream for them.
pub struct OnDevice {
    pub stream: Stream,
    pub kernels: ElementwiseKernels,
}

impl OnDevice {
    pub fn new() -> Self {
        let device = device();
        Self {
            stream: device.stream().expect("a stream"),
            kernels: ElementwiseKernels::new(&device, element()).expect("kernels"),
        }
    }

    pub fn device(&self) -> &Arc<Device> {
        self.stream.device()
    }

    pub fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> DeviceBuffer<T> {
        let buffer = DeviceBuffer::new(self.device(), values.len(), "a test").expect("memory");
        self.stream.upload(values, &buffer).expect("a copy");
        buffer
    }

    pub fn download<T: bytemuck::Pod>(&self, buffer: &DeviceBuffer<T>) -> Vec<T> {
        let mut values = vec![T::zeroed(); buffer.len()];
        self.stream.download(buffer, &mut values).expect("a copy");
        values
    }

    /// The `rows` rows that `work` writes, of `width`; it is given room for one more, and launches for that.
    pub fn to_rows(
        &self,
        rows: usize,
        width: usize,
        stride: usize,
        work: impl FnOnce(Matrix<'_>, RowCount<'_>),
    ) -> Padded {
        let mut y = Padded::new(&[], width, stride, rows + 1);
        let buffer = self.upload(&y.values);
        let count = self.upload(&[rows as u32]);
        work(Matrix { data: buffer.slice(..), stride }, count_of(&count, rows));
        y.values = self.download(&buffer);
        y.assert_untouched_past(rows);
        y
    }

    pub fn matrix_of(&self, padded: &Padded) -> (DeviceBuffer<Half>, usize) {
        (self.upload(&padded.values), padded.stride)
    }
}

/// A launch for a row more than the `rows` that `count` holds.
pub fn count_of(count: &DeviceBuffer<u32>, rows: usize) -> RowCount<'_> {
    RowCount { count: count.slice(..), bound: rows + 1, overlap: true }
}

pub fn matrix((buffer, stride): &(DeviceBuffer<Half>, usize)) -> Matrix<'_> {
    Matrix { data: buffer.slice(..), stride: *stride }
}

/// Limits of small steps.
pub fn limits() -> StepLimits {
    StepLimits {
        rows: 300,
        sequences: 8,
        pages: 32,
        picked: 8,
        vocabulary: 40,
        positions: 100,
        rotary_variants: 2,
        cache_pages: 24,
    }
}

/// Panics unless `got` is `wanted`, give or take `error` before it was rounded.
pub fn assert_close(got: Half, wanted: f64, error: f64, what: impl FnOnce() -> String) {
    let bound = error + (wanted.abs() + error) * half_ulp() + half_of_smallest();
    let got = f(got);
    assert!((got - wanted).abs() <= bound + 1e-30, "{}: {got}, wanted {wanted} ± {bound}", what());
}

/// `(width, stride)` of rows that take accesses of 16 bytes, and of rows that do not.
pub const WIDTHS: [(usize, usize); 6] = [(8, 8), (64, 80), (4104, 4112), (64, 67), (1, 3), (2077, 2080)];
/// Rows of a step: none, one, some.
pub const ROWS: [usize; 3] = [0, 1, 5];
