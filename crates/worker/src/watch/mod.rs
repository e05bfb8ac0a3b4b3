//! `Worker.Watch`: what the prefix cache holds, and how busy the worker is, told to routers as it changes.
//!
//! ```text
//!   engine thread ──Batch (its log is bounded)──▶ Hub ──Changes, broadcast (bounded)──▶ one task for each watcher ──▶ gRPC
//!                 └─ Snapshot, when asked ─────────────────────────────────────────────▶  (snapshot, then changes)
//! ```
//!
//! The engine's thread is asked between two steps and hands over what it has; it never waits for anybody here. Whoever can't
//! keep up loses changes (the broadcast forgets the oldest), notices by their numbers and begins anew with a snapshot, at
//! most every [`ANEW_EVERY`]. So what is kept for slow watchers is bounded whatever they do, and one that takes nothing for
//! [`PATIENCE`] is sent away.

mod changes;
mod speeds;

use std::{sync::Arc, time::Duration};

use kvasir_engine::{CacheSnapshot, Handle, Stats};
use kvasir_proto::v1::{self, watch_event};
use kvasir_runtime::Shutdown;
use kvasir_types::Role;
use tokio::{
    sync::{
        Notify, OwnedSemaphorePermit, Semaphore,
        broadcast::{self, error::RecvError},
        mpsc, oneshot, watch,
    },
    time::{Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use self::{
    changes::{Changes, Gap, Group, parts},
    speeds::Speeds,
};
use crate::host::Host;

pub(crate) use speeds::Rate;

/// How often the engine is asked for changes, while it has any. A router that is told so late has sent a request of its
/// own elsewhere at most; an idle engine is not asked.
const POLL: Duration = Duration::from_millis(20);
/// How often it is asked though nothing seems to have changed.
const POLL_IDLE: Duration = Duration::from_secs(1);
/// How often the load is looked at.
const LOAD: Duration = Duration::from_millis(100);
/// The load is told at least so often: silence means that something is wrong.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Changes kept for watchers that are behind: 64 × 4096 events of 40 bytes at most, shared by all watchers.
const CHANGES_KEPT: usize = 64;
/// Messages on their way to one watcher.
const IN_FLIGHT: usize = 4;
/// Watchers at a time: one for each router, and some to spare.
const MAX_WATCHERS: usize = 64;
/// Between two snapshots for one watcher: each costs the engine's thread a copy of all names.
const ANEW_EVERY: Duration = Duration::from_millis(500);
/// For a watcher to take a message.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a call returns.
pub(crate) type Watching = ReceiverStream<Result<v1::WatchEvent, Status>>;

/// Where changes and loads go out from. One for a worker.
pub(crate) struct Hub {
    engine: Handle,
    group: Group,
    changes: broadcast::Sender<Arc<Changes>>,
    load: watch::Sender<v1::WorkerLoad>,
    watchers: Arc<Semaphore>,
    /// Somebody began to watch.
    arrived: Notify,
    shutdown: Shutdown,
}

impl Hub {
    /// For this worker.
    pub(crate) fn new(host: &Host, shutdown: Shutdown) -> Arc<Self> {
        Arc::new(Self {
            engine: host.engine.clone(),
            group: Group::of(&host.groups),
            changes: broadcast::Sender::new(CHANGES_KEPT),
            load: watch::Sender::new(load(host, &Speeds::default())),
            watchers: Arc::new(Semaphore::new(MAX_WATCHERS)),
            arrived: Notify::new(),
            shutdown,
        })
    }

    /// Asks the engine and tells all watchers; as long as the engine lives.
    pub(crate) async fn run(&self, host: &Host) {
        let mut tick = tokio::time::interval(POLL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut speeds = Speeds::default();
        let (mut seen, mut polled, mut looked) = (None, Instant::now(), Instant::now());
        loop {
            if self.changes.receiver_count() == 0 {
                // Nobody to tell. What happens meanwhile is in the snapshot that a watcher begins with.
                self.arrived.notified().await;
                continue;
            }
            tick.tick().await;
            let now = Instant::now();
            if now - looked >= LOAD {
                looked = now;
                speeds.observe(self.engine.stats());
                let load = load(host, &speeds);
                self.load.send_if_modified(|told| std::mem::replace(told, load) != load);
            }
            let stats = self.engine.stats();
            if seen == Some(stats) && now - polled < POLL_IDLE {
                continue;
            }
            (seen, polled) = (Some(stats), now);
            let (tell, told) = oneshot::channel();
            self.engine.cache_events(move |batch| drop(tell.send(batch)));
            let Ok(batch) = told.await else { return };
            for changes in Changes::of(batch) {
                let _nobody_listens = self.changes.send(Arc::new(changes));
            }
        }
    }

    /// A place for one more watcher, if there is one.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, Status> {
        let place = Arc::clone(&self.watchers).try_acquire_owned();
        place.map_err(|_| Status::resource_exhausted(format!("{MAX_WATCHERS} watch this worker already")))
    }

    /// Tells one watcher, until it or the worker leaves.
    pub(crate) async fn tell(&self, to: mpsc::Sender<Result<v1::WatchEvent, Status>>, _place: OwnedSemaphorePermit) {
        let teller = Teller { hub: self, to: &to };
        // Losing the first future loses what is not told yet, and the stream ends.
        tokio::select! {
            Leaves = teller.tell() => {}
            () = self.shutdown.wait() => {
                let _gone_already = to.try_send(Err(Status::unavailable("this worker is leaving")));
            }
            () = to.closed() => {}
        }
    }

    async fn snapshot(&self) -> Result<CacheSnapshot, Leaves> {
        let (tell, told) = oneshot::channel();
        self.engine.cache_snapshot(move |snapshot| drop(tell.send(snapshot)));
        told.await.map_err(|_| Leaves)
    }
}

/// A channel for one watcher and its other end.
pub(crate) fn channel() -> (mpsc::Sender<Result<v1::WatchEvent, Status>>, Watching) {
    let (to, from) = mpsc::channel(IN_FLIGHT);
    (to, ReceiverStream::new(from))
}

/// The watcher or the engine is gone.
struct Leaves;

struct Teller<'a> {
    hub: &'a Hub,
    to: &'a mpsc::Sender<Result<v1::WatchEvent, Status>>,
}

impl Teller<'_> {
    async fn tell(&self) -> Leaves {
        loop {
            let began = Instant::now();
            if let Err(leaves) = self.one_round().await {
                return leaves;
            }
            tokio::time::sleep_until(began + ANEW_EVERY).await;
        }
    }

    /// A snapshot and what follows it, until some of that is lost.
    async fn one_round(&self) -> Result<(), Leaves> {
        let hub = self.hub;
        // First, so that no change falls between the snapshot and the first one heard.
        let mut changes = hub.changes.subscribe();
        hub.arrived.notify_one();
        let mut load = hub.load.subscribe();
        load.mark_changed();
        let snapshot = hub.snapshot().await?;
        let mut next = snapshot.next;
        let parts = parts(&snapshot, hub.group);
        drop(snapshot);
        for part in parts {
            self.send(watch_event::Event::Part(part)).await?;
        }
        loop {
            // Whichever comes first; none of them takes anything before it is ready.
            tokio::select! {
                heard = changes.recv() => match heard {
                    Ok(changes) => match changes.since(next, hub.group) {
                        Ok(Some(wire)) => {
                            next += u64::from(wire.count);
                            self.send(watch_event::Event::Changes(wire)).await?;
                        }
                        Ok(None) => {}
                        Err(Gap) => return Ok(()),
                    },
                    Err(RecvError::Lagged(_)) => return Ok(()),
                    Err(RecvError::Closed) => return Err(Leaves),
                },
                changed = tokio::time::timeout(HEARTBEAT, load.changed()) => {
                    if let Ok(Err(_)) = changed {
                        return Err(Leaves);
                    }
                    let now = *load.borrow_and_update();
                    self.send(watch_event::Event::Load(now)).await?;
                }
            }
        }
    }

    async fn send(&self, event: watch_event::Event) -> Result<(), Leaves> {
        let event = Ok(v1::WatchEvent { event: Some(event) });
        self.to.send_timeout(event, PATIENCE).await.map_err(|_| Leaves)
    }
}

/// What this worker is doing now.
fn load(host: &Host, speeds: &Speeds) -> v1::WorkerLoad {
    let stats = host.engine.stats();
    let decode = host.duty.role() == Role::Decode;
    // A decode worker has prompts waiting for blocks that others will compute.
    let waiting_tokens = stats.prefilling_tokens + if decode { 0 } else { stats.waiting_tokens };
    let local = if decode { host.now().decode.local_prefill_tokens } else { 0 };
    v1::WorkerLoad {
        running: stats.running as u32,
        waiting: (stats.waiting + stats.preempted + stats.held) as u32,
        waiting_tokens,
        free_blocks: stats.blocks.free as u64,
        cached_blocks: stats.blocks.cached as u64,
        total_blocks: stats.blocks.total as u64,
        prefill_tokens_per_second: speeds.prefill.per_second(),
        step_seconds: speeds.steps.seconds_each(),
        handoff_bytes_per_second: host.pushes().per_second(),
        local_prefill_tokens: u32::try_from(local).unwrap_or(u32::MAX),
        draining: host.draining(),
        totals: Some(totals(&stats)),
    }
}

fn totals(stats: &Stats) -> v1::WorkerTotals {
    let plain = &stats.decode.plain;
    v1::WorkerTotals {
        prefilled_tokens: stats.prefilled_tokens,
        prefilled_prompts: stats.prefilled_prompts,
        timed_tokens: stats.prefill.tokens,
        timed_positions: stats.prefill.positions,
        timed_seconds: stats.prefill.time.as_secs_f64(),
        sampled_tokens: stats.sampled_tokens,
        plain_steps: plain.steps,
        plain_seconds: plain.time.as_secs_f64(),
        plain_answers: plain.answers,
        plain_context: plain.context,
    }
}

#[cfg(test)]
mod tests;
