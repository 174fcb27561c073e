//! The CUDA backend.

mod images;
