//! Prompts with answers as tokens.
//!
//! A sample begins with the tokens that generation would start from, then come those of the answer. Mostly that is what
//! the whole text encodes to. Where it is not, because a tokenizer merges or splits across the border (a prompt that
//! ends with a space, a line break before a word), the answer is encoded by itself, so that training meets the prompt
//! that generation will meet. A tokenizer that writes a text's beginning differently (a space before the first word)
//! cannot do so; then the text stays whole and the tokens that overlap the answer are the answer's.

use std::ops::Range;

use super::formats::{Content, Record};
use super::{Question, Sample, Target, final_answer};
use crate::model::chat_template::{ChatTemplate, ChatTemplateError};
use crate::model::{Base, Tokenizer};

/// How conversations are written for a base without a chat template. Each answer ends with the end token.
const PLAIN_LAYOUT: &str = "\
{% for message in messages %}\
{% if tools or message.tool_calls %}{{ raise_exception('tools need a chat template, the base has none') }}{% endif %}\
### {{ message.role | capitalize }}:\n{{ message.content }}{{ eos_token if message.role == 'assistant' }}\n\n\
{% endfor %}\
{% if add_generation_prompt %}### Assistant:\n{% endif %}";

/// Makes tokens of what lines say.
pub(super) struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    pub chat_template: Option<&'a ChatTemplate>,
    /// Stands in for a chat template.
    pub plain_layout: ChatTemplate,
    /// Tokens at which generation stops.
    pub end_tokens: &'a [u32],
    pub vocab_size: usize,
}

/// What one line became.
#[derive(Default)]
pub(super) struct Encoded {
    pub samples: Vec<Sample>,
    /// A conversation became a sample for each of its answers.
    pub split: bool,
    /// An answer ends with no token at which generation stops.
    pub endless: bool,
}

/// A prompt and its answer.
pub(super) struct Asked {
    /// What generation starts from.
    pub prompt: Vec<u32>,
    /// The sample.
    pub tokens: Vec<u32>,
    /// Index of the answer's first token.
    pub answer: usize,
    /// Bytes of the prompt's text that the tokens before the answer stand for.
    pub ranges: Vec<Range<usize>>,
}

impl<'a> Encoder<'a> {
    pub fn of(base: &'a Base) -> Result<Self, ChatTemplateError> {
        Self::new(&base.tokenizer, base.chat_template(), &base.config.end_tokens, base.config.vocab_size)
    }

    pub fn new(
        tokenizer: &'a Tokenizer,
        chat_template: Option<&'a ChatTemplate>,
        end_tokens: &'a [u32],
        vocab_size: usize,
    ) -> Result<Self, ChatTemplateError> {
        let plain_layout = ChatTemplate::new(PLAIN_LAYOUT, tokenizer.special_tokens())?;
        Ok(Self { tokenizer, chat_template, plain_layout, end_tokens, vocab_size })
    }

    /// The samples of line number `line`.
    ///
    /// # Errors
    /// Why its text cannot be encoded.
    pub fn encode(&self, line: usize, record: Record) -> Result<Encoded, String> {
        let mut encoded = match record.content {
            Content::Conversation { messages, tools } => self.conversation(&messages, tools)?,
            Content::Completion { prompt, completion } => self.completion(&prompt, &completion)?.into(),
            Content::Text(text) => {
                let mut tokens = self.tokenize(&text)?;
                self.end(&mut tokens);
                let targets = learned(&tokens, 0..tokens.len()).collect();
                Sample { tokens, targets, ..Sample::default() }.into()
            }
            Content::Tokens { tokens, targets } => Sample { tokens, targets, ..Sample::default() }.into(),
        };
        for sample in &mut encoded.samples {
            sample.line = line;
            sample.task.clone_from(&record.task);
            sample.group.clone_from(&record.group);
        }
        Ok(encoded)
    }

    /// `prompt` and the `answer` that follows it. With `special_tokens`, the tokenizer's own are added, as they are to a
    /// plain prompt.
    pub fn ask(&self, prompt: &str, answer: &str, special_tokens: bool) -> Result<Asked, String> {
        let tokenizer = self.tokenizer;
        let encode = |text: &str| {
            tokenizer.encode_with_ranges(text, special_tokens).map_err(|error| error.to_string())
        };
        let (asked, asked_ranges) = encode(prompt)?;
        let (whole, mut ranges) = encode(&format!("{prompt}{answer}"))?;
        if whole.starts_with(&asked) {
            ranges.truncate(asked.len());
            return Ok(Asked { answer: asked.len(), prompt: asked, tokens: whole, ranges });
        }
        let apart = tokenizer.encode(answer, false).map_err(|error| error.to_string())?;
        let joined = [asked.as_slice(), &apart].concat();
        if tokenizer.decode(&joined, false) == tokenizer.decode(&asked, false) + answer {
            return Ok(Asked { answer: asked.len(), prompt: asked, tokens: joined, ranges: asked_ranges });
        }
        let inside = prompt.len()..prompt.len() + answer.len();
        let first = (0..whole.len()).find(|&index| self.overlaps(whole[index], &ranges[index], &inside));
        let first = first.unwrap_or(whole.len());
        ranges.truncate(first);
        Ok(Asked { prompt: asked, tokens: whole, answer: first, ranges })
    }

    /// Whether `token` is part of the text `inside`. A special token that swallows spaces behind itself is not part of
    /// what they belong to.
    pub fn overlaps(&self, token: u32, range: &Range<usize>, inside: &Range<usize>) -> bool {
        let before = range.start < inside.start && self.tokenizer.is_special(token);
        range.start < inside.end && range.end > inside.start && !before
    }

    /// The tokens of a plain text.
    fn tokenize(&self, text: &str) -> Result<Vec<u32>, String> {
        self.tokenizer.encode(text, true).map_err(|error| error.to_string())
    }

    fn completion(&self, prompt: &str, completion: &str) -> Result<Sample, String> {
        let mut asked = self.ask(prompt, completion, true)?;
        self.end(&mut asked.tokens);
        let targets = learned(&asked.tokens, asked.answer..asked.tokens.len()).collect();
        let answer = final_answer(completion).to_owned();
        let question = (!asked.prompt.is_empty()).then_some(Question { tokens: asked.prompt, answer });
        Ok(Sample { tokens: asked.tokens, targets, question, ..Sample::default() })
    }

    /// Adds the end token where there is none yet: the tokenizer's own if generation stops at it, else the first at
    /// which it does.
    fn end(&self, tokens: &mut Vec<u32>) {
        let own = self.tokenizer.eos_token().and_then(|text| self.tokenizer.token_to_id(text));
        let stops = own.filter(|token| self.end_tokens.contains(token));
        let end = stops.or(self.end_tokens.first().copied()).or(own);
        let ended = |last: &u32| self.end_tokens.contains(last) || Some(*last) == end;
        if !tokens.last().is_some_and(ended) {
            tokens.extend(end);
        }
    }
}

/// Targets of the tokens at `indices`; nothing predicts the first of a sample.
pub(super) fn learned(tokens: &[u32], indices: Range<usize>) -> impl Iterator<Item = Target> {
    let indices = indices.start.max(1)..indices.end;
    indices.map(|index| Target { row: index as u32 - 1, token: tokens[index] })
}

impl From<Sample> for Encoded {
    fn from(sample: Sample) -> Self {
        Self { samples: vec![sample], ..Self::default() }
    }
}
