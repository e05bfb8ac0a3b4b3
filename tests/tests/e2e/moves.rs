//! Nothing is lost when workers die: what was begun is ended elsewhere, in the same stream, with the same tokens.

use std::{cell::Cell, time::Duration};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Builder, Cluster, Service,
    openai::text_of,
    wait::{self, SOON},
};
use serde_json::{Value, json};

use crate::{
    load::Load,
    prompts::{COUNT, streamed},
};

/// Streams at the same time.
const STREAMS: usize = 50;

/// What routers and workers say when somebody dies.
pub(crate) fn announce(cluster: &mut Cluster) {
    for warning in [
        "an answer broke off",
        "a worker did not begin an answer",
        "a worker did not go on with an answer",
        "prefill failed, trying next",
        "transfer",
        "store",
        "a peer",
    ] {
        cluster.expect_warning(warning);
    }
}

/// Two of each that may die.
fn pairs() -> Builder {
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .kv_store(2)
        .set(Service::Decode, "decode.local_prefill_tokens", 16)
        .set(Service::Decode, "decode.peer_timeout_ms", 1_000)
        .set(Service::Router, "retry.moves", 20)
}

#[tokio::test]
async fn every_stream_of_fifty_completes_with_the_golden_tokens_whichever_service_is_killed() -> Result<()> {
    pairs()
        .run(async |cluster| {
            announce(cluster);
            let load = Load::new(cluster, STREAMS)?;
            let more = async |what: &str| load.more(what, STREAMS).await;
            load.run(async {
                more("the load runs").await?;
                for (service, index) in [
                    (Service::Decode, 0),
                    (Service::Prefill, 0),
                    (Service::KvStore, 0),
                    (Service::Decode, 1),
                    (Service::Prefill, 1),
                    (Service::KvStore, 1),
                ] {
                    cluster.node_mut(service, index).process.kill();
                    more("the rest serves on").await?;
                    cluster.restart(service, index).await?;
                    more("the new one is taken in").await?;
                }
                Ok(())
            })
            .await?;
            let metrics = cluster.node(Service::Router, 0).metrics().await?;
            let moved = metrics.sum_where("kvasir_router_move_seconds_count", &[]);
            ensure!(moved > 0.0, "somebody must have been in the middle of an answer");
            Ok(())
        })
        .await
}

/// The index of the decode worker that has a request.
async fn writer(cluster: &Cluster) -> Result<usize> {
    let found = Cell::new(None);
    wait::until("a decode worker writes", SOON, async || {
        for index in 0..2 {
            let status = cluster.node(Service::Decode, index).status().await.ok()?;
            if status.blocks.is_some_and(|blocks| blocks.in_use > 0) {
                found.set(Some(index));
            }
        }
        found.get().map(drop)
    })
    .await?;
    found.get().context("a decode worker")
}

/// A long answer in several choices, chosen with a seed, of a form: what a move could get wrong.
fn elaborate(model: &str) -> Value {
    let mut body = streamed(model, COUNT);
    body["temperature"] = 1.2.into();
    body["seed"] = 11.into();
    body["n"] = 3.into();
    body["max_tokens"] = 160.into();
    body["frequency_penalty"] = 0.3.into();
    body["guided_regex"] = json!("([a-z]{1,9} ){150}");
    body
}

/// What each choice says.
fn choices(chunks: &[Value]) -> Vec<String> {
    let mut texts = vec![String::new(); 3];
    for chunk in chunks.iter().flat_map(|chunk| chunk["choices"].as_array()).flatten() {
        let text = &mut texts[chunk["index"].as_u64().unwrap_or_default() as usize];
        text.push_str(chunk["delta"]["content"].as_str().unwrap_or_default());
    }
    texts
}

/// Answers an elaborate request while `harm` is done to the worker that writes it, in the middle of it.
async fn harmed(builder: Builder, harm: impl AsyncFnOnce(&mut Cluster, usize) -> Result<()>) -> Result<()> {
    let builder = builder.kv_store(0).decode(2);
    builder
        .run(async |cluster| {
            announce(cluster);
            cluster.expect_warning("still running after the grace");
            cluster.expect_warning("request failed");
            let (client, body) = (cluster.client(), elaborate(cluster.model()));
            let undisturbed = client.stream("/v1/chat/completions", &body).await?.chunks().await?;
            let mut stream = client.stream("/v1/chat/completions", &body).await?;
            let mut chunks = Vec::new();
            while text_of(&chunks).is_empty() {
                chunks.push(stream.chunk().await?);
            }
            let writer = writer(cluster).await?;
            harm(cluster, writer).await?;
            chunks.extend(stream.chunks().await?);
            let (one, other) = (choices(&chunks), choices(&undisturbed));
            ensure!(one == other, "{one:?} is not {other:?}");
            let usage = |chunks: &[Value]| chunks.last().map(|last| last["usage"]["completion_tokens"].clone());
            ensure!(usage(&chunks) == usage(&undisturbed), "{:?}", usage(&chunks));
            let metrics = cluster.node(Service::Router, 0).metrics().await?;
            let moved = metrics.sum_where("kvasir_router_move_seconds_count", &[]);
            ensure!(moved == 1.0, "{moved} moves; was it harmed too late?");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn choices_with_a_seed_a_grammar_and_penalties_survive_a_kill() -> Result<()> {
    harmed(Cluster::builder(), async |cluster, writer| {
        cluster.node_mut(Service::Decode, writer).process.kill();
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_decode_worker_that_stops_answering_is_left_in_mid_answer() -> Result<()> {
    harmed(Cluster::builder(), async |cluster, writer| {
        cluster.node_mut(Service::Decode, writer).process.pause();
        let router = cluster.node(Service::Router, 0);
        let moved = async || {
            let metrics = router.metrics().await.ok()?;
            (metrics.sum_where("kvasir_router_move_seconds_count", &[]) > 0.0).then_some(())
        };
        wait::until("the answer goes on elsewhere", SOON, moved).await?;
        // Awake again, it must have given up what it was doing.
        cluster.node_mut(Service::Decode, writer).process.resume();
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_decode_worker_that_leaves_before_its_answers_end_hands_them_on() -> Result<()> {
    let impatient = Cluster::builder().set(Service::Decode, "shutdown.grace_ms", 1);
    harmed(impatient, async |cluster, writer| {
        let process = &mut cluster.node_mut(Service::Decode, writer).process;
        process.terminate();
        process.wait(Duration::from_secs(20)).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn an_answer_waits_for_the_only_decode_worker_to_come_back() -> Result<()> {
    Cluster::builder()
        .kv_store(0)
        .run(async |cluster| {
            announce(cluster);
            let body = elaborate(cluster.model());
            let undisturbed = cluster.client().stream("/v1/chat/completions", &body).await?.chunks().await?;
            let mut stream = cluster.client().stream("/v1/chat/completions", &body).await?;
            let mut chunks = vec![stream.chunk().await?];
            cluster.node_mut(Service::Decode, 0).process.kill();
            cluster.restart(Service::Decode, 0).await?;
            chunks.extend(stream.chunks().await?);
            ensure!(choices(&chunks) == choices(&undisturbed), "{:?}", choices(&chunks));
            Ok(())
        })
        .await
}
