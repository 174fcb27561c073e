//! JSON files, read strictly.
//!
//! RFC 8259 leaves open what a repeated key means, and parsers differ; so a repeated key is refused, at any
//! depth. Errors name the path of keys down to the value and its line.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{FormatError, open_regular};

/// Largest JSON file that is read; the largest real ones (tokenizers) are about half of it.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Reads a JSON file.
///
/// # Errors
/// When it cannot be read, is larger than 64 MiB, is not UTF-8, starts with a byte order mark, is not JSON, or
/// repeats a key within an object.
pub fn read_json(path: &Path) -> Result<Value, FormatError> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    // One byte more than the limit tells a file at the limit from one beyond it, whatever its metadata says.
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(FormatError::io(path, "read"))?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(invalid(path, format!("larger than {} MiB", MAX_JSON_BYTES >> 20)));
    }
    parse_json(path, &bytes)
}

/// Parses JSON bytes as strictly as [`read_json`]; `path` is for messages.
///
/// # Errors
/// As [`read_json`], apart from reading.
pub fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value, FormatError> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(invalid(path, "starts with a byte order mark; save it as UTF-8 without one".to_owned()));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| invalid(path, format!("not UTF-8: {error}")))?;
    parse_text(text).map_err(|error| invalid(path, error.to_string()))
}

/// Parses JSON text as strictly as [`read_json`].
///
/// # Errors
/// What is wrong with the text, with line and column.
pub fn parse_text(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).map(|StrictValue(value)| value)
}

fn invalid(path: &Path, problem: String) -> FormatError {
    FormatError::Json { path: path.to_owned(), problem }
}

/// A [`Value`] whose objects repeat no key.
struct StrictValue(Value);

impl<'de> Deserialize<'de> for StrictValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(StrictValue)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(StrictValue(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let StrictValue(value) = entries
                .next_value()
                .map_err(|error| de::Error::custom(format_args!("in `{key}`: {error}")))?;
            if object.contains_key(&key) {
                return Err(de::Error::custom(format_args!("key `{key}` occurs twice")));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Value, String> {
        parse_json(Path::new("config.json"), text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_repeated_key_is_refused_at_any_depth() {
        let error = parse(r#"{"a": 1, "b": [{"c": {"r": 8, "r": 16}}]}"#).unwrap_err();
        assert!(error.contains("config.json") && error.contains("key `r` occurs twice"), "{error}");
        assert!(error.contains("in `b`: in `c`"), "{error}");
        assert!(parse(r#"{"a": 1, "\u0061": 2}"#).unwrap_err().contains("key `a` occurs twice"));
        assert!(parse(r#"{"a": {"r": 1}, "b": {"r": 1}}"#).is_ok());
    }

    #[test]
    fn text_that_is_not_plain_utf8_json_is_refused() {
        for (bytes, wanted) in [
            (&b"\xef\xbb\xbf{}"[..], "byte order mark"),
            (b"{\"a\": \"\xff\"}", "not UTF-8"),
            (b"", "EOF"),
            (b"{\"a\": 1} x", "trailing characters"),
            (b"{\"alpha\": NaN}", "in `alpha`"),
            (b"{\"alpha\": 1e999}", "in `alpha`: number out of range"),
            (b"{'a': 1}", "line 1"),
        ] {
            let error = parse_json(Path::new("x.json"), bytes).unwrap_err().to_string();
            assert!(error.starts_with("x.json: not valid JSON") && error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        let error = parse(&"[".repeat(1_000_000)).unwrap_err();
        assert!(error.contains("recursion limit"), "{error}");
    }

    #[test]
    fn a_file_beyond_the_limit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("huge.json");
        std::fs::File::create(&path).unwrap().set_len(MAX_JSON_BYTES + 1).unwrap();
        let error = read_json(&path).unwrap_err().to_string();
        assert!(error.contains("larger than 64 MiB"), "{error}");
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (-1e300..1e300).prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(".{0,4}", inner, 0..5)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn strict_parsing_gives_what_serde_json_gives(value in values()) {
            let text = serde_json::to_string_pretty(&value).unwrap();
            prop_assert_eq!(parse(&text).unwrap(), serde_json::from_str::<Value>(&text).unwrap());
        }
    }
}
