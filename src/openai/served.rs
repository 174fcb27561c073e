//! An engine as requests see it: the names it answers to, its tokenizer and its chat template.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::ApiError;
use super::request::{Context, Limits, Models, ParsedRequest, Text};
use crate::engine::{Engine, EngineError, Stream};
use crate::model::ChatOptions;

/// A served engine.
pub struct Served<'a> {
    pub engine: &'a Engine,
    /// Names of the base.
    names: Vec<String>,
    /// Adapters that were asked for and could not be loaded, with the reason.
    failed: BTreeMap<String, String>,
    limits: Limits,
}

impl<'a> Served<'a> {
    /// The base answers to `names`, or to its folder's name when there are none.
    pub fn new(engine: &'a Engine, names: &[String]) -> Self {
        let config = &engine.base().config;
        let names = if names.is_empty() { vec![engine.base().name.clone()] } else { names.to_vec() };
        let limits = Limits::new(engine.max_model_len(), config.vocab_size);
        Self { engine, names, failed: BTreeMap::new(), limits }
    }

    /// Requests for the adapter `name` are answered with the reason why it is not there.
    pub fn mark_failed(&mut self, name: &str, reason: String) {
        self.failed.insert(name.to_owned(), reason);
    }

    /// What the meaning of a body depends on.
    pub fn context(&self, can_stream: bool) -> Context<'_> {
        Context { limits: &self.limits, models: self, text: self, can_stream }
    }

    /// Queues all prompts of a request.
    ///
    /// # Errors
    /// When the engine refuses one.
    pub fn submit(&self, request: &ParsedRequest) -> Result<Vec<Stream>, ApiError> {
        request.requests.iter().map(|request| self.engine.submit(request.clone()).map_err(answer)).collect()
    }
}

/// An engine's error as the client sees it.
pub fn answer(error: EngineError) -> ApiError {
    match error {
        EngineError::Request { field, .. } => ApiError::bad_request(field, error.to_string()),
        EngineError::Failed(message) => ApiError::bad_body(message),
        other => ApiError::internal(other.to_string()),
    }
}

impl Models for Served<'_> {
    fn is_base(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }

    fn is_adapter(&self, name: &str) -> bool {
        self.engine.has_adapter(name)
    }

    fn failure(&self, name: &str) -> Option<&str> {
        self.failed.get(name).map(String::as_str)
    }
}

impl Text for Served<'_> {
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        self.engine.base().tokenizer.encode(text, add_special_tokens).map_err(|error| error.to_string())
    }

    fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        Ok(self.engine.base().tokenizer.decode(tokens, skip_special_tokens))
    }

    fn render_chat(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
    ) -> Result<String, String> {
        let options =
            ChatOptions { add_generation_prompt, variables: variables.clone(), ..ChatOptions::default() };
        let messages = Value::Array(messages.to_vec());
        self.engine.base().render_chat(&messages, &options).map_err(|error| error.to_string())
    }
}
