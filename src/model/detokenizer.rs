//! Token ids to text, one token at a time.
//!
//! Each token adds known bytes (see `tokenizer::pieces`), so a pushed token yields every character that its bytes
//! complete, and at most three bytes of an unfinished character wait for the next token. Text that was returned never
//! changes: what the pushes and the final flush return is, put together, what decoding all tokens at once gives.
//! Work per token is proportional to the token's own bytes.
//!
//! A generated text continues its prompt. A decoder that drops the space before the first word has already done so in
//! the prompt, and a character that the prompt's last tokens began is returned whole once it is complete.

use std::str;
use std::sync::Arc;

use crate::model::tokenizer::{InvalidBytes, Tokenizer};

/// Turns one sequence's generated tokens into text.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    decoder: TextDecoder,
}

impl Detokenizer {
    /// A detokenizer for what follows `prompt_ids`; of the prompt itself nothing is returned.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt_ids: &[u32], skip_special_tokens: bool) -> Self {
        let mut decoder = TextDecoder::new(&tokenizer, skip_special_tokens);
        let mut prompt = String::new();
        for &id in prompt_ids {
            decoder.push(&tokenizer, id, &mut prompt);
            prompt.clear();
        }
        decoder.begin_output();
        Self { tokenizer, decoder }
    }

    /// Adds a token and returns the text that is now complete, possibly none.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.decoder.push(&self.tokenizer, id, &mut text);
        text
    }

    /// Ends the text: bytes still waiting for the rest of a character become U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.decoder.finish(&self.tokenizer, &mut text);
        text
    }
}

/// The state of decoding one sequence.
#[derive(Clone)]
pub(super) struct TextDecoder {
    skip_special_tokens: bool,
    /// No token has been decoded yet.
    at_start: bool,
    /// How many characters may still be stripped off the start of the text.
    strip: usize,
    /// Bytes of an unfinished character.
    pending: Vec<u8>,
    /// How many of the pending bytes belong to the prompt.
    prompt_bytes: usize,
}

impl TextDecoder {
    pub fn new(tokenizer: &Tokenizer, skip_special_tokens: bool) -> Self {
        Self {
            skip_special_tokens,
            at_start: true,
            strip: tokenizer.stripped_start().map_or(0, |(_, times)| times),
            pending: Vec::new(),
            prompt_bytes: 0,
        }
    }

    /// Appends to `text` what `id` completes.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, text: &mut String) {
        if self.skip_special_tokens && tokenizer.is_special(id) {
            return;
        }
        if self.at_start {
            let Some(bytes) = tokenizer.first_token_bytes(id) else { return };
            self.pending.extend_from_slice(&bytes);
        } else {
            let Some(bytes) = tokenizer.token_bytes(id) else { return };
            self.pending.extend_from_slice(bytes);
        }
        self.at_start = false;
        self.drain(tokenizer, false, text);
    }

    /// Appends what is still held back.
    pub fn finish(&mut self, tokenizer: &Tokenizer, text: &mut String) {
        self.drain(tokenizer, true, text);
    }

    /// From here on the text is output; bytes of an unfinished character stay the prompt's.
    fn begin_output(&mut self) {
        self.prompt_bytes = self.pending.len();
    }

    fn drain(&mut self, tokenizer: &Tokenizer, last: bool, text: &mut String) {
        let mut done = 0;
        while done < self.pending.len() {
            let rest = &self.pending[done..];
            let (valid, invalid) = match str::from_utf8(rest) {
                Ok(valid) => (valid, 0),
                Err(error) => {
                    let valid = str::from_utf8(&rest[..error.valid_up_to()]).unwrap_or_default();
                    match error.error_len() {
                        Some(length) => (valid, length),
                        None if last => (valid, rest.len() - valid.len()),
                        None => {
                            text.push_str(strip_start(tokenizer, &mut self.strip, valid));
                            done += valid.len();
                            break;
                        }
                    }
                }
            };
            text.push_str(strip_start(tokenizer, &mut self.strip, valid));
            done += valid.len();
            // The prompt's text already shows its own bytes as U+FFFD.
            let shown = done.max(self.prompt_bytes.min(done + invalid));
            let replacements = match tokenizer.invalid_bytes() {
                InvalidBytes::PerByte => done + invalid - shown,
                InvalidBytes::PerSequence => usize::from(done + invalid > shown),
            };
            text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, replacements));
            if invalid > 0 {
                self.strip = 0;
            }
            done += invalid;
        }
        self.pending.drain(..done);
        self.prompt_bytes = self.prompt_bytes.saturating_sub(done);
    }
}

/// What is left of `part`, the next part of the whole text, after the decoder's characters are stripped off the start;
/// of these `left` may still go.
fn strip_start<'a>(tokenizer: &Tokenizer, left: &mut usize, mut part: &'a str) -> &'a str {
    while *left > 0 && !part.is_empty() {
        match tokenizer.stripped_start().and_then(|(stripped, _)| part.strip_prefix(stripped)) {
            Some(rest) => {
                part = rest;
                *left -= 1;
            }
            None => *left = 0,
        }
    }
    part
}

#[cfg(test)]
mod tests;
