//! The door: who may come in, and what is left of what they may send.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use tracing::Span;

use super::{app::App, error::Error};
use crate::access::{Caller, Left, Over, Unknown};

/// Paths that are open to everybody: probes, and what clients read before they have a key.
const OPEN: &[&str] = &[
    "/health",
    "/healthz",
    "/live",
    "/livez",
    "/liveness",
    "/ready",
    "/readyz",
    "/readiness",
    "/metrics",
    "/openapi.json",
];

/// Lets in whoever has a key, if one is needed, and tells what the key has left.
pub(crate) async fn authorize(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    if OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let authorization = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let caller = app.keys.borrow().caller(authorization);
    let caller = match caller {
        Ok(caller) => caller,
        Err(unknown) => {
            app.metrics.turned_away(unknown);
            return Error::from(unknown).into_response();
        }
    };
    if !caller.tenant().name.is_empty() {
        let span = Span::current();
        span.record("tenant", caller.tenant().name.as_str());
        span.record("key", caller.key().name.as_str());
    }
    request.extensions_mut().insert(caller.clone());
    let mut response = next.run(request).await;
    tell(caller.left(Instant::now()), response.headers_mut());
    response
}

/// OpenAI's headers.
fn tell(left: Left, headers: &mut HeaderMap) {
    let mut put = |name: &'static str, value: String| {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    let seconds = |reset: Duration| format!("{:.3}s", reset.as_secs_f64());
    if let Some((limit, remaining, reset)) = left.requests {
        put("x-ratelimit-limit-requests", limit.to_string());
        put("x-ratelimit-remaining-requests", remaining.to_string());
        put("x-ratelimit-reset-requests", seconds(reset));
    }
    if let Some((limit, remaining, reset)) = left.tokens {
        put("x-ratelimit-limit-tokens", limit.to_string());
        put("x-ratelimit-remaining-tokens", remaining.to_string());
        put("x-ratelimit-reset-tokens", seconds(reset));
    }
}

impl From<Unknown> for Error {
    fn from(unknown: Unknown) -> Self {
        match unknown {
            Unknown::NoKey => Self::NoKey,
            Unknown::BadKey => Self::BadKey,
        }
    }
}

/// Pays for an answer's tokens when it ends, however it does.
pub(crate) struct Meter {
    caller: Caller,
    tokens: u64,
}

impl Meter {
    /// Pays for a prompt now.
    pub(crate) fn prompt(caller: Caller, tokens: usize) -> Result<Self, Over> {
        caller.prompt(tokens as u64, Instant::now())?;
        Ok(Self { caller, tokens: 0 })
    }

    /// A token of the answer.
    pub(crate) fn token(&mut self) {
        self.tokens += 1;
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.caller.answer(self.tokens, Instant::now());
    }
}
