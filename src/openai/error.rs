//! The error object of the protocol.

use serde_json::{Value, json};

/// Why a request failed: an HTTP status and `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status, repeated as `code`.
    pub status: u16,
    /// `type`, in vLLM's names.
    pub kind: &'static str,
    /// Says what was found and what was wanted.
    pub message: String,
    /// The top-level field of the body that is at fault.
    pub param: Option<String>,
}

impl ApiError {
    /// 400: the request is at fault, in `param`.
    pub fn bad_request(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status: 400, kind: "BadRequestError", message: message.into(), param: Some(param.into()) }
    }

    /// 400: the body as a whole is at fault.
    pub fn bad_body(message: impl Into<String>) -> Self {
        Self { status: 400, kind: "BadRequestError", message: message.into(), param: None }
    }

    /// 404: nothing is served under this name, perhaps because it could not be loaded.
    pub fn unknown_model(name: &str, failure: Option<&str>) -> Self {
        let reason =
            failure.map_or_else(String::new, |failure| format!(" It could not be loaded: {failure}"));
        Self {
            status: 404,
            kind: "NotFoundError",
            message: format!("The model `{name}` does not exist.{reason}"),
            param: Some("model".to_owned()),
        }
    }

    /// 500: the request was in order and still failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { status: 500, kind: "InternalServerError", message: message.into(), param: None }
    }

    /// The response body.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.status,
        }})
    }
}
