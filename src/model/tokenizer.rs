//! Text to token ids and back, as the model's own folder defines it.
//!
//! `tokenizer.json` holds vocabulary, normalisation, splitting, post-processing (where `<s>` is added) and decoding;
//! `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` add the names of the special tokens
//! and the chat template. Encoding is the `tokenizers` crate's. Decoding is done here from per-token bytes
//! (`pieces`), so that text decoded at once, streamed text and the bytes reported with log-probabilities agree.
//!
//! Truncation and padding that a `tokenizer.json` may carry from training are switched off: a prompt is never cut
//! and never filled up.

mod config;
mod pieces;
#[cfg(test)]
pub(crate) mod tests;

use std::borrow::Cow;
use std::fs;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::model::detokenizer::TextDecoder;
use config::FolderConfig;
use pieces::Pieces;

pub use config::{ChatTemplateSource, SpecialTokens};
pub(super) use pieces::InvalidBytes;

/// Ids above this are refused: they come from a damaged file, and tables are sized by the largest id.
const LARGEST_ID: u32 = (1 << 24) - 1;

/// What can be wrong with a tokenizer folder or a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: no tokenizer.json", .0.display())]
    Missing(PathBuf),
    #[error(
        "{}: found {found} but no tokenizer.json; write one next to it with transformers: \
         AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        folder.display()
    )]
    OnlySlow { folder: PathBuf, found: &'static str },
    #[error("{}: not valid JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: {field} is {found}; wanted {wanted}", path.display())]
    Field { path: PathBuf, field: String, found: String, wanted: String },
    #[error("{}: {message}", path.display())]
    Invalid { path: PathBuf, message: String },
    #[error("the text could not be encoded: {0}")]
    Encode(String),
}

/// A model's tokenizer. Shared between threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Pieces,
    special: Vec<bool>,
    special_tokens: SpecialTokens,
    chat_templates: Vec<ChatTemplateSource>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model folder.
    ///
    /// Special tokens that `tokenizer_config.json` names and the vocabulary has are matched in text as Hugging Face
    /// does, also where `tokenizer.json` does not list them as added tokens.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let Some(bytes) = read_optional(&path)? else {
            let slow = ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json"];
            return Err(match slow.into_iter().find(|name| folder.join(name).exists()) {
                Some(found) => TokenizerError::OnlySlow { folder: folder.to_owned(), found },
                None => TokenizerError::Missing(folder.to_owned()),
            });
        };
        let config = FolderConfig::read(folder)?;
        let invalid = |message: String| TokenizerError::Invalid { path: path.clone(), message };

        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|source| TokenizerError::Json { path: path.clone(), source })?;
        check_dropout(&path, &json)?;

        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(invalid)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        inner.set_encode_special_tokens(config.split_special_tokens);
        check_added_ids(&path, &json, &inner)?;
        config.add_tokens(folder, &mut inner)?;

        let tokens = token_table(&path, &inner)?;
        let mut special = vec![false; tokens.len()];
        for (id, token) in inner.get_added_tokens_decoder() {
            if let Some(special) = special.get_mut(id as usize) {
                *special = token.special;
            }
        }
        let pieces = guarded(|| Pieces::new(inner.get_decoder(), tokens)).map_err(invalid)?;
        Ok(Self {
            inner,
            pieces,
            special,
            special_tokens: config.special_tokens,
            chat_templates: config.chat_templates,
        })
    }

    /// Token ids of `text`. `add_special_tokens` applies the post-processor (`<s>` and the like): on for plain
    /// prompts, off for text that a chat template has rendered.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        guarded(|| self.inner.encode_fast(text, add_special_tokens))
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(TokenizerError::Encode)
    }

    /// [`Self::encode`], with the bytes of `text` that each token stands for.
    ///
    /// A range begins no later than the one before it ends, so together they cover the text: what no token shows (a
    /// space that a normaliser removed) belongs to the token behind it. The tokens of one character all have its
    /// range; tokens that the post-processor adds have an empty one.
    pub fn encode_with_ranges(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>), TokenizerError> {
        let encoding =
            guarded(|| self.inner.encode(text, add_special_tokens)).map_err(TokenizerError::Encode)?;
        let mut covered = 0;
        // Post-processors shorten the ranges of tokens that begin with spaces, so a start alone says little.
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| {
            let range = start.min(covered)..end;
            covered = covered.max(end);
            range
        });
        let ranges = ranges.collect();
        Ok((encoding.get_ids().to_vec(), ranges))
    }

    /// Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that no token has are skipped.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut text = String::new();
        let mut decoder = TextDecoder::new(self, skip_special_tokens);
        for &id in ids {
            decoder.push(self, id, &mut text);
        }
        decoder.finish(self, &mut text);
        text
    }

    /// The bytes that `id` adds to a running text (a word's token has its leading space); `None` for an id that no
    /// token has.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.pieces.following(id)
    }

    /// [`Self::token_bytes`] as text, for display beside log-probabilities: U+FFFD where a token is part of a
    /// character, empty for an id that no token has.
    pub fn decode_token(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id).unwrap_or_default()).into_owned()
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.special.len()
    }

    /// Whether `id` is a control token, left out of text by `skip_special_tokens`.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Id of the token spelled exactly `token`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Text of the token that begins a sequence, when the folder names one.
    pub fn bos_token(&self) -> Option<&str> {
        self.special_tokens.get("bos_token")
    }

    /// Text of the token that ends a sequence, when the folder names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token")
    }

    /// Text of the padding token, when the folder names one.
    pub fn pad_token(&self) -> Option<&str> {
        self.special_tokens.get("pad_token")
    }

    /// All named special tokens (`bos_token`, `eos_token`, …): variables of the chat template.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// The folder's chat templates; empty when the model has none.
    pub fn chat_templates(&self) -> &[ChatTemplateSource] {
        &self.chat_templates
    }

    /// Bytes of `id` as the first token of a text, where some decoders drop the leading space.
    pub(super) fn first_token_bytes(&self, id: u32) -> Option<Cow<'_, [u8]>> {
        self.pieces.first(id)
    }

    /// A character that the decoder removes from the start of the text, and how often at most.
    pub(super) fn stripped_start(&self) -> Option<(char, usize)> {
        self.pieces.stripped_start()
    }

    /// How many U+FFFD bytes that are not UTF-8 become.
    pub(super) fn invalid_bytes(&self) -> InvalidBytes {
        self.pieces.invalid_bytes()
    }
}

/// Runs code of the `tokenizers` crate, which panics on some malformed definitions, so that a bad folder or text
/// fails by itself.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_else(|| "malformed definition".to_owned())),
    }
}

/// BPE dropout draws random merges while encoding: the same prompt would give different ids.
fn check_dropout(path: &Path, json: &Value) -> Result<(), TokenizerError> {
    match &json["model"]["dropout"] {
        Value::Null => Ok(()),
        Value::Number(number) if number.as_f64() == Some(0.0) => Ok(()),
        other => Err(TokenizerError::Field {
            path: path.to_owned(),
            field: "model.dropout".to_owned(),
            found: other.to_string(),
            wanted: "null or 0 (dropout makes encoding random)".to_owned(),
        }),
    }
}

/// The crate numbers added tokens itself; where that differs from the file, the model was trained with other ids.
fn check_added_ids(path: &Path, json: &Value, inner: &tokenizers::Tokenizer) -> Result<(), TokenizerError> {
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(content), Some(declared)) = (token["content"].as_str(), token["id"].as_u64()) else {
            continue;
        };
        let found = inner.token_to_id(content);
        if found.map(u64::from) != Some(declared) {
            let found = found.map_or("no id".to_owned(), |id| format!("id {id}"));
            return Err(TokenizerError::Invalid {
                path: path.to_owned(),
                message: format!("added token {content:?} is declared with id {declared} but has {found}"),
            });
        }
    }
    Ok(())
}

/// The string of every id; `None` where the ids have a hole.
fn token_table(path: &Path, inner: &tokenizers::Tokenizer) -> Result<Vec<Option<String>>, TokenizerError> {
    let mut tokens = Vec::new();
    for (token, id) in inner.get_vocab(true) {
        if id > LARGEST_ID {
            return Err(TokenizerError::Invalid {
                path: path.to_owned(),
                message: format!("token {token:?} has id {id}; the largest supported is {LARGEST_ID}"),
            });
        }
        let index = id as usize;
        if index >= tokens.len() {
            tokens.resize(index + 1, None);
        }
        // The added vocabulary's own spelling is what decoding starts from; it differs where the normaliser
        // changed the token.
        tokens[index] = Some(inner.get_added_vocabulary().simple_id_to_token(id).unwrap_or(token));
    }
    Ok(tokens)
}

/// A file's bytes; `None` when it does not exist.
fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { path: path.to_owned(), source }),
    }
}
