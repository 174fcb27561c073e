//! Answers of adapters in training, through an engine of their own beside the trainer.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::TrainError;
use super::data::Sample;
use super::evaluate::{Measures, Scores, Subject, evaluate};
use crate::adapter::Adapter;
use crate::engine::{Engine, EngineOptions};
use crate::model::Base;

/// Questions to an adapter, and how their answers are read.
pub struct Questions<'a> {
    pub samples: &'a [Sample],
    /// The answers that are classes; empty where answers are free text.
    pub classes: BTreeMap<String, usize>,
}

/// What can ask an adapter questions.
pub trait Answerer {
    /// Scores of the answers to each list of questions, of at most `max_tokens` tokens; no losses.
    ///
    /// # Errors
    /// When there is no room for the adapter, or the engine stops.
    fn scores(
        &self,
        adapter: &Adapter,
        questions: &[Questions<'_>],
        max_tokens: usize,
    ) -> Result<Vec<Scores>, TrainError>;
}

/// An engine for questions.
pub struct EngineAnswerer(Engine);

/// Under which an adapter is loaded for as long as it is asked.
const NAME: &str = "in-training";

impl EngineAnswerer {
    /// Starts the engine, on the CPU.
    ///
    /// # Errors
    /// When it has no room.
    pub fn start(base: Arc<Base>, threads: Option<usize>) -> Result<Self, TrainError> {
        let options = EngineOptions { threads, max_lora_rank: usize::MAX, ..EngineOptions::default() };
        Ok(Self(Engine::start(base, options)?))
    }
}

impl Answerer for EngineAnswerer {
    fn scores(
        &self,
        adapter: &Adapter,
        questions: &[Questions<'_>],
        max_tokens: usize,
    ) -> Result<Vec<Scores>, TrainError> {
        self.0.insert_adapter(NAME, adapter.clone())?;
        let subjects: Vec<Subject<'_>> = (questions.iter())
            .map(|Questions { samples, classes }| Subject { adapter: Some(NAME), samples, classes })
            .collect();
        let scores = evaluate(&self.0, &subjects, Measures { max_tokens, loss: false }, || ());
        self.0.unload_adapter(NAME)?;
        Ok(scores?)
    }
}
