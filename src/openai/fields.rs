//! Reading the fields of a JSON object strictly.
//!
//! A getter checks the type and range of one field and remembers its name; `null` is the same as absent. In the end
//! [`Fields::finish`] refuses every key that no getter asked for, so the set of known fields is exactly the set of
//! fields that are read.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;
pub(super) use crate::format::{describe, shorten, shorten_to};

/// The fields of a request body.
pub(super) struct Fields<'a> {
    body: &'a Map<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(body: &'a Value) -> Result<Self, ApiError> {
        let body = body.as_object().ok_or_else(|| {
            ApiError::bad_body(format!("the body must be a JSON object, got {}", describe(body)))
        })?;
        Ok(Self { body, known: Vec::new() })
    }

    /// A field of any type.
    pub(super) fn value(&mut self, name: &'static str) -> Option<&'a Value> {
        self.known.push(name);
        self.body.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn boolean(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<&'a str>, ApiError> {
        self.read(name, "a string", Value::as_str)
    }

    pub(super) fn list(&mut self, name: &'static str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        self.read(name, "a list", Value::as_array)
    }

    pub(super) fn object(&mut self, name: &'static str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.read(name, "an object", Value::as_object)
    }

    /// A whole number within `range`.
    pub(super) fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let wanted = match (*range.start(), *range.end()) {
            (i64::MIN, i64::MAX) => "a 64-bit integer".to_owned(),
            (least, i64::MAX) => format!("an integer of at least {least}"),
            (least, most) => format!("an integer from {least} to {most}"),
        };
        self.read(name, &wanted, |value| integer(value).filter(|number| range.contains(number)))
    }

    /// A count from `least` to `most`.
    pub(super) fn count(
        &mut self,
        name: &'static str,
        least: usize,
        most: usize,
    ) -> Result<Option<usize>, ApiError> {
        let bound = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let number = self.integer(name, bound(least)..=bound(most))?;
        Ok(number.and_then(|number| usize::try_from(number).ok()))
    }

    /// A finite number that `accepts` holds for, as given and as it is used.
    pub(super) fn number(
        &mut self,
        name: &'static str,
        wanted: &str,
        accepts: impl Fn(f64) -> bool,
    ) -> Result<Option<f32>, ApiError> {
        self.read(name, &format!("a number {wanted}"), |value| {
            let used = finite(value)?;
            (value.as_f64().is_some_and(&accepts) && accepts(used.into())).then_some(used)
        })
    }

    fn read<T>(
        &mut self,
        name: &'static str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        let read = read(value).ok_or_else(|| {
            ApiError::bad_request(name, format!("`{name}` must be {wanted}, got {}", describe(value)))
        })?;
        Ok(Some(read))
    }

    /// Accepts a field that this server does not implement when it is absent, null or one of `neutral` (as compact
    /// JSON), which ask for nothing.
    pub(super) fn unsupported(&mut self, name: &'static str, neutral: &[&str]) -> Result<(), ApiError> {
        if let Some(value) = self.body.get(name).filter(|value| !value.is_null())
            && !neutral.contains(&value.to_string().as_str())
        {
            let only = if neutral.is_empty() {
                String::new()
            } else {
                format!(" other than {}", neutral.join(" or "))
            };
            let message = format!("`{name}`{only} is not supported, got {}", describe(value));
            return Err(ApiError::bad_request(name, message));
        }
        // Not a name to suggest for a typo.
        self.known.extend(self.body.contains_key(name).then_some(name));
        Ok(())
    }

    /// Refuses keys that were not read.
    ///
    /// `place` says whose fields they are.
    pub(super) fn finish(self, place: &str) -> Result<(), ApiError> {
        let Some(unknown) = self.body.keys().find(|key| !self.known.contains(&key.as_str())) else {
            return Ok(());
        };
        let hint = nearest(unknown, &self.known).map(|name| format!("; did you mean `{name}`?"));
        let message = format!("unknown field `{}` for {place}{}", shorten(unknown), hint.unwrap_or_default());
        Err(ApiError::bad_request(shorten(unknown), message))
    }
}

/// A whole number; a float counts when it has no fraction and is exact.
pub(super) fn integer(value: &Value) -> Option<i64> {
    let exact = |number: &f64| number.fract() == 0.0 && number.abs() <= (1u64 << 53) as f64;
    value.as_i64().or_else(|| {
        if value.is_u64() { None } else { value.as_f64().filter(exact).map(|number| number as i64) }
    })
}

/// A number that is finite as f32.
pub(super) fn finite(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32).filter(|number| number.is_finite())
}

/// The known name that a typo most likely meant: at most a third of its letters differ.
fn nearest<'n>(unknown: &str, known: &[&'n str]) -> Option<&'n str> {
    if unknown.len() > 64 {
        return None;
    }
    let distances = known.iter().map(|name| (edit_distance(unknown, name), *name));
    distances.min().filter(|(distance, name)| distance * 3 <= name.len()).map(|(_, name)| name)
}

/// Levenshtein distance in bytes: fewest insertions, deletions and substitutions.
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn integral_floats_are_integers_and_booleans_are_not() {
        for (value, expected) in [
            (json!(3), Some(3)),
            (json!(3.0), Some(3)),
            (json!(-0.0), Some(0)),
            (json!(i64::MIN), Some(i64::MIN)),
            (json!(i64::MAX), Some(i64::MAX)),
            (json!(u64::MAX), None),
            (json!(1e300), None),
            (json!(3.5), None),
            (json!(true), None),
            (json!("3"), None),
        ] {
            assert_eq!(integer(&value), expected, "{value}");
        }
    }

    #[test]
    fn a_typo_finds_its_field() {
        let known = ["temperature", "top_p", "top_k", "max_tokens", "n"];
        for (typo, expected) in [
            ("temprature", Some("temperature")),
            ("Temperature", Some("temperature")),
            ("maxtokens", Some("max_tokens")),
            ("topp", Some("top_p")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(typo, &known), expected, "{typo}");
        }
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
    }
}
