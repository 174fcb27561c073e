//! Functions, filters, tests and methods that chat templates use and that differ from `minijinja`'s own.
//!
//! - `raise_exception(message)`, `strftime_now(format)`, as Hugging Face defines them.
//! - `tojson` prints as Python's `json.dumps(…, ensure_ascii=False)` does ([`super::json`]).
//! - Python's string methods where whitespace, argument names or cost matter ([`super::python`]); the others come from
//!   `minijinja-contrib`.
//! - `sequence` and `iterable` accept strings, as in Python.
//!
//! Not there: `%` between a string and values (the `format` filter is), and Jinja2's `truncate`, `center`, `urlize` and
//! `xmlattr` filters.

use std::borrow::Cow;
use std::error::Error as _;
use std::fmt;

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, escape_formatter};
use minijinja_contrib::pycompat;

use super::json;
use super::python::{Align, check_widths, pad, split, split_lines, strip, zero_fill};

/// Deepest nesting of a value that a template may store.
const DEEPEST_VALUE: usize = 100;
/// Bytes of text that one unit of fuel pays for, as in the engine.
const BYTES_PER_FUEL: usize = 64;

/// Adds everything to an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.remove_global("debug");
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_filter("trim", trim);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_filter("bounded_value", bounded_value);
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment
        .add_test("iterable", |value: &Value| value.kind() == ValueKind::String || value.try_iter().is_ok());
    environment.set_unknown_method_callback(method);
    // Python prints 1e-07 and 1e+16 where the engine prints all digits.
    environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(float) if value.is_number() && !value.is_integer() && float.is_finite() => {
            out.write_str(&json::float(float)).map_err(Error::from)
        }
        _ => escape_formatter(out, state, value),
    });
}

/// Marks an error as the template's own refusal.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// What a template said with `raise_exception`, if that is what the error is.
pub(super) fn raised_message(error: &Error) -> Option<String> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

/// The local time now.
fn strftime_now(format: &str) -> Result<String, Error> {
    strftime(format, &jiff::Zoned::now())
}

/// `time` in C's `strftime` notation.
pub(super) fn strftime(format: &str, time: &jiff::Zoned) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, time)
        .map_err(|error| invalid(format!("strftime_now: format {format:?}: {error}")))
}

fn tojson(
    state: &State,
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    keywords: Kwargs,
) -> Result<Value, Error> {
    let keyword = |positional: Option<Value>, name| -> Result<Value, Error> {
        match positional {
            Some(value) => Ok(value),
            None => Ok(keywords.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let ensure_ascii = keyword(ensure_ascii, "ensure_ascii")?;
    let indent = keyword(indent, "indent")?;
    let separators = keyword(None, "separators")?;
    let sort_keys = keyword(None, "sort_keys")?;
    keywords.assert_all_used()?;
    let format = json::Format::new(ensure_ascii.is_true(), &indent, &separators, sort_keys.is_true())?;
    json::to_json(value, &format, &|bytes| charge(state, bytes)).map(Value::from)
}

fn trim(value: &Value, chars: Option<&str>) -> Value {
    let text = match value.as_str() {
        Some(text) => Cow::Borrowed(text),
        None => Cow::Owned(value.to_string()),
    };
    Value::from(strip(&text, chars, true, true))
}

/// Passes on a value that may be stored: it nests at most [`DEEPEST_VALUE`] deep.
///
/// Namespaces are the only values that can change, so a namespace stored in one could contain itself: refused. Lists
/// that are views of other lists (slices) become lists of their own, or storing one in a loop would build a chain.
fn bounded_value(state: &State, value: &Value, into_namespace: bool) -> Result<Value, Error> {
    Ok(settle(state, value, into_namespace, 0)?.unwrap_or_else(|| value.clone()))
}

/// The value without views, or `None` when it has none.
fn settle(state: &State, value: &Value, into_namespace: bool, depth: usize) -> Result<Option<Value>, Error> {
    /// Values per unit of fuel.
    const VALUES: usize = 4;
    let Some(object) = value.as_object() else { return Ok(None) };
    if depth >= DEEPEST_VALUE {
        return Err(invalid(format!("value nests more than {DEEPEST_VALUE} deep")));
    }
    if into_namespace && object.type_name().ends_with("Namespace") {
        return Err(invalid("a namespace cannot be stored in a namespace".to_owned()));
    }
    let mut pairs = Vec::new();
    let mut items = Vec::new();
    let mut changed = false;
    let mut settle_item = |item: Value, index: usize| -> Result<Value, Error> {
        if index.is_multiple_of(VALUES) {
            state.consume_fuel(1)?;
        }
        Ok(match settle(state, &item, into_namespace, depth + 1)? {
            Some(settled) => {
                changed = true;
                settled
            }
            None => item,
        })
    };
    if value.kind() == ValueKind::Map {
        for (index, (key, item)) in object.try_iter_pairs().into_iter().flatten().enumerate() {
            pairs.push((key, settle_item(item, index)?));
        }
        return Ok(changed.then(|| Value::from_pairs(pairs)));
    }
    for (index, item) in object.try_iter().into_iter().flatten().enumerate() {
        items.push(settle_item(item, index)?);
    }
    let is_view = matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
        && !object.is::<Vec<Value>>()
        && !object.is::<Tuple>();
    Ok((changed || is_view).then(|| Value::from(items)))
}

/// Python methods that templates call on values.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return match (name, value.kind()) {
            ("copy", ValueKind::Map | ValueKind::Seq) => from_args(arguments).map(|()| value.clone()),
            ("index", ValueKind::Seq) => {
                let (wanted,): (&Value,) = from_args(arguments)?;
                for (index, item) in value.try_iter()?.checked().enumerate() {
                    charge(state, 1)?;
                    if item? == *wanted {
                        return Ok(Value::from(index));
                    }
                }
                Err(invalid("index: not in the list".to_owned()))
            }
            _ => pycompat::unknown_method_callback(state, value, name, arguments),
        };
    };
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(arguments)?;
            Ok(Value::from(strip(text, chars, name != "rstrip", name != "lstrip")))
        }
        "split" | "rsplit" => {
            let (separator, most, keywords): (Option<&str>, Option<i64>, Kwargs) = from_args(arguments)?;
            let separator = match separator {
                Some(separator) => Some(separator),
                None => keywords.get::<Option<&str>>("sep")?,
            };
            let most = match most {
                Some(most) => most,
                None => keywords.get::<Option<i64>>("maxsplit")?.unwrap_or(-1),
            };
            keywords.assert_all_used()?;
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            let parts = split(text, separator, most, name == "rsplit", &|bytes| charge(state, bytes))?;
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "splitlines" => {
            let (keep_ends, keywords): (Option<bool>, Kwargs) = from_args(arguments)?;
            let keep_ends = keep_ends.or(keywords.get("keepends")?).unwrap_or(false);
            keywords.assert_all_used()?;
            Ok(split_lines(text, keep_ends).into_iter().map(Value::from).collect())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let last = name == "rpartition";
            let found = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }
        "removeprefix" | "removesuffix" => {
            let (affix,): (&str,) = from_args(arguments)?;
            let rest =
                if name == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        "replace" => {
            let (old, new, most): (&str, &str, Option<i64>) = from_args(arguments)?;
            let most = usize::try_from(most.unwrap_or(-1)).unwrap_or(usize::MAX);
            let times = text.matches(old).count().min(most);
            charge(state, text.len().saturating_add(times.saturating_mul(new.len())))?;
            Ok(Value::from(text.replacen(old, new, most)))
        }
        "join" => {
            let (items,): (&Value,) = from_args(arguments)?;
            let mut joined = String::new();
            for (index, item) in items.try_iter()?.checked().enumerate() {
                let item = item?;
                let item = item.as_str().ok_or_else(|| {
                    invalid(format!("join: item {index} is a {}; wanted a string", item.kind()))
                })?;
                charge(state, text.len() + item.len() + 16)?;
                if index > 0 {
                    joined.push_str(text);
                }
                joined.push_str(item);
            }
            Ok(Value::from(joined))
        }
        "ljust" | "center" | "rjust" => {
            let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
            let align = match name {
                "ljust" => Align::Left,
                "center" => Align::Center,
                _ => Align::Right,
            };
            pad(text, width, fill.unwrap_or(" "), align).map(Value::from)
        }
        "zfill" => {
            let (width,): (i64,) = from_args(arguments)?;
            zero_fill(text, width).map(Value::from)
        }
        "index" | "rindex" => {
            let (wanted,): (&str,) = from_args(arguments)?;
            let found = if name == "index" { text.find(wanted) } else { text.rfind(wanted) };
            let found = found.ok_or_else(|| invalid(format!("{name}: substring not found")))?;
            Ok(Value::from(text[..found].chars().count()))
        }
        "format" => {
            check_widths(text)?;
            pycompat::unknown_method_callback(state, value, name, arguments)
        }
        _ => pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

/// Takes fuel for `bytes` of text, at least one unit.
fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes.div_ceil(BYTES_PER_FUEL) as u64)
}

pub(super) fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
