//! Settings that are one of a few words.

use super::{Balance, BatchTasks, Format, OnOverlong, Recompute, Sampling, Schedule};

/// A setting that is one of a few words.
pub trait Word: Copy + 'static {
    /// In the order in which messages name them.
    const ALL: &'static [Self];

    /// As it is written.
    fn word(self) -> &'static str;

    /// What a word means.
    fn from_word(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|value| value.word() == word)
    }

    /// All words, as a message lists them.
    fn words() -> String {
        Self::ALL.iter().map(|value| format!("{:?}", value.word())).collect::<Vec<_>>().join(", ")
    }
}

impl Word for Recompute {
    const ALL: &'static [Self] = &[Self::None, Self::Mlp, Self::Block];

    fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mlp => "mlp",
            Self::Block => "block",
        }
    }
}

impl Word for Schedule {
    const ALL: &'static [Self] = &[Self::Constant, Self::Linear, Self::Cosine];

    fn word(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
        }
    }
}

impl Word for OnOverlong {
    const ALL: &'static [Self] = &[Self::Truncate, Self::Drop, Self::Error];

    fn word(self) -> &'static str {
        match self {
            Self::Truncate => "truncate",
            Self::Drop => "drop",
            Self::Error => "error",
        }
    }
}

impl Word for Sampling {
    /// The temperature itself is a key of its own.
    const ALL: &'static [Self] = &[
        Self::Proportional,
        Self::Uniform,
        Self::RoundRobin,
        Self::Temperature(1.0),
        Self::Annealed,
        Self::EvenThenHard,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Proportional => "proportional",
            Self::Uniform => "uniform",
            Self::RoundRobin => "round-robin",
            Self::Temperature(_) => "temperature",
            Self::Annealed => "annealed",
            Self::EvenThenHard => "even-then-hard",
        }
    }
}

impl Word for BatchTasks {
    const ALL: &'static [Self] = &[Self::Mixed, Self::One];

    fn word(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::One => "one",
        }
    }
}

impl Word for Balance {
    const ALL: &'static [Self] = &[Self::Token, Self::Sample, Self::Task];

    fn word(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Sample => "sample",
            Self::Task => "task",
        }
    }
}

impl Word for Format {
    const ALL: &'static [Self] = &[
        Self::Messages,
        Self::PromptCompletion,
        Self::Alpaca,
        Self::ShareGpt,
        Self::Text,
        Self::Tokens,
        Self::Labelled,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt-completion",
            Self::Alpaca => "alpaca",
            Self::ShareGpt => "sharegpt",
            Self::Text => "text",
            Self::Tokens => "tokens",
            Self::Labelled => "labelled",
        }
    }
}
