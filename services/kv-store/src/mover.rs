//! The mover: carries blocks between memory and disk as the store decides, and tells it how that ended.
//!
//! No thread of its own, and one task, which looks after a full disk: a lookup hands reads to the disk, a commit hands writes
//! to it, and the disk's threads, at the end of each, hand over the next. What fails is told to the store and costs a cached
//! block, nothing else.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak},
    time::Duration,
};

use kvasir_runtime::Shutdown;
use kvasir_transfer::MemoryRange;
use kvasir_types::{BlockHash, BlockId};
use tokio::sync::oneshot;

use crate::{
    disk::{self, DiskOffset, Failure, Record, State},
    node::{DiskTier, Node},
    store::{BlockBytes, Forget, Move, Origin, Place, ReadEnd, Recovered, Sift, Store, Which, tag},
};

/// Most hashes of evicted blocks that an eviction tells.
const MAX_GONE: usize = 1 << 16;

impl Node {
    /// Starts to fetch what of a run is on disk only: how many blocks are coming, and whether the disk took all of it.
    pub(crate) fn fetch(self: &Arc<Self>, size: BlockBytes, hashes: &[BlockHash]) -> (usize, bool) {
        let Some(tier) = &self.disk else { return (0, true) };
        let fetch = self.lock().store.fetch(size, hashes);
        let mut all_sent = true;
        for read in fetch.reads {
            let node = Arc::downgrade(self);
            let block = read.block;
            let into = MemoryRange { offset: read.memory_offset, len: read.size.0 };
            let done = move |result| fetched(&node, block, result);
            if let Err(failure) = tier.disk.read(DiskOffset(read.disk_offset), into, read.checksum, done) {
                tracing::debug!(hash = %read.hash, %failure, "not fetched from disk");
                self.lock().store.fetched(block, ReadEnd::Failed);
                all_sent = false;
            }
        }
        (fetch.coming, all_sent)
    }

    /// Hands the disk what is to be written, as much as it takes at a time.
    pub(crate) fn write_behind(self: &Arc<Self>) {
        let Some(tier) = &self.disk else { return };
        let works = tier.disk.state() == State::Working;
        let may_grow = works || tier.disk.may_grow();
        // Once: what is refused in here waits for the next call.
        let mut try_again = works;
        loop {
            let writes = {
                let mut state = self.lock();
                if std::mem::take(&mut try_again) {
                    state.store.try_again();
                }
                state.store.disk_is_full(!may_grow);
                let writes = state.store.writes();
                writes.into_iter().map(|write| (record(&mut state.store, tier, &write), write)).collect::<Vec<_>>()
            };
            if writes.is_empty() {
                return;
            }
            for (record, write) in writes {
                let (node, block) = (Arc::downgrade(self), write.block);
                let done = move |result: Result<(), Failure>| {
                    if let Some(node) = node.upgrade() {
                        node.lock().store.wrote(block, &result);
                        node.write_behind();
                    }
                };
                if let Err(failure) = tier.disk.write(DiskOffset(write.disk_offset), record, write.memory_offset, done)
                {
                    tracing::debug!(hash = %write.hash, %failure, "not written to disk");
                    self.lock().store.wrote(block, &Err(failure));
                }
            }
        }
    }

    /// Until shutdown: while the disk is full, looks every so often whether it still is, and then writes what it did not take.
    /// Without this, a node that nobody writes to would not notice.
    pub(crate) async fn watch_disk(self: Arc<Self>, every: Duration, shutdown: Shutdown) {
        let Some(tier) = &self.disk else { return };
        while !shutdown.is_triggered() {
            // Waiting loses nothing: how the disk is, is asked for anew each time round.
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                () = shutdown.wait() => return,
            }
            if tier.disk.state() != State::Full {
                continue;
            }
            let disk = Arc::clone(&tier.disk);
            // A file system may take its time.
            let has_room = tokio::task::spawn_blocking(move || disk.has_room_again()).await;
            if has_room.is_ok_and(|has_room| has_room) {
                self.write_behind();
            }
        }
    }

    /// Takes over what the disk held at the start.
    pub(crate) fn recover(&self, blocks: Vec<Recovered>) {
        if !blocks.is_empty() {
            let found = blocks.len();
            let used = self.lock().store.recover(blocks);
            tracing::info!(found, used, "blocks on disk found again");
        }
    }

    /// How the disk is, in one word.
    pub(crate) fn disk_state(&self) -> &'static str {
        self.disk.as_ref().map_or("none", |tier| tier.disk.state().name())
    }

    /// Lets go of disk and memory: whoever reads or writes sees it fail.
    pub(crate) fn close(&self) {
        if let Some(tier) = &self.disk {
            tier.disk.close();
        }
        self.engine.shutdown();
    }

    /// Gives these blocks up, wherever they are.
    pub(crate) async fn evict_these(self: &Arc<Self>, size: BlockBytes, hashes: &[BlockHash]) -> Sift {
        let mut sift = self.lock().store.evict_these(size, hashes);
        self.forget(&mut sift).await;
        sift
    }

    /// Gives up what is meant of all blocks. How many, how many are in use, and how the hashes of those gone begin.
    pub(crate) async fn evict(self: &Arc<Self>, which: &Which) -> (u64, u64, Vec<u32>) {
        let (mut evicted, mut in_use, mut gone) = (0, 0, HashSet::new());
        let mut next = Some(0);
        while let Some(from) = next {
            let mut sift = self.lock().store.evict(from, which, |hash| {
                if gone.len() < MAX_GONE {
                    gone.insert(tag(hash));
                }
            });
            self.forget(&mut sift).await;
            evicted += sift.evicted;
            in_use += sift.in_use;
            next = sift.next;
            tokio::task::yield_now().await;
        }
        (evicted, in_use, gone.into_iter().collect())
    }

    /// Has the disk forget its copies, so that they do not come back after a restart; those blocks are gone then.
    async fn forget(self: &Arc<Self>, sift: &mut Sift) {
        let waiting: Vec<_> =
            std::mem::take(&mut sift.forget).into_iter().map(|forget| self.forget_one(forget)).collect();
        for forgotten in waiting {
            // The sender is gone only if the disk dropped the operation, which it never does.
            match forgotten.await {
                Ok(true) => sift.evicted += 1,
                Ok(false) | Err(_) => sift.in_use += 1,
            }
        }
    }

    fn forget_one(self: &Arc<Self>, Forget { block, place }: Forget) -> oneshot::Receiver<bool> {
        let (tell, told) = oneshot::channel();
        let forgotten = Forgotten { node: Arc::downgrade(self), block, tell: Some(tell) };
        let tier = self.disk.as_ref().expect("a block is on disk only if there is one");
        // A disk that can't be told may bring the block back after a restart: it is still the right bytes.
        if let Err(failure) = tier.disk.forget(DiskOffset(place.offset), place.size.0, move |_| drop(forgotten)) {
            tracing::debug!(%failure, "a disk was not told to forget a block");
        }
        told
    }
}

/// A copy that the disk is to forget. The end of this, wherever it comes, is the end of that.
struct Forgotten {
    node: Weak<Node>,
    block: BlockId,
    tell: Option<oneshot::Sender<bool>>,
}

impl Drop for Forgotten {
    fn drop(&mut self) {
        if let (Some(node), Some(tell)) = (self.node.upgrade(), self.tell.take()) {
            let gone = node.lock().store.forgotten(self.block);
            let _ = tell.send(gone); // or nobody waits any more
        }
    }
}

/// The end of a read, on one of the disk's threads.
fn fetched(node: &Weak<Node>, block: BlockId, result: Result<(), Failure>) {
    let Some(node) = node.upgrade() else { return };
    let end = match &result {
        Ok(()) => ReadEnd::Good,
        Err(Failure::Mismatch) => ReadEnd::Torn,
        Err(_) => ReadEnd::Failed,
    };
    if let Err(failure) = result {
        tracing::debug!(%failure, "a block on disk is a miss");
    }
    node.lock().store.fetched(block, end);
    node.arrived.notify_waiters();
}

/// What was found on disk, in the order in which it was written, with names for the numbers of its origins.
pub(crate) fn recovered(mut found: Vec<disk::Recovered>, names: &HashMap<u32, Origin>) -> Vec<Recovered> {
    found.sort_unstable_by_key(|block| block.sequence);
    // The same hash may have been written twice: the later one counts, and comes first so that it is taken.
    let mut latest = HashMap::with_capacity(found.len());
    for (n, block) in found.iter().enumerate() {
        latest.insert((block.record.hash, block.record.bytes), n);
    }
    let is_latest =
        |n: usize, block: &disk::Recovered| latest.get(&(block.record.hash, block.record.bytes)) == Some(&n);
    let one = |block: &disk::Recovered| {
        let Record { hash, bytes, checksum, position, parent, group, origin } = block.record;
        let place = Place { hash, offset: block.slot.0, size: BlockBytes(bytes) };
        let origin = names.get(&origin).cloned().unwrap_or_default();
        Recovered { place, checksum, position, parent, group, origin }
    };
    found.iter().enumerate().filter(|&(n, block)| is_latest(n, block)).map(|(_, block)| one(block)).collect()
}

impl Store {
    /// The end of a write.
    fn wrote(&mut self, block: BlockId, result: &Result<(), Failure>) {
        match result {
            Err(Failure::Full | Failure::Resting) => self.refused(block),
            other => self.written(block, other.is_ok()),
        }
    }
}

/// What the disk keeps of a block beside its bytes.
fn record(store: &mut Store, tier: &DiskTier, write: &Move) -> Record {
    let (facts, origin) = store.facts(write.block);
    Record {
        hash: write.hash,
        bytes: write.size.0,
        checksum: write.checksum,
        position: facts.position,
        parent: facts.parent,
        group: facts.group,
        origin: tier.origins.number(&origin),
    }
}
