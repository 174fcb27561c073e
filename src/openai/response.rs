//! Finished completions to response bodies, in vLLM's format.
//!
//! A body with several prompts has `n` choices per prompt, prompt after prompt. Log-probabilities come in three
//! shapes: parallel lists for completions, a list of objects for chats, and maps by token id for prompts. −inf, which
//! JSON cannot say, is reported as −9999.

#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use super::Endpoint;
use super::request::ParsedRequest;
use crate::engine::request::{Choice, Completion, FinishReason, TokenLogprobs};

/// What stands for a log-probability of −inf.
const LOWEST_LOGPROB: f32 = -9999.0;

/// What a response is labelled with, and how it spells tokens.
#[derive(Clone, Copy)]
pub struct Labels<'a> {
    /// Unique part of the response's id.
    pub id: &'a str,
    /// Seconds since 1970.
    pub created: u64,
    /// Text of a single token.
    pub decode_token: &'a dyn Fn(u32) -> String,
}

/// The body of the answer to `request`; `completions` has one entry per prompt, in order.
pub fn body(request: &ParsedRequest, completions: &[Completion], labels: Labels<'_>) -> Value {
    let spelling = Spelling { as_ids: request.return_tokens_as_token_ids, decode_token: labels.decode_token };
    let mut choices = Vec::new();
    for (prompt_index, completion) in completions.iter().enumerate() {
        let echoed = request.echo.as_ref().and_then(|texts| texts.get(prompt_index));
        for choice in &completion.choices {
            let build = match request.endpoint {
                Endpoint::Completions => completion_choice,
                Endpoint::ChatCompletions => chat_choice,
            };
            let mut body = build(request, completion, choice, echoed.map(String::as_str), spelling);
            body.insert("index".to_owned(), choices.len().into());
            choices.push(Value::Object(body));
        }
    }
    let (prefix, object) = match request.endpoint {
        Endpoint::Completions => ("cmpl", "text_completion"),
        Endpoint::ChatCompletions => ("chatcmpl", "chat.completion"),
    };
    let mut body = object_of(json!({
        "id": format!("{prefix}-{}", labels.id),
        "object": object,
        "created": labels.created,
        "model": request.model,
        "choices": choices,
        "usage": usage(request, completions),
    }));
    if request.endpoint == Endpoint::ChatCompletions {
        let completion = completions.first();
        let logprobs = completion.map_or(Value::Null, |only| prompt_logprobs(request, only, spelling));
        body.insert("prompt_logprobs".to_owned(), logprobs);
        if request.return_token_ids {
            body.insert("prompt_token_ids".to_owned(), json!(completion.map(|only| &only.prompt_token_ids)));
        }
    }
    Value::Object(body)
}

/// Tokens computed: each prompt once, each choice's output.
fn usage(request: &ParsedRequest, completions: &[Completion]) -> Value {
    let prompt: usize = completions.iter().map(|completion| completion.prompt_token_ids.len()).sum();
    let generated = completions.iter().flat_map(|completion| &completion.choices);
    let generated: usize = generated.map(|choice| output(request, choice).len()).sum();
    json!({
        "prompt_tokens": prompt,
        "total_tokens": prompt + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": null,
    })
}

/// The generated tokens that the client gets.
fn output<'c>(request: &ParsedRequest, choice: &'c Choice) -> &'c [u32] {
    if request.echo_only { &[] } else { &choice.token_ids }
}

fn completion_choice(
    request: &ParsedRequest,
    completion: &Completion,
    choice: &Choice,
    echoed: Option<&str>,
    spelling: Spelling<'_>,
) -> Map<String, Value> {
    let mut text = echoed.unwrap_or_default().to_owned();
    let mut positions = Vec::new();
    if echoed.is_some() {
        let known = completion.prompt_logprobs.iter().flatten().map(Option::as_ref);
        let known = known.chain(std::iter::repeat(None));
        positions.extend(completion.prompt_token_ids.iter().copied().zip(known));
    }
    if !request.echo_only {
        text.push_str(&choice.text);
        let known = choice.logprobs.iter().flatten().map(Some).chain(std::iter::repeat(None));
        positions.extend(choice.token_ids.iter().copied().zip(known));
    }
    let logprobs = request.logprobs.map(|top| parallel_logprobs(&positions, top, spelling));
    let mut body = object_of(json!({
        "index": null,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason(request, choice),
        "stop_reason": stop_reason(request, choice),
        "prompt_logprobs": prompt_logprobs(request, completion, spelling),
    }));
    insert_token_ids(&mut body, request, completion, choice);
    body
}

fn chat_choice(
    request: &ParsedRequest,
    completion: &Completion,
    choice: &Choice,
    echoed: Option<&str>,
    spelling: Spelling<'_>,
) -> Map<String, Value> {
    let content = format!("{}{}", echoed.unwrap_or_default(), choice.text);
    let logprobs = request.logprobs.map(|top| {
        let entries = choice.logprobs.iter().flatten().map(|entry| chat_logprobs(entry, top, spelling));
        json!({"content": entries.collect::<Vec<_>>()})
    });
    let mut body = object_of(json!({
        "index": null,
        "message": {"role": "assistant", "content": content},
        "logprobs": logprobs,
        "finish_reason": finish_reason(request, choice),
        "stop_reason": stop_reason(request, choice),
    }));
    insert_token_ids(&mut body, request, completion, choice);
    body
}

fn insert_token_ids(
    body: &mut Map<String, Value>,
    request: &ParsedRequest,
    completion: &Completion,
    choice: &Choice,
) {
    if request.return_token_ids {
        body.insert("token_ids".to_owned(), json!(output(request, choice)));
        body.insert("prompt_token_ids".to_owned(), json!(completion.prompt_token_ids));
    }
}

fn finish_reason(request: &ParsedRequest, choice: &Choice) -> &'static str {
    match choice.finish_reason {
        FinishReason::Aborted => "abort",
        _ if request.echo_only => "length",
        FinishReason::Length => "length",
        FinishReason::EndToken | FinishReason::StopToken(_) | FinishReason::StopString(_) => "stop",
    }
}

/// The stop string or token id that ended the choice; null for everything else.
fn stop_reason(request: &ParsedRequest, choice: &Choice) -> Value {
    match &choice.finish_reason {
        _ if request.echo_only => Value::Null,
        FinishReason::StopToken(token) => json!(token),
        FinishReason::StopString(text) => json!(text),
        FinishReason::EndToken | FinishReason::Length | FinishReason::Aborted => Value::Null,
    }
}

/// How tokens are written where they are keys or labels.
#[derive(Clone, Copy)]
struct Spelling<'a> {
    /// As `token_id:N`, which is unambiguous.
    as_ids: bool,
    decode_token: &'a dyn Fn(u32) -> String,
}

impl Spelling<'_> {
    fn text(self, token: u32) -> String {
        (self.decode_token)(token)
    }

    fn name(self, token: u32) -> String {
        if self.as_ids { format!("token_id:{token}") } else { self.text(token) }
    }
}

/// Log-probabilities of completions: parallel lists over the tokens at `positions`.
///
/// `text_offset` counts characters from the start of the text. `top_logprobs` has the position's own token and up to
/// `top` of the most likely ones.
fn parallel_logprobs(
    positions: &[(u32, Option<&TokenLogprobs>)],
    top: usize,
    spelling: Spelling<'_>,
) -> Value {
    let mut offset = 0;
    let (mut offsets, mut logprobs, mut tokens, mut tops) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for &(token, known) in positions {
        offsets.push(offset);
        offset += spelling.text(token).chars().count();
        tokens.push(spelling.name(token));
        logprobs.push(known.map(|entry| speakable(entry.logprob)));
        tops.push(known.map(|entry| {
            let mut by_name = Map::new();
            let own = (entry.token, entry.logprob);
            for (token, logprob) in std::iter::once(own).chain(entry.top.iter().take(top).copied()) {
                // Different tokens can have the same text; the first is the token itself or the likelier one.
                by_name.entry(spelling.name(token)).or_insert_with(|| json!(speakable(logprob)));
            }
            by_name
        }));
    }
    json!({"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops})
}

/// Log-probabilities of one token of a chat's answer.
fn chat_logprobs(entry: &TokenLogprobs, top: usize, spelling: Spelling<'_>) -> Value {
    let describe = |token: u32, logprob: f32| {
        object_of(json!({
            "token": spelling.name(token),
            "logprob": speakable(logprob),
            "bytes": spelling.text(token).as_bytes(),
        }))
    };
    let alternatives: Vec<_> =
        entry.top.iter().take(top).map(|&(token, logprob)| describe(token, logprob)).collect();
    let mut body = describe(entry.token, entry.logprob);
    body.insert("top_logprobs".to_owned(), json!(alternatives));
    Value::Object(body)
}

/// Log-probabilities of a prompt: per position a map from token id, the prompt's own token first. Null when they were
/// not asked for, and for the first token, which nothing predicts.
fn prompt_logprobs(request: &ParsedRequest, completion: &Completion, spelling: Spelling<'_>) -> Value {
    let (Some(top), Some(positions)) = (request.prompt_logprobs, &completion.prompt_logprobs) else {
        return Value::Null;
    };
    let describe = |token: u32, logprob: f32, rank: usize| json!({"logprob": speakable(logprob), "rank": rank, "decoded_token": spelling.text(token)});
    let positions = positions.iter().map(|known| {
        known.as_ref().map(|entry| {
            let mut by_id = Map::new();
            by_id.insert(entry.token.to_string(), describe(entry.token, entry.logprob, entry.rank));
            for (index, &(token, logprob)) in entry.top.iter().take(top).enumerate() {
                by_id.entry(token.to_string()).or_insert_with(|| describe(token, logprob, index + 1));
            }
            by_id
        })
    });
    json!(positions.collect::<Vec<_>>())
}

/// A log-probability as JSON can say it.
fn speakable(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(LOWEST_LOGPROB) } else { LOWEST_LOGPROB }
}

fn object_of(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
