//! Out of service and back, while the process runs.
//!
//! ```text
//!   serving ──cordon──▶ cordoned ──drain──▶ (cordoned for a moment) ─▶ draining ─────────────▶ drained
//!      ▲                   │ new requests go elsewhere:                │ new ones are refused,   │ nothing runs here, nothing is to
//!      │                   │ the record says so                        │ at the deadline those   │ be written: safe to delete
//!      │                   │                                           │ that run move elsewhere │
//!      └───────────────────┴──────────── serve again ─────────────────┴────────────────────────┘
//! ```
//!
//! A drain is a task of this worker: whoever asked for it may go away. What it publishes is published once etcd is back, if
//! that is away, and until then refusals tell routers. The next process under this name begins with serving.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kvasir_cluster::EventKind;
use kvasir_proto::{check_protocol, v1};
use kvasir_rpc::operator::Operator;
use kvasir_runtime::{Kind, Shutdown};
use kvasir_types::Stage;
use tonic::Status;

use crate::{
    duty::{Duties, Now as Published, check_reason},
    error::Error,
    host::Host,
};

/// Before new requests are refused, routers hear that they should send none.
const HEAR: Duration = Duration::from_secs(1);
/// Between two looks at what is left.
const LOOK: Duration = Duration::from_millis(50);
/// After the deadline, finished blocks have so long to get to the KV store.
const WRITE_BACK: Duration = Duration::from_secs(10);
/// Longest deadline.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Where this worker is on the way. Written by [`Duties`] alone, read by all; a leaf, held for a copy.
pub(crate) struct Stages {
    now: Mutex<Now>,
    /// What every request asks.
    refuses: AtomicBool,
}

struct Now {
    stage: Stage,
    since: Instant,
    /// On the way to drained.
    leaving: bool,
    /// Which drain it is: one that was taken back must not go on.
    run: u64,
    deadline: Instant,
    moved: usize,
    blocks_lost: usize,
    /// Given to those who run, and triggered when they are to go elsewhere.
    give_up: Shutdown,
}

impl Stages {
    /// Of a worker that serves.
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self {
            now: Mutex::new(Now {
                stage: Stage::Serving,
                since: now,
                leaving: false,
                run: 0,
                deadline: now,
                moved: 0,
                blocks_lost: 0,
                give_up: Shutdown::new(),
            }),
            refuses: AtomicBool::new(false),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is.
    pub(crate) fn stage(&self) -> Stage {
        self.now().stage
    }

    /// Whether new requests are refused.
    pub(crate) fn refuses(&self) -> bool {
        self.refuses.load(Relaxed)
    }

    /// For a request: given when it is to go on elsewhere.
    pub(crate) fn give_up(&self) -> Shutdown {
        self.now().give_up.clone()
    }

    fn enter(&self, stage: Stage) {
        let mut now = self.now();
        if now.stage != stage {
            (now.stage, now.since) = (stage, Instant::now());
        }
        now.leaving &= matches!(stage, Stage::Cordoned | Stage::Draining);
        self.refuses.store(matches!(stage, Stage::Draining | Stage::Drained), Relaxed);
    }

    /// Serves again, whatever was.
    fn serve(&self) {
        self.enter(Stage::Serving);
        let mut now = self.now();
        now.run += 1;
        (now.moved, now.blocks_lost) = (0, 0);
        if now.give_up.is_triggered() {
            now.give_up = Shutdown::new();
        }
    }

    /// A drain begins, or one under way gets another deadline. The number of one that begins.
    fn leave_by(&self, deadline: Instant) -> Option<u64> {
        let mut now = self.now();
        now.deadline = deadline;
        if now.leaving {
            return None;
        }
        (now.leaving, now.moved, now.blocks_lost) = (true, 0, 0);
        now.run += 1;
        Some(now.run)
    }

    /// The deadline of this drain, if it is not taken back.
    fn deadline(&self, run: u64) -> Option<Instant> {
        let now = self.now();
        (now.run == run).then_some(now.deadline)
    }

    /// Whoever runs is to go on elsewhere. Whether that is news.
    fn move_all(&self, requests: usize) -> bool {
        let mut now = self.now();
        if now.give_up.is_triggered() {
            return false;
        }
        now.moved = requests;
        now.give_up.trigger();
        true
    }
}

impl Host {
    /// How far it is.
    pub(crate) fn lifecycle(&self) -> v1::Lifecycle {
        let (requests, blocks) = (self.tasks.requests(), self.unwritten());
        let now = self.stages.now();
        let left = now.deadline.saturating_duration_since(Instant::now());
        v1::Lifecycle {
            stage: v1::Stage::from(now.stage).into(),
            leaving: now.leaving,
            in_stage_ms: now.since.elapsed().as_millis() as u64,
            requests_left: requests as u32,
            blocks_left: blocks as u64,
            deadline_ms: if now.leaving { left.as_millis() as u64 } else { 0 },
            moved: now.moved as u32,
            blocks_lost: now.blocks_lost as u64,
        }
    }

    /// Finished blocks that wait for the store.
    fn unwritten(&self) -> usize {
        self.store.as_ref().map_or(0, |store| store.write_back.left())
    }
}

/// A change that was asked for.
enum Wanted {
    Serving,
    Cordoned,
    Drained(Duration),
}

impl Wanted {
    fn read(request: &v1::SetStageRequest, usual: Duration) -> Result<Self, Status> {
        check_reason(&request.reason)?;
        let limit = LONGEST.as_millis() as u64;
        match request.deadline_ms {
            Some(ms) if ms > limit => {
                return Err(Status::invalid_argument(format!("deadline_ms: {ms}, allowed is up to {limit}")));
            }
            Some(_) if request.stage() != v1::Stage::Drained => {
                return Err(Status::invalid_argument("deadline_ms: only for a drain"));
            }
            _ => {}
        }
        match v1::Stage::try_from(request.stage) {
            Ok(v1::Stage::Serving) => Ok(Self::Serving),
            Ok(v1::Stage::Cordoned) => Ok(Self::Cordoned),
            Ok(v1::Stage::Drained) => Ok(Self::Drained(request.deadline_ms.map_or(usual, Duration::from_millis))),
            _ => Err(Status::invalid_argument("stage: allowed are serving, cordoned and drained")),
        }
    }
}

impl Duties {
    /// Does what is asked, or says why not. Asking for what is so already is fine.
    pub(crate) async fn set_stage(
        self: &Arc<Self>,
        request: v1::SetStageRequest,
        who: Operator,
    ) -> Result<v1::SetStageResponse, Status> {
        check_protocol(request.protocol_version).map_err(|error| Error::from(error).to_status())?;
        let host = &self.host;
        let wanted = Wanted::read(&request, Duration::from_millis(host.now().shutdown.grace_ms))?;
        let mut now = self.now.lock().await;
        now.is_life(request.incarnation)?;
        if host.ending() {
            return Err(Status::failed_precondition("this worker's process is ending"));
        }
        let former = host.stages.stage();
        match wanted {
            Wanted::Serving => {
                self.publish(&mut now, Stage::Serving).await?;
                host.stages.serve();
            }
            Wanted::Cordoned => {
                let leaving = host.stages.now().leaving;
                if leaving || matches!(former, Stage::Draining | Stage::Drained) {
                    let what = if leaving { "draining" } else { former.as_str() };
                    return Err(Status::failed_precondition(format!("this worker is {what}: undrain it first")));
                }
                self.publish(&mut now, Stage::Cordoned).await?;
                host.stages.enter(Stage::Cordoned);
            }
            Wanted::Drained(_) if former == Stage::Drained => {}
            Wanted::Drained(within) => {
                if former == Stage::Serving {
                    self.publish(&mut now, Stage::Cordoned).await?;
                    host.stages.enter(Stage::Cordoned);
                }
                if let Some(run) = host.stages.leave_by(Instant::now() + within) {
                    let duties = Arc::clone(self);
                    host.tasks.spawn(Kind::Background, "drain", async move {
                        duties.drain(run).await;
                        Ok(())
                    });
                }
            }
        }
        let (lifecycle, stage) = (host.lifecycle(), host.stages.stage());
        tracing::info!(worker = %host.id, %stage, before = %former, leaving = lifecycle.leaving, reason = request.reason, "another stage");
        if stage != former || lifecycle.leaving {
            let what = if lifecycle.leaving { "is to be drained" } else { stage.as_str() };
            self.note(EventKind::Stage, format!("{what} (before: {former}): {}", request.reason), who.to_string());
        }
        Ok(v1::SetStageResponse { now: Some(lifecycle), former: v1::Stage::from(former).into() })
    }

    /// The record says so, now or once etcd is back.
    async fn publish(&self, now: &mut Published, stage: Stage) -> Result<(), Status> {
        let mut member = now.member.clone();
        (member.duty.stage, member.draining) = (stage, !stage.serves());
        if member != now.member {
            self.announce(now, member).await?;
        }
        Ok(())
    }

    /// The next stage of a drain; `false` if it was taken back.
    async fn goes_on(&self, run: u64, stage: Stage) -> bool {
        let mut now = self.now.lock().await;
        if self.host.ending() || self.host.stages.deadline(run).is_none() {
            return false;
        }
        if let Err(error) = self.publish(&mut now, stage).await {
            tracing::warn!(%error, %stage, "a stage is not in the worker's record");
        }
        self.host.stages.enter(stage);
        tracing::info!(worker = %self.host.id, %stage, "another stage");
        self.note(EventKind::Stage, stage.to_string(), String::new());
        true
    }

    async fn drain(self: Arc<Self>, run: u64) {
        let (host, stages) = (&self.host, &self.host.stages);
        tokio::time::sleep(HEAR).await;
        if !self.goes_on(run, Stage::Draining).await {
            return;
        }
        // Twice nothing: one that was let in a moment before may not be counted yet.
        let mut idle_looks = 0;
        while idle_looks < 2 {
            tokio::time::sleep(LOOK).await;
            let Some(deadline) = stages.deadline(run) else { return };
            let requests = host.tasks.requests();
            idle_looks = if requests == 0 { idle_looks + 1 } else { 0 };
            if requests > 0 && Instant::now() >= deadline && stages.move_all(requests) {
                tracing::info!(worker = %host.id, requests, "the drain's deadline: requests go on elsewhere");
            }
        }
        let patience = Instant::now() + WRITE_BACK;
        loop {
            let Some(deadline) = stages.deadline(run) else { return };
            let blocks = host.unwritten();
            if blocks == 0 {
                break;
            }
            if Instant::now() >= deadline.max(patience) {
                stages.now().blocks_lost = blocks;
                tracing::info!(worker = %host.id, blocks, "drained before all finished blocks were written back");
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        self.goes_on(run, Stage::Drained).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_that_begins_anew_counts_anew() {
        let stages = Stages::new();
        let moved = || stages.now().moved;
        assert_eq!(stages.leave_by(Instant::now()), Some(1));
        stages.enter(Stage::Draining);
        assert!(stages.move_all(3) && !stages.move_all(9), "at its deadline, once");
        assert_eq!(stages.leave_by(Instant::now()), None, "the same drain with another deadline");
        assert_eq!(moved(), 3);
        stages.enter(Stage::Drained);
        stages.serve();
        let given = stages.give_up();
        assert_eq!(moved(), 0, "who serves again has moved nobody");
        assert_eq!(stages.leave_by(Instant::now()), Some(3));
        stages.enter(Stage::Draining);
        assert!(moved() == 0 && !given.is_triggered());
        assert!(stages.move_all(1) && given.is_triggered());
        assert_eq!(moved(), 1);
    }
}
