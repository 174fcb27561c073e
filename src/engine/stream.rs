//! The events of one request, as its caller reads them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use super::EngineError;
use super::request::{Choice, Completion, Event, FinishReason, Request};

/// The events of one request, in order. Ends after the last choice has finished or the request failed; dropping it
/// cancels the request.
pub struct Stream {
    request: Arc<Request>,
    events: Receiver<Event>,
    cancelled: Arc<AtomicBool>,
    /// Choices that have not ended.
    open: usize,
}

impl Stream {
    pub(super) fn new(request: Arc<Request>, events: Receiver<Event>, cancelled: Arc<AtomicBool>) -> Self {
        let open = request.n;
        Self { request, events, cancelled, open }
    }

    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Ends the request early; its choices finish with [`FinishReason::Aborted`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// When the request failed or the engine stopped.
    pub fn wait(mut self) -> Result<Completion, EngineError> {
        let mut choices: Vec<Choice> = (0..self.request.n)
            .map(|index| Choice {
                index,
                token_ids: Vec::new(),
                text: String::new(),
                logprobs: self.request.logprobs.map(|_| Vec::new()),
                finish_reason: FinishReason::Aborted,
            })
            .collect();
        let mut prompt_logprobs = None;
        for event in &mut self {
            match event {
                Event::PromptLogprobs(entries) => prompt_logprobs = Some(entries),
                Event::Token { choice, token, text, logprobs } => {
                    let choice = &mut choices[choice];
                    choice.token_ids.push(token);
                    choice.text.push_str(&text);
                    if let (Some(all), Some(logprobs)) = (&mut choice.logprobs, logprobs) {
                        all.push(logprobs);
                    }
                }
                Event::Finished { choice, text, reason } => {
                    choices[choice].text.push_str(&text);
                    choices[choice].finish_reason = reason;
                }
                Event::Failed(message) => return Err(EngineError::Failed(message)),
            }
        }
        if self.open > 0 {
            return Err(EngineError::Stopped);
        }
        Ok(Completion { prompt_token_ids: self.request.prompt.clone(), prompt_logprobs, choices })
    }
}

impl Iterator for Stream {
    type Item = Event;

    /// Waits for the next event.
    fn next(&mut self) -> Option<Event> {
        if self.open == 0 {
            return None;
        }
        let event = self.events.recv().ok()?;
        match event {
            Event::Finished { .. } => self.open -= 1,
            Event::Failed(_) => {
                self.open = 0;
                self.cancel();
            }
            Event::PromptLogprobs(_) | Event::Token { .. } => {}
        }
        Some(event)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancel();
    }
}
