//! A store node whose disk fails it: full, or with other bytes than were written.

use std::{fs, os::unix::fs::FileExt as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use kvasir_tests::{
    Builder, Cluster, Service,
    namespace::{self, Namespace},
    wait,
};

use super::{
    client::{BLOCK, Client, SOON, conversation},
    in_memory,
};

/// One node with room for 64 blocks in memory and, by its own limit, for 1,024 in that directory.
fn node(path: &Path) -> Builder {
    in_memory(1)
        .set(Service::KvStore, "disk.path", path.to_string_lossy())
        .set(Service::KvStore, "disk.capacity_bytes", 16 << 20)
        .set(Service::KvStore, "disk.retry_ms", 100)
}

/// Whether the disk is in that state, by the node's metrics.
async fn is(cluster: &Cluster, state: &str) -> Result<bool> {
    let metrics = cluster.node(Service::KvStore, 0).metrics().await?;
    Ok(metrics.sum_where("kvasir_kv_store_disk_state", &[("state", state)]) == 1.0)
}

/// Writes one prompt after another until the disk is in that state: numbers of the first that was not written.
async fn write_until(cluster: &Cluster, client: &Client, first: u32, state: &str) -> Result<u32> {
    let mut n = first;
    wait::until(&format!("the disk is {state}"), SOON, async || {
        if let Err(error) = write(client, n).await {
            return Some(Err(error));
        }
        n += 1;
        is(cluster, state).await.ok()?.then_some(Ok(n))
    })
    .await?
}

/// The writer of a prompt does not notice how the disk is, nor does who reads it then.
async fn write(client: &Client, n: u32) -> Result<()> {
    let run = conversation(n, 8);
    client.fill(&run).await?;
    let report = client.read(8, &run).await?;
    ensure!(report.error.is_none() && report.blocks == run.len(), "prompt {n}: {report:?}");
    Ok(())
}

#[tokio::test]
async fn with_a_full_disk_a_node_serves_from_memory_and_fills_the_disk_again_once_there_is_room() -> Result<()> {
    let name =
        "store_nodes::disk::with_a_full_disk_a_node_serves_from_memory_and_fills_the_disk_again_once_there_is_room";
    if !Namespace::Mounts.entered(name)? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    namespace::run(&format!("mount -t tmpfs -o size=6m none {}", dir.path().display()))?;
    // Where about a hundred blocks find room, and more than that later.
    let (path, ballast) = (dir.path().join("disk"), dir.path().join("ballast"));
    fs::write(&ballast, vec![1; 4 << 20])?;
    node(&path)
        .run(async |cluster| {
            cluster.expect_warning("the disk is full");
            let client = Client::new(cluster, 64).await?;
            let full = write_until(cluster, &client, 0, "full").await?;
            ensure!(cluster.node(Service::KvStore, 0).process.log().contains("the disk is full"), "a line in the log");
            // What memory has room for, several times over.
            for n in full..full + 40 {
                write(&client, n).await?;
            }
            let on_disk = cluster.node(Service::KvStore, 0).store_status().await?.disk_blocks;
            ensure!(is(cluster, "full").await? && on_disk < 200, "{on_disk} blocks are on a disk that is full");
            fs::remove_file(&ballast)?;
            // Nobody has to write for that.
            wait::until("the disk works again", SOON, async || is(cluster, "working").await.ok()?.then_some(()))
                .await?;
            ensure!(cluster.node(Service::KvStore, 0).process.log().contains("the disk works again"), "and another");
            // More than memory has room for, and all of it is there.
            let later: Vec<_> = (1000..1012).flat_map(|n| conversation(n, 8)).collect();
            client.fill(&later).await?;
            wait::until("all of it is found", SOON, async || {
                (client.there(&later).await.ok()? == later.len()).then_some(())
            })
            .await?;
            client.close();
            Ok(())
        })
        .await
}

#[tokio::test]
async fn after_a_restart_the_bad_blocks_of_a_corrupted_disk_are_misses_and_the_others_are_there() -> Result<()> {
    let dir = tempfile::tempdir()?;
    node(dir.path())
        .run(async |cluster| {
            let client = Client::new(cluster, 64).await?;
            let all: Vec<_> = (0..4).flat_map(|n| conversation(n, 24)).collect();
            client.fill(&all).await?;
            Client::until_on_disk(cluster, all.len()).await?;
            cluster.node_mut(Service::KvStore, 0).process.kill();
            // One bit of every second slot, used or not.
            let data = fs::File::options().read(true).write(true).open(dir.path().join("data")).context("data")?;
            for at in (0..data.metadata()?.len()).step_by(2 * BLOCK as usize) {
                let mut byte = [0];
                data.read_exact_at(&mut byte, at)?;
                data.write_all_at(&[byte[0] ^ 1], at)?;
            }
            cluster.restart(Service::KvStore, 0).await?;
            let mut there = 0;
            for hash in &all {
                // Just started, the node may not be known yet; a bad block is a miss however often it is asked for.
                there += wait::until("the node answers", SOON, async || {
                    let report = client.read(0, std::slice::from_ref(hash)).await;
                    report.map(|report| report.error.is_none().then_some(report.blocks)).transpose()
                })
                .await??;
            }
            let torn = cluster.node(Service::KvStore, 0).metrics().await?.sum("kvasir_kv_store_disk_torn_blocks_total");
            ensure!(there == all.len() / 2 && torn == there as f64, "{there} are there, {torn} torn, of {}", all.len());
            let rewritten = client.write(0, &all[..24]).await?;
            ensure!(rewritten.error.is_none() && rewritten.skipped == 0, "{rewritten:?}");
            client.close();
            Ok(())
        })
        .await
}
