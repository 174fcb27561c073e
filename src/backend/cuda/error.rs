//! What the driver can fail with, and which failures end the process.

use std::fmt;

use cudarc::driver::sys::CUresult;
use thiserror::Error;

use super::images;
use crate::tensor::DType;

/// Exit code of a process whose GPU is lost.
pub const LOST_EXIT_CODE: u8 = 70;

/// A result code of the driver other than success. Shown as its name and number: `CUDA_ERROR_INVALID_VALUE (1)`.
///
/// The name comes from the bindings: asking the driver for it is one more call that a broken driver can fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ResultCode(CUresult);

impl ResultCode {
    /// The number, as in the driver's documentation of `CUresult`.
    pub fn number(self) -> u32 {
        self.0 as u32
    }

    pub(super) fn raw(self) -> CUresult {
        self.0
    }

    /// Whether this code is sticky: every later call on the context returns it again, in this process.
    pub fn is_lost(self) -> bool {
        use CUresult::*;
        matches!(
            self.0,
            CUDA_ERROR_ECC_UNCORRECTABLE
                | CUDA_ERROR_NVLINK_UNCORRECTABLE
                | CUDA_ERROR_CONTAINED
                | CUDA_ERROR_ILLEGAL_ADDRESS
                | CUDA_ERROR_LAUNCH_TIMEOUT
                | CUDA_ERROR_CONTEXT_IS_DESTROYED
                | CUDA_ERROR_ASSERT
                | CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUDA_ERROR_MISALIGNED_ADDRESS
                | CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUDA_ERROR_INVALID_PC
                | CUDA_ERROR_LAUNCH_FAILED
                | CUDA_ERROR_TENSOR_MEMORY_LEAK
                | CUDA_ERROR_MPS_CLIENT_TERMINATED
                | CUDA_ERROR_EXTERNAL_DEVICE
        )
    }
}

impl fmt::Display for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({})", self.0, self.number())
    }
}

impl fmt::Debug for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a GPU did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CudaError {
    /// No library to ask.
    #[error("no CUDA driver: libcuda is not installed or cannot be loaded")]
    NoDriver,
    /// The embedded kernels and some calls need a newer driver. Versions are 1000 · major + 10 · minor.
    #[error(
        "the CUDA driver supports CUDA {}.{}, wanted {}.{} or newer: update it",
        found / 1000, found % 1000 / 10, wanted / 1000, wanted % 1000 / 10
    )]
    DriverTooOld { found: u32, wanted: u32 },
    /// Fewer devices than that.
    #[error("no CUDA device {ordinal}: the driver finds {count}")]
    NoSuchDevice { ordinal: usize, count: usize },
    /// No bf16 tensor cores, no asynchronous copies.
    #[error(
        "{name} has compute capability {}.{}, wanted 8.0 (Ampere) or newer", capability.0, capability.1
    )]
    DeviceTooOld { name: String, capability: (u32, u32) },
    /// A build without nvcc.
    #[error("{}", images::NOT_BUILT)]
    KernelsNotBuilt,
    /// No image of this build runs on this device.
    #[error("none of this build's kernels are for {name}, compute capability {}.{}", capability.0, capability.1)]
    NoKernelsForDevice { name: String, capability: (u32, u32) },
    /// Misspelt, or not in the images that the device was opened with.
    #[error("no kernel is called `{name}`")]
    UnknownKernel { name: String },
    /// The device, or an [`Arena`](super::Arena), has less than that left.
    #[error("out of GPU memory: {wanted} bytes for {purpose}, {available} are left")]
    OutOfMemory { wanted: usize, available: usize, purpose: String },
    /// The two sides of a copy have different lengths, in elements.
    #[error("{operation}: {from} elements into {into}")]
    Length { operation: &'static str, from: usize, into: usize },
    /// Widths, strides or counts that do not fit each other.
    #[error("{0}")]
    Shape(String),
    /// A value that the type of the device's weights and adapters does not hold.
    #[error(
        "{what} has the value {value}, which is too large for {dtype}: run it in BF16 (`--dtype bfloat16`)"
    )]
    Overflow { what: String, value: String, dtype: DType },
    /// An adapter needs more rank chunks than a site has left.
    #[error("no room for an adapter: {wanted} rank chunks wanted, {available} are free")]
    OutOfChunks { wanted: usize, available: usize },
    /// The precondition of a [`TiledTensor`](super::TiledTensor) that does not hold.
    #[error("tensor map: {0}")]
    TensorMap(String),
    /// The driver refuses a launch, or hands over what happened before it.
    #[error(
        "launch of {kernel} (grid {}x{}x{}, block {block}, {shared_bytes} bytes of shared memory): {code}",
        grid[0], grid[1], grid[2]
    )]
    Launch { kernel: String, grid: [u32; 3], block: u32, shared_bytes: u32, code: ResultCode },
    /// Any other call.
    #[error("{operation}: {code}")]
    Driver { operation: String, code: ResultCode },
}

impl CudaError {
    /// The driver's code, where the driver was the one to refuse.
    pub fn code(&self) -> Option<ResultCode> {
        match self {
            Self::Launch { code, .. } | Self::Driver { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether the context is lost: nothing on this device can succeed again in this process.
    pub fn is_lost(&self) -> bool {
        self.code().is_some_and(ResultCode::is_lost)
    }

    /// Ends the process with [`LOST_EXIT_CODE`], after one line on standard error, when the context is lost.
    ///
    /// Whoever gets a [`CudaError`] that is not answered by its caller passes it through here: what is left of a
    /// process without its context can only fail every request.
    pub fn end_process_if_lost(&self) {
        if self.is_lost() {
            eprintln!(
                "error: GPU lost: {self}; faults surface late, with CUDA_LAUNCH_BLOCKING=1 at the launch at fault"
            );
            std::process::exit(LOST_EXIT_CODE.into());
        }
    }
}

/// The result of a driver call. `operation` completes "… failed", and is only asked for when it did.
pub(super) fn check(result: CUresult, operation: impl FnOnce() -> String) -> Result<(), CudaError> {
    match code(result) {
        None => Ok(()),
        Some(code) => Err(CudaError::Driver { operation: operation(), code }),
    }
}

/// The code of a call that failed.
pub(super) fn code(result: CUresult) -> Option<ResultCode> {
    (result != CUresult::CUDA_SUCCESS).then_some(ResultCode(result))
}
