//! One continuation of one request: its tokens, how many of them the cache holds, and how it goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use super::request::{Event, FinishReason, Request, TokenLogprobs};
use super::stop::StopText;
use crate::backend::sampling::{Draw, Drawn, Sampler, TokenSource};
use crate::mixture::Mixture;
use crate::model::{Detokenizer, Tokenizer};

/// What every sequence of an engine ends by.
pub(super) struct EndRules {
    /// The model's end tokens.
    pub end_tokens: Vec<u32>,
    /// Most tokens of prompt and output together.
    pub max_model_len: usize,
    pub vocab_size: usize,
}

pub(super) struct Sequence {
    /// Order of arrival, unique.
    pub id: u64,
    pub request: Arc<Request>,
    pub choice: usize,
    pub mixture: Mixture,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    /// How many of `tokens` have keys and values in `pages`.
    pub computed: usize,
    /// Rows of this sequence in the step being planned.
    pub planned: usize,
    pub pages: Vec<u32>,
    /// Rotary table that `computed` was computed with.
    pub rotary_variant: usize,
    /// Log-probabilities of the prompt's tokens so far; the first token has none.
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    /// The newest token, until it is reported.
    unreported: Option<(u32, Option<TokenLogprobs>)>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stop_text: StopText,
    /// Tokens that may not be drawn before `min_tokens`.
    banned_early: Vec<u32>,
    events: Sender<Event>,
    cancelled: Arc<AtomicBool>,
}

/// Where a sequence stands after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Running,
    Ended,
}

/// The pieces a sequence is made of, besides its request.
pub(super) struct NewSequence {
    pub id: u64,
    pub choice: usize,
    pub mixture: Mixture,
    pub seed: u64,
    pub events: Sender<Event>,
    pub cancelled: Arc<AtomicBool>,
}

impl Sequence {
    pub fn new(
        new: NewSequence,
        request: &Arc<Request>,
        tokenizer: &Arc<Tokenizer>,
        rules: &EndRules,
    ) -> Self {
        let NewSequence { id, choice, mixture, seed, events, cancelled } = new;
        let ends = rules.end_tokens.iter().filter(|_| !request.stop.ignore_eos);
        // Different tokens that can be drawn.
        let room = rules.max_model_len.saturating_sub(request.prompt.len());
        let room = room.min(request.stop.max_tokens.unwrap_or(usize::MAX)).min(rules.vocab_size);
        Self {
            id,
            choice,
            mixture,
            tokens: request.prompt.clone(),
            computed: 0,
            planned: 0,
            pages: Vec::new(),
            rotary_variant: 0,
            prompt_logprobs: Vec::new(),
            unreported: None,
            sampler: Sampler::new(&request.sampling, &request.prompt, seed, choice, room),
            detokenizer: Detokenizer::new(
                Arc::clone(tokenizer),
                &request.prompt,
                request.skip_special_tokens,
            ),
            stop_text: StopText::new(&request.stop.stop),
            banned_early: ends.chain(&request.stop.stop_token_ids).copied().collect(),
            request: Arc::clone(request),
            events,
            cancelled,
        }
    }

    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len()
    }

    /// Tokens whose rows are still to be computed.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether the next token is the last, whatever it is.
    pub fn ends_with_next(&self, rules: &EndRules) -> bool {
        self.is_full(1, rules)
    }

    /// Whether there is no room for more after `coming` further tokens.
    fn is_full(&self, coming: usize, rules: &EndRules) -> bool {
        let most = self.request.stop.max_tokens;
        most.is_some_and(|most| self.generated() + coming >= most)
            || self.tokens.len() + coming >= rules.max_model_len
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Whether the row at `position` gives a log-probability of the prompt that is still to be reported.
    pub fn wants_prompt_logprob(&self, position: usize) -> bool {
        // A sequence that is computed again has reported some or all of them already.
        self.choice == 0
            && self.request.prompt_logprobs.is_some()
            && self.generated() == 0
            && position + 1 < self.prompt_len()
            && position + 1 >= self.prompt_logprobs.len()
    }

    /// What to do with the logits in `row`: those of the prompt's row at `prompt_position`, which tell how likely its
    /// next token was, or those of the newest row, which give the next token.
    pub fn draw(&self, row: usize, prompt_position: Option<usize>) -> Draw<'_> {
        if let Some(position) = prompt_position {
            let token = TokenSource::Given(self.tokens[position + 1]);
            return Draw { row, token, logprobs: Some(self.request.prompt_logprobs.unwrap_or(0)) };
        }
        let position = self.generated();
        let early = position < self.request.stop.min_tokens;
        let banned = if early { self.banned_early.as_slice() } else { &[] };
        let token = TokenSource::Sampler { sampler: &self.sampler, position, banned };
        Draw { row, token, logprobs: self.request.logprobs }
    }

    /// Takes what a row of the prompt gave.
    pub fn accept_prompt_row(&mut self, drawn: Drawn) {
        if self.prompt_logprobs.is_empty() {
            self.prompt_logprobs.push(None);
        }
        self.prompt_logprobs.push(drawn.logprobs);
    }

    /// Takes what the newest row gave, and says whether that token is the last. One that is not, and that no stop string
    /// can end with, is [reported](Self::report) later: the next step need not wait for its text.
    pub fn accept_row(&mut self, drawn: Drawn, rules: &EndRules) -> Progress {
        if self.generated() == 0 && self.choice == 0 && self.request.prompt_logprobs.is_some() {
            if self.prompt_logprobs.is_empty() {
                self.prompt_logprobs.push(None);
            }
            let entries = std::mem::take(&mut self.prompt_logprobs);
            self.send(Event::PromptLogprobs(entries));
        }
        let token = match drawn.token {
            Ok(token) => token,
            Err(error) => {
                self.fail(error.to_string());
                return Progress::Ended;
            }
        };
        self.sampler.record(token);
        self.tokens.push(token);
        let ended = self.ended_by(token, rules);
        self.unreported = Some((token, drawn.logprobs));
        // Only the text tells whether a stop string has appeared.
        if ended.is_some() || !self.request.stop.stop.is_empty() {
            return self.report_token(ended);
        }
        Progress::Running
    }

    /// Why a drawn token is the last, as far as the tokens tell.
    fn ended_by(&self, token: u32, rules: &EndRules) -> Option<FinishReason> {
        let stop = &self.request.stop;
        if rules.end_tokens.contains(&token) && !stop.ignore_eos {
            return Some(FinishReason::EndToken);
        }
        if stop.stop_token_ids.contains(&token) {
            return Some(FinishReason::StopToken(token));
        }
        self.is_full(0, rules).then_some(FinishReason::Length)
    }

    /// Reports the newest token, unless that has been done.
    pub fn report(&mut self) {
        self.report_token(None);
    }

    /// Reports the newest token and, where it is the last, the end.
    fn report_token(&mut self, ended: Option<FinishReason>) -> Progress {
        let Some((token, logprobs)) = self.unreported.take() else { return Progress::Running };
        // Stop strings end nothing before `min_tokens`; the ending token itself gives no text.
        let watch = self.generated() > self.request.stop.min_tokens;
        let mut text = String::new();
        let mut stopped = None;
        if !matches!(ended, Some(FinishReason::EndToken | FinishReason::StopToken(_))) {
            let new = self.detokenizer.push(token);
            if watch {
                (text, stopped) = self.stop_text.push(&new);
            } else {
                text = new;
            }
        }
        let choice = self.choice;
        self.send(Event::Token { choice, token, text, logprobs });
        let matched = stopped.is_some();
        let Some(reason) = stopped.map(FinishReason::StopString).or(ended) else { return Progress::Running };
        let mut text = String::new();
        if !matched {
            let (rest, found) = self.stop_text.push(&self.detokenizer.finish());
            text = rest;
            if found.is_none() {
                text.push_str(&self.stop_text.finish());
            }
        }
        self.send(Event::Finished { choice, text, reason });
        Progress::Ended
    }

    /// Ends the sequence with an error.
    pub fn fail(&mut self, message: String) {
        self.report();
        self.send(Event::Failed(message));
    }

    /// Ends the sequence because nobody waits for it.
    pub fn abort(&mut self) {
        self.report();
        let choice = self.choice;
        self.send(Event::Finished { choice, text: String::new(), reason: FinishReason::Aborted });
    }

    fn send(&mut self, event: Event) {
        if self.events.send(event).is_err() {
            // The receiver is gone: the next step drops the sequence.
            self.cancelled.store(true, Ordering::Relaxed);
        }
    }
}
