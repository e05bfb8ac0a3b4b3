//! `kvasir-replay` through its front door: against store nodes, and against a whole cluster through its router.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use kvasir_replay::live::Names;
use kvasir_tests::{
    Builder, Cluster, Process, Service,
    wait::{self, SOON},
    workspace,
};
use serde_json::Value;

use crate::store_nodes::{BLOCK, Client};

/// Two nodes and nothing else, with room for `memory` and `disk` bytes each.
fn nodes(disks: &Path, memory: u64, disk: u64) -> Builder {
    let path = disks.join("{id}").to_string_lossy().into_owned();
    Cluster::builder()
        .prefill(0)
        .decode(0)
        .routers(0)
        .kv_store(2)
        .set(Service::KvStore, "capacity_bytes", memory)
        .set(Service::KvStore, "slab_bytes", 1 << 20)
        .set(Service::KvStore, "disk.path", path)
        .set(Service::KvStore, "disk.capacity_bytes", disk)
        .set(Service::KvStore, "group_blocks", 2)
}

/// A run of the program, under way.
struct Replay {
    process: Process,
    json: std::path::PathBuf,
}

impl Replay {
    fn start(name: &str, arguments: &[&str], dir: &Path) -> Result<Self> {
        let json = dir.join(format!("{name}.json"));
        let mut command = Command::new(workspace::binary("kvasir-replay")?);
        command.args(arguments).arg("--json").arg(&json);
        Ok(Self { process: Process::spawn(name, command, dir)?, json })
    }

    /// Against the store of a cluster. Nodes that share a few cores with other tests are slow, not away.
    fn of_store(cluster: &mut Cluster, name: &str, arguments: &[&str], dir: &Path) -> Result<Self> {
        let etcd = cluster.etcd().endpoint().to_owned();
        let common = ["--store", "--etcd", &etcd, "--timeout", "20000", "--block-bytes", "4096"];
        Self::start(name, &[arguments, &common].concat(), dir)
    }

    /// Its rows, once it has ended well.
    async fn rows(&mut self) -> Result<Vec<Value>> {
        let status = self.process.wait(SOON * 3).await?;
        ensure!(status.success(), "{status}\n{}", self.process.log());
        let rows: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&self.json)?)?;
        println!("{}", self.process.log());
        Ok(rows)
    }

    /// Its only row.
    async fn row(&mut self) -> Result<Value> {
        let rows = self.rows().await?;
        ensure!(rows.len() == 1, "one pass over one trace is one row: {rows:?}");
        rows.into_iter().next().context("a row")
    }
}

fn count(row: &Value, pointer: &str) -> Result<u64> {
    row.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no {pointer} in {row}"))
}

fn rate(row: &Value, name: &str) -> Result<f64> {
    row[name].as_f64().with_context(|| format!("no {name} in {row}"))
}

/// Requests of a made-up trace, one every so many milliseconds.
fn spread(dir: &Path, requests: u64, every_ms: u64) -> Result<String> {
    let path = dir.join("spread.txt");
    // Conversations that take turns: each time a conversation is continued, its prompt has one block more.
    let line = |n: u64| {
        let (conversation, turn) = (n % 20, n / 20);
        let first = conversation * 1000;
        format!("{} 2048 1 {first}-{}\n", n * every_ms, first + 3 + turn)
    };
    std::fs::write(&path, (0..requests).map(line).collect::<String>())?;
    Ok(path.to_string_lossy().into_owned())
}

async fn committed(cluster: &Cluster, index: usize) -> Option<u64> {
    Some(cluster.node(Service::KvStore, index).store_status().await.ok()?.committed_blocks_total)
}

#[tokio::test]
async fn a_store_with_room_for_all_hits_what_can_be_hit_and_the_second_time_everything() -> Result<()> {
    let dir = tempfile::tempdir()?;
    nodes(dir.path(), 64 << 20, 64 << 20)
        .run(async |cluster| {
            let arguments = ["conversation", "--limit", "80", "--concurrency", "1", "--namespace", "e2e"];
            let first = Replay::of_store(cluster, "first", &arguments, dir.path())?.row().await?;
            let (asked, hit) = (count(&first, "/blocks/asked")?, count(&first, "/blocks/hit")?);
            ensure!(count(&first, "/requests")? == 80 && asked > 1000 && hit > 0, "{first}");
            let (split, bytes) = (count(&first, "/split")?, count(&first, "/block_bytes")?);
            ensure!((split, bytes) == (2, 2048), "as many blocks as the nodes place together: {first}");
            ensure!(count(&first, "/blocks/wrong")? == 0 && first["errors"] == serde_json::json!({}), "{first}");
            ensure!(rate(&first, "hit_rate")? == rate(&first, "bound")?, "{first}");
            ensure!(count(&first, "/blocks/written")? + hit == asked, "what was not there was written: {first}");
            ensure!(rate(&first, "memory_hit_rate")? == rate(&first, "hit_rate")?, "there is room in memory: {first}");
            let times = |what: &str| count(&first, &format!("/latency_us/{what}/count"));
            ensure!(times("request")? == 80 && times("lookup")? == 80 && times("read")? > 0, "{first}");

            let stored =
                committed(cluster, 0).await.context("a node")? + committed(cluster, 1).await.context("a node")?;
            ensure!(stored == count(&first, "/blocks/written")?, "the nodes have {stored} blocks: {first}");

            let second = Replay::of_store(cluster, "second", &arguments, dir.path())?.row().await?;
            ensure!(rate(&second, "hit_rate")? == 1.0 && count(&second, "/blocks/written")? == 0, "{second}");
            let nodes = second["nodes"].as_array().context("nodes")?;
            let given: u64 = nodes.iter().filter_map(|node| node["blocks"].as_u64()).sum();
            ensure!(nodes.len() == 2 && given == asked && rate(&second, "imbalance")? < 2.0, "{second}");

            // Another namespace meets none of these, and its second pass meets its own first.
            let other = ["conversation", "--limit", "20", "--concurrency", "1", "--repeat", "2"];
            let rows = Replay::of_store(cluster, "other", &other, dir.path())?.rows().await?;
            let [cold, warm] = rows.as_slice() else { anyhow::bail!("two passes: {rows:?}") };
            ensure!(rate(cold, "hit_rate")? == rate(cold, "bound")?, "{cold}");
            ensure!(rate(warm, "hit_rate")? == 1.0 && rate(warm, "bound")? == 1.0, "{warm}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn what_memory_has_no_room_for_comes_from_disk_and_says_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // Memory for 1,024 blocks, disks for all.
    nodes(dir.path(), 1 << 20, 64 << 20)
        .run(async |cluster| {
            let arguments = |passes: &'static str| {
                ["conversation", "--limit", "60", "--concurrency", "2", "--namespace", "tiers", "--repeat", passes]
            };
            let first = Replay::of_store(cluster, "first", &arguments("1"), dir.path())?.row().await?;
            let written = count(&first, "/blocks/written")?;
            ensure!(written > 1200, "more than memory has room for: {first}");
            wait::until("all blocks are on disk", SOON, async || {
                let mut on_disk = 0;
                for index in 0..2 {
                    on_disk += cluster.node(Service::KvStore, index).store_status().await.ok()?.disk_blocks;
                }
                (on_disk >= written).then_some(())
            })
            .await?;
            let second = Replay::of_store(cluster, "second", &arguments("1"), dir.path())?.row().await?;
            let (memory, disk) = (count(&second, "/blocks/memory")?, count(&second, "/blocks/disk")?);
            ensure!(disk > 0 && memory + disk == count(&second, "/blocks/hit")?, "{second}");
            ensure!(count(&second, "/blocks/wrong")? == 0, "{second}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_node_killed_in_the_middle_costs_hits_and_no_wrong_bytes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let trace = spread(dir.path(), 200, 50)?;
    nodes(dir.path(), 64 << 20, 64 << 20)
        .run(async |cluster| {
            // By the clock: when the node dies, seconds of the trace are still to come.
            let mut run = Replay::of_store(cluster, "run", &[&trace, "--speed", "1"], dir.path())?;
            wait::until("both nodes have blocks", SOON, async || {
                (committed(cluster, 0).await? > 10 && committed(cluster, 1).await? > 10).then_some(())
            })
            .await?;
            cluster.node_mut(Service::KvStore, 1).process.kill();
            ensure!(run.process.ended().is_none(), "the run goes on without it");
            let row = run.row().await?;
            ensure!(count(&row, "/requests")? == 200 && count(&row, "/blocks/wrong")? == 0, "{row}");
            ensure!(count(&row, "/blocks/hit")? > 0 && rate(&row, "hit_rate")? < rate(&row, "bound")?, "{row}");
            ensure!(row["errors"].as_object().is_some_and(|errors| !errors.is_empty()), "{row}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_block_with_other_bytes_than_its_own_is_counted_and_fails_the_run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let trace = dir.path().join("two.txt");
    std::fs::write(&trace, "0 1024 1 7 8\n")?;
    nodes(dir.path(), 64 << 20, 64 << 20)
        .run(async |cluster| {
            // Somebody else writes under the names of these four blocks.
            let names = Names::new("wrong", "two.txt", BLOCK);
            let hashes: Vec<_> = (0..4).map(|number| names.hash(number)).collect();
            let client = Client::new(cluster, 4).await?;
            let written = client.write(0, &hashes).await?.written;
            ensure!(written == 4, "all four are new");
            let bytes = (2 * BLOCK).to_string();
            let arguments = [&trace.to_string_lossy(), "--namespace", "wrong", "--block-bytes", &bytes];
            let etcd = cluster.etcd().endpoint().to_owned();
            let arguments = [&arguments[..], &["--store", "--etcd", &etcd, "--timeout", "20000"]].concat();
            let mut run = Replay::start("run", &arguments, dir.path())?;
            let status = run.process.wait(SOON).await?;
            ensure!(status.code() == Some(1), "{status}");
            ensure!(
                run.process.log().contains("4 blocks of two.txt came back with wrong bytes"),
                "{}",
                run.process.log()
            );
            let rows: Value = serde_json::from_str(&std::fs::read_to_string(&run.json)?)?;
            ensure!(count(&rows[0], "/blocks/wrong")? == 4 && count(&rows[0], "/blocks/hit")? == 0, "{rows}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn told_to_stop_it_reports_what_was_done() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let trace = spread(dir.path(), 1000, 1000)?;
    nodes(dir.path(), 64 << 20, 64 << 20)
        .run(async |cluster| {
            let mut run = Replay::of_store(cluster, "run", &[&trace, "--speed", "10"], dir.path())?;
            wait::until("something was written", SOON, async || {
                (committed(cluster, 0).await? + committed(cluster, 1).await? > 10).then_some(())
            })
            .await?;
            run.process.terminate();
            let row = run.row().await?;
            let requests = count(&row, "/requests")?;
            ensure!(row["stopped"] == true && requests > 0 && requests < 1000, "{row}");
            ensure!(count(&row, "/blocks/written")? > 0, "{row}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn without_store_nodes_it_says_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    Cluster::builder()
        .prefill(0)
        .decode(0)
        .routers(0)
        .kv_store(0)
        .run(async |cluster| {
            let mut run = Replay::of_store(cluster, "run", &["chat", "--limit", "1"], dir.path())?;
            let status = run.process.wait(SOON).await?;
            ensure!(status.code() == Some(1), "{status}");
            ensure!(run.process.log().contains("no store node is running"), "{}", run.process.log());
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_whole_cluster_answers_all_of_a_trace_and_computes_no_prefix_twice() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let trace = spread(dir.path(), 30, 10)?;
    Cluster::builder()
        .run(async |cluster| {
            let router = format!("http://{}/v1", cluster.node(Service::Router, 0).http());
            let arguments =
                [&trace, "--router", &router, "--concurrency", "2", "--max-output-tokens", "4", "--repeat", "2"];
            let rows = Replay::start("run", &arguments, dir.path())?.rows().await?;
            let [cold, warm] = rows.as_slice() else { anyhow::bail!("two passes: {rows:?}") };
            for row in [cold, warm] {
                ensure!(count(row, "/answered")? == 30 && row["errors"] == serde_json::json!({}), "{row}");
                ensure!(count(row, "/latency_us/ttft/count")? == 30, "{row}");
                ensure!(count(row, "/tokens/output")? == 30, "as long as the trace's answers: {row}");
            }
            // Twenty conversations; ten of them come again in the first pass.
            ensure!(count(cold, "/tokens/prompt")? == 20 * 65 + 10 * 81, "{cold}");
            ensure!(count(cold, "/tokens/cached")? > 0 && rate(cold, "hit_rate")? <= rate(cold, "bound")?, "{cold}");
            ensure!(count(warm, "/tokens/cached")? > count(cold, "/tokens/cached")?, "{warm}");
            Ok(())
        })
        .await
}
