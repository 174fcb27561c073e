//! The `messages` of a chat: checked, and brought into the form that chat templates read.
//!
//! As vLLM does for text models, a list of text parts becomes one string with a line break between parts, and the
//! arguments of a tool call, which the protocol sends as a string of JSON, become an object.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{describe, shorten};
use crate::format::parse_text;

const PARAM: &str = "messages";

/// What a message may hold beside `role` and `content`. All but the tool calls are for templates to read.
const OPTIONAL_TEXT: [&str; 5] = ["name", "tool_call_id", "reasoning_content", "reasoning", "refusal"];

fn refuse(message: String) -> ApiError {
    ApiError::bad_request(PARAM, message)
}

/// The messages as a chat template gets them.
///
/// # Errors
/// 400 naming the message's index and field.
pub(super) fn normalise(messages: &[Value]) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(refuse("`messages` is empty; give at least one message".to_owned()));
    }
    messages.iter().enumerate().map(|(index, message)| normalise_one(index, message)).collect()
}

/// The text of a normalised message.
pub(super) fn content(message: &Value) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or_default()
}

/// Whether a normalised message was spoken by the model.
pub(super) fn is_assistant(message: &Value) -> bool {
    message.get("role").and_then(Value::as_str) == Some("assistant")
}

fn normalise_one(index: usize, message: &Value) -> Result<Value, ApiError> {
    let place = format!("messages[{index}]");
    let fields = message
        .as_object()
        .ok_or_else(|| refuse(format!("`{place}` must be an object, got {}", describe(message))))?;
    let role = match fields.get("role") {
        Some(Value::String(role)) if !role.is_empty() => role.as_str(),
        Some(other) => {
            return Err(refuse(format!("`{place}.role` must be a role's name, got {}", describe(other))));
        }
        None => return Err(refuse(format!("`{place}` has no `role`"))),
    };
    let mut normal = Map::new();
    let mut tool_calls = None;
    for (key, value) in fields {
        match key.as_str() {
            "role" => {
                normal.insert(key.clone(), value.clone());
            }
            "content" => {
                if !value.is_null() {
                    normal.insert(key.clone(), Value::String(join_content(&place, value)?));
                }
            }
            "tool_calls" if value.is_null() => {}
            "tool_calls" => {
                let calls = normalise_tool_calls(&place, role, value)?;
                tool_calls = (!calls.is_empty()).then_some(calls);
            }
            name if OPTIONAL_TEXT.contains(&name) => match value {
                Value::Null => {}
                Value::String(_) => {
                    normal.insert(key.clone(), value.clone());
                }
                other => {
                    return Err(refuse(format!(
                        "`{place}.{name}` must be a string, got {}",
                        describe(other)
                    )));
                }
            },
            "audio" | "function_call" if value.is_null() => {}
            unknown => {
                return Err(refuse(format!("`{place}` has an unknown field `{}`", shorten(unknown))));
            }
        }
    }
    if !normal.contains_key("content") && tool_calls.is_none() {
        return Err(refuse(format!("`{place}` has no `content`")));
    }
    if let Some(calls) = tool_calls {
        normal.insert("tool_calls".to_owned(), Value::Array(calls));
    }
    Ok(Value::Object(normal))
}

/// The text of a string or of a list of text parts.
fn join_content(place: &str, content: &Value) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) if !parts.is_empty() => parts,
        other => {
            let found = describe(other);
            return Err(refuse(format!(
                "`{place}.content` must be a string or a list of text parts, got {found}"
            )));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let place = format!("{place}.content[{index}]");
        match part.get("type") {
            Some(Value::String(kind)) if kind == "text" => {}
            Some(Value::String(kind)) => {
                let kind = shorten(kind);
                return Err(refuse(format!(
                    "`{place}` is of type `{kind}`, which is not supported; use `text`"
                )));
            }
            _ => {
                return Err(refuse(format!(
                    "`{place}` must be a part with a `type`, got {}",
                    describe(part)
                )));
            }
        }
        if let Some(unknown) =
            part.as_object().and_then(|part| part.keys().find(|key| *key != "type" && *key != "text"))
        {
            return Err(refuse(format!("`{place}` has an unknown field `{}`", shorten(unknown))));
        }
        match part.get("text") {
            Some(Value::String(text)) => texts.push(text.as_str()),
            other => {
                let found = other.map_or_else(|| "nothing".to_owned(), describe);
                return Err(refuse(format!("`{place}.text` must be a string, got {found}")));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// Tool calls of an earlier answer, with their arguments as objects.
fn normalise_tool_calls(place: &str, role: &str, calls: &Value) -> Result<Vec<Value>, ApiError> {
    let calls = calls
        .as_array()
        .ok_or_else(|| refuse(format!("`{place}.tool_calls` must be a list, got {}", describe(calls))))?;
    if role != "assistant" && !calls.is_empty() {
        return Err(refuse(format!(
            "`{place}.tool_calls` belongs to the role `assistant`, not `{}`",
            shorten(role)
        )));
    }
    let mut normal = calls.clone();
    for (index, call) in normal.iter_mut().enumerate() {
        let place = format!("{place}.tool_calls[{index}].function");
        let function = call
            .get_mut("function")
            .and_then(Value::as_object_mut)
            .ok_or_else(|| refuse(format!("`{place}` must be an object")))?;
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(refuse(format!("`{place}.name` must be a string")));
        }
        let arguments = match function.get("arguments") {
            Some(Value::String(text)) => parse_text(text).unwrap_or(Value::Null),
            Some(value) => value.clone(),
            None => Value::Object(Map::new()),
        };
        if !arguments.is_object() {
            return Err(refuse(format!("`{place}.arguments` must be a JSON object or the text of one")));
        }
        function.insert("arguments".to_owned(), arguments);
    }
    Ok(normal)
}

/// Follows the text of the message to be continued through a template. Private-use characters: no text has them, and
/// no template trims or escapes them.
const CONTINUE_HERE: &str = "\u{F8FF}\u{E000}\u{F8FF}";

/// Marks the end of the last message's text, for [`cut_at_mark`] to find in the rendered chat.
///
/// # Errors
/// When the last message has no text.
pub(super) fn mark_final(messages: &mut [Value]) -> Result<(), ApiError> {
    match messages.last_mut().and_then(|message| message.get_mut("content")) {
        Some(Value::String(text)) if !text.trim().is_empty() => {
            text.push_str(CONTINUE_HERE);
            Ok(())
        }
        _ => Err(cannot_continue("the final message has no text to continue")),
    }
}

/// A rendered chat up to the mark: what a template writes after the last message (the end of the turn) is cut off, so
/// that the model goes on in the middle of that message.
///
/// # Errors
/// When the template did not reproduce the last message.
pub(super) fn cut_at_mark(rendered: &str) -> Result<&str, ApiError> {
    let end = rendered.rfind(CONTINUE_HERE);
    end.map(|end| &rendered[..end]).ok_or_else(|| {
        cannot_continue("the chat template does not reproduce the final message, so it cannot be continued")
    })
}

fn cannot_continue(message: &str) -> ApiError {
    ApiError::bad_request("continue_final_message", message)
}
