//! loramux runs one frozen base model and many LoRA adapters in one batch.

pub mod adapter;
pub mod backend;
pub mod engine;
pub mod format;
pub mod mixture;
pub mod model;
pub mod openai;
pub mod tensor;
