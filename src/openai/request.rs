//! A request body to engine requests.
//!
//! [`parse`] reads every field of the body, checks the rules of each, resolves the model and adapters, and tokenizes.
//! Whatever is unknown, of the wrong type or out of range is an [`ApiError`] whose `param` names the field.

mod prompt;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value};

use super::Endpoint;
use super::error::ApiError;
use super::fields::{Fields, describe, finite, shorten, shorten_to};
use crate::engine::request::{Request, SamplingParams, StopParams};
use prompt::{ChatOptions, Prompt, completion_length, encode, read_prompts, token_ids};

/// What a request may ask for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most tokens of prompt and completion together.
    pub max_model_len: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Most continuations per prompt.
    pub max_n: usize,
    /// Most prompts in one body.
    pub max_prompts: usize,
    pub max_stop_strings: usize,
    /// Most characters of one stop string.
    pub max_stop_length: usize,
    /// Most alternatives reported per position.
    pub max_logprobs: usize,
}

impl Limits {
    /// The limits of a base, and defaults for the rest.
    pub fn new(max_model_len: usize, vocab_size: usize) -> Self {
        Self {
            max_model_len,
            vocab_size,
            max_n: 128,
            max_prompts: 1024,
            max_stop_strings: 16,
            max_stop_length: 1024,
            max_logprobs: 20,
        }
    }
}

/// The names that a body's `model` and `adapters` can mean.
pub trait Models {
    /// Whether the base is served under this name.
    fn is_base(&self, name: &str) -> bool;
    /// Whether an adapter is served under this name.
    fn is_adapter(&self, name: &str) -> bool;
    /// Why the adapter that was to be served under this name is not.
    fn failure(&self, name: &str) -> Option<&str> {
        let _ = name;
        None
    }
}

/// The tokenizer and chat template of the base. Errors are messages for the client.
pub trait Text {
    /// Token ids of a text.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String>;
    /// Text of token ids.
    fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, String>;
    /// The prompt for a chat. `messages` have string contents; `variables` are further variables of the template.
    fn render_chat(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
    ) -> Result<String, String>;
}

/// Everything that the meaning of a body depends on.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub limits: &'a Limits,
    pub models: &'a dyn Models,
    pub text: &'a dyn Text,
    /// Whether the answer can be streamed (HTTP) or not (a batch file).
    pub can_stream: bool,
}

/// How to stream an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Send a last chunk with the usage.
    pub include_usage: bool,
    /// Send the usage so far with every chunk.
    pub continuous_usage_stats: bool,
}

/// A body that is in order.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedRequest {
    pub endpoint: Endpoint,
    /// `model` as given.
    pub model: String,
    /// One per prompt.
    pub requests: Vec<Request>,
    /// With `echo`, what to put before each prompt's outputs: the prompt, or in a chat the message that is continued.
    pub echo: Option<Vec<String>>,
    /// `echo` with `max_tokens: 0`: only the prompt is wanted. The engine generates one token, which is left out.
    pub echo_only: bool,
    /// Alternatives to report per generated token, as asked for.
    pub logprobs: Option<usize>,
    /// Alternatives to report per prompt token, as asked for (`echo` with `logprobs` makes the engine compute more).
    pub prompt_logprobs: Option<usize>,
    pub return_token_ids: bool,
    pub return_tokens_as_token_ids: bool,
    /// `None` for one answer at the end.
    pub stream: Option<StreamOptions>,
}

/// Fields that clients of OpenAI and vLLM send but that ask for nothing when null or one of these values (as compact
/// JSON). Any other value is refused: it would change the result elsewhere.
const UNSUPPORTED: [(&str, &[&str]); 43] = [
    ("allowed_token_ids", &[]),
    ("audio", &[]),
    ("bad_words", &["[]"]),
    ("best_of", &["1"]),
    ("cache_salt", &[]),
    ("chat_template", &[]),
    ("detokenize", &["true"]),
    ("documents", &["[]"]),
    ("function_call", &["\"none\""]),
    ("functions", &["[]"]),
    ("guided_choice", &[]),
    ("guided_decoding_backend", &[]),
    ("guided_grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("include_reasoning", &["true"]),
    ("include_stop_str_in_output", &["false"]),
    ("kv_transfer_params", &[]),
    ("length_penalty", &["1", "1.0"]),
    ("logits_processors", &["[]"]),
    ("mm_processor_kwargs", &[]),
    ("modalities", &["[\"text\"]"]),
    ("parallel_tool_calls", &["true", "false"]),
    ("prediction", &[]),
    ("priority", &["0"]),
    ("prompt_cache_retention", &[]),
    ("prompt_embeds", &[]),
    ("reasoning_effort", &[]),
    ("request_id", &[]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("service_tier", &["\"auto\"", "\"default\""]),
    ("spaces_between_special_tokens", &["true"]),
    ("store", &["false"]),
    ("structured_outputs", &[]),
    ("suffix", &["\"\""]),
    ("thinking_token_budget", &[]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("tools", &["[]"]),
    ("truncate_prompt_tokens", &[]),
    ("use_beam_search", &["false"]),
    ("verbosity", &["\"medium\""]),
    ("vllm_xargs", &["{}"]),
    ("web_search_options", &[]),
];

/// Fields that identify the caller and never change a result.
const CALLER: [&str; 4] = ["metadata", "prompt_cache_key", "safety_identifier", "user"];

/// Reads the body of a request.
///
/// # Errors
/// 400 naming the field at fault in `param`, 404 for an unknown model.
pub fn parse(endpoint: Endpoint, body: &Value, context: &Context<'_>) -> Result<ParsedRequest, ApiError> {
    let limits = context.limits;
    let mut fields = Fields::new(body)?;
    for name in CALLER {
        fields.value(name);
    }
    for (name, neutral) in UNSUPPORTED {
        fields.unsupported(name, neutral)?;
    }
    let model = fields.text("model")?;
    let adapters = fields.object("adapters")?;
    let sampling = sampling_params(&mut fields, limits)?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let completions = endpoint == Endpoint::Completions;
    let (mut stop, echo_only) = stop_params(&mut fields, limits, endpoint, echo)?;
    let n = fields.count("n", 1, limits.max_n)?.unwrap_or(1);
    let logprobs = if completions {
        fields.count("logprobs", 0, limits.max_logprobs)?
    } else {
        chat_logprobs(&mut fields, limits)?
    };
    let prompt_logprobs = fields.count("prompt_logprobs", 0, limits.max_logprobs)?;
    let skip_special_tokens = fields.boolean("skip_special_tokens")?.unwrap_or(true);
    let return_token_ids = fields.boolean("return_token_ids")?.unwrap_or(false);
    let return_tokens_as_token_ids = fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false);
    let stream = stream_options(&mut fields, context)?;
    if stream.is_some() && prompt_logprobs.is_some() {
        return Err(ApiError::bad_request("prompt_logprobs", "`prompt_logprobs` cannot be streamed"));
    }
    let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(completions);
    let source = if completions { "prompt" } else { "messages" };
    let given = fields.value(source);
    let chat = if completions { None } else { Some(ChatOptions::read(&mut fields)?) };
    fields.finish(endpoint.path())?;

    let (model, adapters) = resolve_adapters(model, adapters, context.models)?;
    let given = given.ok_or_else(|| {
        ApiError::bad_request(source, format!("`{source}` is missing; {endpoint} needs it"))
    })?;
    let rendered;
    let mut echoed = Vec::new();
    let prompts = match chat {
        None => read_prompts(given, limits)?,
        Some(chat) => {
            let last;
            (rendered, last) = chat.render(given, context.text)?;
            echoed.push(last);
            vec![Prompt::Text(&rendered)]
        }
    };
    let mut requests = Vec::with_capacity(prompts.len());
    let newer = body.get("max_completion_tokens").is_some_and(|value| !value.is_null());
    let field = if newer { "max_completion_tokens" } else { "max_tokens" };
    let wanted = stop.max_tokens.map(|wanted| (wanted, field));
    for prompt in prompts {
        let tokens = match &prompt {
            Prompt::Text(text) => encode(text, add_special_tokens, source, context)?,
            Prompt::Tokens(tokens) => tokens.clone(),
        };
        stop.max_tokens = Some(completion_length(tokens.len(), wanted, endpoint, source, limits)?);
        check_min_tokens(&stop)?;
        if echo && completions {
            echoed.push(match prompt {
                Prompt::Text(text) => text.to_owned(),
                Prompt::Tokens(tokens) => context
                    .text
                    .decode(&tokens, skip_special_tokens)
                    .map_err(|message| ApiError::bad_request(source, message))?,
            });
        }
        requests.push(Request {
            prompt: tokens,
            adapters: adapters.clone(),
            n,
            sampling: sampling.clone(),
            stop: stop.clone(),
            logprobs,
            prompt_logprobs: if echo && completions {
                prompt_logprobs.max(logprobs)
            } else {
                prompt_logprobs
            },
            skip_special_tokens,
        });
    }
    Ok(ParsedRequest {
        endpoint,
        model: model.to_owned(),
        requests,
        echo: echo.then_some(echoed),
        echo_only,
        logprobs,
        prompt_logprobs,
        return_token_ids,
        return_tokens_as_token_ids,
        stream,
    })
}

fn sampling_params(fields: &mut Fields<'_>, limits: &Limits) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let within = |least: f64, most: f64| move |number: f64| (least..=most).contains(&number);
    let temperature = fields.number("temperature", "from 0 to 2", within(0.0, 2.0))?;
    let top_p = fields.number("top_p", "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
    let top_k = match fields.integer("top_k", -1..=i64::MAX)? {
        None | Some(-1 | 0) => None,
        Some(top_k) => Some(usize::try_from(top_k).unwrap_or(usize::MAX)),
    };
    let min_p = fields.number("min_p", "from 0 to 1", within(0.0, 1.0))?;
    let presence = fields.number("presence_penalty", "from -2 to 2", within(-2.0, 2.0))?;
    let frequency = fields.number("frequency_penalty", "from -2 to 2", within(-2.0, 2.0))?;
    let repetition = fields.number("repetition_penalty", "above 0", |penalty| penalty > 0.0)?;
    let mut logit_bias = Vec::new();
    for (key, value) in fields.object("logit_bias")?.into_iter().flatten() {
        let refuse = |message: String| ApiError::bad_request("logit_bias", message);
        let token = key.parse().ok().filter(|&token: &u32| token.to_string() == *key);
        let token = token.filter(|&token| (token as usize) < limits.vocab_size).ok_or_else(|| {
            let (key, size) = (shorten(key), limits.vocab_size);
            refuse(format!("`logit_bias` has the key \"{key}\", which is none of the {size} token ids"))
        })?;
        let bias = finite(value).filter(|bias| (-100.0..=100.0).contains(bias)).ok_or_else(|| {
            let found = describe(value);
            refuse(format!("`logit_bias` of token {token} must be a number from -100 to 100, got {found}"))
        })?;
        logit_bias.push((token, bias));
    }
    // Any i64 is a seed; its two's complement is the key of the random stream.
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64);
    Ok(SamplingParams {
        temperature: temperature.unwrap_or(default.temperature),
        top_p: top_p.unwrap_or(default.top_p),
        top_k,
        min_p: min_p.unwrap_or(default.min_p),
        presence_penalty: presence.unwrap_or(default.presence_penalty),
        frequency_penalty: frequency.unwrap_or(default.frequency_penalty),
        repetition_penalty: repetition.unwrap_or(default.repetition_penalty),
        logit_bias,
        seed,
    })
}

/// When to stop, with `max_tokens` as given; and whether only the echoed prompt is wanted.
fn stop_params(
    fields: &mut Fields<'_>,
    limits: &Limits,
    endpoint: Endpoint,
    echo: bool,
) -> Result<(StopParams, bool), ApiError> {
    let echoes_prompt = echo && endpoint == Endpoint::Completions;
    let mut max_tokens = fields.count("max_tokens", usize::from(!echoes_prompt), usize::MAX)?;
    let echo_only = max_tokens == Some(0);
    if echo_only {
        max_tokens = Some(1);
    }
    if endpoint == Endpoint::ChatCompletions
        && let Some(newer) = fields.count("max_completion_tokens", 1, usize::MAX)?
    {
        if let Some(older) = max_tokens
            && older != newer
        {
            let message = format!("`max_completion_tokens` is {newer} and `max_tokens` is {older}; give one");
            return Err(ApiError::bad_request("max_completion_tokens", message));
        }
        max_tokens = Some(newer);
    }
    let stop_token_ids = match fields.list("stop_token_ids")? {
        None => Vec::new(),
        Some(ids) => token_ids("stop_token_ids", "stop_token_ids", ids, limits)?,
    };
    let stop = StopParams {
        max_tokens,
        min_tokens: fields.count("min_tokens", 0, usize::MAX)?.unwrap_or(0),
        stop: stop_strings(fields, limits)?,
        stop_token_ids,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
    };
    Ok((stop, echo_only))
}

fn stop_strings(fields: &mut Fields<'_>, limits: &Limits) -> Result<Vec<String>, ApiError> {
    let refuse = |message: String| ApiError::bad_request("stop", message);
    let strings = match fields.value("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(strings)) => strings.as_slice(),
        Some(single) => std::slice::from_ref(single),
    };
    if strings.len() > limits.max_stop_strings {
        let (found, most) = (strings.len(), limits.max_stop_strings);
        return Err(refuse(format!("`stop` has {found} strings, at most {most} are allowed")));
    }
    let read = strings.iter().map(|value| match value {
        Value::String(text) if text.is_empty() => Err(refuse("`stop` has an empty string".to_owned())),
        Value::String(text) if text.chars().count() > limits.max_stop_length => {
            let (found, most) = (text.chars().count(), limits.max_stop_length);
            Err(refuse(format!("`stop` has a string of {found} characters, at most {most} are allowed")))
        }
        Value::String(text) => Ok(text.clone()),
        other => {
            Err(refuse(format!("`stop` must be a string or a list of strings, got {}", describe(other))))
        }
    });
    read.collect()
}

/// A chat says with a flag whether to report log-probabilities, and with a number how many alternatives.
fn chat_logprobs(fields: &mut Fields<'_>, limits: &Limits) -> Result<Option<usize>, ApiError> {
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, limits.max_logprobs)?.unwrap_or(0);
    if top > 0 && !logprobs {
        let message = format!("`top_logprobs` is {top}, which needs `logprobs` to be true");
        return Err(ApiError::bad_request("top_logprobs", message));
    }
    Ok(logprobs.then_some(top))
}

fn stream_options(fields: &mut Fields<'_>, context: &Context<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    if stream && !context.can_stream {
        return Err(ApiError::bad_request("stream", "`stream` is true, but a batch file cannot be streamed"));
    }
    let refuse = |message: String| ApiError::bad_request("stream_options", message);
    if options.is_some() && !stream {
        return Err(refuse("`stream_options` needs `stream` to be true".to_owned()));
    }
    let mut read = StreamOptions::default();
    for (name, value) in options.into_iter().flatten() {
        let option = match name.as_str() {
            "include_usage" => &mut read.include_usage,
            "continuous_usage_stats" => &mut read.continuous_usage_stats,
            _ => return Err(refuse(format!("`stream_options` has an unknown field `{}`", shorten(name)))),
        };
        *option = match value {
            Value::Null => false,
            Value::Bool(value) => *value,
            other => {
                let found = describe(other);
                return Err(refuse(format!("`stream_options.{name}` must be true or false, got {found}")));
            }
        };
    }
    Ok(stream.then_some(read))
}

/// Adapters with their gates.
type Gates = Vec<(String, f32)>;

/// The name of the model and the adapters that its rows use.
fn resolve_adapters<'a>(
    model: Option<&'a str>,
    weights: Option<&Map<String, Value>>,
    models: &dyn Models,
) -> Result<(&'a str, Gates), ApiError> {
    let name = model.ok_or_else(|| {
        ApiError::bad_request("model", "`model` is missing; name the base or an adapter that is served")
    })?;
    let mut adapters = Vec::new();
    if name == "auto" {
        return Err(ApiError::bad_request("model", "`model` is \"auto\", but no router is loaded"));
    } else if models.is_adapter(name) {
        adapters.push((name.to_owned(), 1.0));
    } else if !models.is_base(name) {
        return Err(ApiError::unknown_model(&shorten_to(name, 256), models.failure(name)));
    }
    let Some(weights) = weights else {
        return Ok((name, adapters));
    };
    adapters.clear();
    for (adapter, weight) in weights {
        let shown = shorten(adapter);
        let refuse = |message: String| ApiError::bad_request("adapters", message);
        if !models.is_adapter(adapter) {
            let reason = models.failure(adapter).map_or_else(String::new, |reason| format!(": {reason}"));
            return Err(refuse(format!(
                "`adapters` names `{shown}`, but the adapter `{shown}` does not exist{reason}"
            )));
        }
        let gate = finite(weight).ok_or_else(|| {
            let found = describe(weight);
            refuse(format!("`adapters` must give `{shown}` a finite number as its weight, got {found}"))
        })?;
        if gate != 0.0 {
            adapters.push((adapter.clone(), gate));
        }
    }
    Ok((name, adapters))
}

fn check_min_tokens(stop: &StopParams) -> Result<(), ApiError> {
    match stop.max_tokens {
        Some(most) if stop.min_tokens > most => {
            let message = format!(
                "`min_tokens` must be at most `max_tokens`, which is {most}, got {}",
                stop.min_tokens
            );
            Err(ApiError::bad_request("min_tokens", message))
        }
        _ => Ok(()),
    }
}
