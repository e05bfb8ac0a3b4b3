//! Workers are moved between prefill and decode while they run, and nobody who is answered notices.

use std::{
    ops::RangeInclusive,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, future, stream};
use kvasir_proto::v1::{Pin, SetDutyRequest, SetDutyResponse, worker_client::WorkerClient};
use kvasir_tests::{
    Client, Cluster, Node, Service,
    wait::{self, SOON},
    workspace,
};
use kvasir_types::PROTOCOL_VERSION;
use serde_json::{Value, json};

use crate::{
    ctl::ctl,
    load::Load,
    prompts::{chat, long},
};

const CHAT: &str = "/v1/chat/completions";
const STREAMS: usize = 16;

async fn set(node: &Node, request: SetDutyRequest) -> Result<SetDutyResponse, tonic::Status> {
    let request = SetDutyRequest { protocol_version: PROTOCOL_VERSION, reason: "a test".into(), ..request };
    let connected = WorkerClient::connect(format!("http://{}", node.grpc())).await;
    let mut client = connected.map_err(|error| tonic::Status::internal(error.to_string()))?;
    Ok(client.set_duty(request).await?.into_inner())
}

/// As a planner of that term asks.
fn planned(role: &str, term: u64) -> SetDutyRequest {
    SetDutyRequest { role: role.into(), term, ..SetDutyRequest::default() }
}

/// Waits until the router sends answers to one of `decode`, and prompts to one of `prefill`.
async fn goes(client: &Client, model: &str, decode: &[&str], prefill: &[&str]) -> Result<()> {
    let mut last = Value::Null;
    let mut number = 0;
    let there = wait::until("requests go elsewhere", SOON, async || {
        number += 1;
        // Another prompt each time: what is cached should not decide.
        let (_, route) = client.explained(CHAT, &chat(model, &format!("{number}? {}", long(60)))).await.ok()?;
        let names = |list: &[&str], name: &Value| name.as_str().is_some_and(|name| list.contains(&name));
        let readers = route["prefill"].as_array().into_iter().flatten();
        let fits = names(decode, &route["decode"]) && readers.clone().all(|reader| names(prefill, reader));
        last = route.clone();
        (fits && readers.count() == prefill.len()).then_some(())
    });
    let there = there.await;
    there.with_context(|| format!("expected {decode:?} to write and {prefill:?} to read, last was {last}"))
}

#[tokio::test]
async fn workers_change_roles_under_load_and_every_answer_is_the_golden_one() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .kv_store(0)
        .set(Service::Decode, "decode.local_prefill_tokens", 16)
        .set(Service::Prefill, "decode.local_prefill_tokens", 16)
        .run(async |cluster| {
            let load = Load::new(cluster, STREAMS)?;
            let (client, model) = (cluster.client(), cluster.model().to_owned());
            let more = async || load.more("the load goes on", 2 * STREAMS).await;
            load.run(async {
                more().await?;
                // One after the other changes sides, until all have.
                ctl(cluster, &["worker", "role", "decode-1", "prefill"])?;
                more().await?;
                ctl(cluster, &["worker", "role", "prefill-0", "decode"])?;
                more().await?;
                ctl(cluster, &["worker", "role", "decode-0", "prefill"])?;
                more().await?;
                ctl(cluster, &["worker", "role", "prefill-1", "decode"])?;
                more().await?;
                let (decode, prefill) = (["prefill-0", "prefill-1"], ["decode-0", "decode-1"]);
                goes(&client, &model, &decode, &prefill).await?;
                let table = ctl(cluster, &["status"])?;
                ensure!(table.contains("prefill (was decode)") && table.contains("decode (was prefill)"), "{table}");
                // And home again.
                for worker in ["decode-0", "prefill-0", "decode-1", "prefill-1"] {
                    ctl(cluster, &["worker", "role", worker, "home"])?;
                    more().await?;
                }
                goes(&client, &model, &prefill, &decode).await
            })
            .await?;
            let router = cluster.node(Service::Router, 0).metrics().await?;
            ensure!(router.sum("kvasir_router_upstream_errors_total") == 0.0, "nobody failed");
            ensure!(router.sum("kvasir_router_move_seconds_count") == 0.0, "no answer had to be moved");
            let changes = cluster.node(Service::Decode, 0).metrics().await?.sum("kvasir_worker_role_changes_total");
            ensure!(changes == 2.0, "{changes} changes");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_pinned_worker_and_a_newer_term_refuse_a_planner_but_no_person() -> Result<()> {
    Cluster::builder()
        .decode(2)
        .kv_store(0)
        .set(Service::Prefill, "pinned", true)
        .run(async |cluster| {
            let (prefill, decode) = (cluster.node(Service::Prefill, 0), cluster.node(Service::Decode, 0));
            let pinned = set(prefill, planned("decode", 7)).await.unwrap_err();
            ensure!(pinned.message().contains("pinned"), "{pinned}");

            let moved = set(decode, planned("prefill", 7)).await?;
            ensure!((moved.role.as_str(), moved.former_role.as_str()) == ("prefill", "decode"), "{moved:?}");
            let late = set(decode, planned("decode", 6)).await.unwrap_err();
            ensure!(late.message().contains("term 6 is over"), "{late}");
            let again = set(decode, planned("prefill", 7)).await?;
            ensure!(again.former_role == "prefill", "asking again is fine: {again:?}");
            let status = decode.status().await?;
            ensure!((status.role.as_str(), status.works_as.as_str()) == ("decode", "prefill"), "{status:?}");

            for (wrong, why) in [
                (planned("router", 8), "role"),
                (SetDutyRequest { pin: Pin::Set.into(), ..planned("decode", 8) }, "pin"),
                (SetDutyRequest { pin: 17, ..planned("decode", 0) }, "pin"),
                (SetDutyRequest { incarnation: 1, ..planned("decode", 8) }, "life"),
            ] {
                let refused = set(decode, wrong.clone()).await.unwrap_err();
                ensure!(refused.message().contains(why), "{wrong:?}: {refused}");
            }

            // A person is not refused, and can keep the planner off.
            ctl(cluster, &["worker", "role", "decode-0", "decode", "--pin"])?;
            let decode = cluster.node(Service::Decode, 0);
            ensure!(set(decode, planned("prefill", 9)).await.is_err(), "it is pinned now");
            let table = ctl(cluster, &["workers"])?;
            ensure!(table.contains("decode pinned"), "{table}");
            ctl(cluster, &["worker", "unpin", "decode-0"])?;
            let decode = cluster.node(Service::Decode, 0);
            ensure!(set(decode, planned("prefill", 9)).await?.role == "prefill", "and no more");
            let last = ctl(cluster, &["worker", "role", "decode-1", "prefill"]).unwrap_err();
            ensure!(format!("{last:#}").contains("last decode worker"), "{last:#}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_change_while_etcd_is_away_is_known_once_it_is_back_and_a_restart_brings_the_worker_home() -> Result<()> {
    Cluster::builder()
        .decode(2)
        .kv_store(0)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .set(Service::Decode, "registry.etcd.request_timeout_ms", 500)
        .run(async |cluster| {
            for warning in ["registration not renewed", "etcd"] {
                cluster.expect_warning(warning);
            }
            let (client, model) = (cluster.client(), cluster.model().to_owned());
            client.chat(&chat(&model, "before")).await?;
            cluster.etcd().kill();
            let changed = set(cluster.node(Service::Decode, 1), planned("prefill", 0)).await?;
            ensure!(changed.role == "prefill", "{changed:?}");
            // Nobody has heard of it, and both kinds of work are taken.
            for number in 0..4 {
                client.chat(&chat(&model, &format!("{number} meanwhile"))).await?;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            cluster.etcd().restart().await?;
            goes(&client, &model, &["decode-0"], &["decode-1", "prefill-0"]).await?;

            cluster.node_mut(Service::Decode, 1).process.kill();
            cluster.restart(Service::Decode, 1).await?;
            goes(&client, &model, &["decode-1"], &["prefill-0"]).await
        })
        .await
}

/// How many workers write answers.
async fn writers(cluster: &Cluster) -> Result<usize> {
    let workers = cluster.nodes().iter().filter(|node| node.service.is_worker());
    let statuses = future::try_join_all(workers.map(|node| node.status())).await?;
    Ok(statuses.iter().filter(|status| status.works_as == "decode").count())
}

/// Asks, at `STREAMS` a time, until so many workers write; every answer must come.
async fn until_writers(
    cluster: &Cluster,
    wanted: RangeInclusive<usize>,
    question: impl Fn(usize) -> Value,
) -> Result<()> {
    let client = cluster.client();
    let (over, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let load = stream::iter(0..STREAMS).map(async |_| {
        while !over.load(Relaxed) {
            client.chat(&question(asked.fetch_add(1, Relaxed))).await?;
        }
        anyhow::Ok(())
    });
    let load = load.buffer_unordered(STREAMS).collect::<Vec<_>>();
    let there = async {
        let there = wait::until("the planner moves workers", 2 * SOON, async || {
            wanted.contains(&writers(cluster).await.ok()?).then_some(())
        });
        let there = there.await;
        over.store(true, Relaxed);
        there
    };
    let (answers, there) = future::join(load, there).await;
    answers.into_iter().collect::<Result<Vec<_>>>()?;
    let page = cluster.node(Service::Router, 0).admin_page("/planner").await?.1;
    there.with_context(|| format!("after {} answers not {wanted:?} workers write: {page}", asked.load(Relaxed)))
}

#[tokio::test]
async fn the_planner_follows_the_mix_and_another_router_plans_when_it_is_killed() -> Result<()> {
    Cluster::builder()
        .routers(2)
        .decode(3)
        .kv_store(0)
        .worker("engine.threads", 1)
        .set(Service::Prefill, "pinned", true)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .set(Service::Router, "registry.etcd.lease_ttl_s", 2)
        .set(Service::Router, "planner.mode", "act")
        .set(Service::Router, "planner.look_ms", 500)
        .set(Service::Router, "planner.votes", 2)
        .set(Service::Router, "planner.pause_ms", 2_000)
        .set(Service::Router, "planner.strained_percent", 20)
        .set(
            Service::Router,
            "models",
            json!([{"name": "demo", "path": workspace::demo_model(), "slo": {"ttft_ms": 20.0, "tpot_ms": 4.0}}]),
        )
        .run(async |cluster| {
            let model = cluster.model().to_owned();
            // Long prompts, each another one, and next to no answers.
            let reading = |at: usize| {
                let mut body = chat(&model, &format!("{at} {}", long(500)));
                body["max_tokens"] = 2.into();
                body
            };
            until_writers(cluster, 1..=1, reading).await?;
            let told = ctl(cluster, &["planner"])?;
            ensure!(told.contains("mode act") && told.contains("moved decode-"), "{told}");

            // Short prompts, long answers.
            let writing = |at: usize| {
                let mut body = chat(&model, &format!("{at}"));
                body["max_tokens"] = 200.into();
                body["ignore_eos"] = true.into();
                body
            };
            // Two of them meet the targets on some machines.
            until_writers(cluster, 2..=3, writing).await?;
            ensure!(cluster.node(Service::Prefill, 0).status().await?.works_as == "prefill", "it is pinned");

            // The planner dies: another router plans, in a later term.
            let page: Value = serde_json::from_str(&ctl(cluster, &["planner", "--output", "json"])?)?;
            let (leader, term) =
                (page["leader"]["router"].as_str().context("a leader")?.to_owned(), page["leader"]["term"].as_u64());
            let first = usize::from(leader != "router-0");
            ensure!(cluster.node(Service::Router, first).id() == leader, "{page}");
            cluster.node_mut(Service::Router, first).process.kill();
            let other = cluster.node(Service::Router, 1 - first);
            wait::until("the other router plans", SOON, async || {
                let page: Value = serde_json::from_str(&other.admin_page("/planner").await.ok()?.1).ok()?;
                let plans = page["leader"]["here"] == true && page["leader"]["term"].as_u64() > term;
                plans.then_some(())
            })
            .await?;
            let moved = other.metrics().await?.sum("kvasir_router_plans");
            ensure!(moved == 1.0, "it says so in its metrics, too");
            cluster.restart(Service::Router, first).await
        })
        .await
}
