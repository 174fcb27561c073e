//! Chat messages to the text a model was trained on, through the model's own Jinja template.
//!
//! Templates are written for Hugging Face's renderer: Jinja2 with `trim_blocks` and `lstrip_blocks`, loop controls,
//! Python's string and dictionary methods, and a few extra functions. `functions` brings what `minijinja` does
//! differently; `source` prepares the template text; `messages` prepares the messages.
//!
//! A template comes with the model and is not trusted. It sees nothing but its variables, and it is bounded: every
//! step, byte and item costs fuel (a base amount plus one unit per byte of input), the rendered text, the depth of
//! values and the depth of macro calls have limits. A template that exceeds one fails with an error.

mod functions;
mod json;
mod messages;
mod python;
mod source;
#[cfg(test)]
mod tests;

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};

use crate::model::tokenizer::{ChatTemplateSource, SpecialTokens, Tokenizer};
use messages::ContentFormat;

/// Fuel of a render before its input is counted; one unit is one instruction or 64 bytes of text moved.
const BASE_FUEL: u64 = 2_000_000;
/// Most bytes a template may render.
const LARGEST_OUTPUT: usize = 32 << 20;
/// Largest template, in bytes; the largest in use have some tens of kilobytes.
const LARGEST_SOURCE: usize = 1 << 20;
/// Frames (loops and `with` count one, macro calls six) that may be open at once.
const RECURSION_LIMIT: usize = 150;

/// What can go wrong between messages and prompt text.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    #[error("{origin}: the template has {bytes} bytes; the largest supported is {LARGEST_SOURCE}")]
    TooLarge { origin: String, bytes: usize },
    /// The template cannot be parsed.
    #[error("{origin}, line {line}: {message}")]
    Syntax { origin: String, line: usize, message: String },
    /// The template refused the messages with `raise_exception`.
    #[error("{message} ({origin}, line {line})")]
    Raised { origin: String, line: usize, message: String },
    #[error("{origin}, line {line}: {message}")]
    Render { origin: String, line: usize, message: String },
    /// The template ran away.
    #[error("{origin}, line {line}: the template exceeds its limit on {limit}")]
    Limit { origin: String, line: usize, limit: &'static str },
    #[error("the model has no default chat template; it has {0}")]
    NoDefault(String),
    /// A message has the wrong shape.
    #[error("{field} is {found}; wanted {wanted}")]
    Message { field: String, found: String, wanted: &'static str },
}

/// How to render a chat.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// End with the header that makes the model answer.
    pub add_generation_prompt: bool,
    /// Tool definitions (a list of JSON schemas), offered to the template as `tools`.
    pub tools: Option<Value>,
    /// Documents to answer from, offered as `documents`.
    pub documents: Option<Value>,
    /// Further variables (`enable_thinking`, …); they override special tokens of the same name.
    pub variables: Map<String, Value>,
}

/// A parsed chat template. Shared between threads.
pub struct ChatTemplate {
    environment: Environment<'static>,
    templates: Vec<Named>,
    special_tokens: Map<String, Value>,
}

/// One of the templates of a model.
struct Named {
    name: String,
    origin: String,
    content: ContentFormat,
}

impl ChatTemplate {
    /// Parses `source`; `special_tokens` become variables of their names.
    pub fn new(source: &str, special_tokens: &SpecialTokens) -> Result<Self, ChatTemplateError> {
        let template = ChatTemplateSource {
            name: "default".to_owned(),
            origin: "chat template".to_owned(),
            source: source.to_owned(),
        };
        Self::from_sources(&[template], special_tokens)
    }

    /// The templates of a model's folder; `None` when it has none.
    pub fn from_tokenizer(tokenizer: &Tokenizer) -> Result<Option<Self>, ChatTemplateError> {
        match tokenizer.chat_templates() {
            [] => Ok(None),
            sources => Self::from_sources(sources, tokenizer.special_tokens()).map(Some),
        }
    }

    /// Parses named templates. With tools the one named `tool_use` is rendered if there is one, else `default`.
    pub fn from_sources(
        sources: &[ChatTemplateSource],
        special_tokens: &SpecialTokens,
    ) -> Result<Self, ChatTemplateError> {
        let mut environment = environment();
        let mut templates = Vec::with_capacity(sources.len());
        for template in sources {
            if template.source.len() > LARGEST_SOURCE {
                let bytes = template.source.len();
                return Err(ChatTemplateError::TooLarge { origin: template.origin.clone(), bytes });
            }
            let source = source::prepare(&template.source).map_err(|error| ChatTemplateError::Syntax {
                origin: template.origin.clone(),
                line: error.line,
                message: error.message,
            })?;
            environment
                .add_template_owned(template.name.clone(), source)
                .map_err(|error| describe(&template.origin, &error))?;
            templates.push(Named {
                name: template.name.clone(),
                origin: template.origin.clone(),
                content: ContentFormat::Any,
            });
        }
        if !templates.iter().any(|template| template.name == "default") {
            let names: Vec<&str> = templates.iter().map(|template| template.name.as_str()).collect();
            return Err(ChatTemplateError::NoDefault(names.join(", ")));
        }
        let special_tokens =
            special_tokens.iter().map(|(name, text)| (name.to_owned(), Value::from(text))).collect();
        let mut template = Self { environment, templates, special_tokens };
        for index in 0..template.templates.len() {
            let render = |messages: Value| {
                template.render_prepared(&template.templates[index], messages, &ChatOptions::default()).ok()
            };
            template.templates[index].content = ContentFormat::probe(render);
        }
        Ok(template)
    }

    /// Renders `messages`, an array of `{role, content, …}`.
    ///
    /// `content` is a string or a list of text parts; it is handed to the template in the form the template can use.
    pub fn render(&self, messages: &Value, options: &ChatOptions) -> Result<String, ChatTemplateError> {
        let with_tools = options.tools.as_ref().is_some_and(|tools| !tools.is_null());
        let wanted = |name: &str| self.templates.iter().find(|template| template.name == name);
        let template = wanted("tool_use")
            .filter(|_| with_tools)
            .or_else(|| wanted("default"))
            .unwrap_or(&self.templates[0]);
        let messages = messages::prepare(messages, template.content)?;
        self.render_prepared(template, messages, options)
    }

    fn render_prepared(
        &self,
        template: &Named,
        messages: Value,
        options: &ChatOptions,
    ) -> Result<String, ChatTemplateError> {
        let mut variables = self.special_tokens.clone();
        variables.extend(options.variables.clone());
        variables.insert("messages".to_owned(), messages);
        variables.insert("tools".to_owned(), options.tools.clone().unwrap_or_default());
        variables.insert("documents".to_owned(), options.documents.clone().unwrap_or_default());
        variables.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
        let variables = Value::Object(variables);

        let describe = |error| describe(&template.origin, &error);
        // A clone shares everything but the fuel setting.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(BASE_FUEL + messages::size(&variables)));
        let compiled = environment.get_template(&template.name).map_err(describe)?;
        let mut output = BoundedOutput(Vec::new());
        compiled.render_captured_to(minijinja::value::Serde(&variables), &mut output).map_err(describe)?;
        // The renderer writes text only.
        Ok(String::from_utf8(output.0).unwrap_or_default())
    }
}

/// Jinja as Hugging Face sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.set_debug(false);
    functions::install(&mut environment);
    environment
}

/// The engine's error as ours: what happened, in which file and line.
fn describe(origin: &str, error: &minijinja::Error) -> ChatTemplateError {
    let origin = origin.to_owned();
    let line = error.line().unwrap_or(1);
    if let Some(message) = functions::raised_message(error) {
        return ChatTemplateError::Raised { origin, line, message };
    }
    let message = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.kind() {
        ErrorKind::SyntaxError => ChatTemplateError::Syntax { origin, line, message },
        ErrorKind::OutOfFuel => ChatTemplateError::Limit { origin, line, limit: "work" },
        ErrorKind::WriteFailure => ChatTemplateError::Limit { origin, line, limit: "rendered text" },
        _ if message.contains("recursion limit") => {
            ChatTemplateError::Limit { origin, line, limit: "recursion" }
        }
        _ => ChatTemplateError::Render { origin, line, message },
    }
}

/// Collects up to [`LARGEST_OUTPUT`] bytes.
struct BoundedOutput(Vec<u8>);

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LARGEST_OUTPUT {
            return Err(io::Error::other("rendered text too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
