//! A client of the store nodes that knows what belongs under each name, and fails the test where something else is.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use kvasir_cluster::EtcdConfig;
use kvasir_proto::{
    convert,
    v1::{self, store_client},
};
use kvasir_store_client::{Config, Origin, ReadReport, StoreClient, WriteReport};
use kvasir_tests::{Cluster, Node, Service, wait};
use kvasir_transfer::{LocalNet, TransferEngine};
use kvasir_types::{BlockHash, Deadline, PROTOCOL_VERSION, TokenId};
use tonic::transport::Channel;

pub(crate) const BLOCK: u64 = 16 << 10;
/// Blocks that are placed together.
pub(super) const GROUP: usize = 4;
pub(super) const SOON: Duration = Duration::from_secs(30);
/// What a request at most waits for.
const PATIENCE: Duration = Duration::from_secs(2);

/// A reader and writer with memory of its own, and what keeps its view of the members up to date.
pub(crate) struct Client {
    pub(super) store: StoreClient,
    pub(super) engine: TransferEngine,
    watching: tokio::task::JoinSet<()>,
    patience: Duration,
}

impl Client {
    pub(crate) async fn new(cluster: &mut Cluster, blocks: u64) -> Result<Self> {
        Self::connect(cluster.etcd().endpoint(), blocks, Config::default()).await
    }

    /// One that waits for a node as long as it takes on a machine that has other things to do: what it does not get is not
    /// there.
    pub(super) async fn patient(cluster: &mut Cluster, blocks: u64) -> Result<Self> {
        let config = Config { timeout_ms: 10_000, lookup_timeout_ms: 10_000, ..Config::default() };
        let client = Self::connect(cluster.etcd().endpoint(), blocks, config).await?;
        Ok(Self { patience: SOON, ..client })
    }

    pub(super) async fn connect(etcd: &str, blocks: u64, config: Config) -> Result<Self> {
        let etcd = EtcdConfig { endpoints: vec![etcd.to_owned()], ..EtcdConfig::default() };
        let (registry, watch) = kvasir_cluster::connect_etcd(etcd).await?;
        let mut watching = tokio::task::JoinSet::new();
        watching.spawn(watch);
        let engine =
            TransferEngine::new(kvasir_transfer::Config::default(), LocalNet::new(), (blocks * BLOCK) as usize)?;
        let store = StoreClient::new(config, registry.view(), engine.clone());
        Ok(Self { store, engine, watching, patience: PATIENCE })
    }

    /// Stops following the members: before they leave.
    pub(crate) fn close(self) {
        drop(self.watching);
    }

    /// Blocks from place `first` on, under these names.
    pub(super) fn places(first: u64, hashes: &[BlockHash]) -> Vec<(BlockHash, u64)> {
        hashes.iter().zip(first..).map(|(&hash, place)| (hash, place * BLOCK)).collect()
    }

    /// Puts what belongs there into the own memory.
    pub(super) fn put(&self, blocks: &[(BlockHash, u64)]) -> Result<()> {
        for &(hash, offset) in blocks {
            self.engine.write_bytes(offset, &content(hash))?;
        }
        Ok(())
    }

    pub(crate) async fn write(&self, first: u64, hashes: &[BlockHash]) -> Result<WriteReport> {
        let blocks = Self::places(first, hashes);
        self.put(&blocks)?;
        let deadline = Deadline::after(self.patience);
        Ok(self.store.write(&"test".parse()?, &Origin::default(), &blocks, BLOCK, deadline).await)
    }

    /// What is there of the run, which is right or the test fails.
    pub(super) async fn read(&self, first: u64, hashes: &[BlockHash]) -> Result<ReadReport> {
        let blocks = Self::places(first, hashes);
        let report = self.store.read(&"test".parse()?, &blocks, BLOCK, Deadline::after(self.patience)).await;
        self.check(&blocks[..report.blocks])?;
        Ok(report)
    }

    /// Fails where other bytes lie than belong there.
    pub(super) fn check(&self, blocks: &[(BlockHash, u64)]) -> Result<()> {
        let mut bytes = vec![0; BLOCK as usize];
        for &(hash, offset) in blocks {
            self.engine.read_bytes(offset, &mut bytes)?;
            ensure!(bytes == content(hash), "block {hash} has wrong bytes");
        }
        Ok(())
    }

    /// Writes all of it, in whole groups. What finds no room while memory waits for the disk is offered again.
    pub(super) async fn fill(&self, hashes: &[BlockHash]) -> Result<()> {
        for part in hashes.chunks(32) {
            wait::until("blocks find room", SOON, async || match self.write(0, part).await {
                Ok(report) if report.error.is_some() => Some(Err(anyhow!("{report:?}"))),
                Ok(report) => (report.skipped == 0).then_some(Ok(())),
                Err(error) => Some(Err(error)),
            })
            .await??;
        }
        Ok(())
    }

    /// Waits until so many blocks are on the disks of all nodes together.
    pub(super) async fn until_on_disk(cluster: &Cluster, blocks: usize) -> Result<()> {
        wait::until("all blocks are on disk", SOON, async || {
            let mut on_disk = 0;
            for node in cluster.nodes().iter().filter(|node| node.service == Service::KvStore) {
                on_disk += node.store_status().await.ok()?.disk_blocks;
            }
            (on_disk >= blocks as u64).then_some(())
        })
        .await
    }

    /// Of these blocks, asked for a group at a time, those that are there.
    pub(super) async fn there(&self, hashes: &[BlockHash]) -> Result<usize> {
        let mut there = 0;
        for group in hashes.chunks(GROUP) {
            there += self.read(0, group).await?.blocks;
        }
        Ok(there)
    }
}

/// What speaks to a node itself, whatever the placement says.
pub(super) async fn raw(grpc: &str) -> Result<store_client::StoreClient<Channel>> {
    Ok(store_client::StoreClient::connect(format!("http://{grpc}")).await?)
}

/// Blocks' names, as the protocol has them.
pub(super) fn names(hashes: &[BlockHash]) -> Vec<u8> {
    convert::pack16(hashes.iter().map(|hash| &hash.0)).into()
}

/// Which of these blocks a node says it has, in memory or on disk.
pub(super) async fn has(node: &Node, hashes: &[BlockHash]) -> Result<Vec<bool>> {
    let request = v1::ExistsRequest {
        protocol_version: PROTOCOL_VERSION,
        block_bytes: BLOCK,
        hashes: names(hashes).into(),
        index: false,
    };
    let tiers = raw(node.grpc()).await?.exists(request).await?.into_inner().tiers;
    ensure!(tiers.len() == hashes.len(), "{} of {} answers", tiers.len(), hashes.len());
    Ok(tiers.iter().map(|&tiers| tiers != 0).collect())
}

/// What belongs under a hash.
pub(super) fn content(hash: BlockHash) -> Vec<u8> {
    let mut word = u64::from_le_bytes(hash.0[..8].try_into().expect("eight of sixteen bytes"));
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    while bytes.len() < BLOCK as usize {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes
}

/// Names of the n-th conversation's blocks.
pub(super) fn conversation(n: u32, blocks: u32) -> Vec<BlockHash> {
    let root = BlockHash([2; 16]).extend(&[TokenId(n)]);
    (0..blocks).map(|block| root.extend(&[TokenId(block)])).collect()
}

/// Small, seeded, and the same everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
