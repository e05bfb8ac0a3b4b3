use http::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::harness::*;

#[tokio::test]
async fn what_is_counted_is_not_for_everybody_unless_asked_for() {
    for shown in [true, false] {
        let cluster = Cluster::start(|config| config.public_metrics = shown).await;
        let (status, page) = cluster.get("/metrics").await;
        assert_eq!((status, page.contains("kvasir_router")), if shown { (200, true) } else { (404, false) });
        assert_eq!(cluster.get("/openapi.json").await.1.contains("\"/metrics\""), shown);
    }
}

#[tokio::test]
async fn bad_requests_are_refused_by_name_and_no_worker_hears_of_them() {
    let cluster = Cluster::start(|config| config.limits.max_body_bytes = 4096).await;
    let mock = cluster.worker(|_| vec![stop()]).await;
    let chat = |fields: Value| Cluster::chat(fields).to_string();
    let completion = |prompt: Value| json!({"model": "demo", "prompt": prompt}).to_string();
    let (chats, completions) = ("/v1/chat/completions", "/v1/completions");
    let cases: Vec<(Method, &str, String, u16, Value, Value)> = vec![
        (Method::POST, chats, "{".into(), 400, Value::Null, Value::Null),
        (Method::POST, chats, "[]".into(), 400, Value::Null, Value::Null),
        (Method::POST, chats, "".into(), 400, Value::Null, Value::Null),
        (Method::POST, chats, chat(json!({"model": "gpt-9"})), 404, json!("model"), json!("model_not_found")),
        (Method::POST, chats, chat(json!({"temperature": -1})), 400, json!("temperature"), json!("below_min_value")),
        (Method::POST, chats, chat(json!({"n": 17})), 400, json!("n"), json!("above_max_value")),
        (Method::POST, chats, chat(json!({"n": 0})), 400, json!("n"), json!("below_min_value")),
        (Method::POST, chats, chat(json!({"n": 1u64 << 40})), 400, json!("n"), json!("above_max_value")),
        (Method::POST, chats, chat(json!({"nope": 2})), 400, json!("nope"), json!("unknown_parameter")),
        (Method::POST, chats, chat(json!({"max_tokens": 99_999})), 400, json!("max_tokens"), json!("above_max_value")),
        (
            Method::POST,
            chats,
            chat(json!({"reasoning_effort": "low"})),
            400,
            json!("reasoning_effort"),
            json!("unsupported_parameter"),
        ),
        (Method::POST, chats, chat(json!({"user": "x".repeat(5000)})), 413, Value::Null, json!("request_too_large")),
        (Method::POST, completions, completion(json!([1532])), 400, json!("prompt"), json!("invalid_value")),
        (
            Method::POST,
            completions,
            completion(json!(vec![5; CONTEXT as usize])),
            400,
            json!("prompt"),
            json!("context_length_exceeded"),
        ),
        (Method::POST, completions, completion(json!(["a", "b"])), 400, json!("prompt"), json!("unsupported_value")),
        (Method::GET, chats, String::new(), 405, Value::Null, Value::Null),
        (Method::POST, "/v1/embeddings", "{}".into(), 404, Value::Null, Value::Null),
        (Method::GET, "/v1/models/none", String::new(), 404, json!("model"), json!("model_not_found")),
    ];
    for (method, path, body, status, param, code) in cases {
        let request = cluster.client.request(method, format!("{}{path}", cluster.base)).body(body.clone());
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{path} {body:.100}");
        assert!(response.headers().contains_key("x-request-id"));
        let error = response.json::<Value>().await.unwrap()["error"].clone();
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{path} {body:.100}");
        assert!(error["message"].is_string() && error["type"] == "invalid_request_error", "{error}");
    }
    assert!(mock.requests().is_empty());
    cluster.until("kvasir_router_inflight 0").await;
}

#[tokio::test]
async fn a_big_body_of_unknown_length_is_cut_off() {
    let cluster = Cluster::start(|config| config.limits.max_body_bytes = 1000).await;
    let parts = futures_util::stream::iter((0..100).map(|_| Ok::<_, std::io::Error>("x".repeat(100))));
    let request =
        cluster.client.post(format!("{}/v1/completions", cluster.base)).body(reqwest::Body::wrap_stream(parts));
    assert_eq!(request.send().await.unwrap().status(), 413);
}

#[tokio::test]
async fn half_a_body_is_not_waited_for() {
    let cluster = Cluster::start(|config| config.limits.body_timeout_ms = 50).await;
    let mut stream = TcpStream::connect(cluster.base.trim_start_matches("http://")).await.unwrap();
    let half = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"model\":";
    stream.write_all(half.as_bytes()).await.unwrap();
    let mut answer = [0; 1024];
    let read = stream.read(&mut answer).await.unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer[..read]));
    cluster.until("kvasir_router_inflight 0").await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let cluster = Cluster::start(|config| config.limits.header_timeout_ms = 50).await;
    for said in ["", "GET /health HTTP/1.1\r\nhost"] {
        let mut stream = TcpStream::connect(cluster.base.trim_start_matches("http://")).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(std::time::Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "still open after {said:?}");
    }
}

#[tokio::test]
async fn a_request_id_that_is_no_name_is_replaced() {
    let (cluster, mock) = Cluster::with_worker(vec![stop()]).await;
    let request = cluster.client.post(format!("{}/v1/chat/completions", cluster.base)).header("x-request-id", "a/b c");
    let response = request.json(&Cluster::chat(json!({}))).send().await.unwrap();
    let told = response.headers()["x-request-id"].to_str().unwrap();
    assert_eq!((told.len(), told), (32, mock.requests()[0].request_id.as_str()));
}
