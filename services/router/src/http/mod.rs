//! The HTTP side: OpenAI's API in, OpenAI's API out.
//!
//! ```text
//! connection (server) ─▶ identify: x-request-id, span, counters ─▶ handler ─▶ fields → types ─▶ live ─▶ wire | sse
//!                                                                     └─────────── error ◀── anything that fails
//! ```
//!
//! A handler is let in (or gets 429) before its body is read; nothing is started on a worker before everything in the
//! request has been checked.

mod app;
mod chat;
mod choosing;
mod completions;
mod console;
mod deciding;
mod error;
mod fields;
mod guard;
mod live;
mod messages;
mod models;
mod openapi;
mod placing;
mod requests;
mod responses;
mod routing;
mod server;
mod sse;
mod tls;
mod tokenize;
mod tokens;
mod tools;
mod types;
mod ways;
mod wire;

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header};
use kvasir_rpc::trace;
use kvasir_runtime::{
    admin::{HEALTH, READY},
    random_u64,
};
use kvasir_types::RequestId;
use serde_json::json;
use tracing::{Instrument, info_span};

pub(crate) use app::{App, Parts};
pub(crate) use console::Surroundings;
pub(crate) use routing::{Operators, admin};
pub(crate) use server::Server;
pub(crate) use tls::acceptor;
pub use tls::{TlsConfig, TlsError};

use error::Error;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `1` in a request: say in the answer's [`ROUTE`] where it went and why.
const EXPLAIN: HeaderName = HeaderName::from_static("x-kvasir-explain");
const ROUTE: HeaderName = HeaderName::from_static("x-kvasir-route");

/// A path and what is served there.
type Route = (&'static str, MethodRouter<Arc<App>>);

/// All of them.
fn table() -> Vec<Route> {
    let mut table = vec![
        ("/v1/chat/completions", post(chat::chat)),
        ("/v1/completions", post(completions::completions)),
        ("/v1/responses", post(responses::responses)),
        ("/v1/models", get(models::list)),
        // Names of models may have slashes: `Qwen/Qwen3-0.6B`.
        ("/v1/models/{*name}", get(models::get)),
        ("/tokenize", post(tokenize::tokenize)),
        ("/detokenize", post(tokenize::detokenize)),
        ("/openapi.json", get(openapi::document)),
        ("/metrics", get(metrics)),
    ];
    table.extend(HEALTH.map(|path| (path, get(health))));
    table.extend(READY.map(|path| (path, get(ready))));
    table
}

/// All routes.
pub(crate) fn routes(app: Arc<App>) -> Router {
    let routes = table().into_iter().fold(Router::new(), |routes, (path, serve)| routes.route(path, serve));
    routes
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::authorize))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), identify))
        .with_state(app)
}

/// Gives every request its name, span and place in the counters. A client's `x-request-id` is kept if it is a name
/// ([`RequestId`]); otherwise, or without one, the request gets a new one. The answer says which.
async fn identify(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()?.parse::<RequestId>().ok());
    let id = given.unwrap_or_else(fresh_id);
    let http1 = request.version() <= Version::HTTP_11;
    let endpoint = match request.uri().path() {
        "/v1/chat/completions" => "chat",
        "/v1/completions" => "completions",
        "/v1/responses" => "responses",
        path if path.starts_with("/v1/models") => "models",
        "/tokenize" | "/detokenize" => "tokenize",
        "/metrics" | "/openapi.json" => "probe",
        path if HEALTH.contains(&path) || READY.contains(&path) => "probe",
        _ => "other",
    };
    let span = info_span!(
        "request",
        request_id = %id,
        endpoint,
        tenant = tracing::field::Empty,
        key = tracing::field::Empty,
        model = tracing::field::Empty,
        worker = tracing::field::Empty
    );
    trace::adopt_http(&span, request.headers());
    request.extensions_mut().insert(id.clone());
    let asked = request.headers().get(EXPLAIN).is_some_and(|value| value == "1");
    let (mut response, told) = deciding::explaining(asked, next.run(request).instrument(span)).await;
    if let Some(told) = told.and_then(|told| HeaderValue::from_str(&told).ok()) {
        response.headers_mut().insert(ROUTE, told);
    }
    app.metrics.answered(endpoint, response.status());
    // A client that keeps its connection would have its next request cross with the closing of it. (HTTP/2 says so by itself.)
    if http1 && app.context.shutdown.is_triggered() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

fn fresh_id() -> RequestId {
    let id = format!("{:016x}{:016x}", random_u64(), random_u64());
    id.parse().expect("hexadecimal digits are a name")
}

async fn health() -> impl IntoResponse {
    axum::Json(json!({"status": "ok"}))
}

async fn ready(State(app): State<Arc<App>>) -> impl IntoResponse {
    match app.context.health.ready() {
        Ok(()) => (StatusCode::OK, axum::Json(json!({"ready": true}))),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, axum::Json(json!({"ready": false, "reason": reason}))),
    }
}

async fn metrics(State(app): State<Arc<App>>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    if !app.public_metrics {
        return no_path(method, uri).await.into_response(); // as if it were not there
    }
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let page = app.context.metrics.encode_for(accept);
    ([(header::CONTENT_TYPE, kvasir_runtime::metrics::CONTENT_TYPE)], page).into_response()
}

async fn no_path(method: Method, uri: Uri) -> Error {
    Error::NoPath { method: method.to_string(), path: uri.path().chars().take(100).collect() }
}

async fn no_method(method: Method) -> Error {
    Error::Method(method.to_string())
}

#[cfg(test)]
#[path = "tests/mod.rs"]
mod tests;
