//! The CUDA driver, as far as this crate needs it: a thin layer over `cudarc`'s bindings of the driver library.
//!
//! A [`Device`] is a GPU's primary context with this build's kernels loaded. Work goes to its [`Stream`]s, in order on
//! one stream and side by side on several, tied together with [`Event`]s. A [`Kernel`] is launched with one parameter
//! struct by value; addresses inside it are plain numbers, taken from a [`DeviceBuffer`] or an [`Arena`] of them. A
//! sequence of launches that repeats is captured once as a [`Graph`].
//!
//! ```no_run
//! use loramux::backend::cuda::{Device, DeviceBuffer, Kernel, Launch};
//!
//! #[repr(C)]
//! #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
//! struct ScaleParams {
//!     values: u64,
//!     count: u32,
//!     factor: f32,
//! }
//!
//! # fn main() -> Result<(), loramux::backend::cuda::CudaError> {
//! let device = Device::open(0)?;
//! let stream = device.stream()?;
//! let scale: Kernel<ScaleParams> = device.kernel("scale")?;
//! let values = DeviceBuffer::<f32>::new(&device, 1000, "values")?;
//! stream.upload(&[1.0; 1000], &values)?;
//!
//! let params = ScaleParams { values: values.address(), count: 1000, factor: 0.5 };
//! // SAFETY: `values` holds `count` floats and outlives the synchronisation in `download`.
//! unsafe { stream.launch(&scale, &Launch::new([4, 1, 1], 256), &params) }?;
//!
//! let mut host = [0.0; 1000];
//! stream.download(&values, &mut host)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is safe
//!
//! Everything that could touch host memory after its borrow has ended, or device memory that nobody vouches for, is
//! `unsafe`: launches, replays of graphs, and copies that do not wait. Memory on the device is not Rust's: two streams
//! may write to one buffer in any order, and then its numbers are any. Events decide the order.
//!
//! # Errors
//!
//! Every call returns [`CudaError`], which names what was attempted and the driver's code. A driver that is not there is
//! such an error too, never a panic. Nothing that happens in a destructor reaches a later call. After some codes
//! ([`CudaError::is_lost`]) no call of this process can succeed any more: [`CudaError::end_process_if_lost`] is the one
//! place that ends it.

pub mod attention;
mod backend;
mod device;
mod element;
pub mod elementwise;
mod error;
mod event;
pub mod experts;
mod graph;
mod images;
mod launch;
pub mod lora;
mod matrix;
mod memory;
pub mod params;
pub mod sample;
mod stream;
mod tensor_map;
mod trace;

pub use backend::{Buffer, Cuda, GroupId, KvCache, Loader, MemoryOptions, Recorded, StagedAdapter, Weight};
pub use device::{Device, Properties};
pub use element::{Element, Half};
pub use error::{CudaError, LOST_EXIT_CODE, ResultCode};
pub use event::Event;
pub use graph::Graph;
pub use images::BUILT as KERNELS_BUILT;
pub use launch::{Kernel, Launch};
pub use matrix::Matrix;
pub use memory::{Arena, DeviceBuffer, DeviceSlice, Pinned};
pub use stream::Stream;
pub use tensor_map::{MapElement, Swizzle, TensorMap, TiledTensor};
pub use trace::TracedLaunch;
