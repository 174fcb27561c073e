//! What people read in a terminal: tables with aligned columns, and text that a terminal does not obey.
//!
//! Names and answers come from files and models, so what a terminal would obey (control and direction characters) is
//! shown escaped, and width is counted in terminal columns.

use std::fmt;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Spaces between columns.
const GAP: &str = "  ";

/// The text with what a terminal would obey escaped.
pub(crate) fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        let directs =
            matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if character.is_control() || directs {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
    }
    clean
}

/// At most `columns` columns of a text; what was cut is marked with `…`.
pub(crate) fn shorten(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let mut used = 1;
    let fits = |character: &char| {
        used += character.width().unwrap_or(0);
        used <= columns
    };
    let kept: String = text.chars().take_while(fits).collect();
    format!("{}…", kept.trim_end())
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    let (mut value, mut units) = (count as f64, ["KiB", "MiB", "GiB", "TiB"].iter());
    let mut unit = "bytes";
    while let (true, Some(next)) = (value >= 1024.0, units.as_slice().first()) {
        value /= 1024.0;
        unit = next;
        units.next();
    }
    if unit == "bytes" { format!("{count} bytes") } else { format!("{value:.1} {unit}") }
}

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows of cells; each column as wide as its widest cell.
pub(crate) struct Table {
    columns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(columns: &[Align]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, one cell per column.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(|cell| clean(cell.as_ref())).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width_of =
            |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.width()).max();
        let widths: Vec<usize> =
            (0..self.columns.len()).map(|column| width_of(column).unwrap_or(0)).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, align), width) in row.iter().zip(&self.columns).zip(&widths) {
                let fill = " ".repeat(width - cell.width());
                match align {
                    Align::Left => line.extend([cell, fill.as_str(), GAP]),
                    Align::Right => line.extend([fill.as_str(), cell, GAP]),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_their_text() {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Left]);
        table.row(["a", "%", "note"]);
        table.row(["日本", "100.0", ""]);
        table.row(["naïve", "5.5", "x\ny"]);
        assert_eq!(table.to_string(), "a          %  note\n日本   100.0\nnaïve    5.5  x\\ny\n");
    }

    #[test]
    fn text_is_cut_at_columns_and_not_inside_a_character() {
        assert_eq!(shorten("exactly ten", 11), "exactly ten");
        assert_eq!(shorten("one word more", 9), "one word…");
        assert_eq!(shorten("日本語日本語", 6), "日本…");
        assert_eq!(shorten("", 3), "");
    }

    #[test]
    fn a_terminal_is_not_told_what_to_do() {
        assert_eq!(clean("a\u{1b}[2Jb\u{202e}\tc"), "a\\u{1b}[2Jb\\u{202e}\\tc");
        assert_eq!(clean("Größe 🙂"), "Größe 🙂");
    }

    #[test]
    fn sizes_have_one_decimal_from_a_kibibyte_on() {
        for (count, shown) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1.0 KiB"),
            (3_407_872, "3.2 MiB"),
            (5 << 50, "5120.0 TiB"),
        ] {
            assert_eq!(bytes(count), shown);
        }
    }
}
