//! The worker: a model on a backend, the resident adapters, and the loop of steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::request::{Event, Request};
use super::scheduler::{Pick, Scheduler, StepLimits};
use super::sequence::{EndRules, NewSequence, Progress, Sequence};
use super::{EngineError, EngineOptions, LaidOut, Stats};
use crate::adapter::AdapterStore;
use crate::backend::sampling::{Draw, Drawn};
use crate::backend::{Backend, BackendError, PAGE, Rows};
use crate::mixture::Mixture;
use crate::model::{AdapterLoader, Base, Transformer, Workspace, WorkspaceSize};

/// How long to wait when nothing can run before an adapter has been copied.
const WAIT_FOR_EXPERTS: Duration = Duration::from_micros(50);

pub(super) struct Worker<B: Backend> {
    base: Arc<Base>,
    transformer: Transformer<B>,
    workspace: Workspace<B>,
    adapters: AdapterStore,
    max_adapters: usize,
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
    /// The next step where it has been planned ahead, and the scheduler's changes until then.
    next_rows: Rows,
    next_picks: Vec<Pick>,
    ahead: Option<u64>,
    /// Rows of the picks whose logits are computed together.
    picked: Vec<u32>,
    /// What to do with their logits; empty between steps.
    draws: Vec<Draw<'static>>,
    drawn: Vec<Drawn>,
    ended: Vec<u64>,
    /// Sequences whose experts there is no room for, and why.
    refused: Vec<(u64, BackendError)>,
}

impl<B: Backend> Worker<B> {
    /// # Errors
    /// When the backend has no room for the weights or the cache.
    pub fn new(
        backend: &mut B,
        base: &Arc<Base>,
        options: &EngineOptions,
        stats: Arc<Stats>,
    ) -> Result<Self, EngineError> {
        let config = &base.config;
        let positions = options.most_positions(config);
        let transformer = Transformer::new(backend, config, &base.checkpoint, positions)?;
        let size = WorkspaceSize {
            rows: options.max_num_batched_tokens,
            sequences: options.max_num_seqs,
            logit_rows: (B::LOGITS_BYTES / (config.vocab_size * 4)).clamp(1, options.max_num_batched_tokens),
        };
        let mut pages = 0;
        let workspace = transformer.workspace(backend, size, |room| {
            pages = options.cache_pages(config, B::CACHE_ELEMENT_BYTES, room)?;
            Ok::<_, EngineError>(pages)
        })?;
        let limits = StepLimits {
            sequences: options.max_num_seqs,
            rows: options.max_num_batched_tokens,
            adapters: options.max_loras.unwrap_or(usize::MAX),
        };
        let rules = EndRules {
            end_tokens: config.end_tokens.clone(),
            max_model_len: positions.min(pages * PAGE),
            vocab_size: config.vocab_size,
        };
        Ok(Self {
            workspace,
            transformer,
            adapters: AdapterStore::default(),
            max_adapters: options.max_cpu_loras.unwrap_or(usize::MAX),
            scheduler: Scheduler::new(limits, pages, config.rope.clone()),
            rules,
            seed: options.seed,
            arrived: 0,
            stats,
            step: Step::default(),
            base: Arc::clone(base),
        })
    }

    /// Most tokens of a prompt and its continuation.
    pub fn max_model_len(&self) -> usize {
        self.rules.max_model_len
    }

    /// What lays adapters out for this worker.
    pub fn loader(&self, backend: &B) -> Result<AdapterLoader<B>, BackendError> {
        self.transformer.loader(backend)
    }

    /// Makes an adapter resident under a name.
    ///
    /// # Errors
    /// When the name is taken or the backend has no room.
    pub fn load_adapter(&mut self, backend: &mut B, name: &str, adapter: LaidOut) -> Result<(), EngineError> {
        if self.adapters.len() >= self.max_adapters {
            return Err(EngineError::Option {
                option: "max-cpu-loras",
                found: self.max_adapters.to_string(),
                wanted: format!("more, to load `{name}` beside the adapters that are loaded"),
            });
        }
        let expert = adapter.expert.downcast::<B::Expert>().expect("laid out for this engine's backend");
        let slot = self.adapters.insert(name, adapter.mixable)?;
        if let Err(error) = self.transformer.insert_adapter(backend, slot, *expert) {
            self.adapters.remove(name)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes an adapter's name away; its memory goes with the last request that uses it.
    ///
    /// # Errors
    /// When there is no such adapter.
    pub fn unload_adapter(&mut self, backend: &mut B, name: &str) -> Result<(), EngineError> {
        if let Some(slot) = self.adapters.remove(name)? {
            self.transformer.unload_adapter(backend, slot)?;
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

    /// Computes one step: the next rows of all sequences that fit, and the tokens they give. When the backend fails, so
    /// do the sequences that were running.
    pub fn step(&mut self, backend: &mut B) {
        self.drop_cancelled(backend);
        let Self { scheduler, step, .. } = self;
        step.refused.clear();
        let begun = step.ahead.take() == Some(scheduler.changes());
        if begun {
            std::mem::swap(&mut step.rows, &mut step.next_rows);
            std::mem::swap(&mut step.picks, &mut step.next_picks);
            scheduler.name_tokens(&mut step.rows);
        } else {
            scheduler.plan(&mut step.rows, &mut step.picks, |id, wanted, kept| {
                backend.bring_experts(wanted, kept).unwrap_or_else(|error| {
                    step.refused.push((id, error));
                    false
                })
            });
        }
        for (id, error) in std::mem::take(&mut self.step.refused) {
            error.end_process_if_lost();
            self.fail(backend, &error, |sequence| sequence.id == id);
        }
        if self.step.rows.is_empty() {
            if !self.is_idle() {
                std::thread::sleep(WAIT_FOR_EXPERTS);
            }
            return;
        }
        let computed = self.compute(backend, begun);
        // Also after an error: what has ended has not failed.
        self.retire_ended(backend);
        if let Err(error) = computed {
            error.end_process_if_lost();
            self.fail(backend, &error, |sequence| sequence.planned > 0);
        }
    }

    /// Runs the planned rows, which may have `begun` already, and hands their tokens to the sequences.
    fn compute(&mut self, backend: &mut B, begun: bool) -> Result<(), BackendError> {
        let Self { scheduler, step, transformer, workspace, rules, stats, .. } = self;
        step.ended.clear();
        stats.count_step(&step.rows, scheduler);
        if begun {
            backend.set_tokens(&step.rows.tokens)?;
        } else {
            backend.begin_step(&step.rows)?;
        }
        transformer.forward(backend, &step.rows, workspace)?;
        for sequence in &mut scheduler.running {
            sequence.computed += sequence.planned;
        }
        for picks in step.picks.chunks(workspace.logit_rows()) {
            step.picked.clear();
            step.picked.extend(picks.iter().map(|pick| pick.row));
            transformer.logits(backend, &step.rows, &step.picked, workspace)?;
            if B::QUEUES {
                // While the device is busy: the tokens of the step before, and the lists of the next.
                scheduler.running.iter_mut().for_each(Sequence::report);
                let ends = |sequence: &Sequence| sequence.ends_with_next(rules);
                if picks.len() == step.picks.len()
                    && scheduler.plan_ahead(&mut step.next_rows, &mut step.next_picks, ends)
                {
                    match backend.begin_step(&step.next_rows) {
                        Ok(()) => step.ahead = Some(scheduler.changes()),
                        // This step is computed all the same, and the next is planned anew.
                        Err(error) => error.end_process_if_lost(),
                    }
                }
            }
            let mut draws: Vec<Draw<'_>> = std::mem::take(&mut step.draws);
            for (row, pick) in picks.iter().enumerate() {
                draws.push(scheduler.running[pick.sequence].draw(row, pick.prompt_position));
            }
            let sampled = backend.sample(workspace.logits(), &draws, &mut step.drawn);
            step.draws = emptied(draws);
            sampled?;
            for (pick, drawn) in picks.iter().zip(step.drawn.drain(..)) {
                let sequence = &mut scheduler.running[pick.sequence];
                if pick.prompt_position.is_some() {
                    sequence.accept_prompt_row(drawn);
                    continue;
                }
                stats.count_token();
                if sequence.accept_row(drawn, rules) == Progress::Ended {
                    step.ended.push(sequence.id);
                } else if !B::QUEUES {
                    sequence.report();
                }
            }
        }
        Ok(())
    }

    /// Lets go of the sequences whose last token has been drawn.
    fn retire_ended(&mut self, backend: &mut B) {
        if !self.step.ended.is_empty() {
            let ended = std::mem::take(&mut self.step.ended);
            self.retire(backend, |sequence| ended.contains(&sequence.id), |_| {});
            self.step.ended = ended;
        }
    }

    fn drop_cancelled(&mut self, backend: &mut B) {
        self.retire(backend, Sequence::is_cancelled, Sequence::abort);
    }

    fn fail(&mut self, backend: &mut B, error: &BackendError, which: impl Fn(&Sequence) -> bool) {
        let message = error.to_string();
        self.retire(backend, which, |sequence| sequence.fail(message.clone()));
    }

    /// Lets go of the sequences that `leaves` is true of, each after a last word.
    fn retire(
        &mut self,
        backend: &mut B,
        leaves: impl Fn(&Sequence) -> bool,
        last_word: impl Fn(&mut Sequence),
    ) {
        let mut left = Vec::new();
        self.scheduler.retire(leaves, |sequence| left.push(sequence));
        for mut sequence in left {
            last_word(&mut sequence);
            for slot in sequence.mixture.slots() {
                if let Some(slot) = self.adapters.release(slot as usize)
                    && let Err(error) = self.transformer.unload_adapter(backend, slot)
                {
                    // Nobody waits for this; what is wrong shows at the next step, unless it is the end.
                    error.end_process_if_lost();
                }
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
