//! Training: many jobs, one adapter each, in one ragged batch on one frozen base.
//!
//! A job's result has the same bits alone and beside any others, in one piece or resumed.

pub mod config;
pub mod data;
pub mod progress;
pub mod report;
pub mod tensorboard;
