//! The JSON header, key by key.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// The one key of the header that is not a tensor's name.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// A header in the order it was written.
pub(super) struct Header {
    pub tensors: Vec<(String, Entry)>,
    pub metadata: BTreeMap<String, String>,
}

/// What the header says about one tensor.
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte and the byte after the last, from the start of the data.
    pub data_offsets: (usize, usize),
}

impl Header {
    /// # Errors
    /// A message, when the bytes are not a header, a key occurs twice, or a value has the wrong type.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        // JSON would take leading white space; the format does not.
        match bytes.first() {
            Some(b'{') => {}
            Some(&other) => return Err(format!("the header starts with byte 0x{other:02x}, not with `{{`")),
            None => return Err("the header is empty".to_owned()),
        }
        let text = std::str::from_utf8(bytes).map_err(|error| format!("the header is not UTF-8: {error}"))?;
        serde_json::from_str(text).map_err(|error| format!("the header is not valid: {error}"))
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Header, A::Error> {
        let mut header = Header { tensors: Vec::new(), metadata: BTreeMap::new() };
        let mut seen = HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            if key == METADATA_KEY {
                let strings = entries.next_value::<StringMap>();
                header.metadata =
                    strings.map_err(|error| A::Error::custom(format_args!("`{key}`: {error}")))?.0;
            } else {
                let entry = entries
                    .next_value()
                    .map_err(|error| A::Error::custom(format_args!("tensor `{key}`: {error}")))?;
                header.tensors.push((key.clone(), entry));
            }
            if let Some(key) = seen.replace(key) {
                return Err(A::Error::custom(format_args!("key `{key}` occurs twice")));
            }
        }
        Ok(header)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Entry, A::Error> {
        let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
        while let Some(field) = fields.next_key::<String>()? {
            let twice = match field.as_str() {
                "dtype" => dtype.replace(fields.next_value()?).is_some(),
                "shape" => shape.replace(fields.next_value()?).is_some(),
                "data_offsets" => data_offsets.replace(fields.next_value()?).is_some(),
                _ => return Err(A::Error::custom(format_args!("unknown field `{field}`"))),
            };
            if twice {
                return Err(A::Error::custom(format_args!("key `{field}` occurs twice")));
            }
        }
        Ok(Entry {
            dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
            data_offsets: data_offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?,
        })
    }
}

/// `__metadata__`: strings to strings.
struct StringMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for StringMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(StringMapVisitor)
    }
}

struct StringMapVisitor;

impl<'de> Visitor<'de> for StringMapVisitor {
    type Value = StringMap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<StringMap, A::Error> {
        let mut strings = BTreeMap::new();
        while let Some((key, value)) = entries.next_entry::<String, String>()? {
            if strings.contains_key(&key) {
                return Err(A::Error::custom(format_args!("key `{key}` occurs twice")));
            }
            strings.insert(key, value);
        }
        Ok(StringMap(strings))
    }
}
