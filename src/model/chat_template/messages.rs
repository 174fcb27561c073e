//! Chat messages as templates expect them.
//!
//! Requests carry `content` as a string or as a list of parts, `null` for absent fields, and a tool call's arguments
//! as JSON text. Templates are written against one of the two content forms, crash on `null`, and read arguments as
//! an object. The same normalisation as in transformers and vLLM stands between the two.

use serde_json::{Map, Value, json};

use super::ChatTemplateError;

/// Which form of `content` a template can render.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentFormat {
    /// Strings only: lists of parts are joined with newlines.
    Text,
    /// Lists only: strings become a list of one part.
    Parts,
    /// Both; content is passed as it came.
    Any,
}

impl ContentFormat {
    /// Finds the form by rendering a message in both.
    pub fn probe(render: impl Fn(Value) -> Option<String>) -> Self {
        const TEXT: &str = "content-probe";
        let shows = |content: Value| {
            render(json!([{ "role": "user", "content": content }]))
                // A template that prints the list itself shows its keys as well.
                .is_some_and(|text| {
                    text.contains(TEXT) && !text.contains("'text'") && !text.contains("\"text\"")
                })
        };
        match (shows(json!(TEXT)), shows(json!([{ "type": "text", "text": TEXT }]))) {
            (true, true) => Self::Any,
            (false, true) => Self::Parts,
            (_, false) => Self::Text,
        }
    }
}

/// Names a message's reasoning goes by; templates read the first, or the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Checks and normalises messages for a template.
pub(super) fn prepare(messages: &Value, format: ContentFormat) -> Result<Value, ChatTemplateError> {
    let wrong = |field: String, found: &Value, wanted| ChatTemplateError::Message {
        field,
        found: kind(found),
        wanted,
    };
    let list = messages
        .as_array()
        .filter(|list| !list.is_empty())
        .ok_or_else(|| wrong("messages".to_owned(), messages, "a list of at least one message"))?;
    let mut prepared = Vec::with_capacity(list.len());
    for (index, message) in list.iter().enumerate() {
        let at = |field: &str| format!("messages[{index}]{field}");
        let Value::Object(message) = message else {
            return Err(wrong(at(""), message, "an object with `role` and `content`"));
        };
        let role = message.get("role").unwrap_or(&Value::Null);
        if !role.is_string() {
            return Err(wrong(at(".role"), role, "a string"));
        }
        let mut fields = Map::new();
        for (key, value) in message {
            let value = match key.as_str() {
                _ if value.is_null() => continue,
                "content" => content(value, format, &at(".content"))?,
                "tool_calls" => tool_calls(value, &at(".tool_calls"))?,
                _ => value.clone(),
            };
            fields.insert(key.clone(), value);
        }
        if let Some(reasoning) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
            fields.entry("thinking").or_insert_with(|| reasoning.clone());
            fields.insert(REASONING[0].to_owned(), reasoning);
        }
        prepared.push(Value::Object(fields));
    }
    Ok(Value::Array(prepared))
}

fn content(value: &Value, format: ContentFormat, field: &str) -> Result<Value, ChatTemplateError> {
    let wrong = |field: String, found: &Value, wanted| ChatTemplateError::Message {
        field,
        found: kind(found),
        wanted,
    };
    match value {
        Value::String(_) if format == ContentFormat::Parts => Ok(json!([{ "type": "text", "text": value }])),
        Value::String(_) => Ok(value.clone()),
        Value::Array(parts) => {
            let mut texts = Vec::with_capacity(parts.len());
            for (index, part) in parts.iter().enumerate() {
                let at = |key: &str| format!("{field}[{index}]{key}");
                if let Value::String(text) = part {
                    texts.push(text.as_str());
                    continue;
                }
                let key = match part.get("type") {
                    None => "text",
                    Some(Value::String(kind)) => match kind.as_str() {
                        "text" | "input_text" | "output_text" => "text",
                        "refusal" => "refusal",
                        _ => {
                            return Err(wrong(
                                at(".type"),
                                &part["type"],
                                "`text` (the model reads text only)",
                            ));
                        }
                    },
                    Some(other) => return Err(wrong(at(".type"), other, "a string")),
                };
                match part.get(key) {
                    Some(Value::String(text)) => texts.push(text),
                    other => {
                        return Err(wrong(at(&format!(".{key}")), other.unwrap_or(&Value::Null), "a string"));
                    }
                }
            }
            Ok(match format {
                ContentFormat::Text => Value::String(texts.join("\n")),
                ContentFormat::Parts | ContentFormat::Any => {
                    texts.into_iter().map(|text| json!({ "type": "text", "text": text })).collect()
                }
            })
        }
        other => Err(wrong(field.to_owned(), other, "a string or a list of text parts")),
    }
}

/// Turns each call's arguments from JSON text into the object that templates read.
fn tool_calls(value: &Value, field: &str) -> Result<Value, ChatTemplateError> {
    let wrong = |field: String, found: &Value, wanted| ChatTemplateError::Message {
        field,
        found: kind(found),
        wanted,
    };
    let Value::Array(calls) = value else {
        return Err(wrong(field.to_owned(), value, "a list of tool calls"));
    };
    let mut calls = calls.clone();
    for (index, call) in calls.iter_mut().enumerate() {
        let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments"))
        else {
            continue;
        };
        if let Value::String(text) = &*arguments {
            let parsed = if text.trim().is_empty() { Ok(json!({})) } else { serde_json::from_str(text) };
            match parsed {
                Ok(object @ Value::Object(_)) => *arguments = object,
                _ => {
                    let field = format!("{field}[{index}].function.arguments");
                    return Err(wrong(field, arguments, "a JSON object, or one as text"));
                }
            }
        }
    }
    Ok(Value::Array(calls))
}

/// Bytes of text in a value: the part of a render's work that its input asks for.
pub(super) fn size(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(|item| 8 + size(item)).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| 8 + key.len() as u64 + size(value)).sum(),
        _ => 8,
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "missing".to_owned(),
        Value::Array(items) if items.is_empty() => "empty".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.chars().count() > 60 => "a long string".to_owned(),
        other => other.to_string(),
    }
}
