//! A table whose cells are coloured by their values. The values stand in it too: colour is never all there is.

use serde::Serialize;

#[derive(Debug, Default, Serialize)]
pub struct HeatMap {
    /// What the rows are.
    pub corner: String,
    pub columns: Vec<Header>,
    pub rows: Vec<Row>,
}

/// The name of a row or column, with a few more words.
#[derive(Debug, Default, Serialize)]
pub struct Header {
    pub name: String,
    pub detail: String,
    /// What it leads to.
    pub link: Option<String>,
}

impl Header {
    pub fn new(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), detail: detail.into(), link: None }
    }
}

#[derive(Debug, Serialize)]
pub struct Row {
    pub header: Header,
    pub cells: Vec<Cell>,
}

#[derive(Debug, Default, Serialize)]
pub struct Cell {
    pub text: String,
    pub detail: String,
    /// More, for those who point at it.
    pub title: String,
    pub tone: Tone,
    /// Of the colour, in percent.
    pub strength: u32,
    /// Set off from the others: a task that the job trains.
    pub marked: bool,
}

/// Which colour a cell has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tone {
    #[default]
    None,
    /// More of something, neither good nor bad.
    Level,
    /// Better, or alike.
    Better,
    /// Worse, or opposed.
    Worse,
}

impl Cell {
    /// Nothing is known.
    pub fn empty() -> Self {
        Self::default()
    }

    /// A share of 1.
    pub fn level(text: String, share: f64) -> Self {
        Self { text, tone: Tone::Level, strength: strength(share), ..Self::default() }
    }

    /// A value of either sign: `better` above 0, full at ±1.
    pub fn signed(text: String, better: f64) -> Self {
        let tone = match strength(better.abs()) {
            0 => Tone::None,
            _ if better > 0.0 => Tone::Better,
            _ => Tone::Worse,
        };
        Self { text, tone, strength: strength(better.abs()), ..Self::default() }
    }
}

fn strength(share: f64) -> u32 {
    (100.0 * share.clamp(0.0, 1.0)).round() as u32
}
