//! The one place where something that went wrong becomes an HTTP answer, in OpenAI's shape.
//!
//! ```json
//! {"error": {"message": "…", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}
//! ```
//!
//! Within a stream the status is gone already: the same object is an event of its own and the last one.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::{
    access::Over,
    admission::Refused,
    text,
    upstream::{self, Field},
};

/// How long a refused client should wait: long enough to let a few answers end, short enough not to idle.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A parameter that is not acceptable.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct BadParam {
    /// Its path in the request, e.g. `messages[2].content`.
    pub(crate) param: String,
    /// What kind of mistake, for programs.
    pub(crate) code: &'static str,
    /// What is wrong and what is allowed, for people.
    pub(crate) message: String,
}

impl BadParam {
    /// A mistake of kind `code` in `param`.
    pub(crate) fn new(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self { param: param.into(), code, message: message.into() }
    }
}

/// What the client calls what workers may refuse.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Params {
    /// Asked for the answer's form, if anything did.
    pub(crate) form: Option<&'static str>,
    /// Asked for the answer's length, if anything did.
    pub(crate) max_tokens: Option<&'static str>,
    /// Holds the prompt.
    pub(crate) prompt: &'static str,
}

/// Why a request is not answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The body is not JSON, or not an object.
    #[error("could not parse the JSON body of your request: {0}")]
    Malformed(String),
    /// A parameter is not acceptable.
    #[error(transparent)]
    Param(#[from] BadParam),
    /// No such model here.
    #[error("the model `{0}` does not exist")]
    NoModel(String),
    /// No such path.
    #[error("unknown request URL: {method} {path}")]
    NoPath {
        /// The method.
        method: String,
        /// The path, cut.
        path: String,
    },
    /// Another method is needed.
    #[error("method {0} is not allowed here")]
    Method(String),
    /// The body did not come in time.
    #[error("the request body did not arrive within {} ms", .0.as_millis())]
    SlowBody(Duration),
    /// The body is too big.
    #[error("the request body is over the limit of {limit_bytes} bytes")]
    BigBody {
        /// The limit.
        limit_bytes: usize,
    },
    /// The body broke off.
    #[error("the request body could not be read")]
    Body,
    /// The router holds as many requests as it may.
    #[error("too many requests under way (limit {limit}), try again later")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// It says no key, and one is needed.
    #[error("you didn't provide an API key: send it in an Authorization header, as `Authorization: Bearer YOUR_KEY`")]
    NoKey,
    /// There is no such key.
    #[error("incorrect API key provided")]
    BadKey,
    /// More than the caller may send in a minute.
    #[error("rate limit reached: {limit} {what} per minute; try again in {} ms", after.as_millis())]
    Rate {
        /// `requests` or `tokens`.
        what: &'static str,
        /// How many a minute.
        limit: u64,
        /// When there will be room.
        after: Duration,
    },
    /// Too many wait for their turn.
    #[error("too many requests wait for the model's workers (limit {limit}), try again later")]
    Queued {
        /// The limit.
        limit: usize,
        /// When there may be room.
        after: Duration,
    },
    /// It would not be, or was not, its turn in time.
    #[error("the model's workers are overloaded: this request would wait {} ms for its turn", wait.as_millis())]
    Late {
        /// How long.
        wait: Duration,
    },
    /// No worker serves the model now.
    #[error("no worker serves the model `{0}` right now, try again later")]
    NoWorker(String),
    /// The request's time is over before a worker had it.
    #[error("the request was not done within its time limit")]
    Deadline,
    /// An operator ended it.
    #[error("an operator has ended this request")]
    Cancelled,
    /// A worker failed.
    #[error(transparent)]
    Upstream(#[from] upstream::Error),
    /// A bug of ours.
    #[error("internal error")]
    Internal(#[source] text::Error),
}

impl Error {
    /// The HTTP status.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) | Self::Param(_) | Self::Body => StatusCode::BAD_REQUEST,
            Self::NoModel(_) | Self::NoPath { .. } => StatusCode::NOT_FOUND,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::SlowBody(_) => StatusCode::REQUEST_TIMEOUT,
            Self::BigBody { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoKey | Self::BadKey => StatusCode::UNAUTHORIZED,
            Self::Full { .. } | Self::Rate { .. } | Self::Queued { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::NoWorker(_) | Self::Late { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Deadline => StatusCode::GATEWAY_TIMEOUT,
            // Not one that clients try again by themselves.
            Self::Cancelled => StatusCode::FORBIDDEN,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Upstream(error) => match error {
                upstream::Error::Refused { .. } => StatusCode::BAD_REQUEST,
                upstream::Error::Busy { .. }
                | upstream::Error::Unavailable { .. }
                | upstream::Error::Leaving { .. } => StatusCode::SERVICE_UNAVAILABLE,
                upstream::Error::Stalled { .. } | upstream::Error::Deadline { .. } => StatusCode::GATEWAY_TIMEOUT,
                upstream::Error::Broken { .. } | upstream::Error::Failed { .. } | upstream::Error::Protocol { .. } => {
                    StatusCode::BAD_GATEWAY
                }
            },
        }
    }

    /// What kind of mistake, for programs.
    /// OpenAI's word, or ours.
    pub(crate) fn code(&self) -> Option<&'static str> {
        Some(match self {
            Self::Malformed(_) | Self::Body | Self::NoPath { .. } | Self::Method(_) | Self::NoKey => return None,
            Self::BadKey => "invalid_api_key",
            Self::Param(bad) => bad.code,
            Self::NoModel(_) => "model_not_found",
            Self::SlowBody(_) => "request_timeout",
            Self::BigBody { .. } => "request_too_large",
            Self::Full { .. } | Self::Rate { .. } => "rate_limit_exceeded",
            Self::Queued { .. } | Self::Late { .. } => "overloaded",
            Self::NoWorker(_) => "no_worker",
            Self::Deadline => "deadline_exceeded",
            Self::Cancelled => "cancelled_by_operator",
            Self::Internal(_) => "internal_error",
            Self::Upstream(error) => match error {
                upstream::Error::Refused { .. } => "invalid_value",
                upstream::Error::Busy { .. } => "overloaded",
                upstream::Error::Unavailable { .. } | upstream::Error::Leaving { .. } => "worker_unavailable",
                upstream::Error::Stalled { .. } => "worker_stalled",
                upstream::Error::Deadline { .. } => "deadline_exceeded",
                upstream::Error::Broken { .. } | upstream::Error::Failed { .. } | upstream::Error::Protocol { .. } => {
                    "worker_failed"
                }
            },
        })
    }

    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS => match self {
                Self::Rate { what, .. } => what,
                _ => "rate_limit_error",
            },
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// How long a refused client should wait, in seconds.
    fn retry_after_s(&self) -> u64 {
        match self {
            Self::Rate { after, .. } | Self::Queued { after, .. } | Self::Late { wait: after } => after.as_secs() + 1,
            _ => RETRY_AFTER.as_secs(),
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Param(bad) => Some(&bad.param),
            Self::NoModel(_) => Some("model"),
            _ => None,
        }
    }

    /// What the client reads. Names of workers are ours to know: they go to the log, not to clients.
    fn message(&self) -> String {
        let Self::Upstream(error) = self else { return self.to_string() };
        match error {
            upstream::Error::Refused { message, .. } => message.clone(),
            upstream::Error::Busy { .. } => "the workers of this model are overloaded, try again later".to_owned(),
            upstream::Error::Unavailable { .. } | upstream::Error::Leaving { .. } => {
                "no worker of this model could be reached, try again later".to_owned()
            }
            upstream::Error::Stalled { idle, .. } => {
                format!("the worker that wrote this answer has said nothing for {} ms", idle.as_millis())
            }
            upstream::Error::Deadline { .. } => Self::Deadline.to_string(),
            upstream::Error::Broken { .. } | upstream::Error::Failed { .. } | upstream::Error::Protocol { .. } => {
                "the worker that wrote this answer failed".to_owned()
            }
        }
    }

    /// The same, blaming the client's parameter if a worker can't do what that asks for.
    pub(crate) fn naming(self, params: Params) -> Self {
        let Self::Upstream(upstream::Error::Refused { ref message, field: Some(field), .. }) = self else {
            return self;
        };
        let (param, code, what) = match field {
            Field::Form => (params.form, "invalid_value", "can't be followed"),
            Field::MaxTokens => (params.max_tokens, "above_max_value", "is more than this server can hold"),
            Field::Prompt => (Some(params.prompt), "context_length_exceeded", "is more than this server can hold"),
            Field::Named(name) => (Some(name), "unsupported_value", "can't be followed"),
        };
        match param {
            Some(param) => BadParam::new(param, code, format!("'{param}' {what}: {message}")).into(),
            None => self,
        }
    }

    /// OpenAI's error object.
    pub(crate) fn object(&self) -> Value {
        json!({"error": {
            "message": self.message(),
            "type": self.kind(),
            "param": self.param(),
            "code": self.code(),
        }})
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full { limit, after } => Self::Queued { limit, after },
            Refused::Late { wait } => Self::Late { wait },
        }
    }
}

impl From<Over> for Error {
    fn from(Over { what, limit, after }: Over) -> Self {
        Self::Rate { what, limit, after }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = self.status();
        let mut response = (status, axum::Json(self.object())).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_s()));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_openais_shape() {
        let bad = BadParam::new("temperature", "invalid_value", "'temperature' must be 0 to 2, got 3");
        insta::assert_snapshot!(Error::from(bad).object(), @r#"{"error":{"message":"'temperature' must be 0 to 2, got 3","type":"invalid_request_error","param":"temperature","code":"invalid_value"}}"#);
        insta::assert_snapshot!(Error::NoModel("gpt-9".into()).object(), @r#"{"error":{"message":"the model `gpt-9` does not exist","type":"invalid_request_error","param":"model","code":"model_not_found"}}"#);
        insta::assert_snapshot!(Error::Full { limit: 8 }.object(), @r#"{"error":{"message":"too many requests under way (limit 8), try again later","type":"rate_limit_error","param":null,"code":"rate_limit_exceeded"}}"#);
        let busy = upstream::Error::Busy { worker: "decode-0".parse().unwrap(), message: "queue full".into() };
        insta::assert_snapshot!(Error::from(busy).object(), @r#"{"error":{"message":"the workers of this model are overloaded, try again later","type":"server_error","param":null,"code":"overloaded"}}"#);
    }

    #[test]
    fn who_should_come_back_later_is_told_when() {
        for (error, status, told) in [
            (Error::Full { limit: 1 }, 429, true),
            (Error::NoWorker("m".into()), 503, true),
            (Error::Deadline, 504, false),
            (Error::BigBody { limit_bytes: 1 }, 413, false),
        ] {
            let response = error.into_response();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), told);
        }
    }
}
