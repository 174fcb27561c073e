//! Which rows run next: continuous batching over a bounded number of sequences, rows and pages.
//!
//! Sequences that generate come first, one row each; then prompts, in pieces where they exceed the step; then waiting
//! sequences join while there is room. When pages run out, the newest sequence gives its own back and waits to be
//! computed again. None of this shows in a result: a row does not depend on the step it runs in.

use std::collections::VecDeque;

use super::pages::PagePool;
use super::sequence::Sequence;
use crate::backend::{PAGE, Rows};
use crate::model::RopeConfig;

/// Bounds of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StepLimits {
    pub sequences: usize,
    pub rows: usize,
    /// Distinct adapters.
    pub adapters: usize,
}

/// A row of the step whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pick {
    pub row: u32,
    /// Index in [`Scheduler::running`].
    pub sequence: usize,
    /// The prompt position that the row scores; `None` when it gives the next token.
    pub prompt_position: Option<usize>,
}

pub(super) struct Scheduler {
    limits: StepLimits,
    rope: RopeConfig,
    pool: PagePool,
    waiting: VecDeque<Sequence>,
    /// In order of arrival.
    pub running: Vec<Sequence>,
    /// Planned sequences in the order of their rows.
    order: Vec<usize>,
    /// Experts of the running sequences, and of the waiting ones that theirs are being brought for; ascending.
    adapters: Vec<u32>,
    reserved: Vec<u32>,
    wanted: Vec<u32>,
    /// How often sequences have come, gone or been thrown out.
    changes: u64,
}

impl Scheduler {
    pub fn new(limits: StepLimits, pages: usize, rope: RopeConfig) -> Self {
        Self {
            limits,
            rope,
            pool: PagePool::new(pages),
            waiting: VecDeque::new(),
            running: Vec::new(),
            order: Vec::new(),
            adapters: Vec::new(),
            reserved: Vec::new(),
            wanted: Vec::new(),
            changes: 0,
        }
    }

    pub fn push(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
        self.changes += u64::from(self.may_admit());
    }

    /// Whether a waiting sequence might join the next step.
    fn may_admit(&self) -> bool {
        !self.waiting.is_empty() && self.running.len() < self.limits.sequences
    }

    /// A number that is another one once sequences have come, gone or been thrown out.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Share of the cache in use, 0 to 1.
    pub fn cache_usage(&self) -> f64 {
        1.0 - self.pool.free() as f64 / self.pool.total().max(1) as f64
    }

    /// Removes every sequence that `leaves` says has ended; `left` is called with each.
    pub fn retire(&mut self, leaves: impl Fn(&Sequence) -> bool, mut left: impl FnMut(Sequence)) {
        let mut index = 0;
        while index < self.running.len() {
            if leaves(&self.running[index]) {
                self.changes += 1;
                let mut sequence = self.running.remove(index);
                self.pool.release(&mut sequence.pages);
                left(sequence);
            } else {
                index += 1;
            }
        }
        // Asked at every step: a long queue that nobody leaves is looked at, not moved.
        if !self.waiting.iter().any(&leaves) {
            return;
        }
        for _ in 0..self.waiting.len() {
            let Some(sequence) = self.waiting.pop_front() else { break };
            if leaves(&sequence) {
                left(sequence);
            } else {
                self.waiting.push_back(sequence);
            }
        }
    }

    /// Plans the next step into `rows` and `picks`.
    ///
    /// A waiting sequence joins once its experts are where steps can use them: `bring(id, wanted, kept)` has those in
    /// `wanted` brought there for the sequence `id`, leaving those in `kept`, and says whether they have arrived.
    pub fn plan(
        &mut self,
        rows: &mut Rows,
        picks: &mut Vec<Pick>,
        bring: impl FnMut(u64, &[u32], &[u32]) -> bool,
    ) {
        let mut budget = self.limits.rows;
        for sequence in &mut self.running {
            sequence.planned = 0;
            restart_if_longer(sequence, &self.rope);
        }
        for decoding in [true, false] {
            let mut index = 0;
            // Looked up anew every time: planning a sequence may send the newest ones back to wait.
            while index < self.running.len() && budget > 0 {
                let sequence = &self.running[index];
                if sequence.planned == 0 && (sequence.remaining() == 1) == decoding {
                    self.plan_running(index, &mut budget);
                }
                index += 1;
            }
        }
        self.admit(&mut budget, bring);
        self.lay_out(rows, picks);
    }

    /// Plans the step after one whose tokens are still being drawn, as far as it can be known: where every sequence draws
    /// one, `ends` says of none that it is the last, and nobody can join. Says whether it has.
    ///
    /// While [`changes`](Self::changes) stays the same that step can run, with the tokens that
    /// [`name_tokens`](Self::name_tokens) puts in.
    pub fn plan_ahead(
        &mut self,
        rows: &mut Rows,
        picks: &mut Vec<Pick>,
        ends: impl Fn(&Sequence) -> bool,
    ) -> bool {
        let all_drawing = self.running.iter().all(|sequence| sequence.remaining() == 0 && !ends(sequence));
        if !all_drawing || self.may_admit() || self.running.len() > self.limits.rows {
            return false;
        }
        for sequence in &mut self.running {
            let length = sequence.tokens.len() + 1;
            if self.rope.variant_for(length) != sequence.rotary_variant
                || !self.pool.grow(&mut sequence.pages, length.div_ceil(PAGE))
            {
                return false;
            }
        }
        for sequence in &mut self.running {
            sequence.planned = 1;
            sequence.tokens.push(0);
        }
        self.lay_out(rows, picks);
        for sequence in &mut self.running {
            sequence.tokens.pop();
        }
        true
    }

    /// Puts the newest token of every sequence into the rows that were planned ahead.
    pub fn name_tokens(&self, rows: &mut Rows) {
        for (row, &index) in rows.tokens.iter_mut().zip(&self.order) {
            *row = *self.running[index].tokens.last().expect("a sequence that runs has tokens");
        }
    }

    /// Plans rows of a running sequence, taking pages from the newest sequences when there are none left.
    fn plan_running(&mut self, index: usize, budget: &mut usize) {
        let count = self.running[index].remaining().min(*budget);
        let wanted = (self.running[index].computed + count).div_ceil(PAGE);
        while !self.pool.grow(&mut self.running[index].pages, wanted) {
            // The oldest sequence always finds room: an engine's cache holds at least one sequence of full length.
            let Some(mut newest) = self.running.pop() else { return };
            self.changes += 1;
            newest.report();
            *budget += newest.planned;
            newest.planned = 0;
            newest.computed = 0;
            self.pool.release(&mut newest.pages);
            self.waiting.push_front(newest);
            if self.running.len() <= index {
                return;
            }
        }
        self.running[index].planned = count;
        *budget -= count;
    }

    /// Lets waiting sequences join, oldest first; one whose adapters exceed the step's bound, or are still on their way,
    /// lets others pass.
    fn admit(&mut self, budget: &mut usize, mut bring: impl FnMut(u64, &[u32], &[u32]) -> bool) {
        self.adapters.clear();
        for sequence in &self.running {
            self.adapters.extend(sequence.mixture.slots());
        }
        sort_and_dedup(&mut self.adapters);
        self.reserved.clone_from(&self.adapters);
        let mut index = 0;
        while index < self.waiting.len() && *budget > 0 && self.running.len() < self.limits.sequences {
            let new = |slot: &u32| self.adapters.binary_search(slot).is_err();
            self.wanted.clear();
            self.wanted.extend(self.waiting[index].mixture.slots().filter(new));
            let added = self.wanted.len();
            // A mixture of more adapters than the bound still runs, alone.
            if added > 0 && !self.adapters.is_empty() && self.adapters.len() + added > self.limits.adapters {
                index += 1;
                continue;
            }
            if added > 0 && !bring(self.waiting[index].id, &self.wanted, &self.reserved) {
                // The next ones must not push out what is being brought for this one.
                self.reserved.extend(&self.wanted);
                sort_and_dedup(&mut self.reserved);
                index += 1;
                continue;
            }
            let count = self.waiting[index].remaining().min(*budget);
            let wanted = count.div_ceil(PAGE);
            if !self.pool.grow(&mut self.waiting[index].pages, wanted) {
                break;
            }
            let Some(mut sequence) = self.waiting.remove(index) else { break };
            restart_if_longer(&mut sequence, &self.rope);
            sequence.planned = count;
            *budget -= count;
            for experts in [&mut self.adapters, &mut self.reserved] {
                experts.extend(sequence.mixture.slots());
                sort_and_dedup(experts);
            }
            let place = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(place, sequence);
        }
    }

    /// Writes the planned rows, sequences with the same experts next to each other.
    fn lay_out(&mut self, rows: &mut Rows, picks: &mut Vec<Pick>) {
        let Self { running, order, .. } = self;
        order.clear();
        order.extend((0..running.len()).filter(|&index| running[index].planned > 0));
        order.sort_unstable_by(|&a, &b| {
            let (a, b) = (&running[a], &running[b]);
            a.mixture.slots().cmp(b.mixture.slots()).then(a.id.cmp(&b.id))
        });
        rows.clear();
        picks.clear();
        for &index in order.iter() {
            let sequence = &running[index];
            let (first, start) = (rows.len(), sequence.computed);
            let end = start + sequence.planned;
            rows.push_sequence(
                &sequence.tokens[start..end],
                start,
                sequence.rotary_variant,
                &sequence.pages,
                sequence.mixture.entries(),
            );
            for position in start..end {
                let newest = position + 1 == sequence.tokens.len();
                if newest || sequence.wants_prompt_logprob(position) {
                    picks.push(Pick {
                        row: (first + position - start) as u32,
                        sequence: index,
                        prompt_position: (!newest).then_some(position),
                    });
                }
            }
        }
    }
}

fn sort_and_dedup(experts: &mut Vec<u32>) {
    experts.sort_unstable();
    experts.dedup();
}

/// Rotary tables that depend on the sequence's length (longrope) change under it when it grows: its keys are then
/// computed anew with the other table, as transformers does.
fn restart_if_longer(sequence: &mut Sequence, rope: &RopeConfig) {
    let variant = rope.variant_for(sequence.tokens.len());
    if variant != sequence.rotary_variant {
        sequence.rotary_variant = variant;
        sequence.computed = 0;
    }
}
