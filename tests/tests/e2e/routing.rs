//! Where requests go: to the workers that hold their prompts, as far as routers know, and they know it soon.

use anyhow::{Context, Result, ensure};
use futures_util::future;
use kvasir_tests::{
    Builder, Cluster, Service,
    wait::{self, SOON},
};
use serde_json::Value;

use crate::{
    ctl::ctl,
    prompts::{cached_tokens, chat, long},
};

const CHAT: &str = "/v1/chat/completions";

/// Two of each; all that is cached is cached by workers.
fn two_of_each() -> Builder {
    Cluster::builder().prefill(2).decode(2).kv_store(0).set(Service::Decode, "decode.local_prefill_tokens", 0)
}

/// A prompt of some 25 blocks, other ones than those of any other number.
fn prompt(number: usize) -> String {
    format!("{number}{number}{number} {}", long(300))
}

/// What a router knows, and what the workers that live hold.
async fn known(cluster: &Cluster, router: usize) -> Result<((f64, f64), (f64, f64))> {
    let page = cluster.node(Service::Router, router).metrics().await?;
    let knows = (page.sum("kvasir_router_feeds_connected"), page.sum("kvasir_router_indexed_holdings"));
    let workers = cluster.nodes().iter().filter(|node| node.service.is_worker() && !node.process.is_reaped());
    let statuses = future::try_join_all(workers.map(|node| node.status())).await?;
    let cached: u64 = statuses.iter().filter_map(|status| status.blocks.map(|blocks| blocks.cached)).sum();
    Ok((knows, (statuses.len() as f64, cached as f64)))
}

/// Waits until a router knows all that idle workers hold, and nothing else.
async fn until_known(cluster: &Cluster, router: usize) -> Result<()> {
    let mut last = None;
    let known = wait::until("the router knows what workers hold", SOON, async || {
        let (knows, truth) = known(cluster, router).await.ok()?;
        last = Some((knows, truth));
        (knows == truth).then_some(())
    });
    let known = known.await;
    known.with_context(|| format!("feeds and blocks known, and true: {last:?}"))
}

fn decode_of(route: &Value) -> &str {
    route["decode"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_prompt_goes_to_the_workers_that_hold_its_beginning() -> Result<()> {
    two_of_each()
        .run(async |cluster| {
            let client = cluster.client();
            let (_, first) = client.explained(CHAT, &chat(cluster.model(), &prompt(0))).await?;
            ensure!(first["policy"] == "kv-aware" && first["reason"] == "load", "nobody holds any of it: {first}");
            for number in 1..4 {
                // Others, so that it is not just the same one's turn.
                client.chat(&chat(cluster.model(), &prompt(number))).await?;
                until_known(cluster, 0).await?;
                let body = chat(cluster.model(), &format!("{} and {number} more", prompt(0)));
                let (answer, route) = client.explained(CHAT, &body).await?;
                let (cached, all) = (cached_tokens(&answer), answer["usage"]["prompt_tokens"].as_u64());
                ensure!(decode_of(&route) == decode_of(&first) && route["reason"] == "cache", "{route}, was {first}");
                ensure!(all.is_some_and(|all| cached + 64 > all) && cached > 256, "{cached} of {all:?} were found");
                ensure!(route["cached_tokens"].as_u64() == Some(cached), "{cached} were found, and predicted: {route}");
                let candidates = route["candidates"].as_array().context("there are candidates")?;
                let total = |candidate: &Value| candidate["total_ms"].as_f64().unwrap_or(f64::NAN);
                ensure!(candidates.len() == 2 && total(&candidates[0]) < total(&candidates[1]), "{route}");
            }
            let page = cluster.node(Service::Router, 0).metrics().await?;
            let by_cache = [("policy", "kv-aware"), ("reason", "cache")];
            ensure!(page.sum_where("kvasir_router_decisions_total", &by_cache) == 3.0, "{page:?}");
            let (predicted, actual) = (
                page.sum("kvasir_router_predicted_cached_tokens_total"),
                page.sum("kvasir_router_cached_tokens_total"),
            );
            ensure!(predicted == actual && actual > 768.0, "predicted {predicted}, found {actual}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn what_a_killed_worker_held_is_forgotten_and_learned_again() -> Result<()> {
    two_of_each()
        .run(async |cluster| {
            // The decode worker may be killed while a router or worker speaks with it.
            cluster.expect_warning("transfer");
            let client = cluster.client();
            let body = chat(cluster.model(), &prompt(0));
            let (_, first) = client.explained(CHAT, &body).await?;
            until_known(cluster, 0).await?;
            let index = usize::from(decode_of(&first) == "decode-1");
            cluster.node_mut(Service::Decode, index).process.kill();
            until_known(cluster, 0).await?;
            cluster.restart(Service::Decode, index).await?;
            until_known(cluster, 0).await?;
            // What the prefill workers hold is known still; the decode worker is as good as the other one now.
            let (answer, route) = client.explained(CHAT, &body).await?;
            ensure!(cached_tokens(&answer) > 256 && route["reason"] == "cache", "{answer} {route}");
            until_known(cluster, 0).await
        })
        .await
}

#[tokio::test]
async fn a_stopped_worker_is_not_preferred_for_what_it_holds() -> Result<()> {
    two_of_each()
        .run(async |cluster| {
            for warning in ["lease", "registry", "etcd"] {
                cluster.expect_warning(warning);
            }
            let client = cluster.client();
            let body = chat(cluster.model(), &prompt(0));
            let (_, first) = client.explained(CHAT, &body).await?;
            until_known(cluster, 0).await?;
            let (before, _) = known(cluster, 0).await?;
            let index = usize::from(decode_of(&first) == "decode-1");
            cluster.node_mut(Service::Decode, index).process.pause();
            let forgotten = wait::until("what it holds is forgotten", SOON, async || {
                let page = cluster.node(Service::Router, 0).metrics().await.ok()?;
                let (feeds, workers) =
                    (page.sum("kvasir_router_feeds_connected"), page.sum("kvasir_router_decode_workers"));
                let holdings = page.sum("kvasir_router_indexed_holdings");
                (feeds == 3.0 && workers == 1.0 && holdings < before.1).then_some(())
            });
            forgotten.await?;
            let (answer, route) = client.explained(CHAT, &body).await?;
            ensure!(decode_of(&route) != decode_of(&first) && cached_tokens(&answer) > 256, "{route}");
            cluster.node_mut(Service::Decode, index).process.resume();
            until_known(cluster, 0).await
        })
        .await
}

#[tokio::test]
async fn a_router_that_slept_learns_what_it_missed_and_holds_up_no_worker() -> Result<()> {
    two_of_each()
        .routers(2)
        .run(async |cluster| {
            for warning in ["lease", "registry", "etcd"] {
                cluster.expect_warning(warning);
            }
            let client = cluster.client();
            client.chat(&chat(cluster.model(), &prompt(0))).await?;
            for router in 0..2 {
                until_known(cluster, router).await?;
            }
            cluster.node_mut(Service::Router, 1).process.pause();
            for number in 1..12 {
                client.chat(&chat(cluster.model(), &prompt(number))).await?;
            }
            until_known(cluster, 0).await?;
            cluster.node_mut(Service::Router, 1).process.resume();
            until_known(cluster, 1).await
        })
        .await
}

#[tokio::test]
async fn operators_see_why_and_choose_otherwise() -> Result<()> {
    two_of_each()
        .run(async |cluster| {
            let client = cluster.client();
            let body = chat(cluster.model(), &prompt(0));
            let (_, first) = client.explained(CHAT, &body).await?;
            until_known(cluster, 0).await?;

            let file = tempfile::NamedTempFile::new()?;
            std::fs::write(file.path(), body.to_string())?;
            let path = file.path().to_string_lossy().into_owned();
            let says = format!("chooses by kv-aware: decode {}", decode_of(&first));
            // As soon as the worker has told that it is idle again.
            let shown = wait::until("the worker that holds the prompt is chosen", SOON, async || {
                let table = ctl(cluster, &["route", "explain", "--chat", &path]).ok()?;
                (table.contains(&says) && table.contains("because of cache")).then_some(())
            });
            shown.await?;
            let json: Value =
                serde_json::from_str(&ctl(cluster, &["route", "explain", "--chat", &path, "--output", "json"])?)?;
            ensure!(json["cached_tokens"].as_u64() > Some(256) && json["router"] == "router-0", "{json}");
            // Asking changes nothing.
            let page = cluster.node(Service::Router, 0).metrics().await?;
            ensure!(page.sum("kvasir_router_decisions_total") == 1.0, "{page:?}");

            ensure!(ctl(cluster, &["route", "policy"])?.contains("kv-aware"), "the default");
            let refused = ctl(cluster, &["route", "policy", "best"]);
            let why = refused.err().context("there is no such policy")?.to_string();
            ensure!(why.contains("unknown variant `best`") && why.contains("session-sticky"), "{why}");
            ensure!(ctl(cluster, &["route", "policy", "round-robin"])?.contains("round-robin"), "as asked");
            let mut decode = Vec::new();
            for _ in 0..4 {
                let (_, route) = client.explained(CHAT, &body).await?;
                ensure!(route["policy"] == "round-robin" && route["reason"] == "turn", "{route}");
                decode.push(decode_of(&route).to_owned());
            }
            ensure!(decode[0] != decode[1] && decode[..2] == decode[2..], "they take turns: {decode:?}");
            Ok(())
        })
        .await
}
