//! JSON as Python's `json.dumps` prints it: `, ` and `: ` between items, keys in their order, text as it is.

use minijinja::value::ValueKind;
use minijinja::{Error, Value};

use super::functions::invalid;

/// Deepest nesting printed.
const DEEPEST: usize = 200;

/// The arguments of `json.dumps`.
pub(super) struct Format {
    ensure_ascii: bool,
    /// One level of indentation; `None` prints on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl Format {
    /// Undefined values stand for arguments that were not given.
    pub fn new(
        ensure_ascii: bool,
        indent: &Value,
        separators: &Value,
        sort_keys: bool,
    ) -> Result<Self, Error> {
        let indent = match indent {
            indent if indent.is_undefined() || indent.is_none() => None,
            indent => Some(match (indent.as_str(), indent.as_i64()) {
                (Some(text), _) => text.to_owned(),
                (None, Some(width)) if width <= 100 => " ".repeat(usize::try_from(width).unwrap_or(0)),
                _ => {
                    return Err(invalid(format!(
                        "tojson: indent is {indent}; wanted a string or at most 100"
                    )));
                }
            }),
        };
        let (item_separator, key_separator) = if separators.is_undefined() || separators.is_none() {
            (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
        } else {
            let texts: Vec<Value> = separators.try_iter()?.take(3).collect();
            match texts.as_slice() {
                [item, key] => match (item.as_str(), key.as_str()) {
                    (Some(item), Some(key)) => (item.to_owned(), key.to_owned()),
                    _ => return Err(invalid("tojson: separators must be strings".to_owned())),
                },
                _ => return Err(invalid("tojson: separators must be two strings".to_owned())),
            }
        };
        Ok(Self { ensure_ascii, indent, item_separator, key_separator, sort_keys })
    }
}

/// Prints `value`. `charge` is told of bytes before they are written.
pub(super) fn to_json(
    value: &Value,
    format: &Format,
    charge: &dyn Fn(usize) -> Result<(), Error>,
) -> Result<String, Error> {
    let mut writer = Writer { format, charge, out: String::new() };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    format: &'a Format,
    charge: &'a dyn Fn(usize) -> Result<(), Error>,
    out: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(invalid(format!("tojson: value nests more than {DEEPEST} deep")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let mut empty = true;
                self.out.push('[');
                for item in value.try_iter()?.checked() {
                    self.separate(empty, depth + 1)?;
                    empty = false;
                    self.value(&item?, depth + 1)?;
                }
                self.close(empty, depth, ']')?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()?.checked() {
                    let key = key?;
                    let item = value.get_item(&key)?;
                    pairs.push((key, item));
                }
                if self.format.sort_keys {
                    pairs.sort_by(|(left, _), (right, _)| left.cmp(right));
                }
                let empty = pairs.is_empty();
                self.out.push('{');
                for (index, (key, item)) in pairs.iter().enumerate() {
                    self.separate(index == 0, depth + 1)?;
                    self.key(key)?;
                    self.out.push_str(&self.format.key_separator);
                    self.value(item, depth + 1)?;
                }
                self.close(empty, depth, '}')?;
            }
            kind => return Err(invalid(format!("tojson: a value of kind {kind} is not JSON"))),
        }
        Ok(())
    }

    fn separate(&mut self, first: bool, depth: usize) -> Result<(), Error> {
        (self.charge)(32)?;
        if !first {
            self.out.push_str(&self.format.item_separator);
        }
        self.new_line(depth)
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) -> Result<(), Error> {
        if !empty {
            self.new_line(depth)?;
        }
        self.out.push(bracket);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        if let Some(indent) = &self.format.indent {
            (self.charge)(indent.len() * depth)?;
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
        Ok(())
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.out.push('"');
                self.value(key, 0)?;
                self.out.push('"');
                Ok(())
            }
            kind => Err(invalid(format!("tojson: a key of kind {kind} is not JSON"))),
        }
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            self.out.push_str(&value.to_string());
        } else {
            self.out.push_str(&float(f64::try_from(value.clone())?));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        (self.charge)(text.len())?;
        self.out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                control if control < ' ' => self.out.push_str(&format!("\\u{:04x}", control as u32)),
                other if self.format.ensure_ascii && other > '~' => {
                    for unit in other.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                other => self.out.push(other),
            }
        }
        self.out.push('"');
        Ok(())
    }
}

/// Python's `repr` of a float, with JSON's names for what is not a number.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // Rust's `e` notation has the shortest digits that read back as the same number, as Python's `repr` has.
    let shortest = format!("{value:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}
