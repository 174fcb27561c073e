//! Whole models: what is timed, counted and predicted of their steps.

pub mod cases;
pub mod counts;
pub mod prediction;
pub mod records;
pub mod runner;
