//! Adapters that move between page-locked memory and the device: what is there, who goes first, and that nobody waits.
//!
//! Runs on the emulator, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

#[path = "../common/cuda_device.rs"]
mod cuda_device;
#[path = "../common/element.rs"]
mod element;
mod fixture;
mod products;
#[path = "../common/random.rs"]
mod random;
mod refusals;
mod residency;
mod staging;
mod steady;
