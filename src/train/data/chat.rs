//! Which tokens of a conversation the assistant says.
//!
//! An answer is what the chat template writes between two renderings: the messages before it with the generation prompt,
//! which is what generation sees, and the same messages with the answer. It ends with the first token at which generation
//! stops, or where there is none with its last character that is no white space. So the loss is on exactly the tokens
//! that the model will have to say: the content, whatever the template puts before it (an empty thought), and the end
//! marker; neither the role's header nor the line break behind the marker.
//!
//! All answers of a conversation are learned in one sample where its text shows each of them as it was asked for. Some
//! templates change earlier turns (dropping their thoughts, or moving the system message): such a conversation becomes
//! a sample for each answer. An answer that opens a conversation is context alone, because nothing asked for it; text
//! behind the last answer is left away, because no target sees it.

use std::ops::Range;

use serde_json::Value;

use super::encode::{Asked, Encoded, Encoder, learned};
use super::formats::Message;
use super::{Question, Sample, final_answer};
use crate::model::ChatOptions;

/// A conversation's turns as the chat template reads them.
struct Conversation<'c> {
    messages: &'c [Message],
    options: ChatOptions,
}

/// One answer, rendered.
struct Turn {
    message: usize,
    /// All that generation sees.
    prompt: String,
    /// The same with the answer.
    answered: String,
}

impl Turn {
    /// What is to be said, without white space behind it.
    fn answer(&self) -> &str {
        let answer = &self.answered[self.prompt.len()..];
        let trimmed = answer.trim_end();
        if trimmed.is_empty() { answer } else { trimmed }
    }
}

impl Encoder<'_> {
    /// The samples of a conversation: none but an empty one where nothing is to be learned.
    pub(super) fn conversation(&self, messages: &[Message], tools: Option<Value>) -> Result<Encoded, String> {
        let conversation =
            Conversation { messages, options: ChatOptions { tools, ..ChatOptions::default() } };
        let answers = (1..messages.len()).filter(|&index| messages[index].taught);
        let turns: Vec<Turn> =
            answers.map(|message| self.turn(&conversation, message)).collect::<Result<_, _>>()?;
        let Some((last, earlier)) = turns.split_last() else {
            // Also what has nothing to learn must be a conversation.
            self.render(&conversation, messages.len(), false)?;
            return Ok(Sample::default().into());
        };
        let asked = self.ask_turn(last)?;
        let spans: Option<Vec<Range<usize>>> =
            earlier.iter().map(|turn| self.span(turn, &last.prompt, &asked)).collect();
        if let Some(spans) = spans {
            return Ok(self.sample(&conversation, last, asked, &spans));
        }
        let mut encoded = Encoded { split: true, ..Encoded::default() };
        for turn in &turns {
            let one = self.sample(&conversation, turn, self.ask_turn(turn)?, &[]);
            encoded.endless |= one.endless;
            encoded.samples.extend(one.samples);
        }
        Ok(encoded)
    }

    fn render(&self, conversation: &Conversation, messages: usize, ask: bool) -> Result<String, String> {
        let messages = conversation.messages[..messages].iter().map(|message| message.fields.clone());
        let options = ChatOptions { add_generation_prompt: ask, ..conversation.options.clone() };
        let template = self.chat_template.unwrap_or(&self.plain_layout);
        template.render(&messages.collect(), &options).map_err(|error| error.to_string())
    }

    fn turn(&self, conversation: &Conversation, message: usize) -> Result<Turn, String> {
        let prompt = self.render(conversation, message, true)?;
        let answered = self.render(conversation, message + 1, false)?;
        if !answered.starts_with(&prompt) {
            return Err(format!(
                "the chat template writes what comes before messages[{message}] differently once it is answered, so \
                 there is no telling which tokens are the answer"
            ));
        }
        Ok(Turn { message, prompt, answered })
    }

    fn ask_turn(&self, turn: &Turn) -> Result<Asked, String> {
        // A chat template writes `<s>` and the like itself.
        self.ask(&turn.prompt, turn.answer(), self.chat_template.is_none())
    }

    /// Bytes of an earlier answer within a later prompt; `None` where that shows it differently.
    fn span(&self, turn: &Turn, prompt: &str, asked: &Asked) -> Option<Range<usize>> {
        if !prompt.starts_with(&turn.prompt) {
            return None;
        }
        let start = turn.prompt.len();
        let same = turn.answered.bytes().zip(prompt.bytes()).take_while(|(a, b)| a == b).count();
        let mut tokens = asked.tokens.iter().zip(&asked.ranges);
        let stop = tokens.find(|(token, range)| {
            range.start >= start && range.end <= same && self.end_tokens.contains(token)
        });
        let end = match stop {
            Some((_, range)) => range.end,
            None if same == turn.answered.len() => start + turn.answer().len(),
            None => return None,
        };
        Some(start..end)
    }

    /// The sample that ends with the answer `turn`, with the answers at `spans` of its prompt.
    fn sample(
        &self,
        conversation: &Conversation,
        turn: &Turn,
        asked: Asked,
        spans: &[Range<usize>],
    ) -> Encoded {
        let Asked { prompt, mut tokens, answer, ranges } = asked;
        let stop = tokens[answer..].iter().position(|token| self.end_tokens.contains(token));
        if let Some(stop) = stop {
            tokens.truncate(answer + stop + 1);
        }
        let said = |index: usize| {
            let shows = |span: &Range<usize>| self.overlaps(tokens[index], &ranges[index], span);
            spans.iter().any(shows)
        };
        let earlier = (0..answer).filter(|&index| said(index));
        let targets = earlier.flat_map(|index| learned(&tokens, index..index + 1));
        let targets = targets.chain(learned(&tokens, answer..tokens.len())).collect();
        let text = text(&conversation.messages[turn.message].fields["content"]);
        let question =
            text.map(|answer| Question { tokens: prompt, answer: final_answer(&answer).to_owned() });
        let sample = Sample { tokens, targets, question, ..Sample::default() };
        Encoded { endless: stop.is_none(), ..sample.into() }
    }
}

/// The text of a message's content; `None` for one that only calls tools.
fn text(content: &Value) -> Option<String> {
    let part = |part: &Value| part.as_str().or(part["text"].as_str()).unwrap_or_default().to_owned();
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => Some(parts.iter().map(part).collect::<Vec<_>>().join("\n")),
        _ => None,
    }
}
