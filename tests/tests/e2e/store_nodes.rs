//! Store nodes as processes that are killed, stopped and damaged, and a client that reads and writes all the while.

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use kvasir_cluster::EtcdConfig;
use kvasir_store_client::{Config, Origin, ReadReport, StoreClient, WriteReport};
use kvasir_tests::{Builder, Cluster, Service, wait};
use kvasir_transfer::{LocalNet, TransferEngine};
use kvasir_types::{BlockHash, Deadline, TokenId};

pub(crate) const BLOCK: u64 = 16 << 10;
/// What a request at most waits for.
const PATIENCE: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(30);

/// Three nodes and nothing else; each has room for 64 blocks in memory and 1,024 on disk.
fn nodes(disks: &Path) -> Builder {
    let path = disks.join("{id}").to_string_lossy().into_owned();
    Cluster::builder()
        .prefill(0)
        .decode(0)
        .routers(0)
        .kv_store(3)
        .set(Service::KvStore, "capacity_bytes", 1 << 20)
        .set(Service::KvStore, "slab_bytes", 1 << 18)
        .set(Service::KvStore, "disk.path", path)
        .set(Service::KvStore, "disk.capacity_bytes", 16 << 20)
        .set(Service::KvStore, "group_blocks", 4)
}

/// A reader and writer with memory of its own, and what keeps its view of the members up to date.
pub(crate) struct Client {
    store: StoreClient,
    engine: TransferEngine,
    watching: tokio::task::JoinSet<()>,
}

impl Client {
    pub(crate) async fn new(cluster: &mut Cluster, blocks: u64) -> Result<Self> {
        let etcd = EtcdConfig { endpoints: vec![cluster.etcd().endpoint().to_owned()], ..EtcdConfig::default() };
        let (registry, watch) = kvasir_cluster::connect_etcd(etcd).await?;
        let mut watching = tokio::task::JoinSet::new();
        watching.spawn(watch);
        let engine =
            TransferEngine::new(kvasir_transfer::Config::default(), LocalNet::new(), (blocks * BLOCK) as usize)?;
        let store = StoreClient::new(Config::default(), registry.view(), engine.clone());
        Ok(Self { store, engine, watching })
    }

    /// Blocks from place `first` on, under these names.
    fn places(first: u64, hashes: &[BlockHash]) -> Vec<(BlockHash, u64)> {
        hashes.iter().zip(first..).map(|(&hash, place)| (hash, place * BLOCK)).collect()
    }

    pub(crate) async fn write(&self, first: u64, hashes: &[BlockHash]) -> Result<WriteReport> {
        let blocks = Self::places(first, hashes);
        for &(hash, offset) in &blocks {
            self.engine.write_bytes(offset, &content(hash))?;
        }
        let deadline = Deadline::after(PATIENCE);
        Ok(self.store.write(&"test".parse()?, &Origin::default(), &blocks, BLOCK, deadline).await)
    }

    /// What is there of the run, which is right or the test fails.
    async fn read(&self, first: u64, hashes: &[BlockHash]) -> Result<ReadReport> {
        let blocks = Self::places(first, hashes);
        let report = self.store.read(&"test".parse()?, &blocks, BLOCK, Deadline::after(PATIENCE)).await;
        let mut bytes = vec![0; BLOCK as usize];
        for &(hash, offset) in &blocks[..report.blocks] {
            self.engine.read_bytes(offset, &mut bytes)?;
            ensure!(bytes == content(hash), "block {hash} has wrong bytes");
        }
        Ok(report)
    }

    /// Writes until all of it is on a disk, and how many blocks that are.
    async fn fill(&self, cluster: &Cluster, hashes: &[BlockHash]) -> Result<()> {
        for (part, first) in hashes.chunks(32).zip((0..).step_by(32)) {
            let report = self.write(0, part).await?;
            ensure!(report.written == part.len(), "blocks from {first} on: {report:?}");
        }
        wait::until("all blocks are on disk", SOON, async || {
            let mut on_disk = 0;
            for index in 0..3 {
                on_disk += cluster.node(Service::KvStore, index).store_status().await.ok()?.disk_blocks;
            }
            (on_disk >= hashes.len() as u64).then_some(())
        })
        .await
    }

    /// Of these blocks, asked for a group at a time, those that are there.
    async fn there(&self, hashes: &[BlockHash]) -> Result<usize> {
        let mut there = 0;
        for group in hashes.chunks(4) {
            there += self.read(0, group).await?.blocks;
        }
        Ok(there)
    }
}

/// What belongs under a hash.
fn content(hash: BlockHash) -> Vec<u8> {
    let mut word = u64::from_le_bytes(hash.0[..8].try_into().expect("eight of sixteen bytes"));
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    while bytes.len() < BLOCK as usize {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes
}

/// Names of the n-th conversation's blocks.
fn conversation(n: u32, blocks: u32) -> Vec<BlockHash> {
    let root = BlockHash([2; 16]).extend(&[TokenId(n)]);
    (0..blocks).map(|block| root.extend(&[TokenId(block)])).collect()
}

/// Small, seeded, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[tokio::test]
async fn a_killed_node_is_a_miss_at_once_and_has_its_blocks_when_it_is_back() -> Result<()> {
    let disks = tempfile::tempdir()?;
    nodes(disks.path())
        .run(async |cluster| {
            let client = Client::new(cluster, 64).await?;
            let all: Vec<_> = (0..10).flat_map(|n| conversation(n, 24)).collect();
            client.fill(cluster, &all).await?;
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
            drop(client.watching);
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
            client.fill(cluster, &all).await?;
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
            drop(client.watching);
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
            drop(client.watching);
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
