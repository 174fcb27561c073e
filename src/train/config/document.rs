//! A TOML document whose values know their line, read strictly: what is not understood is refused with its place.

use std::ops::Deref;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;
use crate::format::nearest;

/// The text of a file, for messages.
pub(super) struct Document<'a> {
    pub path: &'a Path,
    pub text: &'a str,
}

/// A value and the line it stands in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Given<T> {
    pub value: T,
    pub line: usize,
}

impl<T> Deref for Given<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// A table of the file.
pub(super) struct Table<'a> {
    pub document: &'a Document<'a>,
    /// Line of its header.
    pub line: usize,
    /// What it is called in messages.
    name: &'static str,
    values: &'a DeTable<'a>,
}

/// A kind of table: what it is called and which keys it may have.
pub(super) struct TableKind {
    pub name: &'static str,
    pub keys: &'static [&'static str],
}

/// What other trainers call our keys.
const ALIASES: &[(&str, &str)] = &[
    ("adam_epsilon", "eps"),
    ("eval_steps", "eval_every"),
    ("learning_rate", "lr"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("lora_r", "rank"),
    ("loraplus_lr_ratio", "lr_b_ratio"),
    ("lr_scheduler_type", "schedule"),
    ("max_seq_length", "max_length"),
    ("max_seq_len", "max_length"),
    ("max_steps", "steps"),
    ("num_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("output_dir", "out"),
    ("per_device_train_batch_size", "batch_size"),
    ("r", "rank"),
    ("save_steps", "save_every"),
    ("sequence_len", "max_length"),
    ("target_modules", "targets"),
];

impl Document<'_> {
    /// The line of a byte, from 1. Behind the last line it is the last one.
    pub fn line(&self, offset: usize) -> usize {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        line.min(self.text.lines().count().max(1))
    }

    pub fn refuse(&self, line: usize, problem: impl Into<String>) -> ConfigError {
        ConfigError::Line { path: self.path.to_owned(), line, problem: problem.into() }
    }
}

impl<'a> Table<'a> {
    /// Takes a value as a table of the first of `kinds`; the others say where a key belongs that has no place in it.
    ///
    /// # Errors
    /// When it is no table, or has a key that its kind has not.
    pub fn new(
        document: &'a Document<'a>,
        value: &'a Spanned<DeValue<'a>>,
        kind: &TableKind,
        kinds: &[TableKind],
    ) -> Result<Self, ConfigError> {
        let line = document.line(value.span().start);
        let DeValue::Table(values) = value.get_ref() else {
            let found = describe(value.get_ref());
            return Err(document.refuse(line, format!("{} is {found}; wanted a table", kind.name)));
        };
        Self::checked(Self { document, line, name: kind.name, values }, kind, kinds)
    }

    /// The whole file as a table.
    ///
    /// # Errors
    /// When it has a key that its kind has not.
    pub fn root(
        document: &'a Document<'a>,
        values: &'a DeTable<'a>,
        kind: &TableKind,
        kinds: &[TableKind],
    ) -> Result<Self, ConfigError> {
        Self::checked(Self { document, line: 1, name: kind.name, values }, kind, kinds)
    }

    fn checked(self, kind: &TableKind, kinds: &[TableKind]) -> Result<Self, ConfigError> {
        let unknown = self.values.keys().filter(|key| !kind.keys.contains(&key.get_ref().as_ref()));
        let Some(unknown) = unknown.min_by_key(|key| key.span().start) else {
            return Ok(self);
        };
        let key = unknown.get_ref().as_ref();
        let mut problem = format!("unknown key {} in {}", quoted(key), self.name);
        let alias = ALIASES.iter().find(|(alias, _)| *alias == key).map(|(_, ours)| *ours);
        let ours = alias.unwrap_or(key);
        let places: Vec<&str> =
            kinds.iter().filter(|other| other.keys.contains(&ours)).map(|other| other.name).collect();
        if alias.is_some() {
            problem += &format!("; it is called `{ours}` here");
        }
        if kind.keys.contains(&ours) {
            // The alias has said it.
        } else if !places.is_empty() {
            problem += &format!("; it belongs in {}", places.join(" or "));
        } else if let Some(known) = nearest(key, kind.keys) {
            problem += &format!("; did you mean `{known}`?");
        } else {
            problem += &format!("; known are {}", kind.keys.join(", "));
        }
        Err(self.document.refuse(self.document.line(unknown.span().start), problem))
    }

    /// The line of a key that is there.
    pub fn line_of(&self, key: &str) -> Option<usize> {
        let (key, _) = self.values.get_key_value(key)?;
        Some(self.document.line(key.span().start))
    }

    /// What to say about a key that has to be there and is not.
    pub fn missing(&self, key: &str, wanted: &str) -> ConfigError {
        self.document.refuse(self.line, format!("{} has no `{key}`; wanted {wanted}", self.name))
    }

    /// A value of any type.
    pub fn value(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.values.get(key)
    }

    /// A value that `read` understands.
    ///
    /// # Errors
    /// When it does not; `wanted` says what it does understand.
    pub fn read<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a DeValue<'a>) -> Option<T>,
    ) -> Result<Option<Given<T>>, ConfigError> {
        let Some(spanned) = self.value(key) else { return Ok(None) };
        let line = self.document.line(spanned.span().start);
        match read(spanned.get_ref()) {
            Some(value) => Ok(Some(Given { value, line })),
            None => {
                let found = describe(spanned.get_ref());
                Err(self.document.refuse(line, format!("`{key}` is {found}; wanted {wanted}")))
            }
        }
    }

    pub fn boolean(&self, key: &str) -> Result<Option<Given<bool>>, ConfigError> {
        self.read(key, "true or false", DeValue::as_bool)
    }

    /// A string that is not empty.
    pub fn text(&self, key: &str) -> Result<Option<Given<String>>, ConfigError> {
        self.read(key, "a string that is not empty", |value| {
            value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
        })
    }

    /// An integer from `least` to `most`.
    pub fn integer(&self, key: &str, least: u64, most: u64) -> Result<Option<Given<u64>>, ConfigError> {
        let wanted = match most {
            u64::MAX => format!("an integer of at least {least}"),
            most => format!("an integer from {least} to {most}"),
        };
        self.read(key, &wanted, |value| {
            let integer = value.as_integer()?;
            let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok()?;
            (least..=most).contains(&number).then_some(number)
        })
    }

    /// As [`Self::integer`], for sizes.
    pub fn count(&self, key: &str, least: usize, most: usize) -> Result<Option<Given<usize>>, ConfigError> {
        let count = self.integer(key, least as u64, most as u64)?;
        Ok(count.map(|count| Given { value: count.value as usize, line: count.line }))
    }

    /// A finite number that `accepts` holds for; `wanted` says which those are.
    pub fn number(
        &self,
        key: &str,
        wanted: &str,
        accepts: impl Fn(f64) -> bool,
    ) -> Result<Option<Given<f64>>, ConfigError> {
        let wanted = format!("a number {wanted}");
        self.read(key, &wanted, |value| number(value).filter(|&number| accepts(number)))
    }

    /// A list of tables, as `[[…]]` makes one.
    pub fn tables(
        &self,
        key: &str,
        kind: &TableKind,
        kinds: &[TableKind],
    ) -> Result<Option<Vec<Table<'a>>>, ConfigError> {
        let wanted = format!("tables with the header {}", kind.name);
        let Some(items) = self.read(key, &wanted, DeValue::as_array)? else { return Ok(None) };
        items
            .iter()
            .map(|item| Self::new(self.document, item, kind, kinds))
            .collect::<Result<_, _>>()
            .map(Some)
    }
}

/// A finite number, however it is written.
pub(super) fn number(value: &DeValue<'_>) -> Option<f64> {
    let number = match value {
        DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix()).ok()? as f64,
        DeValue::Float(float) => float.as_str().parse().ok()?,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

/// A value as messages show it.
fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{:?}", shortened(text)),
        DeValue::Integer(integer) => shortened(&integer.to_string()),
        DeValue::Float(float) => shortened(float.as_str()),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(time) => format!("the time {time}"),
        DeValue::Array(items) if items.is_empty() => "an empty list".to_owned(),
        DeValue::Array(items) => {
            let shown: Vec<String> = items.iter().take(4).map(|item| describe(item.get_ref())).collect();
            let more = if items.len() > shown.len() { ", …" } else { "" };
            format!("[{}{more}]", shortened(&shown.join(", ")))
        }
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// A key as messages show it: whatever is in it stays on its line.
pub(super) fn quoted(key: &str) -> String {
    format!("`{}`", shortened(key).escape_debug())
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
