//! Typed reading of one JSON object, with errors that name the file, the field and the value.
//!
//! Configuration files write an unset option as `null` or leave it out; both read as `None` here.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::model::ModelError;

/// Longest excerpt of an offending value in a message, in characters.
const EXCERPT: usize = 80;

/// A JSON object and where it came from.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    file: &'a str,
    /// Name of the field that holds this object; empty for the whole file.
    parent: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The whole of a file.
    pub fn new(value: &'a Value, file: &'a str) -> Result<Self, ModelError> {
        match value {
            Value::Object(object) => Ok(Self { file, parent: "", object }),
            other => Err(ModelError::Weights {
                place: file.to_owned(),
                problem: format!("found {}; wanted a JSON object", excerpt(other)),
            }),
        }
    }

    /// The value, `None` when absent or `null`.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// Whether the file says anything about this field, `null` included.
    pub fn mentions(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// Names of the fields that are set.
    pub fn set_names(&self) -> impl Iterator<Item = &'a str> {
        self.object.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str())
    }

    pub fn object(&self, name: &'a str) -> Result<Option<Fields<'a>>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields { file: self.file, parent: name, object })),
            Some(_) => Err(self.wrong(name, "an object")),
        }
    }

    pub fn integer(&self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let integer = value.as_u64().and_then(|integer| usize::try_from(integer).ok());
        match integer {
            Some(integer) if range.contains(&integer) => Ok(Some(integer)),
            _ => Err(self.wrong(name, &between_integers(&range))),
        }
    }

    pub fn required_integer(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize, ModelError> {
        let wanted = between_integers(&range);
        self.integer(name, range)?.ok_or_else(|| self.missing(name, &wanted))
    }

    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if range.contains(&number) => Ok(Some(number)),
                _ => Err(self.wrong(name, &between_numbers(&range))),
            },
        }
    }

    pub fn required_number(&self, name: &str, range: RangeInclusive<f64>) -> Result<f64, ModelError> {
        let wanted = between_numbers(&range);
        self.number(name, range)?.ok_or_else(|| self.missing(name, &wanted))
    }

    /// A list of exactly `length` numbers.
    pub fn required_numbers(
        &self,
        name: &str,
        length: usize,
        range: RangeInclusive<f64>,
    ) -> Result<Vec<f64>, ModelError> {
        let wanted = format!("a list of {length} values, each {}", between_numbers(&range));
        let value = self.get(name).ok_or_else(|| self.missing(name, &wanted))?;
        let list = value.as_array().ok_or_else(|| self.wrong(name, &wanted))?;
        if list.len() != length {
            return Err(self.wrong_as(name, format!("a list of {}", list.len()), &wanted));
        }
        let read = |(index, value): (usize, &Value)| match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(number),
            _ => Err(self.wrong_as(&format!("{name}[{index}]"), excerpt(value), &between_numbers(&range))),
        };
        list.iter().enumerate().map(read).collect()
    }

    pub fn boolean(&self, name: &str) -> Result<Option<bool>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value.as_bool().map(Some).ok_or_else(|| self.wrong(name, "true or false")),
        }
    }

    pub fn text(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(name, "a string")),
        }
    }

    pub fn texts(&self, name: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        texts.map(Some).ok_or_else(|| self.wrong(name, "a list of strings"))
    }

    /// The error for a field whose value is not what was wanted.
    pub fn wrong(&self, name: &str, wanted: &str) -> ModelError {
        self.wrong_as(name, self.found(name), wanted)
    }

    pub fn wrong_as(&self, name: &str, found: String, wanted: &str) -> ModelError {
        ModelError::Field {
            file: self.file.to_owned(),
            field: self.path(name),
            found,
            wanted: wanted.to_owned(),
        }
    }

    pub fn missing(&self, name: &str, wanted: &str) -> ModelError {
        ModelError::MissingField {
            file: self.file.to_owned(),
            field: self.path(name),
            wanted: wanted.to_owned(),
        }
    }

    pub fn unsupported(&self, name: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Unsupported {
            file: self.file.to_owned(),
            field: self.path(name),
            found: self.found(name),
            reason: reason.into(),
        }
    }

    fn found(&self, name: &str) -> String {
        self.object.get(name).map_or_else(|| "absent".to_owned(), excerpt)
    }

    fn path(&self, name: &str) -> String {
        if self.parent.is_empty() { name.to_owned() } else { format!("{}.{name}", self.parent) }
    }
}

fn between_integers(range: &RangeInclusive<usize>) -> String {
    format!("an integer from {} to {}", range.start(), range.end())
}

fn between_numbers(range: &RangeInclusive<f64>) -> String {
    format!("a number from {:?} to {:?}", range.start(), range.end())
}

/// The value as JSON, cut short.
pub(super) fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(EXCERPT) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
