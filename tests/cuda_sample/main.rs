//! Sampling on the device gives what the CPU backend gives for the same logits: equal tokens, equal errors, equal
//! log-probabilities.
//!
//! Runs on the emulator, under several orders of threads, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

mod cases;
#[path = "../common/cuda_device.rs"]
mod cuda_device;
mod edges;
#[path = "../common/element.rs"]
mod element;
mod harness;
#[path = "../common/random.rs"]
mod random;
mod refusals;

const SEEDS: u64 = 3;
