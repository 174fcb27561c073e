//! The worker: a model on a backend, the resident adapters, and the loop of steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use super::request::{Event, Request};
use super::scheduler::{Pick, Scheduler, StepLimits};
use super::sequence::{EndRules, NewSequence, Progress, Sequence};
use super::{EngineError, EngineOptions, Stats};
use crate::adapter::{Adapter, AdapterStore};
use crate::backend::sampling::{Draw, Drawn};
use crate::backend::{Backend, Rows};
use crate::mixture::Mixture;
use crate::model::{Activations, Base, Transformer};

/// Bytes of logits that a step holds at a time.
const LOGIT_BYTES: usize = 16 << 20;

pub(super) struct Worker<B: Backend> {
    base: Arc<Base>,
    transformer: Transformer<B>,
    cache: B::KvCache,
    activations: Activations<B>,
    adapters: AdapterStore,
    scheduler: Scheduler,
    rules: EndRules,
    seed: u64,
    /// Sequences that were ever added.
    arrived: u64,
    stats: Arc<Stats>,
    step: Step,
}

/// What one step works on, kept so that steady-state steps allocate nothing.
#[derive(Default)]
struct Step {
    rows: Rows,
    picks: Vec<Pick>,
    /// Rows of the picks whose logits are computed together.
    picked: Vec<u32>,
    /// What to do with their logits; empty between steps.
    draws: Vec<Draw<'static>>,
    drawn: Vec<Drawn>,
    ended: Vec<u64>,
}

impl<B: Backend> Worker<B> {
    /// # Errors
    /// When the backend has no room for the weights or the cache.
    pub fn new(
        backend: &B,
        base: &Arc<Base>,
        options: &EngineOptions,
        stats: Arc<Stats>,
    ) -> Result<Self, EngineError> {
        let config = &base.config;
        let max_model_len = options.max_model_len(config);
        let transformer = Transformer::new(backend, config, &base.checkpoint, max_model_len)?;
        let pages = options.pages(config);
        let logit_rows = (LOGIT_BYTES / (config.vocab_size * 4)).clamp(1, options.max_num_batched_tokens);
        let limits = StepLimits {
            sequences: options.max_num_seqs,
            rows: options.max_num_batched_tokens,
            adapters: options.max_loras.unwrap_or(usize::MAX),
        };
        let rules =
            EndRules { end_tokens: config.end_tokens.clone(), max_model_len, vocab_size: config.vocab_size };
        Ok(Self {
            cache: transformer.kv_cache(backend, pages)?,
            activations: transformer.activations(backend, options.max_num_batched_tokens, logit_rows)?,
            transformer,
            adapters: AdapterStore::default(),
            scheduler: Scheduler::new(limits, pages, config.rope.clone()),
            rules,
            seed: options.seed,
            arrived: 0,
            stats,
            step: Step::default(),
            base: Arc::clone(base),
        })
    }

    /// Makes an adapter resident under a name.
    ///
    /// # Errors
    /// When the name is taken or the backend has no room.
    pub fn load_adapter(&mut self, backend: &B, name: &str, adapter: &Adapter) -> Result<(), EngineError> {
        let slot = self.adapters.insert(name, adapter.saved_modules.is_empty())?;
        if let Err(error) = self.transformer.load_adapter(backend, slot, adapter, &self.base.checkpoint) {
            self.adapters.remove(name)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes an adapter's name away; its memory goes with the last request that uses it.
    ///
    /// # Errors
    /// When there is no such adapter.
    pub fn unload_adapter(&mut self, backend: &B, name: &str) -> Result<(), EngineError> {
        if let Some(slot) = self.adapters.remove(name)? {
            self.transformer.unload_adapter(backend, slot);
        }
        Ok(())
    }

    /// Queues all choices of a request. One that cannot run reports its failure.
    pub fn submit(&mut self, request: &Arc<Request>, events: &Sender<Event>, cancelled: &Arc<AtomicBool>) {
        let mixture = match Mixture::fixed(&request.adapters, &self.adapters) {
            Ok(mixture) => mixture,
            Err(error) => {
                // Nobody may be waiting any more; then there is nothing to say.
                events.send(Event::Failed(error.to_string())).ok();
                return;
            }
        };
        let seed = request.sampling.seed.unwrap_or(self.seed.wrapping_add(self.arrived));
        for choice in 0..request.n {
            for slot in mixture.slots() {
                self.adapters.acquire(slot as usize);
            }
            let new = NewSequence {
                id: self.arrived,
                choice,
                mixture: mixture.clone(),
                seed,
                events: events.clone(),
                cancelled: Arc::clone(cancelled),
            };
            self.arrived += 1;
            self.scheduler.push(Sequence::new(new, request, &self.base.tokenizer, &self.rules));
        }
    }

    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Computes one step: the next rows of all sequences that fit, and the tokens they give.
    pub fn step(&mut self, backend: &mut B) {
        self.drop_cancelled(backend);
        let Self { scheduler, step, transformer, cache, activations, rules, stats, .. } = self;
        scheduler.plan(&mut step.rows, &mut step.picks);
        if step.rows.is_empty() {
            return;
        }
        stats.count_step(&step.rows, scheduler);
        transformer.forward(backend, &step.rows, cache, activations);
        for sequence in &mut scheduler.running {
            sequence.computed += sequence.planned;
        }
        step.ended.clear();
        for picks in step.picks.chunks(activations.logit_rows()) {
            step.picked.clear();
            step.picked.extend(picks.iter().map(|pick| pick.row));
            let logits = transformer.logits(backend, &step.rows, &step.picked, activations);
            let mut draws: Vec<Draw<'_>> = std::mem::take(&mut step.draws);
            for (row, pick) in picks.iter().enumerate() {
                draws.push(scheduler.running[pick.sequence].draw(row, pick.prompt_position));
            }
            let sampled = backend.sample(logits, &draws, &mut step.drawn);
            step.draws = emptied(draws);
            if let Err(error) = sampled {
                for sequence in &mut scheduler.running {
                    if !step.ended.contains(&sequence.id) {
                        sequence.fail(error.to_string());
                        step.ended.push(sequence.id);
                    }
                }
                break;
            }
            for (pick, drawn) in picks.iter().zip(step.drawn.drain(..)) {
                let sequence = &mut scheduler.running[pick.sequence];
                if pick.prompt_position.is_some() {
                    sequence.accept_prompt_row(drawn);
                    continue;
                }
                stats.count_token();
                if sequence.accept_row(drawn, rules) == Progress::Ended {
                    step.ended.push(sequence.id);
                }
            }
        }
        if !self.step.ended.is_empty() {
            let ended = std::mem::take(&mut self.step.ended);
            self.retire(backend, |sequence| ended.contains(&sequence.id));
            self.step.ended = ended;
        }
    }

    fn drop_cancelled(&mut self, backend: &B) {
        let mut cancelled = Vec::new();
        self.scheduler.retire(Sequence::is_cancelled, |sequence| cancelled.push(sequence));
        for mut sequence in cancelled {
            sequence.abort();
            self.release(backend, &sequence);
        }
    }

    fn retire(&mut self, backend: &B, leaves: impl Fn(&Sequence) -> bool) {
        let mut left = Vec::new();
        self.scheduler.retire(leaves, |sequence| left.push(sequence));
        for sequence in left {
            self.release(backend, &sequence);
        }
    }

    fn release(&mut self, backend: &B, sequence: &Sequence) {
        for slot in sequence.mixture.slots() {
            if let Some(slot) = self.adapters.release(slot as usize) {
                self.transformer.unload_adapter(backend, slot);
            }
        }
    }
}

/// An empty list in the memory of `draws`, which have ended.
fn emptied(mut draws: Vec<Draw<'_>>) -> Vec<Draw<'static>> {
    draws.clear();
    draws.into_iter().map(|_| unreachable!("the list is empty")).collect()
}

impl Stats {
    fn count_step(&self, rows: &Rows, scheduler: &Scheduler) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows.len() as u64, Ordering::Relaxed);
        self.running.store(scheduler.running.len(), Ordering::Relaxed);
        self.waiting.store(scheduler.waiting(), Ordering::Relaxed);
        self.cache_permille.store((scheduler.cache_usage() * 1000.0) as usize, Ordering::Relaxed);
    }

    fn count_token(&self) {
        self.generated.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::sampling::TokenSource;

    #[test]
    fn a_list_of_draws_keeps_its_memory() {
        let mut draws = Vec::with_capacity(7);
        draws.push(Draw { row: 0, token: TokenSource::Given(0), logprobs: None });
        let start = draws.as_ptr();
        let emptied = emptied(draws);
        assert_eq!((emptied.as_ptr(), emptied.len(), emptied.capacity()), (start.cast(), 0, 7));
    }
}
