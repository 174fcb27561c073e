//! The base model: its configuration, weights, tokenizer and forward pass.

mod base;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod detokenizer;
pub mod family;
mod merged;
pub mod rope;
mod sites;
pub mod tokenizer;
pub mod training;
pub mod transformer;

pub use base::{Base, BaseError};
pub use chat_template::{ChatOptions, ChatTemplate, ChatTemplateError};
pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use detokenizer::Detokenizer;
pub use family::Family;
pub use merged::MergedBase;
pub use rope::{RopeConfig, RopeScaling};
pub use sites::{BlockNorms, BlockSites, ModelSites};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use training::{LearningBatch, Recompute, RowTarget, Tape, TapeSize};
pub use transformer::{AdapterLoader, Transformer, Weights, Workspace, WorkspaceSize};

use crate::format::FormatError;

/// Why a base model was refused. Every message says where, what was found and what was wanted.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A field that has no default is absent from a JSON file.
    #[error("{file}: `{field}` is missing; wanted {wanted}")]
    MissingField { file: String, field: String, wanted: String },

    /// A field has the wrong type or is out of range.
    #[error("{file}: `{field}` is {found}; wanted {wanted}")]
    Field { file: String, field: String, found: String, wanted: String },

    /// A well-formed setting that asks for something this crate does not compute.
    #[error("{file}: `{field}` = {found} is not supported: {reason}")]
    Unsupported { file: String, field: String, found: String, reason: String },

    /// The folder's weight files are absent, of another format, or do not belong together.
    #[error("{place}: {problem}")]
    Weights { place: String, problem: String },

    /// The configuration calls for a tensor that the checkpoint lacks.
    #[error("{place}: no tensor `{tensor}`; config.json calls for one of shape {wanted:?}")]
    MissingTensor { place: String, tensor: String, wanted: Vec<usize> },

    /// A tensor's shape is not what the configuration calls for.
    #[error("{place}: tensor `{tensor}` has shape {found:?}; config.json calls for {wanted:?}")]
    Shape { place: String, tensor: String, found: Vec<usize>, wanted: Vec<usize> },

    /// An adapter has something that cannot be trained.
    #[error("the adapter cannot be trained: {problem}")]
    Untrainable { problem: String },

    /// The backend could not take the weights.
    #[error(transparent)]
    Backend(#[from] crate::backend::BackendError),

    /// A file could not be read or is malformed.
    #[error(transparent)]
    Format(#[from] FormatError),
}
