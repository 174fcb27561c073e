//! Training: many jobs, one adapter each, in one ragged batch on one frozen base.
//!
//! A job's result has the same bits alone and beside any others, in one piece or resumed.

pub mod answer;
pub mod balance;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod evaluate;
pub mod folder;
mod identity;
pub mod job;
pub mod metrics;
pub mod plan;
mod prepare;
pub mod progress;
pub mod report;
pub mod run;
pub mod sampling;
mod schedule;
pub mod tensorboard;
pub mod trainer;

use std::path::PathBuf;

use data::DataError;
use report::ReportError;
use sampling::SamplingError;

use crate::adapter::FreshError;
use crate::adapter::peft::AdapterError;
use crate::backend::BackendError;
use crate::engine::EngineError;
use crate::format::FormatError;
use crate::model::{BaseError, ModelError};

/// What training can fail with.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Base(#[from] BaseError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No job can start: the first of them, and why.
    #[error("job `{job}`: {source}")]
    Refused { job: String, source: Box<TrainError> },
    /// A fresh adapter that this base has no place for.
    #[error(transparent)]
    Fresh(#[from] FreshError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error("{}: there are results in it: continue them with --resume or replace them with --force", folder.display())]
    Exists { folder: PathBuf },
    #[error("{}: another run is writing there", folder.display())]
    Busy { folder: PathBuf },
    /// Something that decides the result is not as it was when the job began.
    #[error("{}: {found} another configuration's: {what}; change it back, or replace the results with --force", folder.display())]
    Changed { folder: PathBuf, found: &'static str, what: String },
    /// A file is not as this program wrote it.
    #[error("{}: damaged: {problem}; put back a copy, or remove {} and the job starts anew", path.display(), remove.display())]
    Damaged { path: PathBuf, problem: String, remove: PathBuf },
}
