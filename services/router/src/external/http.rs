//! How engines are reached: plain HTTP/1.1, connections kept for a moment, every answer bounded in size and time.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::{HeaderValue, Method, Request, Response, StatusCode, header, uri::PathAndQuery};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kvasir_types::MemberId;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{brief, engine::Engine};
use crate::upstream::Error;

/// Longest wait for a connection: engines are near.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that nobody uses is closed before the engine does it: uvicorn, which both engines are served by, waits 5 s.
const IDLE: Duration = Duration::from_secs(4);
/// Connections kept for an engine.
const MAX_IDLE: usize = 256;
/// What is read of an answer that says why not.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// The client of all engines. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Http(Client<HttpConnector, Body>);

impl Default for Http {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .build(connector);
        Self(client)
    }
}

/// A question to an engine, and how long it may take.
pub(crate) struct Ask<'a> {
    /// The engine.
    pub(crate) engine: &'a Engine,
    /// Its name, for errors.
    pub(crate) worker: &'a MemberId,
    /// The path.
    pub(crate) path: &'static str,
    /// For the answer to begin, and, where it is read as a whole, to end.
    pub(crate) until: Instant,
}

impl Ask<'_> {
    /// What has not come in time.
    pub(crate) fn stalled(&self, began: Instant) -> Error {
        Error::Stalled { worker: self.worker.clone(), idle: began.elapsed() }
    }

    /// `GET`, or `POST` of JSON: the head of an answer that is a success. `id`: the request's, where that matters.
    pub(crate) async fn send(&self, id: Option<&str>, json: Option<Vec<u8>>) -> Result<Response<Body>, Error> {
        let began = Instant::now();
        let answering = self.engine.http.0.request(self.request(id, json)?);
        let response = match tokio::time::timeout_at(self.until, answering).await {
            Err(_) => return Err(self.stalled(began)),
            Ok(Err(error)) if error.is_connect() => {
                return Err(Error::Unavailable { worker: self.worker.clone(), message: deepest(&error) });
            }
            Ok(Err(error)) => return Err(self.broken(Box::new(error))),
            Ok(Ok(response)) => response.map(Body::new),
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let told = tokio::time::timeout_at(self.until, read(response.into_body(), MAX_ERROR_BYTES)).await;
        let told = told.ok().and_then(Result::ok).unwrap_or_default();
        Err(refused(self.worker, status, &reason(&told)))
    }

    /// The same with the whole answer, of at most `limit` bytes.
    pub(crate) async fn whole(&self, id: Option<&str>, json: Option<Vec<u8>>, limit: usize) -> Result<Bytes, Error> {
        let began = Instant::now();
        let body = self.send(id, json).await?.into_body();
        match tokio::time::timeout_at(self.until, read(body, limit)).await {
            Err(_) => Err(self.stalled(began)),
            Ok(Err(Cut::Broken(error))) => Err(self.broken(Box::new(error))),
            Ok(Err(Cut::TooLong)) => {
                let what = format!("an answer of over {limit} bytes to {}", self.path);
                Err(Error::Protocol { worker: self.worker.clone(), what })
            }
            Ok(Ok(bytes)) => Ok(bytes),
        }
    }

    fn request(&self, id: Option<&str>, json: Option<Vec<u8>>) -> Result<Request<Body>, Error> {
        let engine = self.engine;
        let uri = http::Uri::builder().scheme("http").authority(engine.authority.clone());
        let uri = uri.path_and_query(PathAndQuery::from_static(self.path)).build();
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = uri.map_err(|error| Error::Unavailable {
            worker: self.worker.clone(),
            message: format!("its address is none: {error}"),
        })?;
        if let Some(key) = &engine.key {
            request.headers_mut().insert(header::AUTHORIZATION, key.clone());
        }
        if let Some(id) = id.and_then(|id| HeaderValue::try_from(id).ok()) {
            request.headers_mut().insert("x-request-id", id);
        }
        kvasir_rpc::trace::carry_http(request.headers_mut());
        if let Some(json) = json {
            *request.method_mut() = Method::POST;
            request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            *request.body_mut() = Body::from(json);
        }
        Ok(request)
    }

    fn broken(&self, error: Box<dyn std::error::Error + Send + Sync>) -> Error {
        broken(self.worker, error)
    }
}

/// The connection broke.
pub(crate) fn broken(worker: &MemberId, error: Box<dyn std::error::Error + Send + Sync>) -> Error {
    let mut status = Status::new(Code::Unavailable, deepest(error.as_ref()));
    status.set_source(error.into());
    Error::Broken { worker: worker.clone(), status: Box::new(status) }
}

/// What happened is at the end of the chain.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    brief(&cause.to_string())
}

/// What a status means for whoever asked.
fn refused(worker: &MemberId, status: StatusCode, why: &str) -> Error {
    let (worker, message) = (worker.clone(), format!("HTTP {}: {why}", status.as_u16()));
    match status {
        StatusCode::TOO_MANY_REQUESTS => Error::Busy { worker, message },
        // Without what it was before the colon: the client asked us, not the engine.
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY | StatusCode::PAYLOAD_TOO_LARGE => {
            Error::Refused { worker, message: why.to_owned(), field: None }
        }
        // Another model, another key, starting, stopping: of no use for now.
        StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::NOT_FOUND
        | StatusCode::METHOD_NOT_ALLOWED
        | StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN => Error::Unavailable { worker, message },
        StatusCode::GATEWAY_TIMEOUT => Error::Failed { worker, code: Code::DeadlineExceeded, message },
        _ => Error::Failed { worker, code: Code::Internal, message },
    }
}

/// What an engine's error object says: `{"error": {"message"}}`, `{"message"}`, `{"detail"}`, or the text itself.
fn reason(body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let told = [&json["error"]["message"], &json["message"], &json["detail"], &json["error"]];
    match told.into_iter().find_map(|text| text.as_str()) {
        Some(text) => brief(text),
        None => brief(&String::from_utf8_lossy(body)),
    }
}

/// Why a body was not read to its end.
#[derive(Debug)]
enum Cut {
    Broken(axum::Error),
    TooLong,
}

async fn read(body: Body, limit: usize) -> Result<Bytes, Cut> {
    let mut stream: BodyDataStream = body.into_data_stream();
    let mut whole = BytesMut::new();
    while let Some(part) = stream.next().await {
        let part = part.map_err(Cut::Broken)?;
        if whole.len() + part.len() > limit {
            return Err(Cut::TooLong);
        }
        whole.extend_from_slice(&part);
    }
    Ok(whole.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_means_what_it_means_on_grpc() {
        let worker: MemberId = "e".parse().unwrap();
        for (status, kind) in [
            (429, "busy"),
            (400, "refused"),
            (422, "refused"),
            (503, "unavailable"),
            (404, "unavailable"),
            (401, "unavailable"),
            (500, "failed"),
            (502, "failed"),
            (302, "failed"),
        ] {
            assert_eq!(refused(&worker, StatusCode::from_u16(status).unwrap(), "why").kind(), kind, "{status}");
        }
    }

    #[test]
    fn the_reason_is_found_wherever_engines_put_it() {
        for (body, told) in [
            (r#"{"error": {"message": "too long", "code": 400}}"#, "too long"),
            (r#"{"object": "error", "message": "too\nlong"}"#, "too long"),
            (r#"{"detail": "Not Found"}"#, "Not Found"),
            (r#"{"error": "invalid request body"}"#, "invalid request body"),
            ("Internal Server Error", "Internal Server Error"),
            ("", ""),
        ] {
            assert_eq!(reason(body.as_bytes()), told, "{body}");
        }
        assert_eq!(reason(&[b'x'; 5000]).len(), 300);
    }
}
