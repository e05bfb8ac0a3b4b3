//! Store nodes as processes that are killed, stopped and damaged, and a client that reads and writes all the while.

mod client;
mod disk;
mod members;
mod parted;
mod stalled;

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use kvasir_tests::{Builder, Cluster, Service, wait};

pub(crate) use client::{BLOCK, Client};
use client::{GROUP, Random, SOON, conversation};

/// So many nodes and nothing else, each with room for 64 blocks in memory.
fn in_memory(count: usize) -> Builder {
    Cluster::builder()
        .prefill(0)
        .decode(0)
        .routers(0)
        .kv_store(count)
        .set(Service::KvStore, "capacity_bytes", 1 << 20)
        .set(Service::KvStore, "slab_bytes", 1 << 18)
        .set(Service::KvStore, "group_blocks", GROUP)
}

/// Three nodes that have room for 1,024 blocks on disk, too.
fn nodes(disks: &Path) -> Builder {
    let path = disks.join("{id}").to_string_lossy().into_owned();
    in_memory(3).set(Service::KvStore, "disk.path", path).set(Service::KvStore, "disk.capacity_bytes", 16 << 20)
}

#[tokio::test]
async fn a_killed_node_is_a_miss_at_once_and_has_its_blocks_when_it_is_back() -> Result<()> {
    let disks = tempfile::tempdir()?;
    nodes(disks.path())
        .run(async |cluster| {
            let client = Client::new(cluster, 64).await?;
            let all: Vec<_> = (0..10).flat_map(|n| conversation(n, 24)).collect();
            client.fill(&all).await?;
            Client::until_on_disk(cluster, all.len()).await?;
            ensure!(client.there(&all).await? == all.len(), "more than memory has room for, so some come from disk");
            let of_dead = cluster.node(Service::KvStore, 1).store_status().await?.blocks as usize;
            ensure!(of_dead > 0, "the node has a share");
            cluster.node_mut(Service::KvStore, 1).process.kill();
            // Its lease has not ended, so it is still a member; nobody waits for it, and nothing of its is named.
            let left = client.there(&all).await?;
            ensure!(left == all.len() - of_dead, "{left} of {} are left, it had {of_dead}", all.len());
            cluster.restart(Service::KvStore, 1).await?;
            let status = cluster.node(Service::KvStore, 1).store_status().await?;
            ensure!(status.disk_blocks as usize == of_dead, "all of its blocks were on disk: {status:?}");
            wait::until("all blocks are found again", SOON, async || {
                (client.there(&all).await.ok()? == all.len()).then_some(())
            })
            .await?;
            client.close();
            Ok(())
        })
        .await
}

#[tokio::test]
async fn without_etcd_for_half_a_minute_nothing_changes() -> Result<()> {
    let disks = tempfile::tempdir()?;
    nodes(disks.path())
        .run(async |cluster| {
            let client = Client::new(cluster, 64).await?;
            let all: Vec<_> = (0..5).flat_map(|n| conversation(n, 24)).collect();
            client.fill(&all).await?;
            Client::until_on_disk(cluster, all.len()).await?;
            for text in ["etcd", "lease", "registration", "watch", "registry"] {
                cluster.expect_warning(text);
            }
            cluster.etcd().kill();
            let back = tokio::time::Instant::now() + Duration::from_secs(30);
            let mut n = 100;
            while tokio::time::Instant::now() < back {
                ensure!(client.there(&all).await? == all.len(), "everything is there while etcd is away");
                let report = client.write(32, &conversation(n, 8)).await?;
                ensure!(report.error.is_none() && report.written == 8, "{report:?}");
                n += 1;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            cluster.etcd().restart().await?;
            ensure!(client.there(&all).await? == all.len(), "and when it is back");
            client.close();
            Ok(())
        })
        .await
}

#[tokio::test]
async fn ten_thousand_operations_among_faults_give_right_bytes_or_misses() -> Result<()> {
    const OPERATIONS: usize = 10_000;
    const FAULTS: usize = 12;
    const WORKERS: u64 = 4;
    let disks = tempfile::tempdir()?;
    nodes(disks.path())
        .set(Service::KvStore, "lease_ms", 200)
        .set(Service::KvStore, "reservation_ms", 500)
        .run(async |cluster| {
            cluster.expect_warning("disk");
            cluster.expect_warning("fence");
            let client = Client::new(cluster, WORKERS * 16).await?;
            let (done, good, failed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
            let is_over = || done.load(Ordering::Relaxed) >= OPERATIONS && failed.load(Ordering::Relaxed) >= FAULTS;
            let worker = async |seed: u64| -> Result<()> {
                let mut random = Random(seed * 77 + 1);
                let base = seed * 16;
                while !is_over() {
                    done.fetch_add(1, Ordering::Relaxed);
                    let run = conversation(random.below(120) as u32, 1 + random.below(8) as u32);
                    if random.below(3) == 0 {
                        client.write(base, &run).await?;
                    } else {
                        good.fetch_add(client.read(base + 8, &run).await?.blocks, Ordering::Relaxed);
                    }
                }
                Ok(())
            };
            let faults = async {
                let mut random = Random(4711);
                while !is_over() {
                    let node = random.below(3) as usize;
                    match random.below(3) {
                        0 => {
                            cluster.node_mut(Service::KvStore, node).process.pause();
                            tokio::time::sleep(Duration::from_millis(300)).await;
                            cluster.node_mut(Service::KvStore, node).process.resume();
                        }
                        1 => {
                            cluster.node_mut(Service::KvStore, node).process.kill();
                            cluster.restart(Service::KvStore, node).await?;
                        }
                        _ => {
                            cluster.node_mut(Service::KvStore, node).process.kill();
                            rot(&disks.path().join(Service::KvStore.id(node)), &mut random)?;
                            cluster.restart(Service::KvStore, node).await?;
                        }
                    }
                    failed.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(100 + random.below(300))).await;
                }
                anyhow::Ok(())
            };
            let workers = futures_util::future::try_join_all((0..WORKERS).map(worker));
            futures_util::future::try_join(workers, faults).await?;
            let good = good.into_inner();
            println!("{} operations, {} faults, {good} blocks read", done.into_inner(), failed.into_inner());
            ensure!(good > 1_000, "{good} blocks were read: the test tests little");
            // What is left works: all nodes take and give.
            wait::until("all nodes take and give", SOON, async || {
                let run = conversation(1_000, 24);
                client.write(0, &run).await.ok()?;
                (client.read(32, &run).await.ok()?.blocks == run.len()).then_some(())
            })
            .await?;
            client.close();
            Ok(())
        })
        .await
}

/// Changes bytes of a node's files, wherever.
fn rot(disk: &Path, random: &mut Random) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    for (name, places) in [("data", 64), ("records", 8)] {
        let file = std::fs::File::options().write(true).open(disk.join(name)).context(name)?;
        let len = file.metadata()?.len();
        for _ in 0..places {
            if len > 64 {
                file.write_all_at(&random.below(u64::MAX >> 33).to_le_bytes(), random.below(len - 8))?;
            }
        }
    }
    Ok(())
}
