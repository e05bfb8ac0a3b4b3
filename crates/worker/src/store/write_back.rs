//! Finished blocks on their way to the store, in the background.
//!
//! One task takes them from the queue, a few at a time: has the engine keep those in its prefix cache, offers them to the
//! store, lets go of them. So nothing is held for a block that waits, and one that has left the cache when its turn comes
//! is not written. Transfers have the lowest priority, and between them the task rests as long as
//! `store.write_back.mib_per_s` asks.
//!
//! With `on-evict` nothing is queued when it is finished. A block that the cache has no more room for is copied to staging
//! memory of its own, on the engine's thread, and waits there: its place is needed at once.
//!
//! Without a prefix cache nothing is found by name: then a prompt's sequence itself waits in the queue and keeps its blocks.

use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use kvasir_engine::{Handle, Leaving, OnEvict, Pinned};
use kvasir_rpc::trace::Here;
use kvasir_runtime::Kind;
use kvasir_store_client::{Origin, StoreClient};
use kvasir_transfer::TransferEngine;
use kvasir_types::{BlockHash, BlockId, Deadline, KvLayout, ModelFingerprint, RequestId};
use tokio::sync::{Notify, oneshot, watch};
use tracing::{Instrument, debug_span, field::Empty};

use super::{
    Parts, lock,
    queue::{Entry, Queue},
    reuse::Reuse,
    staging::{Copies, Staging},
};
use crate::{
    config::{Config, WriteBackPolicy},
    error::went_without_store,
    metrics::{StoreMetrics, WriteBackMetrics},
    sequence::Sequence,
};

/// Blocks are offered so many at a time at most: enough for a call to be worth it.
const MAX_PIECE: usize = 64;
/// And no more than this part of the worker's blocks, which are not to be had meanwhile.
const POOL_PART: usize = 16;
/// Blocks whose names are remembered to tell which are asked for again.
const REMEMBERED: usize = 1 << 17;

/// What a request has finished.
pub(crate) struct Finished {
    pub(crate) request: RequestId,
    /// Whose they are.
    pub(crate) tenant: Arc<str>,
    /// Names of the blocks, from the prompt's first one on.
    pub(crate) chain: Arc<[BlockHash]>,
    /// Blocks before this one are somebody else's to write.
    pub(crate) first: usize,
    /// The sequence that has the blocks, and where; needed only if there is no prefix cache.
    pub(crate) held: Option<(Sequence, Vec<BlockId>)>,
}

/// The way back to the store. Clones are the same.
#[derive(Clone)]
pub(crate) struct WriteBack(Arc<Shared>);

struct Shared {
    client: StoreClient,
    model: ModelFingerprint,
    policy: WriteBackPolicy,
    prefix_cache: bool,
    timeout: Duration,
    layout: KvLayout,
    engine: Handle,
    /// Blocks offered at a time.
    piece: usize,
    /// Filled by requests, emptied by the task; a leaf.
    queue: Mutex<Queue<Source>>,
    /// A leaf.
    reuse: Mutex<Reuse>,
    work: Notify,
    /// Whether there is nothing to do. Set under the queue's lock.
    idle: watch::Sender<bool>,
    /// What writes of evicted blocks are called in logs: no request asked for them.
    evicted_by: RequestId,
    metrics: WriteBackMetrics,
}

/// Where bytes are.
#[derive(Clone)]
enum Source {
    /// In the prefix cache, under their names.
    Cache,
    /// In the blocks of a sequence that is kept for this.
    Held(Arc<(Sequence, Vec<BlockId>)>),
    /// In copies of blocks that have left the cache.
    Copied(Arc<Copies>),
}

/// Blocks that stay as they are while they are read.
enum Kept {
    Pinned(Pinned),
    Held(Arc<(Sequence, Vec<BlockId>)>),
    Copied(Arc<Copies>),
}

impl Kept {
    /// Where the blocks are, as far as none is missing.
    fn places(&self, layout: &KvLayout, range: Range<usize>) -> Vec<u64> {
        let place = |&block: &BlockId| layout.block_offset(block) as u64;
        match self {
            Self::Pinned(pinned) => pinned.blocks().iter().map_while(|block| block.as_ref().map(place)).collect(),
            Self::Held(held) => held.1[range].iter().map(place).collect(),
            Self::Copied(copies) => range.map(|index| copies.place(index)).collect(),
        }
    }
}

/// Hears of evicted blocks. It has to be there before the engine is, and the way to the store only comes after it.
#[derive(Default)]
pub(crate) struct Evictions {
    heard_by: Arc<OnceLock<Evicted>>,
}

/// What becomes of them.
struct Evicted {
    to: WriteBack,
    staging: Arc<Staging>,
    transfer: TransferEngine,
}

impl Evictions {
    /// The engine's part.
    pub(crate) fn hook(&self) -> Box<dyn OnEvict> {
        Box::new(Self { heard_by: Arc::clone(&self.heard_by) })
    }

    /// From now on they go to the store.
    pub(super) fn go_to(&self, to: WriteBack, config: &Config, transfer: &TransferEngine) -> anyhow::Result<()> {
        let bytes = config.store.write_back.staging_bytes;
        let staging = Staging::new(config, bytes, &to.0.layout, transfer)?;
        let evicted = Evicted { to, staging, transfer: transfer.clone() };
        assert!(self.heard_by.set(evicted).is_ok(), "there is one store");
        Ok(())
    }
}

impl fmt::Debug for Evictions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evictions").finish_non_exhaustive()
    }
}

impl OnEvict for Evictions {
    fn evicted(&mut self, leaving: &Leaving<'_>) {
        if let Some(evicted) = self.heard_by.get().filter(|evicted| evicted.to.0.client.nodes() > 0) {
            evicted.keep(leaving);
        }
    }
}

impl Evicted {
    fn keep(&self, leaving: &Leaving<'_>) {
        let shared = &self.to.0;
        let Some(slot) = self.staging.take() else {
            shared.metrics.no_staging.inc();
            return;
        };
        let (from, len) = (shared.layout.block_offset(leaving.block()) as u64, shared.layout.block_bytes() as u64);
        self.transfer.copy_within(from, slot, len).expect("blocks and slots are registered memory");
        let name = leaving.stored().hash;
        let grow = |source: &mut Source| match source {
            Source::Copied(copies) => Arc::get_mut(copies).map(|copies| copies.add_before(slot)).is_some(),
            Source::Cache | Source::Held(_) => false,
        };
        if lock(&shared.queue).join(name, grow) {
            return;
        }
        // Dropped, it gives the slot back.
        let copies = Copies::one(&self.staging, slot);
        let Some(chain) = leaving.chain() else {
            shared.metrics.evicted.inc();
            return;
        };
        let (index, request) = (chain.len() - 1, shared.evicted_by.clone());
        let source = Source::Copied(Arc::new(copies.ending_with(index)));
        // Whoever finds it again may be another than who computed it: it is nobody's.
        let (range, trace) = (index..index + 1, Here::nowhere());
        self.to.push(Entry { request, tenant: "".into(), chain: chain.into(), range, source, trace });
    }
}

impl WriteBack {
    /// Starts the task.
    pub(super) fn start(parts: &Parts<'_>, metrics: &StoreMetrics) -> Self {
        let Parts { client, config, model, blocks, engine, .. } = parts;
        let blocks = *blocks;
        let settings = &config.store.write_back;
        let prefix_cache = config.engine.prefix_cache;
        // What waits holds its blocks if they can't be found again; not all of them, then.
        let limit = if prefix_cache { settings.max_queued_blocks } else { settings.max_queued_blocks.min(blocks / 2) };
        let shared = Arc::new(Shared {
            client: client.clone(),
            model: model.fingerprint,
            policy: settings.policy,
            prefix_cache,
            timeout: Duration::from_millis(settings.timeout_ms),
            layout: model.layout,
            engine: engine.clone(),
            piece: (blocks / POOL_PART).clamp(1, MAX_PIECE),
            queue: Mutex::new(Queue::new(limit)),
            reuse: Mutex::new(Reuse::new(REMEMBERED)),
            work: Notify::new(),
            idle: watch::Sender::new(true),
            evicted_by: "evicted".parse().expect("a request id"),
            metrics: metrics.write_back.clone(),
        });
        let pace = Pace::new(settings.mib_per_s);
        parts.context.tasks.spawn(Kind::Background, "write back", run(Arc::clone(&shared), pace));
        Self(shared)
    }

    /// Whether blocks are written when they leave the cache.
    pub(super) fn writes_evicted(&self) -> bool {
        self.0.policy == WriteBackPolicy::OnEvict
    }

    /// Whether anybody wants to know what requests have finished.
    pub(crate) fn wants_finished(&self) -> bool {
        matches!(self.0.policy, WriteBackPolicy::All | WriteBackPolicy::ReusedOnce) && self.0.client.nodes() > 0
    }

    /// Whether a sequence must be kept for its blocks to be written.
    pub(crate) fn needs_sequence(&self) -> bool {
        !self.0.prefix_cache
    }

    /// Queues what a request has finished, as far as the policy wants it. In its span: writing it is a part of the same trace.
    pub(crate) fn offer(&self, finished: Finished) {
        let shared = &self.0;
        let Finished { request, tenant, chain, first, held } = finished;
        let range = match shared.policy {
            WriteBackPolicy::All => first..chain.len(),
            // Whoever wrote them last time had not seen them before.
            WriteBackPolicy::ReusedOnce => 0..lock(&shared.reuse).ask(&chain),
            WriteBackPolicy::Off | WriteBackPolicy::OnEvict => return,
        };
        let source = match held {
            Some(held) => Source::Held(Arc::new(held)),
            None if shared.prefix_cache => Source::Cache,
            None => return,
        };
        if !range.is_empty() && self.wants_finished() {
            self.push(Entry { request, tenant, chain, range, source, trace: Here::current() });
        }
    }

    fn push(&self, entry: Entry<Source>) {
        let shared = &self.0;
        let mut queue = lock(&shared.queue);
        let dropped = queue.push(entry);
        shared.metrics.queue_full.inc_by(dropped as u64);
        shared.metrics.queued.set(queue.blocks() as i64);
        shared.idle.send_replace(false);
        drop(queue);
        shared.work.notify_one();
    }

    /// Blocks that wait to be written, at least one while any is being written.
    pub(crate) fn left(&self) -> usize {
        let blocks = lock(&self.0.queue).blocks();
        if blocks == 0 && !*self.0.idle.borrow() { 1 } else { blocks }
    }

    /// Waits until everything is written that there is to write, but not longer than this.
    pub(crate) async fn drain(&self, limit: Duration) {
        let mut idle = self.0.idle.subscribe();
        if tokio::time::timeout(limit, idle.wait_for(|&idle| idle)).await.is_err() {
            tracing::info!(blocks = lock(&self.0.queue).blocks(), "left before all finished blocks were written back");
        }
    }
}

async fn run(shared: Arc<Shared>, mut pace: Pace) -> anyhow::Result<()> {
    loop {
        let entry = {
            let mut queue = lock(&shared.queue);
            let entry = queue.pop(shared.piece);
            shared.metrics.queued.set(queue.blocks() as i64);
            if entry.is_none() {
                shared.idle.send_replace(true);
            }
            entry
        };
        match entry {
            Some(entry) => {
                let span = entry.trace.later(
                    || debug_span!("write_back", request_id = %entry.request, blocks = entry.range.len(), bytes = Empty),
                );
                let bytes = shared.write(entry).instrument(span.clone()).await;
                span.record("bytes", bytes);
                drop(span);
                tokio::time::sleep(pace.after(bytes, Instant::now())).await;
            }
            None => shared.work.notified().await,
        }
    }
}

impl Shared {
    /// Offers some blocks; how many bytes were written.
    async fn write(&self, entry: Entry<Source>) -> u64 {
        let Entry { request, tenant, chain, range, source, trace: _ } = entry;
        let Some(kept) = self.keep(&chain[range.clone()], source).await else { return 0 };
        let places = kept.places(&self.layout, range.clone());
        let end = range.start + places.len();
        if end < range.end {
            let rest = lock(&self.queue).give_up(&chain);
            self.metrics.evicted.inc_by((range.end - end + rest) as u64);
        }
        if places.is_empty() {
            return 0;
        }
        let mut blocks: Vec<(BlockHash, u64)> = chain[..end].iter().map(|&hash| (hash, 0)).collect();
        for (block, place) in blocks[range.start..].iter_mut().zip(places) {
            block.1 = place;
        }
        let deadline = Deadline::after(self.timeout);
        let block_bytes = self.layout.block_bytes() as u64;
        let origin = Origin { model: Some(self.model), tenant: tenant.to_string() };
        let report = self.client.write_on(&request, &origin, &blocks, range.start, block_bytes, deadline).await;
        drop(kept);
        self.metrics.written.inc_by(report.written as u64);
        self.metrics.present.inc_by(report.present as u64);
        self.metrics.not_taken.inc_by(report.skipped as u64);
        self.metrics.bytes.inc_by(report.bytes);
        if let Some(error) = &report.error {
            went_without_store(error, "blocks not written back to the store");
        }
        let (written, present, skipped) = (report.written, report.present, report.skipped);
        tracing::debug!(request_id = %request, written, present, skipped, bytes = report.bytes, "written back");
        report.bytes
    }

    /// Sees to it that the blocks stay. `None`: the engine is gone.
    async fn keep(&self, names: &[BlockHash], source: Source) -> Option<Kept> {
        match source {
            Source::Held(held) => Some(Kept::Held(held)),
            Source::Copied(copies) => Some(Kept::Copied(copies)),
            Source::Cache => {
                let (tell, told) = oneshot::channel();
                self.engine.pin(names.to_vec(), move |pinned| drop(tell.send(pinned)));
                told.await.ok().map(Kept::Pinned)
            }
        }
    }
}

/// Rests that keep the bytes of a second below a limit.
struct Pace {
    bytes_per_second: f64,
    free: Option<Instant>,
}

impl Pace {
    /// 0: no limit.
    fn new(mib_per_s: u64) -> Self {
        Self { bytes_per_second: mib_per_s as f64 * f64::from(1 << 20), free: None }
    }

    /// How long to rest after so many bytes.
    fn after(&mut self, bytes: u64, now: Instant) -> Duration {
        if self.bytes_per_second == 0.0 || bytes == 0 {
            return Duration::ZERO;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        let free = self.free.map_or(now, |free| free.max(now)) + takes;
        self.free = Some(free);
        free - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_keep_to_the_limit() {
        let (mut pace, start) = (Pace::new(2), Instant::now());
        assert_eq!(pace.after(4 << 20, start), Duration::from_secs(2));
        assert_eq!(pace.after(0, start + Duration::from_secs(1)), Duration::ZERO, "nothing was written");
        // Back early, it rests for what is left of the first rest, too; back late, it has saved nothing up.
        assert_eq!(pace.after(2 << 20, start + Duration::from_secs(1)), Duration::from_secs(2));
        assert_eq!(pace.after(2 << 20, start + Duration::from_secs(60)), Duration::from_secs(1));
        assert_eq!(Pace::new(0).after(1 << 40, start), Duration::ZERO);
    }
}
