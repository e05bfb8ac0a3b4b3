use std::sync::Arc;

use kvasir_proto::{MAX_TOKENS_FIELD, PROMPT_FIELD};
use kvasir_types::Role;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Semaphore};
use tonic::Code;

use super::harness::*;

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let (cluster, mock) = Cluster::with_worker(vec![Step::Token(973), Step::Hang]).await;
    // In the middle of a stream …
    let mut stream = cluster.post(CHAT, Cluster::chat(json!({"stream": true}))).await.bytes_stream();
    read_until(&mut stream, " prefix").await;
    drop(stream);
    eventually("the stream is cancelled", async || mock.cancelled() == 1).await;
    // … and while it waits for the whole.
    tokio::select! {
        _ = cluster.post(CHAT, Cluster::chat(json!({}))) => panic!("the worker never ends its answer"),
        () = eventually("the worker has it", async || mock.requests().len() == 2) => {}
    }
    eventually("the request is cancelled", async || mock.cancelled() == 2).await;
    cluster.until("kvasir_router_inflight 0").await;
    cluster.until("kvasir_router_answers_total{outcome=\"cancelled\"} 2").await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_given_up() {
    let cluster = Cluster::start(|config| config.limits.write_stall_ms = 100).await;
    let mock = cluster.worker(|_| vec![Step::Flood(973)]).await;
    let mut stream = TcpStream::connect(cluster.base.trim_start_matches("http://")).await.unwrap();
    let body = Cluster::chat(json!({"stream": true})).to_string();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    eventually("the request is cancelled", async || mock.cancelled() == 1).await;
    cluster.until("kvasir_router_inflight 0").await;
}

#[tokio::test]
async fn a_worker_that_does_not_begin_is_passed_over_once() {
    for code in [Code::ResourceExhausted, Code::Unavailable] {
        let cluster = Cluster::start(|config| {
            config.limits.worker_rest_ms = 0;
            config.retry.begin = 1;
        })
        .await;
        let refuse = move |_: &_| vec![Step::Fail(code)];
        let bad = cluster.worker(refuse).await;
        let good = cluster.worker(|_| vec![Step::Token(973), stop()]).await;
        for _ in 0..4 {
            assert_eq!(cluster.ask(CHAT, Cluster::chat(json!({}))).await.0, 200);
        }
        assert_eq!((bad.requests().len(), good.requests().len()), (2, 4));
        drop(good);
        eventually("the good one has left", async || {
            cluster.hub.registry().view().borrow().role(Role::Decode).count() == 1
        })
        .await;
        cluster.until("kvasir_router_decode_workers 1").await;
        let response = cluster.post(CHAT, Cluster::chat(json!({}))).await;
        assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (503, &"1".parse().unwrap()));

        let worse = [cluster.worker(refuse).await, cluster.worker(refuse).await];
        assert_eq!(cluster.ask(CHAT, Cluster::chat(json!({}))).await.0, 503);
        let tried = bad.requests().len() - 3 + worse.iter().map(|mock| mock.requests().len()).sum::<usize>();
        assert_eq!(tried, 2, "one other worker is tried, not all");
    }
}

#[tokio::test]
async fn what_one_workers_memory_cannot_hold_another_is_asked_and_then_it_is_the_clients_to_change() {
    for (field, fields, param, code) in [
        (MAX_TOKENS_FIELD, json!({"max_completion_tokens": 200}), "max_completion_tokens", "above_max_value"),
        (PROMPT_FIELD, json!({}), "messages", "context_length_exceeded"),
    ] {
        let cluster = Cluster::start(|_| {}).await;
        let small = cluster.worker(move |_| vec![Step::Refuse(field)]).await;
        let (status, body) = cluster.ask(CHAT, Cluster::chat(fields.clone())).await;
        assert_eq!((status, &body["error"]["param"], &body["error"]["code"]), (400, &json!(param), &json!(code)));
        let message = format!("'{param}' is more than this server can hold: at most 7");
        assert_eq!(body["error"]["message"], message);
        assert_eq!(small.requests()[0].sampling.as_ref().unwrap().max_tokens_asked, field == MAX_TOKENS_FIELD);

        let large = cluster.worker(|_| vec![Step::Token(973), stop()]).await;
        for _ in 0..2 {
            assert_eq!(cluster.ask(CHAT, Cluster::chat(fields.clone())).await.0, 200);
        }
        assert_eq!(large.requests().len(), 2);
    }
}

#[tokio::test]
async fn a_worker_that_is_not_there_is_passed_over_and_left_alone_for_a_while() {
    let cluster = Cluster::start(|config| config.limits.worker_rest_ms = 600_000).await;
    let mut dead = cluster.worker(|_| vec![stop()]).await;
    dead.kill();
    for _ in 0..2 {
        // It rests after the first request, but there is nobody else to ask.
        assert_eq!(cluster.ask(CHAT, Cluster::chat(json!({}))).await.0, 503);
    }
    let good = cluster.worker(|_| vec![stop()]).await;
    for _ in 0..6 {
        assert_eq!(cluster.ask(CHAT, Cluster::chat(json!({}))).await.0, 200);
    }
    assert_eq!(good.requests().len(), 6);
    cluster.until("kvasir_router_upstream_errors_total{kind=\"unavailable\"} 2").await;
}

#[tokio::test]
async fn a_worker_that_dies_before_the_first_token_is_replaced() {
    let cluster = Cluster::start(|_| {}).await;
    // The first request goes to the first worker.
    let mut dying = cluster.worker(|_| vec![Step::Hang]).await;
    let good = cluster.worker(|_| vec![Step::Token(973), stop()]).await;
    let ((status, _), ()) = tokio::join!(cluster.ask(CHAT, Cluster::chat(json!({}))), async {
        eventually("the worker has it", async || !dying.requests().is_empty()).await;
        dying.kill();
    });
    assert_eq!((status, good.requests().len()), (200, 1));
    cluster.until("kvasir_router_upstream_errors_total{kind=\"broken\"} 1").await;
}

#[tokio::test]
async fn where_answers_may_not_move_a_worker_that_dies_is_a_clear_error() {
    let cluster = Cluster::start(|config| config.retry.moves = 0).await;
    let mut mock = cluster.worker(|_| vec![Step::Token(973), Step::Hang]).await;
    let mut stream = cluster.post(CHAT, Cluster::chat(json!({"stream": true}))).await.bytes_stream();
    read_until(&mut stream, " prefix").await;
    let (whole, rest) = tokio::join!(cluster.ask(CHAT, Cluster::chat(json!({}))), async {
        eventually("both are there", async || mock.requests().len() == 2).await;
        mock.kill();
        read_until(&mut stream, "\n\n").await
    });
    insta::assert_snapshot!(rest, @r#"data: {"error":{"message":"the worker that wrote this answer failed","type":"server_error","param":null,"code":"worker_failed"}}"#);
    assert!(futures_util::StreamExt::next(&mut stream).await.is_none());
    assert_eq!((whole.0, &whole.1["error"]["code"]), (502, &json!("worker_failed")));
    cluster.until("kvasir_router_inflight 0").await;
}

#[tokio::test]
async fn a_worker_that_talks_nonsense_or_ends_early_is_a_502() {
    for steps in [vec![Step::Nonsense], vec![Step::Token(973)], vec![Step::Token(973), Step::Fail(Code::Internal)]] {
        let cluster = Cluster::start(|config| config.retry.moves = 0).await;
        let _mock = cluster.worker(move |_| steps.clone()).await;
        assert_eq!(cluster.ask(CHAT, Cluster::chat(json!({}))).await.0, 502);
    }
}

#[tokio::test]
async fn silence_is_not_waited_for_for_ever() {
    let limits = |idle, request| {
        move |config: &mut crate::Config| {
            config.limits.idle_timeout_ms = idle;
            config.limits.request_timeout_ms = request;
            config.retry.moves = 0;
        }
    };
    for (idle, request, steps, code) in [
        (50, 60_000, vec![Step::Token(973), Step::Hang], "worker_stalled"),
        (60_000, 500, vec![Step::Token(973), Step::Hang], "deadline_exceeded"),
        (60_000, 500, vec![Step::Hang], "deadline_exceeded"),
    ] {
        let cluster = Cluster::start(limits(idle, request)).await;
        let mock = cluster.worker(move |_| steps.clone()).await;
        let (status, answer) = cluster.ask(CHAT, Cluster::chat(json!({}))).await;
        assert_eq!((status, &answer["error"]["code"]), (504, &json!(code)));
        eventually("the worker is told", async || mock.cancelled() == 1).await;
    }
}

#[tokio::test]
async fn more_requests_than_allowed_are_refused_before_any_work() {
    let cluster = Cluster::start(|config| config.limits.max_inflight = 1).await;
    let gate = Arc::new(Semaphore::new(0));
    let steps = vec![Step::Token(973), Step::Wait(gate.clone()), stop()];
    let mock = cluster.worker(move |_| steps.clone()).await;
    let mut first = cluster.post(CHAT, Cluster::chat(json!({"stream": true}))).await.bytes_stream();
    read_until(&mut first, " prefix").await;
    let refused = cluster.post(CHAT, Cluster::chat(json!({}))).await;
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    assert_eq!(mock.requests().len(), 1);
    gate.add_permits(10);
    read_until(&mut first, "[DONE]").await;
    eventually("there is room again", async || cluster.ask(CHAT, Cluster::chat(json!({}))).await.0 == 200).await;
}

#[tokio::test]
async fn workers_that_do_not_fit_are_not_used() {
    let cluster = Cluster::start(|_| {}).await;
    let registry = cluster.hub.registry();
    let not_ready = (503, r#"{"ready":false,"reason":"no decode worker is known"}"#.to_owned());
    assert_eq!(cluster.get("/ready").await, not_ready);
    let mut members = [(); 4].map(|()| cluster.member(Role::Decode, "127.0.0.1:1".into()));
    members[0].model.as_mut().unwrap().tokenizer = "another".into();
    members[1].protocol += 1;
    members[2].draining = true;
    members[3].model.as_mut().unwrap().name = "other".into();
    for member in members {
        registry.register(member).await.unwrap();
    }
    let response = cluster.post(CHAT, Cluster::chat(json!({}))).await;
    assert_eq!((response.status().as_u16(), response.headers().contains_key("retry-after")), (503, true));
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "no_worker");
    assert_eq!(cluster.get("/ready").await, not_ready);
}

#[tokio::test]
async fn leaving_finishes_what_was_begun() {
    let gate = Arc::new(Semaphore::new(0));
    let (cluster, _mock) = Cluster::with_worker(vec![Step::Token(973), Step::Wait(gate.clone()), stop()]).await;
    let mut stream = cluster.post(CHAT, Cluster::chat(json!({"stream": true}))).await.bytes_stream();
    read_until(&mut stream, " prefix").await;
    cluster.context.shutdown.trigger();
    let address = cluster.base.trim_start_matches("http://").to_owned();
    eventually("nobody is let in", async || TcpStream::connect(&address).await.is_err()).await;
    assert_eq!(cluster.hub.registry().view().borrow().role(Role::Router).count(), 0);
    gate.add_permits(1);
    read_until(&mut stream, "data: [DONE]\n\n").await;
    eventually("the router has ended", async || cluster.context.tasks.requests() == 0).await;
}
