//! The small files beside `tokenizer.json`: names of special tokens, added tokens and chat templates.
//!
//! Precedence follows Hugging Face: `special_tokens_map.json` overrides `tokenizer_config.json` in folders from before
//! `added_tokens_decoder` and is not read otherwise; `chat_template.jinja` and `chat_templates/*.jinja` win over the
//! `chat_template` field. `add_bos_token` and `add_eos_token` have no effect where a `tokenizer.json` exists: its
//! post-processor says what is added.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{TokenizerError, read_optional};

/// The named special tokens of a model (`bos_token`, `eos_token`, …) and their texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens(Vec<(String, String)>);

impl SpecialTokens {
    /// The text of the token named `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(known, _)| *known == name).map(|(_, text)| text)
    }

    /// Names and texts.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }

    fn set(&mut self, name: &str, text: String) {
        self.0.retain(|(known, _)| known != name);
        self.0.push((name.to_owned(), text));
    }
}

impl<N: Into<String>, T: Into<String>> FromIterator<(N, T)> for SpecialTokens {
    fn from_iter<I: IntoIterator<Item = (N, T)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, text)| (name.into(), text.into())).collect())
    }
}

/// One chat template of a folder, not yet parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplateSource {
    /// `default`, or the template's own name (`tool_use`, `rag`).
    pub name: String,
    /// Where it was found, for error messages: `chat_template.jinja`, `tokenizer_config.json: chat_template`.
    pub origin: String,
    pub source: String,
}

/// What the small files say.
pub struct FolderConfig {
    pub special_tokens: SpecialTokens,
    pub chat_templates: Vec<ChatTemplateSource>,
    /// Special tokens in text are encoded as ordinary text.
    pub split_special_tokens: bool,
    /// `added_tokens_decoder`, by id.
    added_tokens: Vec<(u32, AddedToken)>,
    /// Special tokens without a name of their own.
    extra_special_tokens: Vec<String>,
}

impl FolderConfig {
    pub fn read(folder: &Path) -> Result<Self, TokenizerError> {
        let config = JsonFile::read(folder.join("tokenizer_config.json"))?;
        let mut read = Self {
            special_tokens: SpecialTokens::default(),
            chat_templates: Vec::new(),
            split_special_tokens: false,
            added_tokens: Vec::new(),
            extra_special_tokens: Vec::new(),
        };
        if let Some(config) = &config {
            read.named_tokens(config)?;
            read.added_tokens = config.added_tokens()?;
            read.split_special_tokens = match config.get("split_special_tokens") {
                Value::Null => false,
                Value::Bool(split) => *split,
                other => return Err(config.wrong("split_special_tokens", other, "true or false")),
            };
        }
        if read.added_tokens.is_empty()
            && let Some(map) = JsonFile::read(folder.join("special_tokens_map.json"))?
        {
            read.named_tokens(&map)?;
        }
        read.chat_templates = chat_template_files(folder)?;
        if read.chat_templates.is_empty()
            && let Some(config) = &config
        {
            read.chat_templates = config.chat_templates()?;
        }
        Ok(read)
    }

    /// Makes the tokenizer recognise the tokens these files declare.
    ///
    /// A declared token must have the id it is declared with. A named special token that the vocabulary lacks stays a
    /// plain text: it has no row in the model.
    pub fn add_tokens(&self, folder: &Path, inner: &mut tokenizers::Tokenizer) -> Result<(), TokenizerError> {
        let invalid =
            |message: String| TokenizerError::Invalid { path: folder.join("tokenizer_config.json"), message };
        let named = |text: &str| self.special_tokens.iter().any(|(_, token)| token == text);
        let known = inner.get_added_tokens_decoder();
        let mut tokens: Vec<AddedToken> = Vec::new();
        for (id, token) in &self.added_tokens {
            if known.get(id) != Some(token) {
                let special = token.special || named(&token.content);
                tokens.push(token.clone().special(special));
            }
        }
        let special = self.special_tokens.iter().map(|(_, text)| text);
        for text in special.chain(self.extra_special_tokens.iter().map(String::as_str)) {
            let already = known.values().chain(&tokens).any(|token| token.content == text);
            if !already && !text.is_empty() && inner.token_to_id(text).is_some() {
                tokens.push(AddedToken::from(text, true));
            }
        }
        if !tokens.is_empty() {
            inner.add_tokens(tokens).map_err(|error| invalid(error.to_string()))?;
        }
        for (id, token) in &self.added_tokens {
            let found = inner.token_to_id(&token.content);
            if found != Some(*id) {
                let found = found.map_or("no id".to_owned(), |found| found.to_string());
                return Err(invalid(format!(
                    "added_tokens_decoder gives {:?} the id {id}; tokenizer.json gives it {found}",
                    token.content
                )));
            }
        }
        Ok(())
    }

    fn named_tokens(&mut self, file: &JsonFile) -> Result<(), TokenizerError> {
        for (key, value) in &file.object {
            match key.as_str() {
                "additional_special_tokens" | "extra_special_tokens" => match value {
                    Value::Null => {}
                    Value::Array(tokens) => {
                        for (index, token) in tokens.iter().enumerate() {
                            let text = file.token_text(&format!("{key}[{index}]"), token)?;
                            self.extra_special_tokens.push(text);
                        }
                    }
                    Value::Object(tokens) => {
                        for (name, token) in tokens {
                            self.special_tokens.set(name, file.token_text(&format!("{key}.{name}"), token)?);
                        }
                    }
                    other => return Err(file.wrong(key, other, "a list of tokens")),
                },
                // `add_bos_token` and the like are switches.
                key if key.ends_with("_token") && !value.is_null() && !value.is_boolean() => {
                    self.special_tokens.set(key, file.token_text(key, value)?);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A JSON file that holds an object.
struct JsonFile {
    path: PathBuf,
    object: Map<String, Value>,
}

impl JsonFile {
    fn read(path: PathBuf) -> Result<Option<Self>, TokenizerError> {
        let Some(bytes) = read_optional(&path)? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(Some(Self { path, object })),
            Ok(other) => Err(TokenizerError::Field {
                path,
                field: "the file".to_owned(),
                found: kind(&other).to_owned(),
                wanted: "an object".to_owned(),
            }),
            Err(source) => Err(TokenizerError::Json { path, source }),
        }
    }

    fn get(&self, key: &str) -> &Value {
        self.object.get(key).unwrap_or(&Value::Null)
    }

    fn wrong(&self, field: &str, found: &Value, wanted: &str) -> TokenizerError {
        TokenizerError::Field {
            path: self.path.clone(),
            field: field.to_owned(),
            found: kind(found).to_owned(),
            wanted: wanted.to_owned(),
        }
    }

    /// A token written as a string or as an object with `content`.
    fn token_text(&self, field: &str, value: &Value) -> Result<String, TokenizerError> {
        match value {
            Value::String(text) => Ok(text.clone()),
            Value::Object(object) => match object.get("content") {
                Some(Value::String(text)) => Ok(text.clone()),
                other => {
                    Err(self.wrong(&format!("{field}.content"), other.unwrap_or(&Value::Null), "a string"))
                }
            },
            other => Err(self.wrong(field, other, "a string or an object with `content`")),
        }
    }

    fn added_tokens(&self) -> Result<Vec<(u32, AddedToken)>, TokenizerError> {
        let declared = match self.get("added_tokens_decoder") {
            Value::Null => return Ok(Vec::new()),
            Value::Object(declared) => declared,
            other => return Err(self.wrong("added_tokens_decoder", other, "an object of ids and tokens")),
        };
        let mut tokens = Vec::with_capacity(declared.len());
        for (key, value) in declared {
            let field = format!("added_tokens_decoder.{key}");
            let id = key.parse().map_err(|_| self.wrong(&field, value, "a token id as the key"))?;
            let content = self.token_text(&field, value)?;
            let flag = |name: &str, default: bool| match value.get(name) {
                None | Some(Value::Null) => Ok(default),
                Some(Value::Bool(flag)) => Ok(*flag),
                Some(other) => Err(self.wrong(&format!("{field}.{name}"), other, "true or false")),
            };
            let special = flag("special", false)?;
            let token = AddedToken::from(content, special)
                .single_word(flag("single_word", false)?)
                .lstrip(flag("lstrip", false)?)
                .rstrip(flag("rstrip", false)?)
                .normalized(flag("normalized", !special)?);
            tokens.push((id, token));
        }
        tokens.sort_by_key(|(id, _)| *id);
        Ok(tokens)
    }

    fn chat_templates(&self) -> Result<Vec<ChatTemplateSource>, TokenizerError> {
        let field = "chat_template";
        let origin = format!("tokenizer_config.json: {field}");
        match self.get(field) {
            Value::Null => Ok(Vec::new()),
            Value::String(source) => {
                Ok(vec![ChatTemplateSource { name: "default".to_owned(), origin, source: source.clone() }])
            }
            Value::Array(templates) => templates
                .iter()
                .enumerate()
                .map(|(index, template)| match (template.get("name"), template.get("template")) {
                    (Some(Value::String(name)), Some(Value::String(source))) => Ok(ChatTemplateSource {
                        name: name.clone(),
                        origin: format!("{origin} `{name}`"),
                        source: source.clone(),
                    }),
                    _ => Err(self.wrong(
                        &format!("{field}[{index}]"),
                        template,
                        "an object with the strings `name` and `template`",
                    )),
                })
                .collect(),
            other => Err(self.wrong(field, other, "a string or a list of named templates")),
        }
    }
}

/// `chat_template.jinja` and what lies in `chat_templates/`.
fn chat_template_files(folder: &Path) -> Result<Vec<ChatTemplateSource>, TokenizerError> {
    let mut files = vec![("default".to_owned(), "chat_template.jinja".to_owned())];
    if let Ok(entries) = fs::read_dir(folder.join("chat_templates")) {
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        for file in names {
            if let Some(name) = file.strip_suffix(".jinja") {
                files.push((name.to_owned(), format!("chat_templates/{file}")));
            }
        }
    }
    let mut templates = Vec::new();
    for (name, origin) in files {
        let path = folder.join(&origin);
        if let Some(bytes) = read_optional(&path)? {
            let source = String::from_utf8(bytes)
                .map_err(|_| TokenizerError::Invalid { path, message: "not UTF-8".to_owned() })?;
            templates.push(ChatTemplateSource { name, origin, source });
        }
    }
    Ok(templates)
}

/// What a JSON value is, with its text where that is short.
fn kind(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.chars().count() > 40 => "a long string".to_owned(),
        other => other.to_string(),
    }
}
