//! From `prompt` or `messages` to tokens that fit the context.

use serde_json::{Map, Value};

use super::{Context, Limits, Text};
use crate::openai::Endpoint;
use crate::openai::error::ApiError;
use crate::openai::fields::{Fields, describe, integer};
use crate::openai::messages;

/// A prompt before it is tokenized.
pub(super) enum Prompt<'a> {
    Text(&'a str),
    Tokens(Vec<u32>),
}

/// Names that a chat template's extra variables may not replace.
const TEMPLATE_VARIABLES: [&str; 7] = [
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "documents",
    "messages",
    "tokenize",
    "tools",
];

pub(super) fn read_prompts<'a>(prompt: &'a Value, limits: &Limits) -> Result<Vec<Prompt<'a>>, ApiError> {
    let refuse = |message: String| ApiError::bad_request("prompt", message);
    let elements = match prompt {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(elements) if elements.is_empty() => return Err(refuse("`prompt` is empty".to_owned())),
        Value::Array(elements) => elements,
        other => {
            let found = describe(other);
            return Err(refuse(format!(
                "`prompt` must be text, token ids, or a list of either, got {found}"
            )));
        }
    };
    if !elements[0].is_string() && !elements[0].is_array() {
        return Ok(vec![Prompt::Tokens(token_ids("prompt", "prompt", elements, limits)?)]);
    }
    if elements.len() > limits.max_prompts {
        let (found, most) = (elements.len(), limits.max_prompts);
        return Err(refuse(format!("`prompt` has {found} prompts, at most {most} are allowed")));
    }
    let read = elements.iter().enumerate().map(|(index, element)| match element {
        Value::String(text) if elements[0].is_string() => Ok(Prompt::Text(text)),
        Value::Array(ids) if elements[0].is_array() => {
            let place = format!("prompt[{index}]");
            if ids.is_empty() {
                return Err(refuse(format!("`{place}` is empty")));
            }
            token_ids("prompt", &place, ids, limits).map(Prompt::Tokens)
        }
        other => {
            let wanted = if elements[0].is_string() { "text" } else { "token ids" };
            let found = describe(other);
            Err(refuse(format!("`prompt[{index}]` must be {wanted} like the prompts before it, got {found}")))
        }
    });
    read.collect()
}

/// A list of ids of the vocabulary, found at `place` in the field `param`.
pub(super) fn token_ids(
    param: &str,
    place: &str,
    ids: &[Value],
    limits: &Limits,
) -> Result<Vec<u32>, ApiError> {
    let read = ids.iter().enumerate().map(|(index, value)| {
        let refuse = |message: String| ApiError::bad_request(param, message);
        let id = integer(value).ok_or_else(|| {
            refuse(format!("`{place}[{index}]` must be a token id, got {}", describe(value)))
        })?;
        let token = u32::try_from(id).ok().filter(|&token| (token as usize) < limits.vocab_size);
        token.ok_or_else(|| {
            let size = limits.vocab_size;
            refuse(format!("`{place}[{index}]` is {id}, which is none of the {size} token ids"))
        })
    });
    read.collect()
}

/// The tokens of a text, checked: a tokenizer may know tokens that the base has no embedding for.
pub(super) fn encode(
    text: &str,
    add_special_tokens: bool,
    source: &str,
    context: &Context<'_>,
) -> Result<Vec<u32>, ApiError> {
    let refuse = |message: String| ApiError::bad_request(source, message);
    if text.is_empty() {
        return Err(refuse(format!("`{source}` is empty")));
    }
    let tokens = context.text.encode(text, add_special_tokens).map_err(refuse)?;
    let size = context.limits.vocab_size;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= size) {
        return Err(refuse(format!(
            "`{source}` has the token {token}, but the base knows only {size} tokens"
        )));
    }
    if tokens.is_empty() {
        return Err(refuse(format!("`{source}` has no tokens")));
    }
    Ok(tokens)
}

/// Most tokens to generate after a prompt of `prompt` tokens.
///
/// `wanted` is the number that was asked for and the field that says so; it must fit the context. Without it,
/// completions get 16 tokens and chats the rest of the context.
pub(super) fn completion_length(
    prompt: usize,
    wanted: Option<(usize, &str)>,
    endpoint: Endpoint,
    source: &str,
    limits: &Limits,
) -> Result<usize, ApiError> {
    let context = limits.max_model_len;
    let room = context.checked_sub(prompt).filter(|&room| room > 0).ok_or_else(|| {
        let message = format!(
            "This model's maximum context length is {context} tokens. However, your request has {prompt} tokens \
             in the {source} and needs room for at least one more. Please reduce the length of the {source}."
        );
        ApiError::bad_request(source, message)
    })?;
    match wanted {
        Some((wanted, field)) if wanted > room => {
            let total = prompt.saturating_add(wanted);
            let message = format!(
                "This model's maximum context length is {context} tokens. However, you requested {total} tokens \
                 ({prompt} in the {source}, {wanted} for the completion). Please reduce the length of the \
                 {source} or the completion."
            );
            Err(ApiError::bad_request(field, message))
        }
        Some((wanted, _)) => Ok(wanted),
        None => Ok(match endpoint {
            Endpoint::Completions => room.min(16),
            Endpoint::ChatCompletions => room,
        }),
    }
}

/// How a chat becomes a prompt.
pub(super) struct ChatOptions<'a> {
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Option<&'a Map<String, Value>>,
}

impl<'a> ChatOptions<'a> {
    pub(super) fn read(fields: &mut Fields<'a>) -> Result<Self, ApiError> {
        let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
        let options = Self {
            add_generation_prompt: fields
                .boolean("add_generation_prompt")?
                .unwrap_or(!continue_final_message),
            continue_final_message,
            variables: fields.object("chat_template_kwargs")?,
        };
        if options.add_generation_prompt && options.continue_final_message {
            let message = "`continue_final_message` is true, which needs `add_generation_prompt` to be false";
            return Err(ApiError::bad_request("continue_final_message", message));
        }
        if let Some(name) = options
            .variables
            .and_then(|map| map.keys().find(|name| TEMPLATE_VARIABLES.contains(&name.as_str())))
        {
            let message = format!("`chat_template_kwargs` may not set `{name}`");
            return Err(ApiError::bad_request("chat_template_kwargs", message));
        }
        Ok(options)
    }

    /// The prompt for the chat, and what `echo` puts before the answer: the last message if it is the model's own.
    pub(super) fn render(&self, messages: &Value, text: &dyn Text) -> Result<(String, String), ApiError> {
        let given = messages.as_array().ok_or_else(|| {
            let found = describe(messages);
            ApiError::bad_request("messages", format!("`messages` must be a list, got {found}"))
        })?;
        let mut messages = messages::normalise(given)?;
        let last = messages.last().filter(|message| messages::is_assistant(message));
        let echoed = last.map(|message| messages::content(message).to_owned()).unwrap_or_default();
        if self.continue_final_message {
            messages::mark_final(&mut messages)?;
        }
        let none = Map::new();
        let rendered = text
            .render_chat(&messages, self.add_generation_prompt, self.variables.unwrap_or(&none))
            .map_err(|message| ApiError::bad_request("messages", message))?;
        if self.continue_final_message {
            return Ok((messages::cut_at_mark(&rendered)?.to_owned(), echoed));
        }
        Ok((rendered, echoed))
    }
}
