//! The memory-bound kernels against plain loops in f64, and their promise: a row's bits depend on nothing but the row.
//!
//! Runs on the emulator, under several orders of threads, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

#[path = "../common/cuda_device.rs"]
mod cuda_device;
#[path = "../common/element.rs"]
mod element;
mod embed;
mod harness;
#[path = "../common/random.rs"]
mod random;
mod rope;
mod rows;
mod steps;

const SEEDS: u64 = 3;
