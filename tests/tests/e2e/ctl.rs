//! `kvasirctl` shows the cluster that is there, to people and to programs.

use std::process::Command;

use anyhow::{Result, ensure};
use kvasir_tests::{Cluster, Service, workspace};
use serde_json::Value;

use crate::prompts::{chat, long};

/// What `kvasirctl` prints.
pub(crate) fn ctl(cluster: &mut Cluster, arguments: &[&str]) -> Result<String> {
    let endpoint = cluster.etcd().endpoint().to_owned();
    let output = Command::new(workspace::binary("kvasirctl")?).args(["--etcd", &endpoint]).args(arguments).output()?;
    let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr).into_owned());
    ensure!(output.status.success(), "kvasirctl {arguments:?}: {}\n{out}{err}", output.status);
    Ok(out)
}

#[tokio::test]
async fn it_shows_every_member_as_a_table_and_as_json() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .run(async |cluster| {
            for command in ["status", "workers"] {
                let table = ctl(cluster, &[command])?;
                for id in ["prefill-0", "prefill-1", "decode-0"] {
                    ensure!(table.contains(id), "{command} shows {id}:\n{table}");
                }
                let json: Value = serde_json::from_str(&ctl(cluster, &[command, "--output", "json"])?)?;
                ensure!(json.to_string().contains("prefill-1"), "{command} as JSON: {json}");
            }
            let models = ctl(cluster, &["models"])?;
            ensure!(models.contains("demo"), "models:\n{models}");
            let json: Value = serde_json::from_str(&ctl(cluster, &["models", "--output", "json"])?)?;
            ensure!(json.to_string().contains("demo"), "models as JSON: {json}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn transfers_show_over_what_blocks_move_and_why() -> Result<()> {
    Cluster::builder()
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let none = ctl(cluster, &["transfers"])?;
            ensure!(none.contains("no transfers"), "{none}");
            cluster.client().chat(&chat(cluster.model(), &long(100))).await?;
            let table = ctl(cluster, &["transfers"])?;
            let line = table.lines().find(|line| line.contains("decode-0")).unwrap_or_default();
            ensure!(line.contains("prefill-0") && line.contains("shm") && line.contains("same host"), "{table}");
            let json: Value = serde_json::from_str(&ctl(cluster, &["transfers", "--output", "json"])?)?;
            let of = |name: &str| json.as_array().into_iter().flatten().find(|entry| entry["member"] == name).cloned();
            let peers = of("prefill-0").unwrap_or_default()["peers"].clone();
            ensure!(peers[0]["name"] == "decode-0" && peers[0]["transport"] == "shm", "{json}");
            ensure!(peers[0]["written_bytes"].as_u64() > Some(0), "{json}");
            let page = cluster.node(Service::Prefill, 0).metrics().await?;
            let route = [("peer", "decode-0"), ("transport", "shm"), ("reason", "same host")];
            ensure!(page.sum_where("kvasir_transfer_peer_route", &route) == 1.0, "{page:?}");
            let all = [("transport", "shm"), ("le", "+Inf")];
            ensure!(page.sum_where("kvasir_transfer_seconds_bucket", &all) > 0.0, "{page:?}");
            ensure!(page.sum_where("kvasir_transfer_peer_seconds_count", &[("peer", "decode-0")]) > 0.0, "{page:?}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn the_kv_store_is_looked_into_pinned_and_emptied() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("prompt.txt");
    let prompt = long(100);
    std::fs::write(&file, &prompt)?;
    Cluster::builder()
        .kv_store(2)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let tokenizer = workspace::demo_model().join("tokenizer.json");
            let arguments = |verb: &'static str| -> Vec<String> {
                let texts =
                    ["kv", verb, "--text", &file.to_string_lossy(), "--tokenizer", &tokenizer.to_string_lossy()];
                texts.map(str::to_owned).to_vec()
            };
            let run = |cluster: &mut Cluster, mut line: Vec<String>, more: &[&str]| {
                line.extend(more.iter().map(|&word| word.to_owned()));
                ctl(cluster, &line.iter().map(String::as_str).collect::<Vec<_>>())
            };
            let json = ["--output", "json"];
            let lookup = |cluster: &mut Cluster| -> Result<Value> {
                Ok(serde_json::from_str(&run(cluster, arguments("lookup"), &json)?)?)
            };
            ensure!(lookup(cluster)?["run"] == 0, "nothing is there yet");

            let body = serde_json::json!({ "model": cluster.model(), "prompt": prompt, "max_tokens": 2 });
            cluster.client().complete(&body).await?;
            let blocks = lookup(cluster)?["blocks"].as_u64().unwrap_or_default();
            ensure!(blocks >= 6, "the prompt has that many full blocks: {blocks}");
            let mut found = Value::Null;
            for _ in 0..200 {
                found = lookup(cluster)?;
                if found["run"] == blocks {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(25)).await;
            }
            ensure!(found["run"] == blocks && found["silent"] == serde_json::json!([]), "{found}");
            let table = run(cluster, arguments("lookup"), &[])?;
            ensure!(table.contains("(memory)") && table.contains("0-"), "{table}");

            let table = ctl(cluster, &["kv", "stats"])?;
            ensure!(table.contains("kv-store-0") && table.contains("kv-store-1") && table.contains("demo"), "{table}");
            let stats: Value = serde_json::from_str(&ctl(cluster, &["kv", "stats", "--output", "json"])?)?;
            let sum = |key: &str| {
                stats["nodes"].as_array().into_iter().flatten().filter_map(|n| n[key].as_u64()).sum::<u64>()
            };
            ensure!(sum("memory_blocks") >= blocks, "{stats}");

            let pinned = run(cluster, arguments("pin"), &["--keep", "hard", "--for", "5m", "--output", "json"])?;
            let pinned: Value = serde_json::from_str(&pinned)?;
            let on_nodes: u64 = pinned["nodes"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
            ensure!(on_nodes == blocks, "{pinned}");
            run(cluster, arguments("unpin"), &[])?;

            ensure!(run(cluster, arguments("evict"), &[]).is_err(), "not without a yes");
            let evicted = run(cluster, arguments("evict"), &["--yes"])?;
            ensure!(evicted.contains("given up"), "{evicted}");
            ensure!(lookup(cluster)?["run"] == 0, "gone, and what followed, too");
            ensure!(
                ctl(cluster, &["kv", "evict", "--model", "no-such", "--yes"]).is_err(),
                "a model that is not there"
            );
            let drained = ctl(cluster, &["kv", "drain", "kv-store-1", "--for", "20s"])?;
            ensure!(drained.starts_with("kv-store-1: drained, safe to delete\n"), "{drained}");
            ensure!(drained.contains("blocks handed over") && !drained.contains("not taken"), "{drained}");
            ensure!(ctl(cluster, &["kv", "drain", "kv-store-9"]).is_err(), "a node that is not there");
            ctl(cluster, &["kv", "evict", "--all", "--yes"])?;
            let stats: Value = serde_json::from_str(&ctl(cluster, &["kv", "stats", "--output", "json"])?)?;
            ensure!(stats["origins"] == serde_json::json!([]), "{stats}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_worker_that_left_is_not_shown() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .run(async |cluster| {
            let node = cluster.node_mut(Service::Prefill, 1);
            node.process.terminate();
            node.process.wait(kvasir_tests::wait::SOON).await?;
            let table = ctl(cluster, &["workers"])?;
            ensure!(table.contains("prefill-0") && !table.contains("prefill-1"), "\n{table}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn an_etcd_out_of_reach_is_one_line() -> Result<()> {
    let output = Command::new(workspace::binary("kvasirctl")?).args(["--etcd", "127.0.0.1:1", "status"]).output()?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && err.lines().count() == 1 && err.contains("127.0.0.1:1"), "{err}");
    Ok(())
}
