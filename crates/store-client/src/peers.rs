//! Connections to store nodes: made when first needed, kept for a node's life, and a breaker each.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_proto::{
    MAX_MESSAGE_BYTES,
    v1::{self, store_client::StoreClient},
};
use kvasir_types::{Deadline, Incarnation, MemberId};
use tonic::{Code, Response, Status, transport::Channel};

use crate::{
    Config, Error, MAX_HASHES, Origin,
    ahead::Ahead,
    breaker::Breaker,
    glance::Index,
    placement::{Node, Placement},
};

/// Bytes that are under way from a node; no longer once this is dropped.
pub(crate) struct Load {
    counter: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

struct Peer {
    incarnation: Incarnation,
    channel: Channel,
    breaker: Breaker,
    /// Leases that are done with, to be told with the next call.
    ended: Vec<u64>,
    /// Room that it has made for a block that may be written next.
    ahead: Option<Ahead>,
    /// Where its published index is, once it has said so.
    index: Option<Arc<Index>>,
    /// What was read by it and is to be told.
    used: Vec<v1::UsedBlocks>,
    /// When the first of those was read.
    used_since: Instant,
    /// Bytes that this client is reading from it. A hint for the choice among copies, so no order is asked for.
    load: Arc<AtomicU64>,
}

/// So many blocks read without a lookup are told to a node at a time, as the protocol has it,
const USED_AT_ONCE: usize = MAX_HASHES;
/// or so many reads, since one read in so many waits for that,
const READS_AT_ONCE: usize = 128;
/// or as many as there are after this time.
const USED_WAIT: Duration = Duration::from_millis(250);

/// Most leases that are told to have ended with one call; who has more lets the rest end by themselves.
const MAX_ENDED: usize = 1024;

/// The nodes this client has talked to. Written and read by whatever task makes a call; the lock is held for a map look-up
/// only.
pub(crate) struct Peers {
    timeout: Duration,
    /// How long a node may take to say what it has.
    pub(crate) lookup_timeout: Duration,
    wait: Duration,
    peers: Mutex<HashMap<MemberId, Peer>>,
}

impl Peers {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            timeout: Duration::from_millis(config.timeout_ms),
            lookup_timeout: Duration::from_millis(config.lookup_timeout_ms),
            wait: Duration::from_millis(config.breaker_ms),
            peers: Mutex::default(),
        }
    }

    /// What a node has for an answer.
    pub(crate) fn timeout_ms(&self) -> u64 {
        u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX)
    }

    /// Forgets nodes that are gone or have restarted: their addresses would pile up for ever.
    pub(crate) fn keep_only(&self, placement: &Placement) {
        self.lock().retain(|id, peer| placement.has(id, peer.incarnation));
    }

    /// Makes one call to a node, bounded by the deadline and by how long a node may take to answer.
    pub(crate) async fn call<T, F, Fut>(&self, node: &Node, deadline: Deadline, call: F) -> Result<T, Error>
    where
        F: FnOnce(StoreClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(self.timeout, node, deadline, call).await
    }

    /// The same with another idea of how long a node may take.
    pub(crate) async fn call_within<T, F, Fut>(
        &self,
        timeout: Duration,
        node: &Node,
        deadline: Deadline,
        call: F,
    ) -> Result<T, Error>
    where
        F: FnOnce(StoreClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let channel = self.channel(node)?;
        let client = StoreClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let limit = timeout.min(deadline.remaining());
        let error = match tokio::time::timeout(limit, call(client)).await {
            Ok(Ok(response)) => {
                self.with(node, |peer| peer.breaker.answered());
                return Ok(response.into_inner());
            }
            Ok(Err(status)) => Error::Call { member: node.id.clone(), status: Box::new(status) },
            Err(_) => Error::Timeout { member: node.id.clone(), waited: limit },
        };
        // A node that had less than its full time, because the request's was nearly over, has not failed.
        let failed = match &error {
            Error::Call { status, .. } => matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled),
            _ => limit == timeout,
        };
        if failed {
            self.failed(node);
        }
        Err(error)
    }

    /// A lease is done with. Nobody waits for a node to hear that, and it costs no call: the next lookup or reservation
    /// there says so. Where none follows, the lease ends by itself.
    pub(crate) fn end(&self, node: &Node, lease: u64) {
        self.with(node, |peer| {
            if peer.ended.len() < MAX_ENDED {
                peer.ended.push(lease);
            }
        });
    }

    /// What a call tells a node to have ended.
    pub(crate) fn take_ended(&self, node: &Node) -> Vec<u64> {
        let mut ended = Vec::new();
        self.with(node, |peer| std::mem::swap(&mut peer.ended, &mut ended));
        ended
    }

    /// The room it has made for such a block, if it did and that is not about to end. Nobody else gets it then.
    pub(crate) fn take_ahead(&self, node: &Node, block_bytes: u64, origin: &Origin) -> Option<Ahead> {
        let mut ahead = None;
        self.with(node, |peer| ahead = peer.ahead.take_if(|ahead| ahead.fits(block_bytes, origin)));
        ahead.filter(|ahead| !ahead.until.passed())
    }

    pub(crate) fn keep_ahead(&self, node: &Node, ahead: Ahead) {
        self.with(node, |peer| peer.ahead = Some(ahead));
    }

    /// Where the node's index is, if that is known.
    pub(crate) fn index(&self, node: &Node) -> Option<Arc<Index>> {
        self.lock().get(&node.id).filter(|peer| peer.incarnation == node.incarnation)?.index.clone()
    }

    pub(crate) fn learn_index(&self, node: &Node, index: Index) {
        self.with(node, |peer| peer.index = Some(Arc::new(index)));
    }

    pub(crate) fn forget_index(&self, node: &Node) {
        self.with(node, |peer| peer.index = None);
    }

    /// Blocks were read without a lookup: for a while, only this client knows.
    pub(crate) fn used(&self, node: &Node, blocks: v1::UsedBlocks) {
        self.with(node, |peer| {
            if peer.used.is_empty() {
                peer.used_since = Instant::now();
            }
            peer.used.push(blocks);
        });
    }

    /// What the node is to be told now of blocks that were read without a lookup.
    pub(crate) fn take_used(&self, node: &Node) -> Vec<v1::UsedBlocks> {
        let mut told = Vec::new();
        self.with(node, |peer| {
            let blocks: usize = peer.used.iter().map(|used| used.hashes.len() / 16).sum();
            let many = peer.used.len() >= READS_AT_ONCE || blocks >= USED_AT_ONCE / 2;
            if many || (blocks > 0 && peer.used_since.elapsed() >= USED_WAIT) {
                let mut room = USED_AT_ONCE;
                let fit = peer.used.iter().take_while(|used| {
                    let blocks = used.hashes.len() / 16;
                    let fits = blocks <= room;
                    room = room.saturating_sub(blocks);
                    fits
                });
                let fit = fit.count();
                told = peer.used.drain(..fit).collect();
                // More than a call takes came in at once: who reads so much can spare some of it.
                peer.used.truncate(READS_AT_ONCE);
            }
        });
        told
    }

    /// A node did not do its part.
    pub(crate) fn failed(&self, node: &Node) {
        self.with(node, |peer| peer.breaker.failed(Instant::now()));
    }

    /// So many bytes are under way from the node from now on.
    pub(crate) fn load(&self, node: &Node, bytes: u64) -> Load {
        let counter = self.lock().get(&node.id).map_or_else(Arc::default, |peer| peer.load.clone());
        counter.fetch_add(bytes, Ordering::Relaxed);
        Load { counter, bytes }
    }

    /// How many bytes are under way from the node.
    pub(crate) fn loaded(&self, node: &Node) -> u64 {
        self.lock().get(&node.id).map_or(0, |peer| peer.load.load(Ordering::Relaxed))
    }

    fn channel(&self, node: &Node) -> Result<Channel, Error> {
        let mut peers = self.lock();
        if let Some(peer) = peers.get_mut(&node.id)
            && peer.incarnation == node.incarnation
        {
            let passes = peer.breaker.passes(Instant::now());
            return if passes { Ok(peer.channel.clone()) } else { Err(Error::Away { member: node.id.clone() }) };
        }
        let channel = self.endpoint(&node.grpc).map_err(|source| Error::Address {
            member: node.id.clone(),
            address: node.grpc.clone(),
            source,
        })?;
        let peer = Peer {
            incarnation: node.incarnation,
            channel: channel.clone(),
            breaker: Breaker::new(self.wait),
            ended: Vec::new(),
            ahead: None,
            index: None,
            used: Vec::new(),
            used_since: Instant::now(),
            load: Arc::default(),
        };
        peers.insert(node.id.clone(), peer);
        Ok(channel)
    }

    fn endpoint(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let endpoint = kvasir_rpc::endpoint(address)?
            .connect_timeout(self.timeout)
            // A machine that vanished closes no connection; without pings the next calls would go the same way.
            .http2_keep_alive_interval(self.timeout)
            .keep_alive_timeout(self.timeout);
        Ok(endpoint.connect_lazy())
    }

    fn with(&self, node: &Node, change: impl FnOnce(&mut Peer)) {
        if let Some(peer) = self.lock().get_mut(&node.id)
            && peer.incarnation == node.incarnation
        {
            change(peer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MemberId, Peer>> {
        // Nothing below can leave the map half changed.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
