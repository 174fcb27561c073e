//! A line's keys and values: which format it is, and what it asks to learn.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::Target;
use crate::format::{describe, parse_text, shorten};
use crate::train::config::Format;

/// All formats; where several fit a line, the first counts.
const FORMATS: [Format; 7] = [
    Format::Messages,
    Format::PromptCompletion,
    Format::Alpaca,
    Format::ShareGpt,
    Format::Text,
    Format::Tokens,
    Format::Labelled,
];
/// Keys that a line of any format may have.
const COMMON: [&str; 3] = ["task", "group", "id"];
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// Keys of a message beside its role: all but the weight are for the chat template to read.
const MESSAGE_KEYS: [&str; 9] = [
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
    "weight",
];
/// The label of a token that is not learned.
const IGNORED: i64 = -100;

/// One line, read.
pub(super) struct Record {
    pub content: Content,
    pub task: Option<String>,
    pub group: Option<String>,
}

/// What a line asks to learn.
pub(super) enum Content {
    Conversation { messages: Vec<Message>, tools: Option<Value> },
    Completion { prompt: String, completion: String },
    Text(String),
    Tokens { tokens: Vec<u32>, targets: Vec<Target> },
}

/// A turn of a conversation.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// As the chat template gets it.
    pub fields: Value,
    /// Whether it is to be learned.
    pub taught: bool,
}

impl Message {
    fn new(role: &str, content: String) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), role.into());
        fields.insert("content".to_owned(), content.into());
        Self { fields: Value::Object(fields), taught: role == "assistant" }
    }
}

/// The object that a line holds.
pub(super) fn read_object(line: &[u8]) -> Result<Map<String, Value>, String> {
    let text = std::str::from_utf8(line)
        .map_err(|error| format!("not valid UTF-8 at byte {}", error.valid_up_to() + 1))?;
    match parse_text(text.trim()) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(format!("found {}, wanted a JSON object", describe(&other))),
        // The parser counts lines within this one, so only its column says something.
        Err(error) => {
            Err(format!("not valid JSON: {}", error.to_string().replace(" at line 1 column", ", at column")))
        }
    }
}

/// The format whose keys `object` has.
pub(super) fn recognise(object: &Map<String, Value>) -> Result<Format, String> {
    FORMATS.into_iter().find(|format| fits(object, *format)).ok_or_else(|| {
        let known: Vec<String> = FORMATS.iter().map(|format| listed(required(*format))).collect();
        format!("found {}, wanted those of one format: {}", found(object), known.join("; or "))
    })
}

/// Reads a line's object as one of `format`.
pub(super) fn read_record(
    mut object: Map<String, Value>,
    format: Format,
    vocab_size: usize,
) -> Result<Record, String> {
    if !fits(&object, format) {
        let more = listed(optional(format).iter().chain(&COMMON));
        let wanted = listed(required(format));
        return Err(format!("found {}, wanted {wanted} and no others but {more}", found(&object)));
    }
    let mut take = |key: &str| object.remove(key).unwrap_or_default();
    let content = match format {
        Format::Messages => Content::Conversation {
            messages: messages(take("messages"))?,
            tools: match take("tools") {
                Value::Null => None,
                tools @ Value::Array(_) => Some(tools),
                other => return Err(wrong("tools", &other, "a list of tools")),
            },
        },
        Format::ShareGpt => {
            Content::Conversation { messages: share_gpt(take("conversations"))?, tools: None }
        }
        Format::Alpaca => {
            let mut question = string("instruction", take("instruction"))?;
            match take("input") {
                Value::Null => {}
                input => {
                    let input = string("input", input)?;
                    if !input.is_empty() {
                        let _ = write!(question, "\n\n{input}");
                    }
                }
            }
            let answer = string("output", take("output"))?;
            let messages = vec![Message::new("user", question), Message::new("assistant", answer)];
            Content::Conversation { messages, tools: None }
        }
        Format::PromptCompletion => Content::Completion {
            prompt: string("prompt", take("prompt"))?,
            completion: string("completion", take("completion"))?,
        },
        Format::Text => Content::Text(string("text", take("text"))?),
        Format::Labelled => {
            let (prompt, label) = (string("text", take("text"))?, string("label", take("label"))?);
            if label.trim().is_empty() {
                return Err(wrong("label", &label.into(), "a word"));
            }
            // A word of its own also where the text ends with one.
            let apart = prompt.ends_with(char::is_whitespace) || label.starts_with(char::is_whitespace);
            Content::Completion { prompt, completion: if apart { label } else { format!(" {label}") } }
        }
        Format::Tokens => tokens(take("input_ids"), take("labels"), vocab_size)?,
    };
    let mut tag = |key: &str| match object.remove(key).unwrap_or_default() {
        Value::Null => Ok(None),
        Value::String(text) if !text.is_empty() => Ok(Some(text)),
        other => Err(wrong(key, &other, "a string that is not empty")),
    };
    Ok(Record { content, task: tag("task")?, group: tag("group")? })
}

fn required(format: Format) -> &'static [&'static str] {
    match format {
        Format::Messages => &["messages"],
        Format::PromptCompletion => &["prompt", "completion"],
        Format::Alpaca => &["instruction", "output"],
        Format::ShareGpt => &["conversations"],
        Format::Text => &["text"],
        Format::Tokens => &["input_ids", "labels"],
        Format::Labelled => &["text", "label"],
    }
}

fn optional(format: Format) -> &'static [&'static str] {
    match format {
        Format::Messages => &["tools"],
        Format::Alpaca => &["input"],
        _ => &[],
    }
}

fn fits(object: &Map<String, Value>, format: Format) -> bool {
    let (required, optional) = (required(format), optional(format));
    let known = |key: &str| required.contains(&key) || optional.contains(&key) || COMMON.contains(&key);
    required.iter().all(|key| object.contains_key(*key)) && object.keys().all(|key| known(key))
}

fn listed<'k>(keys: impl IntoIterator<Item = &'k &'k str>) -> String {
    let keys: Vec<String> = keys.into_iter().map(|key| format!("`{key}`")).collect();
    keys.join(", ")
}

/// The keys of a line, for a message.
fn found(object: &Map<String, Value>) -> String {
    let keys: Vec<String> = object.keys().take(8).map(|key| shorten(key)).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    match object.len() {
        0 => "no keys".to_owned(),
        more if more > 8 => format!("keys {} and {} more", listed(&keys), more - 8),
        _ => format!("keys {}", listed(&keys)),
    }
}

fn wrong(place: &str, found: &Value, wanted: &str) -> String {
    format!("found {} for `{place}`, wanted {wanted}", describe(found))
}

fn string(place: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(wrong(place, &other, "a string")),
    }
}

fn list(place: &str, value: Value, wanted: &str) -> Result<Vec<Value>, String> {
    match value {
        Value::Array(elements) if !elements.is_empty() => Ok(elements),
        other => Err(wrong(place, &other, wanted)),
    }
}

/// Messages as OpenAI has them. A `weight` of 0, from its fine-tuning files, leaves an answer out of the loss.
fn messages(value: Value) -> Result<Vec<Message>, String> {
    let messages = list("messages", value, "a list of at least one message")?.into_iter().enumerate();
    messages.map(|(index, message)| read_message(&format!("messages[{index}]"), message)).collect()
}

fn read_message(place: &str, message: Value) -> Result<Message, String> {
    let at = |key: &str| format!("{place}.{key}");
    let Value::Object(mut fields) = message else {
        return Err(wrong(place, &message, "an object with `role` and `content`"));
    };
    let role = match fields.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        other => {
            let found = other.unwrap_or(&Value::Null);
            return Err(wrong(&at("role"), found, &format!("one of {}", ROLES.join(", "))));
        }
    };
    let is_answer = role == "assistant";
    if let Some(key) = fields.keys().find(|key| *key != "role" && !MESSAGE_KEYS.contains(&key.as_str())) {
        let wanted = format!("`role`, {}", listed(&MESSAGE_KEYS));
        return Err(format!("found key `{}` in `{place}`, wanted only {wanted}", shorten(key)));
    }
    let taught = match fields.remove("weight") {
        None | Some(Value::Null) => is_answer,
        Some(weight) if is_answer && (weight == 0 || weight == 1) => weight == 1,
        Some(other) => return Err(wrong(&at("weight"), &other, "0 or 1, and on assistant messages alone")),
    };
    let calls = fields.get("tool_calls").is_some_and(|calls| !calls.is_null());
    match fields.get("content") {
        Some(Value::String(_) | Value::Array(_)) => {}
        None | Some(Value::Null) if calls && is_answer => {}
        other => {
            let found = other.unwrap_or(&Value::Null);
            return Err(wrong(&at("content"), found, "a string or a list of text parts"));
        }
    }
    Ok(Message { fields: Value::Object(fields), taught })
}

/// ShareGPT's turns as messages.
fn share_gpt(value: Value) -> Result<Vec<Message>, String> {
    let turns = list("conversations", value, "a list of at least one turn")?.into_iter().enumerate();
    let read = turns.map(|(index, turn)| {
        let place = format!("conversations[{index}]");
        let mut fields = match turn {
            Value::Object(fields) if fields.keys().all(|key| key == "from" || key == "value") => fields,
            other => return Err(wrong(&place, &other, "an object with `from` and `value`")),
        };
        let mut take = |key: &str| string(&format!("{place}.{key}"), fields.remove(key).unwrap_or_default());
        let from = take("from")?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            "system" => "system",
            "tool" => "tool",
            _ => {
                let wanted = "one of human, user, gpt, assistant, system, tool";
                return Err(wrong(&format!("{place}.from"), &from.into(), wanted));
            }
        };
        Ok(Message::new(role, take("value")?))
    });
    read.collect()
}

/// Token ids with their labels, as transformers has them: logits of row i predict label i + 1.
fn tokens(ids: Value, labels: Value, vocab_size: usize) -> Result<Content, String> {
    let ids = list("input_ids", ids, "a list of token ids")?;
    let labels = list("labels", labels, "a list of token ids and −100")?;
    if ids.len() != labels.len() {
        return Err(format!("found {} `input_ids` and {} `labels`, wanted as many", ids.len(), labels.len()));
    }
    let token = |value: &Value| {
        value.as_u64().filter(|id| *id < vocab_size as u64).and_then(|id| u32::try_from(id).ok())
    };
    let place = |list: &str, index: usize| format!("{list}[{index}]");
    let mut tokens = Vec::with_capacity(ids.len());
    for (index, value) in ids.iter().enumerate() {
        let wanted = || format!("a token id below {vocab_size}");
        tokens.push(token(value).ok_or_else(|| wrong(&place("input_ids", index), value, &wanted()))?);
    }
    let mut targets = Vec::new();
    for (index, value) in labels.iter().enumerate() {
        if value.as_i64() == Some(IGNORED) {
            continue;
        }
        let wanted = || format!("{IGNORED} or a token id below {vocab_size}");
        let token = token(value).ok_or_else(|| wrong(&place("labels", index), value, &wanted()))?;
        // Nothing predicts the first token.
        if let Some(row) = index.checked_sub(1) {
            targets.push(Target { row: row as u32, token });
        }
    }
    Ok(Content::Tokens { tokens, targets })
}
