//! Python's string methods, where Rust's own differ in what is whitespace, in direction or in limits.

use minijinja::Error;

use super::functions::invalid;

/// Widest padding.
const WIDEST: usize = 10_000;

/// Python's `str.isspace`: Unicode whitespace and the four separator controls.
pub(super) fn is_space(letter: char) -> bool {
    letter.is_whitespace() || ('\x1c'..='\x1f').contains(&letter)
}

/// Python's `strip`, `lstrip` and `rstrip`.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let strips = |letter: char| chars.map_or_else(|| is_space(letter), |chars| chars.contains(letter));
    let text = if start { text.trim_start_matches(strips) } else { text };
    if end { text.trim_end_matches(strips) } else { text }
}

/// Python's `split` and `rsplit`, at most `most` times.
pub(super) fn split<'a>(
    text: &'a str,
    separator: Option<&str>,
    most: usize,
    from_end: bool,
    charge: &dyn Fn(usize) -> Result<(), Error>,
) -> Result<Vec<&'a str>, Error> {
    /// Memory of one part.
    const PART: usize = 64;
    charge(text.len())?;
    let mut parts = Vec::new();
    let mut rest = text;
    match separator {
        Some("") => return Err(invalid("split: empty separator".to_owned())),
        Some(separator) => {
            while parts.len() < most {
                let found = if from_end { rest.rsplit_once(separator) } else { rest.split_once(separator) };
                let Some((before, after)) = found else { break };
                let (part, remainder) = if from_end { (after, before) } else { (before, after) };
                charge(PART)?;
                parts.push(part);
                rest = remainder;
            }
            parts.push(rest);
        }
        None => loop {
            rest = strip(rest, None, !from_end, from_end);
            if rest.is_empty() {
                break;
            }
            charge(PART)?;
            if parts.len() >= most {
                parts.push(rest);
                break;
            }
            let cut = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
            let (part, remainder) = match cut {
                None => (rest, ""),
                Some(at) if from_end => {
                    let (before, after) = rest.split_at(at);
                    (after.trim_start_matches(is_space), before)
                }
                Some(at) => rest.split_at(at),
            };
            parts.push(part);
            rest = remainder;
        },
    }
    if from_end {
        parts.reverse();
    }
    Ok(parts)
}

/// Python's `splitlines`.
pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |letter: char| {
        matches!(letter, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let end = &rest[at..];
        let length = if end.starts_with("\r\n") { 2 } else { end.chars().next().map_or(0, char::len_utf8) };
        lines.push(if keep_ends { &rest[..at + length] } else { &rest[..at] });
        rest = &rest[at + length..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Where `pad` puts the text.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Align {
    Left,
    Center,
    Right,
}

/// Python's `ljust`, `center` and `rjust`.
pub(super) fn pad(text: &str, width: i64, fill: &str, align: Align) -> Result<String, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    if width > WIDEST {
        return Err(invalid(format!("width {width} is over the largest, {WIDEST}")));
    }
    if fill.chars().count() != 1 {
        return Err(invalid(format!("fill {fill:?} is not one character")));
    }
    let length = text.chars().count();
    let missing = width.saturating_sub(length);
    let before = match align {
        Align::Left => 0,
        // Python puts the odd space before the text where both the rest and the width are odd.
        Align::Center => missing / 2 + (missing & width & 1),
        Align::Right => missing,
    };
    Ok(fill.repeat(before) + text + &fill.repeat(missing - before))
}

/// Python's `zfill`: zeros between the sign and the rest.
pub(super) fn zero_fill(text: &str, width: i64) -> Result<String, Error> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let sign = &text[..text.len() - digits.len()];
    Ok(sign.to_owned() + &pad(digits, width.saturating_sub(sign.len() as i64), "0", Align::Right)?)
}

/// Refuses fields of a format string that would fill the memory.
pub(super) fn check_widths(format: &str) -> Result<(), Error> {
    let numbers = format.split(|letter: char| !letter.is_ascii_digit());
    for number in numbers.filter(|number| !number.is_empty()) {
        if number.parse().map_or(true, |number: usize| number > WIDEST) {
            return Err(invalid(format!("format: {number} is over the largest width, {WIDEST}")));
        }
    }
    Ok(())
}
