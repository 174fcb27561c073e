//! What the benches on a GPU run, count, predict and note down: of the LoRA kernels here, of whole models in [`model`].

pub mod cases;
pub mod counts;
pub mod device;
pub mod layers;
pub mod model;
pub mod prediction;
pub mod records;
