//! docs/training.md shows a line of each format.

use std::fs;

use super::super::formats::{read_object, recognise};
use super::*;
use crate::train::config::{Format, Word};

#[test]
fn a_documented_line_is_of_its_format() {
    let text = fs::read_to_string(folder("docs/training.md")).unwrap();
    for format in Format::ALL {
        let row = text.lines().find(|line| line.starts_with(&format!("| `{}` | `{{", format.word())));
        let row = row.unwrap_or_else(|| panic!("no line of the format {}", format.word()));
        let line = row.split('`').nth(3).unwrap();
        assert_eq!(recognise(&read_object(line.as_bytes()).unwrap()), Ok(*format), "{line}");
        let (dataset, warnings) = read(&[serde_json::from_str(line).unwrap()], &OPTIONS).unwrap();
        assert_eq!((dataset.samples.len(), dataset.counts.read), (1, 1), "{line}");
        assert!(warnings.is_empty() || dataset.classes.len() == 1, "{line}: {warnings:?}");
    }
}
