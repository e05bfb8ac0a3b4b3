//! The way into the KV store: blocks of a prompt from and into the cluster's store nodes, straight to their place.
//!
//! ```text
//!             placement                 control (gRPC)                     bytes (one-sided, transfer engine)
//!   read   blocks ─▶ groups ─▶ nodes ─▶ Lookup: longest run, leased ─────▶ read into the given offsets ─▶ verify
//!   write  blocks ─▶ groups ─▶ nodes ─▶ Reserve: slots for what is new ──▶ write from the given offsets ──────────▶ Commit
//! ```
//!
//! Rules guarded here:
//! - **The right bytes or a miss.** Every block read is compared with its checksum. A store that is away, slow, full or
//!   wrong makes a request slower by a bounded delay at most, never wrong and never failed: what went wrong is told in
//!   the report, for metrics and logs.
//! - **A call that returned has let go of memory.** Both calls return only when no transfer can touch the given offsets any
//!   more.
//! - **A dead node is asked once a second,** not by every request: see [`Config::breaker_ms`].
//!
//! No task is spawned here and no thread is owned: the caller's await is what drives it.
#![forbid(unsafe_code)]

mod ahead;
mod breaker;
mod config;
mod error;
mod exists;
mod glance;
mod hot;
mod in_flight;
mod known;
mod lookup;
mod peers;
mod placement;
pub mod published;
mod read;
pub mod rendezvous;
mod views;
mod write;

#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use futures_util::future::join_all;
use kvasir_cluster::View;
use kvasir_proto::v1;
use kvasir_transfer::TransferEngine;
use kvasir_types::{BlockHash, Deadline, Epoch, MemberId, ModelFingerprint, RequestId};
use tokio::sync::watch;

pub use config::Config;
pub use error::Error;
pub use read::{Found, ReadReport, Source};
pub use write::{GroupBlocks, WriteReport};

use glance::Scratch;
use hot::Hot;
use known::Known;
use peers::Peers;
use placement::{Node, Placement, collect};
use views::Views;

/// Most hashes in one call, as the protocol has it.
const MAX_HASHES: usize = 1024;
/// Calls of one request that are open at the same time: enough for every node of a small cluster, and a bound in a large one.
const MAX_CALLS: usize = 16;

/// Whose blocks are written: what the store's quotas count, and what an operator evicts by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The model that computed them.
    pub model: Option<ModelFingerprint>,
    /// A name for the tenant, at most 64 bytes of printable text; empty: nobody in particular.
    pub tenant: String,
}

/// The store as a worker sees it. Clones share connections and what is known about the nodes.
#[derive(Clone)]
pub struct StoreClient {
    inner: Arc<Inner>,
}

struct Inner {
    zone: String,
    views: Views,
    hot: Hot,
    known: Known,
    /// Counts choices among copies: what is drawn for each follows from it.
    choices: AtomicU64,
    engine: TransferEngine,
    peers: Peers,
    shared: Arc<exists::Shared>,
    scratch: Scratch,
}

impl StoreClient {
    /// A client that finds the store's nodes in `members` and moves bytes from and to `engine`'s arena. No connection is
    /// made before it is needed.
    pub fn new(config: Config, members: watch::Receiver<Arc<View>>, engine: TransferEngine) -> Self {
        let peers = Peers::new(&config);
        let (zone, views, hot) = (config.zone, Views::new(members), Hot::default());
        Self {
            inner: Arc::new(Inner {
                zone,
                views,
                hot,
                known: Known::default(),
                choices: AtomicU64::new(0),
                engine,
                peers,
                shared: Arc::default(),
                scratch: Scratch::default(),
            }),
        }
    }

    /// Reads the longest run of `blocks` that the store has, from the first one on, each to its offset in the own arena.
    ///
    /// Offsets past the run may have been written to as well; their content means nothing. Run it to its end: a future
    /// that is dropped halfway cancels its transfers and **blocks its thread** until memory is out of their reach (as
    /// long as the transfer engine's fence grace at worst); its leases then end by themselves.
    pub async fn read(
        &self,
        request: &RequestId,
        blocks: &[(BlockHash, u64)],
        block_bytes: u64,
        deadline: Deadline,
    ) -> ReadReport {
        read::read(&self.inner, request, blocks, 0, block_bytes, deadline).await
    }

    /// The first half of [`read_on`](Self::read_on): what the store has of a chain's rest, for whoever has yet to decide
    /// whether it is worth reading. Nothing has moved when it returns, and nothing is moved by dropping it.
    pub async fn find(
        &self,
        request: &RequestId,
        blocks: Vec<(BlockHash, u64)>,
        have: usize,
        block_bytes: u64,
        deadline: Deadline,
    ) -> Found {
        let have = have.min(blocks.len());
        read::find(&self.inner, request, blocks, have, block_bytes, deadline).await
    }

    /// The second half: reads the run that was found. `progress` hears how many of its blocks, from the first on, are in
    /// place, complete and verified, whenever there are more. What is said of [`read`](Self::read) holds here too, and of
    /// what went wrong the report tells this half's part.
    pub async fn fetch(&self, found: &Found, deadline: Deadline, progress: impl FnMut(usize)) -> ReadReport {
        read::fetch(&self.inner, found, deadline, progress).await
    }

    /// Gives the leases of what was found back: blocks may leave the store earlier than the leases' end would let them.
    pub fn release(&self, found: Found) {
        read::release(&self.inner, found);
    }

    /// The same for the rest of a chain of which the first `have` blocks are there already: the run begins behind them, and
    /// only its blocks are read. They are named all the same because where a block is depends on its place in the chain.
    pub async fn read_on(
        &self,
        request: &RequestId,
        blocks: &[(BlockHash, u64)],
        have: usize,
        block_bytes: u64,
        deadline: Deadline,
    ) -> ReadReport {
        read::read(&self.inner, request, blocks, have.min(blocks.len()), block_bytes, deadline).await
    }

    /// Offers `blocks`, a prompt's from its first one on, to the store: those it does not have are written from their
    /// offsets in the own arena.
    ///
    /// The caller keeps the blocks unchanged until it returns. What is said of a dropped future at [`StoreClient::read`]
    /// holds here too; nothing of what it wrote becomes visible.
    pub async fn write(
        &self,
        request: &RequestId,
        origin: &Origin,
        blocks: &[(BlockHash, u64)],
        block_bytes: u64,
        deadline: Deadline,
    ) -> WriteReport {
        write::write(&self.inner, request, origin, blocks, 0, block_bytes, deadline).await
    }

    /// The same for the rest of a chain: the first `have` blocks are named, because where a block goes depends on its place
    /// in the chain, and not offered. Their offsets are not looked at.
    pub async fn write_on(
        &self,
        request: &RequestId,
        origin: &Origin,
        blocks: &[(BlockHash, u64)],
        have: usize,
        block_bytes: u64,
        deadline: Deadline,
    ) -> WriteReport {
        write::write(&self.inner, request, origin, blocks, have.min(blocks.len()), block_bytes, deadline).await
    }

    /// How many of a prompt's blocks the store has, from the first one on, in memory or on disk. Nothing is held or fetched:
    /// they may be gone a moment later. What a node that does not answer has counts as missing; the first error is told.
    pub async fn exists(&self, blocks: &[BlockHash], block_bytes: u64, deadline: Deadline) -> (usize, Option<Error>) {
        let inner = &*self.inner;
        let placement = inner.placement();
        let groups = placement.groups(blocks.len());
        let parts = groups.filter_map(|group| Some((inner.source(&placement, blocks[group.start])?, group)));
        let shares = collect(parts, placement.group_blocks(), MAX_HASHES);
        let asking = shares.iter().map(|share| async move {
            let hashes = share.blocks.iter().map(|&block| blocks[block]).collect();
            (share, exists::exists(inner, share, hashes, block_bytes, deadline).await)
        });
        let (mut has, mut error) = (vec![false; blocks.len()], None);
        for (share, found) in join_all(asking).await {
            match found {
                Ok(found) => share.blocks[..found].iter().for_each(|&block| has[block] = true),
                Err(failure) => error = error.or(Some(failure)),
            }
        }
        (has.into_iter().take_while(|&has| has).count(), error)
    }

    /// Gives a group's blocks, which lie in the own arena, to the nodes that are to have them, as [`StoreClient::write`] does.
    pub async fn hand_over(
        &self,
        request: &RequestId,
        origin: &Origin,
        group: &GroupBlocks,
        block_bytes: u64,
        deadline: Deadline,
    ) -> WriteReport {
        write::hand_over(&self.inner, request, origin, group, block_bytes, deadline).await
    }

    /// Whether that node is to have the group (first eight bytes of the hash of its first block).
    pub fn is_home(&self, group: u64, id: &MemberId) -> bool {
        let placement = self.inner.placement();
        placement.homes(hot::key(group), placement.replicas()).iter().any(|node| node.id == *id)
    }

    /// What is known of that node: whether it is about to leave; `None` if there is none of that name.
    pub fn is_leaving(&self, id: &MemberId) -> Option<bool> {
        self.inner.placement().get(id).map(|node| node.draining)
    }

    /// As of which change of the cluster's members blocks are divided now.
    pub fn epoch(&self) -> Epoch {
        self.inner.placement().epoch
    }

    /// How many store nodes are known now; with none, reads and writes return at once.
    pub fn nodes(&self) -> usize {
        self.inner.placement().len()
    }
}

impl Inner {
    fn placement(&self) -> Arc<Placement> {
        let (placement, news) = self.views.placement(Instant::now());
        if news {
            self.peers.keep_only(&placement);
        }
        placement
    }

    /// A node says it knows a newer view of the members: whether blocks are divided otherwise by that.
    fn newer(&self, node: &Node, view: &v1::StoreView) -> bool {
        match self.views.offer(view, Instant::now()) {
            Ok(moved) => {
                if moved {
                    tracing::debug!(member = %node.id, epoch = view.epoch, "blocks are divided otherwise, says a store node");
                }
                moved
            }
            Err(reason) => {
                tracing::warn!(member = %node.id, reason, "a store node sent a view that is not acceptable, ignored");
                false
            }
        }
    }

    /// How many nodes have the group with this key.
    fn copies(&self, placement: &Placement, key: BlockHash) -> usize {
        placement.replicas().max(self.hot.copies(key, Instant::now()))
    }

    /// Whom to ask first for a group. Of several copies one in this client's zone, if there is any; of those the less loaded
    /// of two drawn at random (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
    fn source(&self, placement: &Placement, key: BlockHash) -> Option<Arc<Node>> {
        let copies = self.copies(placement, key);
        let mut homes = placement.homes(key, copies);
        if homes.len() > 1 && !self.zone.is_empty() && homes.iter().any(|node| node.store.zone == self.zone) {
            homes.retain(|node| node.store.zone == self.zone);
        }
        if homes.len() > 1 {
            let draw = rendezvous::mix(self.choices.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed));
            let (len, high, low) = (homes.len() as u64, draw >> 32, draw & 0xffff_ffff);
            let (one, step) = (high % len, 1 + low % (len - 1));
            let (one, other) = (&homes[one as usize], &homes[((one + step) % len) as usize]);
            let less = if self.peers.loaded(other) < self.peers.loaded(one) { other } else { one };
            return Some(less.clone());
        }
        homes.pop().or_else(|| placement.leaving(key))
    }

    /// The bytes of a node did not move: if the way to it is at fault, it is left alone for a while.
    fn transfer_failed(&self, node: &Node, error: &kvasir_transfer::Error) {
        use kvasir_transfer::Error::{Disconnected, Stale, Unreachable};
        if matches!(error, Unreachable { .. } | Disconnected { .. } | Stale { .. }) {
            self.peers.failed(node);
        }
    }
}
