//! The page for operators and probes, on a port of its own: `/health`, `/ready` (under all the names that others have for
//! them), `/metrics`, and what a service adds.
//!
//! It is up before the service is (loading a model takes a while, and a probe should get an answer meanwhile) and stays up
//! while the service drains. It has a thread and a runtime of its own: a service whose runtime is busy is not dead, and a
//! probe that waited for it would have it killed.

use std::{io, net::SocketAddr, time::Instant};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use serde_json::json;
use tokio::net::TcpListener;

use crate::{AdminConfig, Context};

/// Names under which a process says that it lives.
pub const HEALTH: [&str; 5] = ["/health", "/healthz", "/live", "/livez", "/liveness"];
/// Names under which it says whether it should be sent work.
pub const READY: [&str; 3] = ["/ready", "/readyz", "/readiness"];

/// The port, or a thread for it, could not be had.
#[derive(Debug, thiserror::Error)]
#[error("admin.listen: cannot listen on {address}")]
pub struct Error {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

/// Binds the port of the configuration and serves from now on until the process ends; returns the address it got.
pub async fn start(config: &AdminConfig, context: &Context) -> Result<SocketAddr, Error> {
    start_with(config, context, Router::new()).await
}

/// The same with more routes, those of the service. Requests carry where they come from (`ConnectInfo<SocketAddr>`).
pub async fn start_with(config: &AdminConfig, context: &Context, more: Router) -> Result<SocketAddr, Error> {
    let failed = |source| Error { address: config.listen, source };
    let listener = std::net::TcpListener::bind(config.listen).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let routes = router(context.clone()).merge(more);
    let serving = move || {
        let served = runtime.block_on(async {
            let routes = routes.into_make_service_with_connect_info::<SocketAddr>();
            axum::serve(TcpListener::from_std(listener)?, routes).await
        });
        if let Err(error) = served {
            tracing::error!(%error, "the admin page is gone");
        }
    };
    std::thread::Builder::new().name("admin".to_owned()).spawn(serving).map_err(failed)?;
    Ok(address)
}

fn router(context: Context) -> Router {
    let started = Instant::now();
    let health =
        move || async move { Json(json!({ "status": "ok", "uptime_ms": started.elapsed().as_millis() as u64 })) };
    let routes = Router::new().route("/metrics", get(metrics));
    let routes = HEALTH.iter().fold(routes, |routes, path| routes.route(path, get(health)));
    READY.iter().fold(routes, |routes, path| routes.route(path, get(ready))).with_state(context)
}

async fn ready(State(context): State<Context>) -> impl IntoResponse {
    match context.health.ready() {
        Ok(()) => (StatusCode::OK, Json(json!({ "ready": true }))),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "reason": why }))),
    }
}

async fn metrics(State(context): State<Context>, headers: HeaderMap) -> impl IntoResponse {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    ([(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], context.metrics.encode_for(accept))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    #[tokio::test]
    async fn it_answers_while_starting_serving_and_draining() {
        let context = Context::detached("test");
        context.metrics.gauge("kvasir_test", "Test").set(3);
        let address = start(&AdminConfig::default(), &context).await.unwrap();
        let ready = async |status: &str, words: &str| {
            let reply = fetch(address, "/ready").await;
            assert!(reply.starts_with(&format!("HTTP/1.1 {status}")) && reply.ends_with(words), "{reply}");
            assert!(fetch(address, "/health").await.contains(r#"{"status":"ok","uptime_ms":"#));
        };
        ready("503", r#"{"ready":false,"reason":"starting"}"#).await;
        context.health.set_ready();
        ready("200", r#"{"ready":true}"#).await;
        context.health.set_not_ready("draining");
        context.shutdown.trigger();
        ready("503", r#"{"ready":false,"reason":"draining"}"#).await;

        for path in HEALTH {
            assert!(fetch(address, path).await.contains(r#"{"status":"ok""#), "{path}");
        }
        for path in READY {
            assert!(fetch(address, path).await.starts_with("HTTP/1.1 503"), "{path}");
        }

        let page = fetch(address, "/metrics").await;
        assert!(
            page.contains("\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"),
            "{page}"
        );
        assert!(page.contains("\nkvasir_test 3\n") && page.contains("# EOF"), "{page}");
        assert!(fetch(address, "/nothing").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn it_answers_while_the_service_has_no_thread_left() {
        let context = Context::detached("test");
        let address = start(&AdminConfig::default(), &context).await.unwrap();
        use std::io::{Read, Write};
        // This runtime has one thread, and that blocks on a plain socket: nothing else of it can run.
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_key() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listen = taken.local_addr().unwrap();
        let error = start(&AdminConfig { listen }, &Context::detached("test")).await.unwrap_err();
        let line = crate::chain(&error);
        assert!(
            line.starts_with(&format!("admin.listen: cannot listen on {listen}: Address already in use")),
            "{line}"
        );
    }
}
