//! Store nodes that can be killed, and clients to ask them, all on loopback.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_cluster::{Member, MemoryHub, Registry, View};
use kvasir_proto::{convert, v1, v1::store_client::StoreClient as Raw};
use kvasir_runtime::Context;
use kvasir_store_client::{Origin, StoreClient};
use kvasir_transfer::{Batch, LocalNet, Op, Priority, Range, TransferEngine};
use kvasir_types::{BlockHash, Deadline, Epoch, PROTOCOL_VERSION, RequestId, TransportKind, Transports};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::{Config, HandoverConfig, ReplicationConfig, node::Node, serve};

/// Bytes of a block of the demo model: five layers of two heads of 32, 16 tokens, bf16.
pub(super) const BLOCK: u64 = 20_480;

/// What all parts of one test share.
pub(super) struct Cluster {
    hub: MemoryHub,
    net: LocalNet,
    transports: Vec<TransportKind>,
}

/// A node in a runtime of its own, so that it can be killed like a process.
pub(super) struct TestNode {
    pub(super) node: Arc<Node>,
    pub(super) member: Member,
    pub(super) context: Context,
    runtime: Option<tokio::runtime::Runtime>,
    /// Held so that a killed node stays in the view, as one does whose lease has not ended yet.
    registry: Arc<dyn Registry>,
}

impl Cluster {
    pub(super) fn new() -> Self {
        Self::with(&[TransportKind::Local, TransportKind::Tcp])
    }

    pub(super) fn with(transports: &[TransportKind]) -> Self {
        Self { hub: MemoryHub::new(), net: LocalNet::new(), transports: transports.to_vec() }
    }

    pub(super) async fn node(&self, id: &str, change: impl FnOnce(&mut Config)) -> TestNode {
        let mut config = Config {
            id: Some(id.to_owned()),
            capacity_bytes: 8 << 20,
            slab_bytes: 1 << 20,
            group_blocks: 4,
            warm_ms: 0,
            handover: HandoverConfig { mib_per_s: 0, ..HandoverConfig::default() },
            replication: ReplicationConfig { hot_lookups_per_s: 0.0, ..ReplicationConfig::default() },
            ..Config::default()
        };
        config.transfer.transports = Transports::Named(self.transports.clone());
        change(&mut config);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (context, registry, net) = (Context::detached(id), self.hub.registry(), self.net.clone());
        let started = {
            let (context, registry) = (context.clone(), registry.clone());
            runtime.spawn(async move { serve::start(config, &context, &registry, net).await.unwrap() }).await.unwrap()
        };
        TestNode { node: started.node, member: started.member, context, runtime: Some(runtime), registry }
    }

    pub(super) fn hub(&self) -> &MemoryHub {
        &self.hub
    }

    /// As of which change the members are what they are now.
    pub(super) fn epoch(&self) -> Epoch {
        self.hub.registry().view().borrow().epoch
    }

    /// A transfer engine with room for `blocks` blocks, and a client over it.
    pub(super) fn client(&self, blocks: u64) -> Client {
        self.client_with(blocks, kvasir_store_client::Config::default(), self.hub.registry().view())
    }

    /// The same with settings and a view of its own.
    pub(super) fn client_with(
        &self,
        blocks: u64,
        store: kvasir_store_client::Config,
        view: watch::Receiver<Arc<View>>,
    ) -> Client {
        let config =
            kvasir_transfer::Config { transports: Transports::Named(self.transports.clone()), ..Default::default() };
        let engine = TransferEngine::new(config, self.net.clone(), (blocks * BLOCK) as usize).unwrap();
        Client { store: StoreClient::new(store, view, engine.clone()), engine }
    }
}

impl TestNode {
    /// Dies without a word: sockets close, nothing is deregistered.
    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // In a thread of its own, since it waits for tasks that hold the node.
            let end = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5)));
            end.join().expect("a runtime ends");
            self.node.engine().shutdown();
        }
    }

    /// Is no member any more.
    pub(super) async fn leave(&self) {
        self.registry.deregister(&self.member.id, kvasir_types::Role::KvStore).await.unwrap();
    }

    /// Says that it is about to leave, and does nothing else.
    pub(super) async fn say_draining(&self) {
        self.registry.update(Member { draining: true, ..self.member.clone() }).await.unwrap();
    }

    pub(super) async fn raw(&self) -> Raw<Channel> {
        Raw::connect(format!("http://{}", self.member.grpc)).await.unwrap()
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A worker's end.
pub(super) struct Client {
    pub(super) store: StoreClient,
    pub(super) engine: TransferEngine,
}

impl Client {
    /// Fills the arena's blocks from `first` on with the content that belongs to these hashes, and names them.
    pub(super) fn prepare(&self, first: u64, hashes: &[BlockHash]) -> Vec<(BlockHash, u64)> {
        let blocks = self.places(first, hashes);
        blocks.iter().for_each(|&(hash, offset)| self.engine.write_bytes(offset, &content(hash)).unwrap());
        blocks
    }

    /// Names the arena's blocks from `first` on.
    pub(super) fn places(&self, first: u64, hashes: &[BlockHash]) -> Vec<(BlockHash, u64)> {
        hashes.iter().zip(first..).map(|(&hash, block)| (hash, block * BLOCK)).collect()
    }

    pub(super) async fn write(&self, blocks: &[(BlockHash, u64)]) -> kvasir_store_client::WriteReport {
        self.store.write(&request(), &Origin::default(), blocks, BLOCK, soon()).await
    }

    pub(super) async fn read(&self, blocks: &[(BlockHash, u64)]) -> kvasir_store_client::ReadReport {
        self.store.read(&request(), blocks, BLOCK, soon()).await
    }

    pub(super) async fn read_on(&self, blocks: &[(BlockHash, u64)], have: usize) -> kvasir_store_client::ReadReport {
        self.store.read_on(&request(), blocks, have, BLOCK, soon()).await
    }

    /// Whether these blocks have the content that belongs to their hashes.
    pub(super) fn has(&self, blocks: &[(BlockHash, u64)]) -> bool {
        blocks.iter().all(|&(hash, offset)| self.bytes(offset) == content(hash))
    }

    pub(super) fn bytes(&self, offset: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        self.engine.read_bytes(offset, &mut bytes).unwrap();
        bytes
    }

    /// Moves one block by hand, as a client that follows no rules would.
    pub(super) async fn touch(
        &self,
        op: Op,
        node: &TestNode,
        grant: u64,
        remote: u64,
    ) -> Result<(), kvasir_transfer::Error> {
        let batch = Batch {
            op,
            target: node.node.engine().descriptor(),
            grant: convert::grant_key(grant),
            ranges: vec![Range { local: 0, remote, len: BLOCK }],
            deadline: soon(),
            priority: Priority::Normal,
            notice: None,
        };
        self.engine.submit(batch).await.map(|_| ())
    }
}

/// What belongs under a hash: bytes that differ everywhere and between hashes.
pub(super) fn content(hash: BlockHash) -> Vec<u8> {
    let mut word = u64::from_le_bytes(hash.0[..8].try_into().unwrap());
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    while bytes.len() < BLOCK as usize {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes
}

pub(super) fn hashes(range: std::ops::Range<u32>) -> Vec<BlockHash> {
    let root = BlockHash([1; 16]);
    range.map(|n| root.extend(&[kvasir_types::TokenId(n)])).collect()
}

pub(super) fn request() -> RequestId {
    "test".parse().unwrap()
}

/// A deadline that only a hanging test meets.
pub(super) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

pub(super) fn lookup_request(hashes: &[BlockHash]) -> v1::LookupRequest {
    v1::LookupRequest {
        protocol_version: PROTOCOL_VERSION,
        request_id: "raw".into(),
        hashes: convert::pack16(hashes.iter().map(|hash| &hash.0)),
        block_bytes: BLOCK,
        ..Default::default()
    }
}

pub(super) fn reserve_request(hashes: &[BlockHash]) -> v1::ReserveRequest {
    let v1::LookupRequest { protocol_version, request_id, hashes, block_bytes, .. } = lookup_request(hashes);
    v1::ReserveRequest { protocol_version, request_id, hashes, block_bytes, ..Default::default() }
}

/// Commits these blocks, with these checksums.
pub(super) fn commit_request(reservation: u64, blocks: &[(BlockHash, [u8; 16])]) -> v1::CommitRequest {
    v1::CommitRequest {
        reservation,
        hashes: convert::pack16(blocks.iter().map(|(hash, _)| &hash.0)),
        checksums: convert::pack16(blocks.iter().map(|(_, sum)| sum)),
        named: None,
    }
}

/// Waits for a condition that is about to come true.
pub(super) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "still not: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
