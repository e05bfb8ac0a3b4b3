//! Tenants: their keys open the door, their blocks are theirs alone, and the KV store knows whose is what.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
    workspace,
};
use serde_json::{Value, json};

use crate::prompts::{cached_tokens, chat, long};

/// SHA-256 of `sk-acme` and `sk-globex`, as `sha256sum` has them.
const HASHES: [(&str, &str); 2] = [
    ("acme", "5f8eee912cd7c0ccb238560e8a22e7f78909e6dac18288188f7f4ea35112700d"),
    ("globex", "486e1dad908597991e4425462823f650cfc9ded21de30af03481f0a489f983db"),
];

/// Blocks of each tenant in the KV store.
fn blocks_by_tenant(cluster: &mut Cluster) -> Result<Vec<(String, u64)>> {
    let endpoint = cluster.etcd().endpoint().to_owned();
    let output = Command::new(workspace::binary("kvasirctl")?)
        .args(["--etcd", &endpoint, "kv", "stats", "--output", "json"])
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stats: Value = serde_json::from_slice(&output.stdout)?;
    let origins = stats["origins"].as_array().context("origins")?;
    let of = |origin: &Value| {
        (origin["tenant"].as_str().unwrap_or_default().to_owned(), origin["blocks"].as_u64().unwrap_or(0))
    };
    Ok(origins.iter().map(of).collect())
}

#[tokio::test]
async fn tenants_find_no_blocks_of_one_another_and_the_store_knows_whose_they_are() -> Result<()> {
    let keys: Vec<Value> = HASHES.iter().map(|(name, hash)| json!({"name": name, "sha256": hash})).collect();
    Cluster::builder()
        .set(Service::Router, "access.keys", keys)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let body = chat(cluster.model(), &long(200));
            let stranger = cluster.client().post("/v1/chat/completions", &body).await?;
            ensure!(stranger.status == 401, "{stranger:?}");
            for (name, _) in HASHES {
                let client = cluster.client().with_key(&format!("sk-{name}"));
                let first = client.chat(&body).await?;
                ensure!(cached_tokens(&first) == 0, "{name} found what another tenant's request left: {first}");
                let second = client.chat(&body).await?;
                ensure!(cached_tokens(&second) > 100, "{name} does not find its own: {second}");
            }
            wait::until("the store has blocks of both", SOON, async || {
                let origins = blocks_by_tenant(cluster).ok()?;
                let of = |name: &str| origins.iter().any(|(tenant, blocks)| tenant == name && *blocks > 5);
                (of("acme") && of("globex")).then_some(())
            })
            .await?;
            let nobodys = blocks_by_tenant(cluster)?.iter().any(|(tenant, _)| tenant.is_empty());
            ensure!(!nobodys, "every block is somebody's");
            Ok(())
        })
        .await
}
