//! Handing over: blocks that other nodes are to have go to them, written by this node out of its own memory.
//!
//! | why | which groups | to whom |
//! | --- | --- | --- |
//! | a node joined, came back or was weighed anew | those whose home this node no longer is | their homes now |
//! | this node is about to leave | all | their homes without it |
//! | a group is hot | that one | the next nodes in its order |
//!
//! Only what is in memory is handed over, the last used first, under a bandwidth cap: it is what somebody is likely to ask
//! for again. Nothing is given up here for it: what is no longer asked for goes when its room is wanted. A block that its
//! new home has already costs a name in a message.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use kvasir_cluster::View;
use kvasir_proto::v1;
use kvasir_runtime::{Shutdown, metrics::set_total};
use kvasir_settings::Live;
use kvasir_store_client::{GroupBlocks, Origin, StoreClient};
use kvasir_types::{Deadline, MemberId, ModelFingerprint, RequestId};
use tokio::sync::{mpsc, watch};

use crate::{
    config::Config,
    expiry::sleep_until,
    heat::{Heat, Seen},
    node::Node,
    store::{Group, Groups, Held, LeaseId},
};

/// Groups on their way at the same time.
const MAX_UNDER_WAY: usize = 4;
/// Hot groups that wait for their copies; more are copied when they are asked for again.
const MAX_WAITING: usize = 256;
/// How long one group may take.
const GROUP_TIMEOUT: Duration = Duration::from_secs(10);
/// A change of the members seldom comes alone: the others are waited for.
const SETTLE: Duration = Duration::from_millis(50);
/// After how long groups are offered again that did not arrive; twice as long each time in a row, up to the second.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_AT_MOST: Duration = Duration::from_secs(30);

/// How far a node that is about to leave is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Leaving {
    /// It stays.
    No,
    /// It hands its blocks over.
    Draining,
    /// They are where they will be looked for: it may be stopped.
    Drained,
}

impl Leaving {
    /// For status and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Draining => "draining",
            Self::Drained => "drained",
        }
    }
}

/// What has been handed over, and how far leaving is. Written by the loop, read by status and metrics.
#[derive(Debug)]
pub(crate) struct Progress {
    leaving: AtomicU8,
    blocks: AtomicU64,
    bytes: AtomicU64,
    /// Groups still to be handed over.
    groups_left: AtomicU64,
    /// Times that a group did not arrive, or not all of it.
    failed: AtomicU64,
    /// Blocks that nobody took when all was offered last: there is no room for them, or nobody else.
    refused: AtomicU64,
}

/// How far handing over came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Everything is where it is to be.
    Done,
    /// Some groups did not arrive.
    Failed,
    /// It was told to stop.
    Stopped,
}

/// What became of a group.
#[derive(Default)]
struct Pushed {
    bytes: u64,
    failed: bool,
    /// Blocks that nobody takes.
    refused: usize,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            leaving: AtomicU8::new(Leaving::No as u8),
            blocks: zero(),
            bytes: zero(),
            groups_left: zero(),
            failed: zero(),
            refused: zero(),
        }
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub(crate) fn groups_left(&self) -> u64 {
        self.groups_left.load(Ordering::Relaxed)
    }

    pub(crate) fn leaving(&self) -> Leaving {
        match self.leaving.load(Ordering::Acquire) {
            0 => Leaving::No,
            1 => Leaving::Draining,
            _ => Leaving::Drained,
        }
    }

    pub(crate) fn set_leaving(&self, leaving: Leaving) {
        self.leaving.store(leaving as u8, Ordering::Release);
    }
}

/// A group that is to have so many copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HotGroup {
    pub(crate) group: u64,
    pub(crate) copies: usize,
}

/// Which groups are hot. Written by whatever task serves a lookup, for a map look-up, and by the loop.
pub(crate) struct HotGroups {
    heat: Mutex<Heat>,
    queue: mpsc::Sender<HotGroup>,
}

impl HotGroups {
    /// And the queue of groups that are to be copied.
    pub(crate) fn new(heat: Heat) -> (Self, mpsc::Receiver<HotGroup>) {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        (Self { heat: Mutex::new(heat), queue }, waiting)
    }

    /// Blocks of these groups were found, in this order: what readers are told of them.
    pub(crate) fn seen(&self, groups: impl Iterator<Item = u64>, now: Instant) -> Vec<v1::HotGroup> {
        let (mut heat, mut told, mut last) = (self.lock(), Vec::new(), 0);
        for group in groups {
            if group == last {
                continue;
            }
            last = group;
            match heat.count(group, now) {
                Seen::Usual => {}
                Seen::Copied(copies) => told.push(v1::HotGroup { group, copies: copies as u32 }),
                // With too many waiting it is not copied now, and is said to be hot again.
                Seen::Copy(copies) if self.queue.try_send(HotGroup { group, copies }).is_err() => {
                    heat.not_copied(group)
                }
                Seen::Copy(_) => {}
            }
        }
        told
    }

    /// Counts and copies otherwise from now on.
    pub(crate) fn set(&self, hot: f64, max_copies: usize) {
        self.lock().set(hot, max_copies);
    }

    /// How many groups have copies because they are hot.
    pub(crate) fn count(&self) -> usize {
        self.lock().hot_groups()
    }

    fn copied(&self, group: u64, copies: usize) {
        self.lock().copied(group, copies);
    }

    fn lock(&self) -> MutexGuard<'_, Heat> {
        // Nothing leaves it half changed.
        self.heat.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who hands over.
pub(crate) struct Handover {
    pub(crate) id: MemberId,
    pub(crate) node: Arc<Node>,
    /// Over the node's own engine: what it writes comes out of the node's memory.
    pub(crate) client: StoreClient,
    pub(crate) live: Live<Config>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) hot: Arc<HotGroups>,
}

impl Handover {
    /// How much in a second, as of now.
    fn mib_per_s(&self) -> u64 {
        self.live.borrow().handover.mib_per_s
    }

    /// Follows the members and hands over what others are to have, until shutdown.
    pub(crate) async fn run(
        &self,
        mut view: watch::Receiver<Arc<View>>,
        mut hot: mpsc::Receiver<HotGroup>,
        shutdown: Shutdown,
    ) {
        let (mut again, mut pause) = (None, AGAIN);
        loop {
            // Waiting loses nothing: a change stays to be seen, a hot group stays in its queue.
            tokio::select! {
                changed = view.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Within that, more may change; cut short by shutdown only.
                    tokio::time::timeout(SETTLE, shutdown.wait()).await.ok();
                    view.mark_unchanged();
                    pause = AGAIN;
                    again = self.round(&shutdown, &view).await.then(|| Instant::now() + pause);
                }
                () = sleep_until(again) => {
                    pause = AGAIN_AT_MOST.min(pause * 2);
                    again = self.round(&shutdown, &view).await.then(|| Instant::now() + pause);
                }
                Some(group) = hot.recv() => self.copy(group).await,
                () = shutdown.wait() => return,
            }
        }
    }

    /// Hands over everything that others are to have now, until it is done, the members change, or shutdown. Whether some
    /// of it is to be tried again.
    async fn round(&self, shutdown: &Shutdown, view: &watch::Receiver<Arc<View>>) -> bool {
        // A node that its own view does not name has just begun, or was taken for dead: its blocks stay where they are.
        let Some(leaving) = self.client.is_leaving(&self.id) else { return false };
        let stop = || shutdown.is_triggered() || view.has_changed().unwrap_or(true);
        let end = self.hand_over(stop).await;
        if end == End::Done && leaving && self.progress.leaving() == Leaving::Draining {
            self.progress.set_leaving(Leaving::Drained);
            let (blocks, refused) = (self.progress.blocks(), self.progress.refused());
            tracing::info!(handed_over = blocks, nobody_took = refused, "drained, safe to stop");
        }
        end == End::Failed
    }

    /// Hands over until then at most: this node is no longer a member.
    pub(crate) async fn leave(&self, until: Instant) {
        // The others' places follow from the view without this node, which is on its way.
        while self.client.is_leaving(&self.id).is_some() && Instant::now() < until {
            tokio::time::sleep(SETTLE).await;
        }
        if self.client.nodes() > 0 {
            let all = async {
                while self.hand_over(|| false).await != End::Done {
                    tokio::time::sleep(AGAIN).await;
                }
            };
            let left = tokio::time::timeout_at(until.into(), all).await;
            let (blocks, refused) = (self.progress.blocks(), self.progress.refused());
            tracing::info!(handed_over = blocks, nobody_took = refused, in_time = left.is_ok(), "leaving");
        }
    }

    /// Hands over every group whose homes are others, the last used first.
    async fn hand_over(&self, stop: impl Fn() -> bool) -> End {
        let groups = self.foreign().await;
        if self.mib_per_s() == 0 || groups.is_empty() {
            let all = groups.iter().map(|group| group.blocks.len() as u64).sum();
            self.progress.refused.store(all, Ordering::Relaxed);
            return End::Done;
        }
        let (mut left, mut failed, mut refused) = (groups.len(), 0, 0);
        self.progress.groups_left.store(left as u64, Ordering::Relaxed);
        tracing::info!(groups = left, "handing over what others are to have");
        let started = Instant::now();
        let mut bytes = 0;
        let mut pushes = stream::iter(groups).map(|group| self.push(group, 1)).buffer_unordered(MAX_UNDER_WAY);
        while let Some(pushed) = pushes.next().await {
            failed += usize::from(pushed.failed);
            left -= usize::from(!pushed.failed);
            refused += pushed.refused as u64;
            bytes += pushed.bytes;
            self.progress.groups_left.store(left as u64, Ordering::Relaxed);
            if left > failed && stop() {
                // What is on its way is dropped: its transfers are cancelled, and its reservations end by themselves.
                return End::Stopped;
            }
            let due = Duration::from_secs_f64(bytes as f64 / (self.mib_per_s().max(1) as f64 * 1048576.0));
            tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
        }
        if failed == 0 {
            self.progress.refused.store(refused, Ordering::Relaxed);
            return End::Done;
        }
        tracing::info!(groups = failed, "groups did not arrive, they are offered again");
        End::Failed
    }

    /// The groups here whose homes are others, the last used first.
    async fn foreign(&self) -> Vec<Group> {
        let mut known: HashMap<u64, bool> = HashMap::new();
        let foreign = |group: u64| *known.entry(group).or_insert_with(|| !self.client.is_home(group, &self.id));
        let mut groups = groups(&self.node, foreign).await;
        groups.sort_unstable_by_key(|group| std::cmp::Reverse(group.last_use));
        groups
    }

    /// Gives a hot group to the next nodes in its order.
    async fn copy(&self, HotGroup { group, copies }: HotGroup) {
        let parts = groups(&self.node, |other| other == group).await;
        let mut bytes = 0;
        for part in parts {
            bytes += self.push(part, copies).await.bytes;
        }
        // Also with nothing written: the others had it already.
        self.hot.copied(group, copies);
        tracing::debug!(group, copies, bytes, "a hot group was copied");
    }

    /// Gives one group to those who are to have it.
    async fn push(&self, group: Group, copies: usize) -> Pushed {
        let Some(held) = self.node.lock().store.hold_group(Instant::now(), &group) else { return Pushed::default() };
        let Held { lease, blocks, position, parent, origin } = held;
        // Also if this is dropped halfway.
        let _lease = Leased { node: &self.node, lease };
        let model = (origin.model != [0; 16]).then_some(ModelFingerprint(origin.model));
        let origin = Origin { model, tenant: origin.tenant };
        let from = self.id.clone();
        let blocks = GroupBlocks { group: group.group, position, parent, blocks, from, copies };
        let deadline = Deadline::after(GROUP_TIMEOUT);
        let report = self.client.hand_over(&request(), &origin, &blocks, group.size.0, deadline).await;
        if let Some(error) = &report.error {
            self.progress.failed.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(group = group.group, error = kvasir_runtime::chain(error), "a group was not handed over");
        }
        self.progress.blocks.fetch_add(report.written as u64, Ordering::Relaxed);
        self.progress.bytes.fetch_add(report.bytes, Ordering::Relaxed);
        let failed = report.error.is_some();
        Pushed { bytes: report.bytes, failed, refused: if failed { 0 } else { report.skipped } }
    }
}

/// A lease that ends with this.
struct Leased<'a> {
    node: &'a Node,
    lease: LeaseId,
}

impl Drop for Leased<'_> {
    fn drop(&mut self) {
        self.node.end_leases([self.lease]);
    }
}

/// The wanted groups that have blocks in memory.
async fn groups(node: &Node, mut wanted: impl FnMut(u64) -> bool) -> Vec<Group> {
    let (mut found, mut from) = (Groups::new(), Some(0));
    while let Some(next) = from {
        from = node.lock().store.groups(next, &mut wanted, &mut found);
        // Between two pieces calls are served.
        tokio::task::yield_now().await;
    }
    found.into_values().collect()
}

/// Shows what was handed over, and what is hot, on the metrics page.
pub(crate) fn copy_at_scrape(page: &kvasir_runtime::Metrics, progress: Arc<Progress>, hot: Arc<HotGroups>) {
    let blocks = page.counter("kvasir_kv_store_handed_over_blocks", "Blocks given to other nodes.");
    let bytes = page.counter("kvasir_kv_store_handed_over_bytes", "Bytes of those.");
    let failed = page.counter("kvasir_kv_store_handover_failed_groups", "Times that a group did not arrive elsewhere.");
    let refused = page.gauge(
        "kvasir_kv_store_not_handed_over_blocks",
        "Blocks in memory that other nodes were to have and nobody took when all were offered last.",
    );
    let left = page.gauge("kvasir_kv_store_handover_groups_left", "Placement groups still to be given to other nodes.");
    let groups = page.gauge("kvasir_kv_store_hot_groups", "Placement groups with more copies than others.");
    page.on_scrape(move || {
        set_total(&blocks, progress.blocks());
        set_total(&bytes, progress.bytes.load(Ordering::Relaxed));
        set_total(&failed, progress.failed.load(Ordering::Relaxed));
        refused.set(i64::try_from(progress.refused()).unwrap_or(i64::MAX));
        left.set(i64::try_from(progress.groups_left()).unwrap_or(i64::MAX));
        groups.set(i64::try_from(hot.count()).unwrap_or(i64::MAX));
    });
}

fn request() -> RequestId {
    "handover".parse().expect("a request id of visible letters")
}
