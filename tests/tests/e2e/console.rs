//! The console of a router's admin port: a page by itself, and what it is told.

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
};
use serde_json::Value;

use crate::prompts::{chat, long};

async fn state(cluster: &Cluster) -> Result<Value> {
    let (status, text) = cluster.node(Service::Router, 0).admin_page("/console/state").await?;
    ensure!(status == 200, "HTTP {status}: {text}");
    Ok(serde_json::from_str(&text)?)
}

#[tokio::test]
async fn the_console_is_one_page_and_shows_the_cluster() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .run(async |cluster| {
            let router = cluster.node(Service::Router, 0);
            let (status, page) = router.admin_page("/console").await?;
            ensure!(status == 200 && page.contains("<title>Kvasir</title>"), "HTTP {status}");
            for elsewhere in ["https://", "//cdn", "src=", "@import"] {
                ensure!(!page.contains(elsewhere), "the page fetches something: {elsewhere}");
            }
            let headers = reqwest::get(format!("http://{}/console", router.admin())).await?.headers().clone();
            let policy = headers.get("content-security-policy").context("a policy")?.to_str()?;
            ensure!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");

            cluster.client().chat(&chat(cluster.model(), &long(100))).await?;
            let told = wait::until("all workers have told, and what was done is in it", SOON, async || {
                let state = state(cluster).await.ok()?;
                let all = state["workers"].as_array()?;
                let told = |worker: &Value, what: &str| worker["told"][what].as_u64().unwrap_or_default();
                let sum = |what: &str| all.iter().map(|worker| told(worker, what)).sum::<u64>();
                let known = all.iter().all(|worker| told(worker, "total_blocks") > 0);
                (known && sum("sampled_tokens") > 0 && sum("prefilled_tokens") > 0).then_some(state)
            })
            .await?;
            let ids = |of: &str| -> Vec<String> {
                told[of]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|one| one["id"].as_str().unwrap_or_default().to_owned())
                    .collect()
            };
            ensure!(ids("workers") == ["decode-0", "decode-1", "prefill-0", "prefill-1"], "{told:#}");
            for id in ["router-0", "kv-store-0", "decode-1", "prefill-1"] {
                ensure!(ids("members").iter().any(|member| member == id), "{id}: {told:#}");
            }
            ensure!(told["router"] == "router-0" && told["policy"] == "kv-aware", "{told:#}");
            ensure!(told["wrong"] == Value::Array(Vec::new()), "{told:#}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn the_console_says_what_is_wrong() -> Result<()> {
    Cluster::builder()
        .decode(1)
        .run(async |cluster| {
            crate::moves::announce(cluster);
            cluster.node_mut(Service::Decode, 0).process.kill();
            wait::until("the console misses the decode worker", SOON, async || {
                let state = state(cluster).await.ok()?;
                let wrong = state["wrong"].as_array()?;
                wrong
                    .iter()
                    .any(|what| what.as_str().is_some_and(|what| what.contains("no decode worker")))
                    .then_some(())
            })
            .await?;
            cluster.restart(Service::Decode, 0).await
        })
        .await
}
