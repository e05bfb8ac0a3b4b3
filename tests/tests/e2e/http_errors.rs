//! What a client gets wrong is told as OpenAI tells it: a 4xx, the error object, the parameter's name. No worker hears of it.

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Cluster, Service};
use serde_json::{Value, json};

use crate::prompts::{QUESTION, chat, long, streamed};

#[tokio::test]
async fn bad_requests_name_the_parameter_and_start_nothing() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let with = |key: &str, value: Value| {
                let mut body = chat("demo", QUESTION);
                body[key] = value;
                body
            };
            let client = cluster.client();
            for (status, param, body) in [
                (404, "model", with("model", json!("no-such-model"))),
                (400, "model", with("model", Value::Null)),
                (400, "messages", with("messages", json!([]))),
                (400, "messages", with("messages", json!("hello"))),
                (400, "temperature", with("temperature", json!(-1))),
                (400, "temperature", with("temperature", json!("warm"))),
                (400, "top_p", with("top_p", json!(1.5))),
                (400, "max_tokens", with("max_tokens", json!(0))),
                (400, "top_logprobs", with("top_logprobs", json!(21))),
                (400, "stop", with("stop", json!(["a", "b", "c", "d", "e"]))),
                (400, "n", with("n", json!(0))),
                (400, "messages", chat("demo", &long(9000))), // more than the model's context
            ] {
                for stream in [false, true] {
                    let mut body = body.clone();
                    body["stream"] = stream.into();
                    let reply = client.post("/v1/chat/completions", &body).await?;
                    let error = &reply.body["error"];
                    let shown = body.to_string().chars().take(200).collect::<String>();
                    ensure!(reply.status == status, "{shown}: HTTP {} {}", reply.status, reply.body);
                    ensure!(error["param"] == param, "{shown}: {}", reply.body);
                    ensure!(error["message"].is_string() && error["type"].is_string(), "{shown}: {}", reply.body);
                }
            }
            nothing_started(cluster).await
        })
        .await
}

#[tokio::test]
async fn an_answer_longer_than_any_memory_is_refused_if_it_was_asked_for() -> Result<()> {
    Cluster::builder()
        .set(Service::Decode, "kv.memory_bytes", 64 * 20_480) // 64 blocks: 1,024 tokens
        .run(async |cluster| {
            let client = cluster.client();
            let mut body = chat("demo", QUESTION);
            body["max_tokens"] = 2000.into();
            let reply = client.post("/v1/chat/completions", &body).await?;
            let error = &reply.body["error"];
            ensure!(reply.status == 400 && error["param"] == "max_tokens", "HTTP {} {}", reply.status, reply.body);
            let message = error["message"].as_str().unwrap_or_default();
            let at_most = message.split("ask for at most ").nth(1).and_then(|rest| rest.split(' ').next());
            let at_most: u64 = at_most.and_then(|number| number.parse().ok()).with_context(|| message.to_owned())?;
            ensure!(message.contains("there are 64") && (900..1024).contains(&at_most), "{message}");
            let prefilled = cluster.node(Service::Prefill, 0).status().await?.requests_total;
            ensure!(prefilled == 0, "it was computed for nothing");
            for max_tokens in [json!(at_most), Value::Null] {
                body["max_tokens"] = max_tokens;
                let reply = client.post("/v1/chat/completions", &body).await?;
                ensure!(reply.status == 200, "HTTP {} {}", reply.status, reply.body);
            }
            Ok(())
        })
        .await
}

#[tokio::test]
async fn what_is_no_request_at_all_is_refused() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let client = cluster.client();
            for body in ["", "{", "[]", "null", "{\"model\": \"demo\", \"messages\": [", "\u{1}"] {
                let reply = client.post_raw("/v1/chat/completions", body.into()).await?;
                ensure!(reply.status == 400, "{body:?}: HTTP {} {}", reply.status, reply.body);
                ensure!(reply.body["error"]["message"].is_string(), "{body:?}: {}", reply.body);
            }
            let reply = client.get("/v1/no-such-page").await?;
            ensure!(reply.status == 404 && reply.body["error"].is_object(), "HTTP {} {}", reply.status, reply.body);
            let reply = client.get("/v1/chat/completions").await?;
            ensure!(reply.status == 405 && reply.body["error"].is_object(), "HTTP {} {}", reply.status, reply.body);
            let models = client.get("/v1/models").await?.ok()?;
            ensure!(models["object"] == "list" && models["data"][0]["id"] == "demo", "{models}");
            nothing_started(cluster).await
        })
        .await
}

#[tokio::test]
async fn a_stream_has_openais_form() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let stream = cluster.client().stream("/v1/chat/completions", &streamed("demo", QUESTION)).await?;
            let kind = stream.headers["content-type"].to_str()?.to_owned();
            ensure!(kind.starts_with("text/event-stream"), "{kind}");
            let chunks = stream.chunks().await?;
            let (usage, chunks) = chunks.split_last().expect("a stream has chunks");
            ensure!(usage["choices"] == json!([]) && usage["usage"]["completion_tokens"].as_u64() > Some(0), "{usage}");
            ensure!(chunks[0]["choices"][0]["delta"]["role"] == "assistant", "{}", chunks[0]);
            ensure!(
                chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == usage["id"])
            );
            let ends: Vec<_> = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).collect();
            ensure!(ends.len() == 1 && ends[0]["choices"][0]["finish_reason"] == "stop", "{ends:?}");
            let whole = cluster.client().chat(&chat("demo", QUESTION)).await?;
            ensure!(kvasir_tests::openai::text_of(chunks) == crate::prompts::text(&whole), "{whole}");
            Ok(())
        })
        .await
}

async fn nothing_started(cluster: &Cluster) -> Result<()> {
    for service in [Service::Prefill, Service::Decode] {
        let status = cluster.node(service, 0).status().await?;
        ensure!(status.requests_total == 0, "{service:?} worker was asked {} times", status.requests_total);
    }
    Ok(())
}
