//! Values in messages: what was found, short enough to read.

use serde_json::Value;

/// A value as an error message shows it: its JSON, shortened.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Array(elements) if elements.len() > 8 => format!("a list of {}", elements.len()),
        Value::Object(entries) if entries.len() > 8 => format!("an object of {} keys", entries.len()),
        Value::String(text) => Value::from(shorten(text)).to_string(),
        value => shorten(&value.to_string()),
    }
}

/// At most 64 characters of a text.
pub(crate) fn shorten(text: &str) -> String {
    shorten_to(text, 64)
}

/// At most `most` characters of a text.
pub(crate) fn shorten_to(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_in_messages_stay_short() {
        let long = "é".repeat(10_000);
        assert_eq!(describe(&json!(long)).chars().count(), 67);
        assert_eq!(describe(&json!(vec![0; 1000])), "a list of 1000");
        assert_eq!(describe(&json!({"a": [1]})), r#"{"a":[1]}"#);
        assert!(describe(&json!([long])).chars().count() < 70);
    }
}
