//! What the bench of the LoRA kernels runs, counts, predicts and notes down.

pub mod cases;
pub mod counts;
pub mod layers;
pub mod prediction;
pub mod records;
