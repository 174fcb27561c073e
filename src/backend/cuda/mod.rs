//! The CUDA backend.

mod images;
pub mod params;
