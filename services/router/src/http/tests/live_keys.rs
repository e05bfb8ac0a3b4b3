//! What an operator sets takes effect on the next request, and not before; each key by what a client, or a worker, sees of it.

use kvasir_cluster::{Document, Found, Scope, changed};
use kvasir_types::Role;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;

use super::harness::*;

const CHAT: &str = "/v1/chat/completions";

/// Sets keys as an operator's change does, once a member has checked it; `Null` unsets.
async fn set(cluster: &Cluster, keys: &[(&str, Value)]) {
    let (registry, scope) = (cluster.hub.registry(), Scope::all(Role::Router));
    let before = match registry.settings_of(&scope).await.unwrap() {
        Some(Found::Document(document)) => document,
        _ => Document::default(),
    };
    let wanted = keys.iter().map(|(key, value)| ((*key).to_owned(), (!value.is_null()).then(|| value.clone())));
    let (document, changes) = changed(&before, &scope, "alice", wanted);
    let revision = registry.set(&scope, &document, &changes).await.unwrap();
    cluster.until(&format!("kvasir_config_revision {revision}")).await;
}

#[tokio::test]
async fn limits_are_those_of_the_moment() {
    let cluster = Cluster::start(|config| config.limits.worker_rest_ms = 0).await;
    let hang = |request: &kvasir_proto::v1::GenerateRequest| {
        if request.choices == 3 { vec![Step::Token(973), Step::Hang] } else { answer_of(request) }
    };
    let _mock = cluster.worker(hang).await;
    let status = async |fields: Value| cluster.ask(CHAT, Cluster::chat(fields)).await.0;
    for (key, value, fields, expected) in [
        ("limits.max_body_bytes", json!(64), json!({}), 413),
        ("limits.max_output_tokens", json!(3), json!({"max_tokens": 4}), 400),
        ("limits.max_choices", json!(1), json!({"n": 2}), 400),
        ("limits.max_inflight", json!(1), json!({}), 200),
    ] {
        assert_eq!(status(fields.clone()).await, 200, "{key}");
        set(&cluster, &[(key, value)]).await;
        assert_eq!(status(fields.clone()).await, expected, "{key}");
        set(&cluster, &[(key, Value::Null)]).await;
        assert_eq!(status(fields).await, 200, "{key}, unset");
    }

    // With one under way that never ends …
    let mut stream = cluster.post(CHAT, Cluster::chat(json!({"n": 3, "stream": true}))).await.bytes_stream();
    read_until(&mut stream, "data: ").await;
    set(&cluster, &[("limits.max_inflight", json!(1))]).await;
    assert_eq!(status(json!({})).await, 429, "there is no room for another");
    set(&cluster, &[("limits.max_inflight", Value::Null)]).await;
    assert_eq!(status(json!({})).await, 200);
    // … nobody may wait, and then nobody needs to.
    set(&cluster, &[("admission.per_worker", json!(1)), ("admission.max_waiting", json!(0))]).await;
    eventually("there is no queue", async || status(json!({})).await == 429).await;
    set(&cluster, &[("admission.per_worker", json!(2))]).await;
    eventually("there is room", async || status(json!({})).await == 200).await;
    drop(stream);

    // Whoever takes too long is given up.
    set(&cluster, &[("limits.request_timeout_ms", json!(50))]).await;
    assert_eq!(status(json!({"n": 3})).await, 504);
    set(&cluster, &[("limits.request_timeout_ms", Value::Null), ("limits.idle_timeout_ms", json!(50))]).await;
    set(&cluster, &[("retry.moves", json!(0))]).await;
    // Long before the request's own time is over.
    assert_eq!(status(json!({"n": 3})).await, 504, "the worker says nothing any more, and nobody else may go on");
    set(&cluster, &[("limits.body_timeout_ms", json!(50))]).await;
    let mut slow = TcpStream::connect(cluster.base.trim_start_matches("http://")).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{{");
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut reply = String::new();
    slow.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
}

#[tokio::test]
async fn second_tries_are_those_of_the_moment_and_so_is_the_policy() {
    let cluster = Cluster::start(|config| config.limits.worker_rest_ms = 0).await;
    let mut bad = Vec::new();
    for _ in 0..4 {
        bad.push(cluster.worker(|_| vec![Step::Fail(Code::Unavailable)]).await);
    }
    let status = async || cluster.ask(CHAT, Cluster::chat(json!({}))).await.0;
    let tries = async || {
        let asked = || bad.iter().map(|worker| worker.requests().len()).sum::<usize>();
        let before = asked();
        assert_ne!(status().await, 200);
        asked() - before
    };
    assert_eq!(tries().await, 3, "two more than one");
    set(&cluster, &[("retry.begin", json!(0))]).await;
    assert_eq!(tries().await, 1);
    set(&cluster, &[("retry.begin", json!(1))]).await;
    assert_eq!(tries().await, 2);
    set(&cluster, &[("retry.burst", json!(0)), ("retry.per_second", json!(0)), ("retry.per_request", json!(0))]).await;
    eventually("the purse is empty", async || tries().await == 1).await;

    set(&cluster, &[("policy", json!("round-robin"))]).await;
    let _good = cluster.worker(answer_of).await;
    let by_turn = "kvasir_router_decisions_total{policy=\"round-robin\"";
    eventually("it is its turn", async || {
        status().await;
        cluster.get("/metrics").await.1.contains(by_turn)
    })
    .await;
    let events = cluster.hub.registry().events("").await.unwrap();
    let told = events.iter().find(|noted| noted.event.kind == "policy").expect("it is in the history");
    assert_eq!((told.event.who.as_str(), told.event.what.contains("round-robin")), ("alice", true));
}
