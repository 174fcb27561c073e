//! The OpenAI-compatible protocol: bodies in, bodies out. Shared by batch files and HTTP.
//!
//! [`request`] turns a body into engine requests or an [`ApiError`], [`response`] turns finished
//! completions into bodies, and [`batch`] reads and writes files of one request per line. Field names, defaults and
//! formats are vLLM's; what is unknown or out of range is refused by name.

pub mod batch;
mod error;
mod fields;
mod messages;
pub mod request;
pub mod response;
mod served;

pub use error::ApiError;
pub use served::{Served, answer};

use std::fmt;

/// What a request asks for, and so how its body is read and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Completions,
    ChatCompletions,
}

impl Endpoint {
    pub const ALL: [Endpoint; 2] = [Endpoint::Completions, Endpoint::ChatCompletions];

    /// Path of its URL.
    pub const fn path(self) -> &'static str {
        match self {
            Endpoint::Completions => "/v1/completions",
            Endpoint::ChatCompletions => "/v1/chat/completions",
        }
    }

    pub fn from_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path())
    }
}
