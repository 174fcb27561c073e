//! The bytes each token stands for.
//!
//! The decoders in use are local: the text of a sequence is the concatenation of what each token adds, where only the
//! first token may add something else (no leading space), and where a strip may take characters off the front of the
//! whole. With `f` for a token's bytes at the start and `b` for its bytes after another token,
//!
//! ```text
//! text(t₀ t₁ … tₙ) = strip(utf8(f(t₀) · b(t₁) · … · b(tₙ)))
//! ```
//!
//! so decoding is a table look-up per token, streaming needs no decoding twice, and a character spread over several
//! tokens is put together from bytes. Decoders that are not local are refused.
//!
//! | decoder | f | b |
//! |---|---|---|
//! | ByteLevel | the GPT-2 byte alphabet undone | same |
//! | ByteFallback | `<0xE4>` is the byte E4 | same |
//! | Replace, Strip before Fuse | applied to the token | same |
//! | Metaspace | `▁` removed (unless `prepend_scheme` is `never`) | `▁` is a space |
//! | WordPiece | as is | `##` removed, else a space before |
//! | none | as is | a space before |

use std::borrow::Cow;

use serde_json::Value;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder, Result};

/// How many replacement characters bytes that are not UTF-8 become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidBytes {
    /// One per longest prefix of a character, as Unicode recommends and byte-level tokenizers do.
    PerSequence,
    /// One per byte, as SentencePiece does.
    PerByte,
}

/// A stage that maps each token's string to another.
struct Stage {
    decoder: DecoderWrapper,
    /// The first token is treated differently from the others.
    positional: bool,
}

/// Per-token bytes of one tokenizer.
pub struct Pieces {
    /// All tokens' bytes, one after the other.
    bytes: Vec<u8>,
    /// End of each token's bytes; a hole in the ids has no token string.
    ends: Vec<usize>,
    tokens: Vec<Option<String>>,
    stages: Vec<Stage>,
    form: Form,
    separator: bool,
    stripped_start: Option<(char, usize)>,
}

/// What a token's string stands for after all stages.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Text,
    ByteLevel,
    ByteFallback,
}

impl Pieces {
    /// Computes the table for `tokens` (by id).
    ///
    /// # Errors
    /// A decoder whose output for one token depends on more than whether it is the first.
    pub fn new(decoder: Option<&DecoderWrapper>, tokens: Vec<Option<String>>) -> Result<Self> {
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(tokens.len()),
            tokens,
            stages: Vec::new(),
            form: Form::Text,
            separator: decoder.is_none(),
            stripped_start: None,
        };
        if let Some(decoder) = decoder {
            let mut fused = false;
            for stage in flatten(serde_json::to_value(decoder)?) {
                pieces.add_stage(stage, &mut fused)?;
            }
        }

        // One pass over the whole vocabulary, behind a first token that takes the special place.
        let strings = std::iter::once(String::from("a"))
            .chain(pieces.tokens.iter().map(|token| token.clone().unwrap_or_default()))
            .collect();
        let strings = pieces.apply(strings)?;
        for (token, string) in pieces.tokens.iter().zip(strings.into_iter().skip(1)) {
            if token.is_some() {
                if pieces.separator {
                    pieces.bytes.push(b' ');
                }
                pieces.bytes.extend(to_bytes(pieces.form, string));
            }
            pieces.ends.push(pieces.bytes.len());
        }
        Ok(pieces)
    }

    /// Bytes that a token adds after another one.
    pub fn following(&self, id: u32) -> Option<&[u8]> {
        let index = id as usize;
        self.tokens.get(index)?.as_ref()?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.bytes[start..self.ends[index]])
    }

    /// Bytes of a token at the very start of a text.
    pub fn first(&self, id: u32) -> Option<Cow<'_, [u8]>> {
        let token = self.tokens.get(id as usize)?.as_ref()?;
        if !self.separator && !self.stages.iter().any(|stage| stage.positional) {
            return self.following(id).map(Cow::Borrowed);
        }
        // The stages worked for this very string when the table was made.
        let string = self.apply(vec![token.clone()]).ok()?.pop()?;
        Some(Cow::Owned(to_bytes(self.form, string)))
    }

    /// A character removed from the start of the whole text, and how often at most.
    pub fn stripped_start(&self) -> Option<(char, usize)> {
        self.stripped_start
    }

    pub fn invalid_bytes(&self) -> InvalidBytes {
        match self.form {
            Form::ByteFallback => InvalidBytes::PerByte,
            Form::Text | Form::ByteLevel => InvalidBytes::PerSequence,
        }
    }

    fn apply(&self, mut strings: Vec<String>) -> Result<Vec<String>> {
        let wanted = strings.len();
        for stage in &self.stages {
            strings = stage.decoder.decode_chain(strings)?;
            if strings.len() != wanted {
                return Err("decoder changes the number of tokens".into());
            }
        }
        Ok(strings)
    }

    fn add_stage(&mut self, json: Value, fused: &mut bool) -> Result<()> {
        let kind = json["type"].as_str().unwrap_or_default().to_owned();
        let refuse = |why: &str| -> Result<()> { Err(format!("decoder {kind}: {why}").into()) };
        let in_text = self.form == Form::Text;
        let mut push = |positional| -> Result<()> {
            self.stages.push(Stage { decoder: serde_json::from_value(json.clone())?, positional });
            Ok(())
        };
        match kind.as_str() {
            "Fuse" => *fused = true,
            "ByteLevel" | "ByteFallback" if *fused || !in_text => {
                return refuse("must come before Fuse, and once");
            }
            "ByteLevel" => self.form = Form::ByteLevel,
            "ByteFallback" => self.form = Form::ByteFallback,
            "Strip" if *fused => {
                let start = json["start"].as_u64().unwrap_or_default() as usize;
                let content = json["content"].as_str().and_then(|text| text.chars().next());
                if json["stop"].as_u64() != Some(0) || self.stripped_start.is_some() {
                    return refuse("stripping the end of a fused text cannot be streamed");
                }
                self.stripped_start = content.filter(|_| start > 0).map(|content| (content, start));
            }
            "Replace" if *fused && !replaces_one_char(&json) => {
                return refuse("replacing more than one character of a fused text cannot be streamed");
            }
            _ if !in_text || (*fused && kind != "Replace") => return refuse("not supported at this place"),
            "Strip" if json["stop"].as_u64() != Some(0) => return refuse("stop must be 0"),
            "Replace" | "Strip" => push(false)?,
            "Metaspace" => push(json["prepend_scheme"].as_str() != Some("never"))?,
            "WordPiece" => push(true)?,
            _ => {
                return refuse(
                    "not supported; supported are ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Sequence, Strip \
                     and WordPiece",
                );
            }
        }
        Ok(())
    }
}

/// A decoder's stages in order, nested sequences resolved.
fn flatten(decoder: Value) -> Vec<Value> {
    match decoder {
        Value::Object(mut object) if object.get("type").and_then(Value::as_str) == Some("Sequence") => {
            match object.remove("decoders") {
                Some(Value::Array(stages)) => stages.into_iter().flat_map(flatten).collect(),
                _ => Vec::new(),
            }
        }
        other => vec![other],
    }
}

fn replaces_one_char(json: &Value) -> bool {
    json["pattern"]["String"].as_str().is_some_and(|pattern| pattern.chars().count() == 1)
}

fn to_bytes(form: Form, string: String) -> Vec<u8> {
    match form {
        Form::Text => string.into_bytes(),
        Form::ByteLevel => {
            // A token with any character outside the alphabet is an added token that was never byte-encoded.
            let bytes: Option<Vec<u8>> = string.chars().map(alphabet_byte).collect();
            bytes.unwrap_or_else(|| string.into_bytes())
        }
        Form::ByteFallback => match fallback_byte(&string) {
            Some(byte) => vec![byte],
            None => string.into_bytes(),
        },
    }
}

/// The byte of a SentencePiece byte token `<0xE4>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// Undoes GPT-2's byte alphabet: bytes that print stand for themselves, the others are, in order, the characters from
/// U+0100 on.
fn alphabet_byte(letter: char) -> Option<u8> {
    match letter as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}
