//! Whoever dies, stops answering or leaves: the request ends once, nothing hangs, nothing leaks.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future;
use kvasir_tests::{
    Builder, Cluster, Service,
    openai::text_of,
    wait::{self, SOON},
};

use crate::prompts::{COUNT, QUESTION, chat, long, streamed, text};

/// Words of a prompt that takes about a second to compute in chunks of 16 tokens.
const LONG: usize = 2000;

/// A cluster in which every prompt is computed anew, slowly, by a prefill worker if there is one.
fn slow() -> Builder {
    Cluster::builder()
        .kv_store(0)
        .worker("engine.prefix_cache", false)
        .worker("engine.chunk_tokens", 16)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .set(Service::Decode, "decode.peer_timeout_ms", 500)
}

/// Waits until a worker holds blocks for a request.
async fn busy(cluster: &Cluster, service: Service, index: usize) -> Result<()> {
    let node = cluster.node(service, index);
    let holds = async || node.status().await.ok()?.blocks.is_some_and(|blocks| blocks.in_use > 0).then_some(());
    wait::until(&format!("{} holds blocks", node.id()), SOON, holds).await
}

#[tokio::test]
async fn a_prefill_worker_killed_in_mid_handoff_costs_time_not_the_answer() -> Result<()> {
    slow()
        .run(async |cluster| {
            cluster.expect_warning("prefill failed, trying next");
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(LONG)));
            let kill = async {
                busy(cluster, Service::Prefill, 0).await?;
                cluster.node_mut(Service::Prefill, 0).process.kill();
                anyhow::Ok(())
            };
            let (answer, killed) = future::join(client.chat(&body), kill).await;
            killed?;
            let log = cluster.node(Service::Decode, 0).process.log();
            ensure!(log.contains("\"WARN\""), "the decode worker had to go on without; was it killed too late?");
            // Computed by the decode worker alone, undisturbed, the answer is the same.
            let undisturbed = client.chat(&body).await?;
            ensure!(text(&answer?) == text(&undisturbed), "a lost worker does not change the answer");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_second_prefill_worker_takes_over_from_a_killed_one() -> Result<()> {
    slow()
        .prefill(2)
        .run(async |cluster| {
            cluster.expect_warning("prefill failed, trying next");
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(LONG)));
            let kill = async {
                let first = Box::pin(busy(cluster, Service::Prefill, 0));
                let second = Box::pin(busy(cluster, Service::Prefill, 1));
                let index = match future::select(first, second).await {
                    future::Either::Left((result, _)) => result.map(|()| 0)?,
                    future::Either::Right((result, _)) => result.map(|()| 1)?,
                };
                cluster.node_mut(Service::Prefill, index).process.kill();
                anyhow::Ok(1 - index)
            };
            let (answer, other) = future::join(client.chat(&body), kill).await;
            answer?;
            let taken_over = cluster.node(Service::Prefill, other?).status().await?.requests_total;
            ensure!(taken_over == 1, "the other prefill worker computed the prompt: {taken_over}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_prefill_worker_that_stops_answering_is_given_up_and_its_late_writes_land_nowhere() -> Result<()> {
    slow()
        .run(async |cluster| {
            cluster.expect_warning("prefill failed, trying next");
            cluster.expect_warning("transfer");
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(LONG)));
            let pause = async {
                busy(cluster, Service::Prefill, 0).await?;
                cluster.node_mut(Service::Prefill, 0).process.pause();
                anyhow::Ok(())
            };
            let (answer, paused) = future::join(client.chat(&body), pause).await;
            paused?;
            let answer = answer?;
            // Awake again, it still has chunks to compute and blocks to write, into memory that others use by now.
            cluster.node_mut(Service::Prefill, 0).process.resume();
            let again = client.chat(&body).await?;
            ensure!(text(&answer) == text(&again), "late writes change no answer");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_killed_decode_worker_is_a_502() -> Result<()> {
    slow()
        .run(async |cluster| {
            cluster.expect_warning("an answer broke off");
            cluster.expect_warning("a worker did not begin an answer");
            cluster.expect_warning("prefill failed, trying next");
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(LONG)));
            let kill = async {
                busy(cluster, Service::Decode, 0).await?;
                cluster.node_mut(Service::Decode, 0).process.kill();
                anyhow::Ok(())
            };
            let (answer, killed) = future::join(client.post("/v1/chat/completions", &body), kill).await;
            killed?;
            let answer = answer?;
            ensure!(answer.status == 502, "HTTP {}: {}", answer.status, answer.body);
            ensure!(answer.body["error"]["message"].is_string(), "an OpenAI error object: {}", answer.body);
            Ok(())
        })
        .await
}

#[tokio::test]
async fn the_only_decode_worker_killed_in_mid_stream_is_an_error_event_and_the_end() -> Result<()> {
    Cluster::builder()
        .kv_store(0)
        .set(Service::Router, "retry.move_wait_ms", 500)
        .run(async |cluster| {
            cluster.expect_warning("an answer broke off");
            cluster.expect_warning("a worker did not go on with an answer");
            let mut body = streamed(cluster.model(), COUNT);
            body["max_tokens"] = 200.into();
            let mut stream = cluster.client().stream("/v1/chat/completions", &body).await?;
            let mut text = String::new();
            while text.is_empty() {
                text = text_of(&[stream.chunk().await?]);
            }
            cluster.node_mut(Service::Decode, 0).process.kill();
            let mut last = String::new();
            while let Some(event) = stream.next().await? {
                last = event;
            }
            ensure!(last.contains("\"error\""), "the last event says what happened: {last}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_blocks_everywhere() -> Result<()> {
    slow()
        .run(async |cluster| {
            let (client, body) = (cluster.client(), streamed(cluster.model(), &long(LONG)));
            for service in [Service::Prefill, Service::Decode] {
                let leave = async {
                    busy(cluster, service, 0).await?;
                    anyhow::Ok(())
                };
                // Dropping the unfinished request hangs up.
                let request = Box::pin(client.post("/v1/chat/completions", &body));
                match future::select(request, Box::pin(leave)).await {
                    future::Either::Left(_) => anyhow::bail!("answered before the client could leave"),
                    future::Either::Right((left, _)) => left?,
                }
                cluster.assert_no_leak().await?;
            }
            let mut stream = client.stream("/v1/chat/completions", &streamed(cluster.model(), COUNT)).await?;
            stream.chunk().await?;
            drop(stream);
            cluster.assert_no_leak().await
        })
        .await
}

#[tokio::test]
async fn requests_go_on_without_etcd_and_the_cluster_grows_again_with_it() -> Result<()> {
    const LEASE_S: u64 = 2;
    let mut builder = Cluster::builder().kv_store(0);
    for service in [Service::Router, Service::Prefill, Service::Decode] {
        builder = builder.set(service, "registry.etcd.lease_ttl_s", LEASE_S);
    }
    builder
        .run(async |cluster| {
            cluster.expect_warning("etcd is away");
            cluster.expect_warning("registration not renewed");
            let (client, body) = (cluster.client(), chat(cluster.model(), QUESTION));
            client.chat(&body).await?;
            cluster.etcd().kill();
            // Longer than the leases: by now etcd would have forgotten everybody.
            let end = Instant::now() + Duration::from_secs(2 * LEASE_S);
            while Instant::now() < end {
                client.chat(&body).await.context("while etcd is away")?;
            }
            cluster.etcd().restart().await?;
            // A decode worker that starts now, where the old one was, can be found only through etcd.
            cluster.expect_warning("did not begin an answer");
            cluster.node_mut(Service::Decode, 0).process.kill();
            cluster.restart(Service::Decode, 0).await?;
            wait::until("the new decode worker gets requests", SOON, async || client.chat(&body).await.ok().map(drop))
                .await
        })
        .await
}
