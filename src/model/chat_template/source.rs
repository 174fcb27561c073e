//! Template text, made ready for the engine.
//!
//! - Line ends become `\n`, as Jinja2 reads them.
//! - `{% generation %}…{% endgeneration %}` marks what the assistant says, for training masks. It renders as its
//!   content in a scope of its own, which is what `{% with %}…{% endwith %}` does, so the tags are renamed.
//! - `{% set target = value %}` becomes `{% set target = (value)|bounded_value(…) %}`: values may not nest without
//!   limit, because printing, comparing and dropping them recurses (see `functions::bounded_value`).
//! - Tags are limited in length: the engine's parser recurses over chains of operators without a limit of its own.
//!
//! Tags are found by the same rules as in the engine's lexer: comments, `raw` blocks and strings are passed over. Line
//! numbers stay the same.

/// Most names, numbers, strings and operators in one tag.
const LONGEST_TAG: usize = 1000;
/// Most `elif` tags in a template; each nests in the one before.
const MOST_ELIFS: usize = 500;

/// A template that is too much for the engine's parser.
#[derive(Debug, PartialEq)]
pub(super) struct TooComplex {
    /// Of the tag, from 1.
    pub line: usize,
    pub message: String,
}

/// The prepared text of a template.
pub(super) fn prepare(source: &str) -> Result<String, TooComplex> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 256);
    let mut rest = source.as_str();
    let mut elifs = 0;
    while let Some(start) = find_opening(rest) {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let line = |message| TooComplex {
            line: 1 + source[..source.len() - rest.len()].matches('\n').count(),
            message,
        };
        let length = match &rest[..2] {
            "{#" => rest[2..].find("#}").map_or(rest.len(), |end| end + 4),
            "{%" if is_tag(&rest[2..], "raw") => raw_length(rest),
            _ => {
                let tag = measure(rest);
                if tag.parts > LONGEST_TAG {
                    return Err(line(format!("a tag has more than {LONGEST_TAG} names and operators")));
                }
                tag.length
            }
        };
        let (tag, after) = rest.split_at(length);
        match block_inside(tag) {
            Some(inside) => {
                elifs += usize::from(keyword(inside) == "elif");
                if elifs > MOST_ELIFS {
                    return Err(line(format!("more than {MOST_ELIFS} elif tags")));
                }
                let before = inside.as_ptr() as usize - tag.as_ptr() as usize;
                out.push_str(&tag[..before]);
                out.push_str(&rewrite(inside));
                out.push_str(&tag[before + inside.len()..]);
            }
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// Where the next comment, expression or block begins.
fn find_opening(text: &str) -> Option<usize> {
    text.match_indices('{')
        .map(|(index, _)| index)
        .find(|&index| matches!(text.as_bytes().get(index + 1), Some(b'{' | b'%' | b'#')))
}

/// A tag's extent.
struct Measure {
    /// Bytes up to and with the closing bracket; to the end of the text when it is never closed.
    length: usize,
    /// Names, numbers, strings and operators.
    parts: usize,
}

/// Measures the `{{` or `{%` tag that `text` begins with. Its end does not count inside strings or brackets.
fn measure(text: &str) -> Measure {
    let bytes = text.as_bytes();
    let end: &[u8] = if bytes[1] == b'{' { b"}}" } else { b"%}" };
    let (mut index, mut depth, mut parts) = (2, 0usize, 0);
    let mut in_word = false;
    while index < bytes.len() {
        if depth == 0 && bytes[index..].starts_with(end) {
            return Measure { length: index + 2, parts };
        }
        let byte = bytes[index];
        let is_word = byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii();
        let continues = byte.is_ascii_whitespace() || (is_word && in_word);
        parts += usize::from(!continues);
        in_word = is_word;
        match byte {
            b'\'' | b'"' => index = string_end(bytes, index),
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        index += 1;
    }
    Measure { length: bytes.len(), parts }
}

/// Index of the closing quote of the string that starts at `start` (past the end when it is never closed).
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut index = start + 1;
    while index < bytes.len() && bytes[index] != bytes[start] {
        index += if bytes[index] == b'\\' { 2 } else { 1 };
    }
    index
}

/// What stands between `{%` and `%}`, whitespace control left out.
fn block_inside(tag: &str) -> Option<&str> {
    let inside = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside);
    Some(inside.strip_suffix(['-', '+']).unwrap_or(inside))
}

/// Whether `text`, which follows a `{%`, is the tag `name` with nothing else in it.
fn is_tag(text: &str, name: &str) -> bool {
    let text = text.strip_prefix(['-', '+']).unwrap_or(text).trim_ascii_start();
    let Some(text) = text.strip_prefix(name) else { return false };
    let text = text.trim_ascii_start();
    text.strip_prefix(['-', '+']).unwrap_or(text).starts_with("%}")
}

/// Length of a raw block with its end tag.
fn raw_length(block: &str) -> usize {
    let end = block.match_indices("{%").find(|(index, _)| is_tag(&block[index + 2..], "endraw"));
    end.and_then(|(start, _)| Some(start + 2 + block[start + 2..].find("%}")? + 2)).unwrap_or(block.len())
}

/// The first word of a block tag.
fn keyword(inside: &str) -> &str {
    let inside = inside.trim_ascii_start();
    inside.split(|letter: char| !(letter.is_alphanumeric() || letter == '_')).next().unwrap_or_default()
}

fn rewrite(inside: &str) -> String {
    match (inside.trim_ascii(), keyword(inside)) {
        ("generation", _) => inside.replacen("generation", "with", 1),
        ("endgeneration", _) => inside.replacen("endgeneration", "endwith", 1),
        (_, "set") => match assignment(inside) {
            Some(equals) => {
                let (target, value) = (&inside[..equals], &inside[equals + 1..]);
                let into_namespace = target.contains('.');
                format!("{target}= ({value}) | bounded_value({into_namespace}) ")
            }
            None => inside.to_owned(),
        },
        _ => inside.to_owned(),
    }
}

/// Index of the `=` of a `set` tag; a block `set` has none.
fn assignment(inside: &str) -> Option<usize> {
    let bytes = inside.as_bytes();
    let (mut index, mut depth) = (0, 0usize);
    while index < bytes.len() {
        match bytes[index] {
            b'\'' | b'"' => index = string_end(bytes, index),
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => depth = depth.saturating_sub(1),
            b'=' if depth == 0 => return Some(index),
            _ => {}
        }
        index += 1;
    }
    None
}
