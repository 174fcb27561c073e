//! Evaluation: what adapters answer to the questions of data sets, and how good that is.
//!
//! Whatever is to be known goes to one engine at once, for any number of adapters and data sets: a greedy request for
//! every question and, where the loss is wanted, one for every sample's own tokens. An answer is a request's, and so
//! the same alone and among others. A request that fails counts as a wrong answer and is counted; the others go on.

mod labels;
mod scores;

use std::collections::BTreeMap;

use super::data::{Sample, Target, final_answer};
use crate::adapter::StoreError;
use crate::engine::request::{Completion, Request, TokenLogprobs};
use crate::engine::{Engine, EngineError, Stream};

pub use labels::Labels;
pub use scores::{GroupScores, Scores, score, word_f1};

/// An adapter and what it is evaluated on.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// `None` is the base alone.
    pub adapter: Option<&'a str>,
    pub samples: &'a [Sample],
    /// The answers that are classes; empty where answers are free text.
    pub classes: &'a BTreeMap<String, usize>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measures {
    /// Most tokens of an answer; 0 asks no questions.
    pub max_tokens: usize,
    /// Whether the loss of every sample is computed.
    pub loss: bool,
}

/// The answer to a question as [`final_answer`] gives it, or why there is none.
pub type Answer = Result<String, String>;

/// The scores of each subject, in order; `on_done` is called after each request. All requests run as one batch.
///
/// # Errors
/// When an adapter is not loaded, or the engine stops.
pub fn evaluate(
    engine: &Engine,
    subjects: &[Subject<'_>],
    measures: Measures,
    mut on_done: impl FnMut(),
) -> Result<Vec<Scores>, EngineError> {
    check_adapters(engine, subjects)?;
    let mut running = Vec::with_capacity(subjects.len());
    for subject in subjects {
        let questions = ask(engine, subject, measures.max_tokens)?;
        let losses = if measures.loss { ask_losses(engine, subject)? } else { Vec::new() };
        running.push((questions, losses));
    }
    let mut all = Vec::with_capacity(subjects.len());
    for (subject, (questions, losses)) in subjects.iter().zip(running) {
        let mut scores = score(subject.samples, &collect(questions, &mut on_done)?, subject.classes);
        let mut sum = LossSum::default();
        for (sample, running) in subject.samples.iter().zip(losses) {
            match finish(running, &mut on_done)? {
                Ok(completion) => {
                    sum.add(&sample.targets, completion.prompt_logprobs.as_deref().unwrap_or_default());
                }
                Err(_) => scores.failed += 1,
            }
        }
        scores.loss = sum.mean();
        scores.perplexity = scores.loss.map(f64::exp);
        all.push(scores);
    }
    Ok(all)
}

/// How many requests [`evaluate`] makes.
pub fn requests(subjects: &[Subject<'_>], measures: Measures) -> usize {
    let asked = |subject: &Subject<'_>| match measures.max_tokens {
        0 => 0,
        _ => subject.samples.iter().filter(|sample| sample.question.is_some()).count(),
    };
    let losses = |subject: &Subject<'_>| if measures.loss { subject.samples.len() } else { 0 };
    subjects.iter().map(|subject| asked(subject) + losses(subject)).sum()
}

/// The greedy answers to each subject's questions, sample by sample, `None` where a sample has no question. All are asked
/// at once.
///
/// # Errors
/// When an adapter is not loaded, or the engine stops.
pub fn answer(
    engine: &Engine,
    subjects: &[Subject<'_>],
    max_tokens: usize,
) -> Result<Vec<Vec<Option<Answer>>>, EngineError> {
    check_adapters(engine, subjects)?;
    let asked = subjects.iter().map(|subject| ask(engine, subject, max_tokens));
    let asked: Vec<_> = asked.collect::<Result<_, _>>()?;
    asked.into_iter().map(|questions| collect(questions, &mut || ())).collect()
}

fn check_adapters(engine: &Engine, subjects: &[Subject<'_>]) -> Result<(), EngineError> {
    let mut named = subjects.iter().filter_map(|subject| subject.adapter);
    match named.find(|name| !engine.has_adapter(name)) {
        Some(absent) => Err(StoreError::Unknown(absent.to_owned()).into()),
        None => Ok(()),
    }
}

/// A request on its way, or why it could not be made.
type Running = Result<Stream, EngineError>;

fn submit(engine: &Engine, adapter: Option<&str>, mut request: Request) -> Result<Running, EngineError> {
    request.adapters = adapter.map(|name| (name.to_owned(), 1.0)).into_iter().collect();
    request.sampling.temperature = 0.0;
    fatal_apart(engine.submit(request))
}

fn ask(
    engine: &Engine,
    subject: &Subject<'_>,
    max_tokens: usize,
) -> Result<Vec<Option<Running>>, EngineError> {
    let ask_one = |sample: &Sample| {
        let Some(question) = sample.question.as_ref().filter(|_| max_tokens > 0) else { return Ok(None) };
        let mut request = Request::new(question.tokens.clone());
        request.stop.max_tokens = Some(max_tokens);
        submit(engine, subject.adapter, request).map(Some)
    };
    subject.samples.iter().map(ask_one).collect()
}

/// Asks for the log-probabilities of the samples' own tokens. The one token that is generated is of no interest.
fn ask_losses(engine: &Engine, subject: &Subject<'_>) -> Result<Vec<Running>, EngineError> {
    let ask_one = |sample: &Sample| {
        let mut request = Request::new(sample.tokens.clone());
        request.stop.max_tokens = Some(1);
        request.prompt_logprobs = Some(0);
        submit(engine, subject.adapter, request)
    };
    subject.samples.iter().map(ask_one).collect()
}

fn collect(
    questions: Vec<Option<Running>>,
    on_done: &mut impl FnMut(),
) -> Result<Vec<Option<Answer>>, EngineError> {
    let mut wait = |running: Option<Running>| {
        let Some(running) = running else { return Ok(None) };
        let finished = finish(running, on_done)?;
        let text = |completion: Completion| completion.choices.into_iter().next().map(|choice| choice.text);
        Ok(Some(finished.map(|completion| final_answer(&text(completion).unwrap_or_default()).to_owned())))
    };
    questions.into_iter().map(&mut wait).collect()
}

fn finish(running: Running, on_done: &mut impl FnMut()) -> Result<Result<Completion, String>, EngineError> {
    let finished = running.and_then(Stream::wait);
    on_done();
    Ok(fatal_apart(finished)?.map_err(|error| error.to_string()))
}

/// A request's own failure, apart from the engine's end.
fn fatal_apart<T>(result: Result<T, EngineError>) -> Result<Result<T, EngineError>, EngineError> {
    match result {
        Err(EngineError::Stopped) => Err(EngineError::Stopped),
        other => Ok(other),
    }
}

/// The negative log-probability of targets, summed.
#[derive(Default)]
struct LossSum {
    sum: f64,
    targets: usize,
    /// A target was not the sample's own next token, of which alone the engine tells.
    is_unknown: bool,
}

impl LossSum {
    /// Adds a sample's targets; entry `i` of `logprobs` is of its token `i`.
    fn add(&mut self, targets: &[Target], logprobs: &[Option<TokenLogprobs>]) {
        for target in targets {
            match logprobs.get(target.row as usize + 1) {
                Some(Some(found)) if found.token == target.token => {
                    self.sum -= f64::from(found.logprob);
                    self.targets += 1;
                }
                _ => self.is_unknown = true,
            }
        }
    }

    /// Over all targets.
    fn mean(&self) -> Option<f64> {
        (self.targets > 0 && !self.is_unknown).then(|| self.sum / self.targets as f64)
    }
}
