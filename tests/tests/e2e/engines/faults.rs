//! Engines that die, hang, refuse, and say what means nothing: answers go on with the tokens that would have come, or end with
//! one clear error.

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Builder, Cluster, Service,
    openai::text_of,
    stand_in::{Kind, Knobs, Role},
    wait::{self, SOON},
};
use serde_json::json;

use super::{Engines, QUESTION, content, each, expected, known};
use crate::prompts::{chat, streamed};

/// What a router says when engines fail.
fn announce(cluster: &mut Cluster) {
    for warning in [
        "an answer broke off",
        "a worker did not begin an answer",
        "a worker did not go on with an answer",
        "prefill failed, trying next",
        "an engine is gone",
    ] {
        cluster.expect_warning(warning);
    }
}

/// A router that notices soon.
fn watchful(engines: &Engines) -> Builder {
    let settings =
        [("external.gone_after_ms", 500), ("limits.idle_timeout_ms", 1_000), ("limits.worker_silence_ms", 500)];
    settings.into_iter().fold(engines.cluster(), |builder, (name, value)| builder.set(Service::Router, name, value))
}

async fn moves(cluster: &Cluster) -> Result<f64> {
    let metrics = cluster.node(Service::Router, 0).metrics().await?;
    Ok(metrics.sum_where("kvasir_router_move_seconds_count", &[]))
}

/// The decode server that is writing.
async fn writer(engines: &Engines) -> Result<&'static str> {
    wait::until("somebody writes", SOON, async || {
        for id in ["d0", "d1"] {
            if engines.seen(id).await.is_ok_and(|seen| seen.running > 0) {
                return Some(id);
            }
        }
        None
    })
    .await
}

#[tokio::test]
async fn an_answer_goes_on_at_another_engine_when_its_own_is_killed() -> Result<()> {
    each(async |kind| {
        let mut engines = Engines::start(kind, 1, 2).await?;
        engines.turn(Role::Decode, Knobs { every_ms: 20, ..Knobs::default() }).await?;
        watchful(&engines)
            .run(async |cluster| {
                announce(cluster);
                known(cluster, 2).await?;
                let client = cluster.client();
                let mut stream = client.stream("/v1/chat/completions", &streamed("demo", QUESTION)).await?;
                let mut chunks = Vec::new();
                while text_of(&chunks).is_empty() {
                    chunks.push(stream.chunk().await?);
                }
                let writer = writer(&engines).await?;
                engines.get_mut(writer).process.kill();
                chunks.extend(stream.chunks().await?);
                let text = expected(&client, QUESTION, 64).await?;
                ensure!(text_of(&chunks) == text, "{:?} is not {text:?}", text_of(&chunks));
                let usage = &chunks.last().context("chunks")?["usage"]["completion_tokens"];
                ensure!(*usage == 64, "{usage}");
                ensure!(moves(cluster).await? == 1.0, "was it killed too late?");
                // It is no member any more, and one again when it answers.
                known(cluster, 1).await?;
                let dir = engines.dir().to_owned();
                engines.get_mut(writer).restart(&dir).await?;
                known(cluster, 2).await
            })
            .await
    })
    .await
}

#[tokio::test]
async fn a_prefill_server_that_is_killed_is_replaced_and_taken_back() -> Result<()> {
    each(async |kind| {
        let mut engines = Engines::start(kind, 2, 1).await?;
        watchful(&engines)
            .run(async |cluster| {
                announce(cluster);
                known(cluster, 1).await?;
                let client = cluster.client();
                let text = expected(&client, QUESTION, 64).await?;
                let ask = async || client.post("/v1/chat/completions", &chat("demo", QUESTION)).await;
                engines.get_mut("p0").process.kill();
                for _ in 0..4 {
                    let answer = ask().await?.ok()?;
                    ensure!(content(&answer["choices"][0]) == text, "{answer}");
                }
                ensure!(engines.seen("d0").await?.computed == 0, "p1 was there");
                engines.get_mut("p1").process.kill();
                let alone = ask().await?;
                match kind {
                    // A decode server of vLLM's computes what nobody computes for it; SGLang's can't.
                    Kind::Vllm => {
                        ensure!(content(&alone.ok()?["choices"][0]) == text, "computed by the decode server itself");
                        ensure!(engines.seen("d0").await?.computed == 1, "by whom else?");
                    }
                    Kind::Sglang => {
                        ensure!(alone.status == 503, "{alone:?}");
                        known(cluster, 0).await?;
                    }
                }
                let dir = engines.dir().to_owned();
                engines.get_mut("p0").restart(&dir).await?;
                wait::until("p0 computes again", SOON, async || {
                    let answer = ask().await.ok()?.ok().ok()?;
                    (content(&answer["choices"][0]) == text).then_some(())?;
                    (engines.seen("p0").await.ok()?.computed > 0).then_some(())
                })
                .await
            })
            .await
    })
    .await
}

#[tokio::test]
async fn whatever_goes_wrong_at_a_decode_server_the_answer_is_the_right_one() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 1, 2).await?;
        watchful(&engines)
            .set(Service::Router, "limits.worker_rest_ms", 0)
            .set(Service::Router, "policy", "round-robin")
            .run(async |cluster| {
                announce(cluster);
                known(cluster, 2).await?;
                let client = cluster.client();
                let text = expected(&client, QUESTION, 64).await?;
                let mut moved = 0.0;
                for after in [0, 5] {
                    for fault in ["status:500", "status:429", "garbage", "cut", "hang", "error"] {
                        if after > 0 && fault.starts_with("status") {
                            continue; // the status has been told by then
                        }
                        // What is written in one go with the head is lost with it.
                        let every_ms = if after > 0 { 5 } else { 0 };
                        let knobs = Knobs { fault: fault.to_owned(), after, times: 1, every_ms, ..Knobs::default() };
                        engines.get("d0").turn(knobs).await?;
                        // One of two in a row is d0's.
                        for _ in 0..2 {
                            let answer = client.chat(&chat("demo", QUESTION)).await;
                            let answer = answer.with_context(|| format!("{fault} after {after}"))?;
                            ensure!(content(&answer["choices"][0]) == text, "{fault} after {after}: {answer}");
                        }
                        moved += if after > 0 { 1.0 } else { 0.0 };
                    }
                }
                ensure!(moves(cluster).await? == moved, "{} moves", moves(cluster).await?);
                Ok(())
            })
            .await
    })
    .await
}

#[tokio::test]
async fn whatever_goes_wrong_at_a_prefill_server_another_computes_the_prompt() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 2, 1).await?;
        watchful(&engines)
            .run(async |cluster| {
                announce(cluster);
                known(cluster, 1).await?;
                let client = cluster.client();
                let text = expected(&client, QUESTION, 64).await?;
                for fault in ["status:500", "status:429", "garbage", "cut", "hang"] {
                    let knobs = Knobs { fault: fault.to_owned(), times: 1, ..Knobs::default() };
                    engines.get("p0").turn(knobs).await?;
                    for _ in 0..2 {
                        let answer = client.chat(&chat("demo", QUESTION)).await.context(fault)?;
                        ensure!(content(&answer["choices"][0]) == text, "{fault}: {answer}");
                    }
                    engines.get("p0").turn(Knobs::default()).await?;
                }
                ensure!(engines.seen("d0").await?.computed == 0, "one of the two always could");
                Ok(())
            })
            .await
    })
    .await
}

#[tokio::test]
async fn an_answer_that_could_only_go_on_wrongly_ends_with_an_error() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 1, 2).await?;
        watchful(&engines)
            .run(async |cluster| {
                announce(cluster);
                cluster.expect_warning("request failed");
                known(cluster, 2).await?;
                for (field, value) in [("guided_regex", json!("[a-z ]+")), ("presence_penalty", json!(0.5))] {
                    engines
                        .turn(
                            Role::Decode,
                            Knobs { fault: "cut".into(), after: 3, times: 1, every_ms: 5, ..Knobs::default() },
                        )
                        .await?;
                    let mut body = chat("demo", QUESTION);
                    body[field] = value;
                    let reply = cluster.client().post("/v1/chat/completions", &body).await?;
                    ensure!(
                        reply.status == 502 && reply.body["error"]["code"] == "worker_failed",
                        "{field}: {reply:?}"
                    );
                }
                ensure!(moves(cluster).await? == 0.0, "nothing was moved");
                Ok(())
            })
            .await
    })
    .await
}
