//! Batches and their life: what is moved, and the future that always resolves.
//!
//! A batch is cut into **frames** (at most `slice_bytes` and [`MAX_RANGES`] ranges each), the unit that a transport sends,
//! retries and finishes. Each frame is in one of three stages, and the batch resolves when all are settled:
//!
//! ```text
//!              touch()                     result of the transport, or the batch was aborted
//!   waiting ────────────▶ busy                                     │
//!      ▲  │   drop(Touch)  │   a thread is in local memory         ▼
//!      │  └────────────────┼──────────────────────────────▶   settled
//!      └───────────────────┴── (a result that came meanwhile settles it on leaving)
//! ```
//!
//! That makes the promise of [`Transfer`] hold: local bytes are touched only in `busy`, an abort (cancel, deadline, a
//! sister frame's failure) settles every frame that is not `busy` at once, and a settled frame can't become busy again.
//! A frame still busy after the fence grace has its connection cut, which makes its thread leave.
//!
//! A batch's notice is one more frame, without ranges, that is handed to the transport when all others have settled well.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use kvasir_types::{Deadline, GrantKey, SegmentDescriptor, SegmentId, TransportKind};

use crate::{
    copier::Copier,
    error::Error,
    grant::Cut,
    peers::Peer,
    plan::{FramePlan, Plan},
    space::{Mapped, Use},
    timer::{Expire, Timer},
};

#[cfg(doc)]
use crate::plan::MAX_RANGES;

/// A batch of at most so many bytes is a small one.
const SMALL_BATCH: u64 = 16 << 10;
/// For how long, counted from its submission, its end is looked out for before its waiter sleeps.
const LOOK_OUT: Duration = Duration::from_micros(60);

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// From the peer's segment into our arena.
    Read,
    /// From our arena into the peer's segment.
    Write,
}

/// What goes first when several batches wait. Frames of a higher one overtake those of a lower one at every step; what is
/// on the wire already is not interrupted, so the wait is for one slice at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Nobody waits for it: a write-back to the store.
    Low,
    /// The default.
    #[default]
    Normal,
    /// A request's next token waits for it: a layer pushed to a decode worker.
    High,
}

impl Priority {
    /// How many there are.
    pub(crate) const COUNT: usize = 3;
}

/// One stretch to move. A range of length zero moves nothing and is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Offset in our own segment (the arena of an engine starts at 0; see [`crate::Region::base`]).
    pub local: u64,
    /// Offset in the peer's segment.
    pub remote: u64,
    /// Bytes.
    pub len: u64,
}

/// Ranges that are moved together, to or from one segment under one grant.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Which way.
    pub op: Op,
    /// The peer's segment.
    pub target: SegmentDescriptor,
    /// The right to touch it, as its owner gave it.
    pub grant: GrantKey,
    /// What goes where. The order in which ranges move is not promised. While the transfer lasts, nobody may write the
    /// local ranges of a write, or touch those of a read.
    pub ranges: Vec<Range>,
    /// When to give up.
    pub deadline: Deadline,
    /// What goes first.
    pub priority: Priority,
    /// A message for the peer's program, at most [`crate::MAX_NOTICE_BYTES`], delivered after the last byte.
    pub notice: Option<Box<[u8]>>,
}

impl Batch {
    /// Ranges to move to or from `target` under `grant`, with normal priority and no notice.
    pub fn new(op: Op, target: SegmentDescriptor, grant: GrantKey, ranges: Vec<Range>, deadline: Deadline) -> Self {
        Self { op, target, grant, ranges, deadline, priority: Priority::default(), notice: None }
    }
}

/// What a completed transfer did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Bytes moved.
    pub bytes: u64,
    /// Ranges moved, after neighbours were merged and long ones cut.
    pub ops: u64,
    /// Over what.
    pub transport: TransportKind,
    /// From submit to completion.
    pub elapsed: Duration,
}

enum Stage {
    Waiting,
    Busy { cut: Arc<dyn Cut>, result: Option<Result<(), Error>> },
    Settled,
}

struct Inner {
    stages: Vec<Stage>,
    unsettled: usize,
    failure: Option<Error>,
    outcome: Option<Result<Report, Error>>,
    waker: Option<Waker>,
    /// A thread blocks until it is over. Nobody else costs a system call to wake.
    awaited: bool,
    on_end: Option<OnEnd>,
    /// How the notice's frame is handed over when it is its turn.
    start_notice: Option<StartNotice>,
    /// The regions stay registered while the batch lasts.
    uses: Vec<Use>,
}

type OnEnd = Box<dyn FnOnce(&Result<Report, Error>) + Send>;
type StartNotice = Box<dyn FnOnce(Frame) + Send>;

/// A batch in progress: shared by the caller's [`Transfer`], the transport's threads and the timer.
pub(crate) struct BatchState {
    pub(crate) op: Op,
    pub(crate) key: GrantKey,
    pub(crate) segment: SegmentId,
    pub(crate) priority: Priority,
    /// Those of its local ranges.
    regions: Vec<Arc<Mapped>>,
    plan: Plan,
    notice: Option<Box<[u8]>>,
    transport: TransportKind,
    copier: Option<Copier<Priority>>,
    started: Instant,
    timer: Timer,
    grace: Duration,
    peer: Option<Arc<Peer>>,
    inner: Mutex<Inner>,
    ended: Condvar,
}

/// What a new batch needs to know besides itself.
pub(crate) struct Setting {
    pub(crate) uses: Vec<Use>,
    pub(crate) transport: TransportKind,
    /// Who copies for it, if it is moved by copying here.
    pub(crate) copier: Option<Copier<Priority>>,
    pub(crate) timer: Timer,
    pub(crate) grace: Duration,
    /// Told when the batch is over; none for one that never began.
    pub(crate) peer: Option<Arc<Peer>>,
}

impl BatchState {
    /// A batch with every frame waiting; it has at least one, if only its notice. It needs [`Self::run_deadline`].
    pub(crate) fn new(batch: &Batch, plan: Plan, setting: Setting) -> Arc<Self> {
        let frames = plan.frames.len() + usize::from(batch.notice.is_some());
        let state = Self::with(batch, plan, setting, None, frames);
        if let Some(peer) = &state.peer {
            peer.started(state.plan.bytes);
        }
        state
    }

    /// Its deadline counts from now on, if it is not over already: one that was copied on the spot never troubles the timer.
    pub(crate) fn run_deadline(self: &Arc<Self>, deadline: Deadline) {
        if !self.is_over() {
            let this = Arc::downgrade(self);
            self.timer.deadline(deadline.instant(), this);
        }
    }

    /// A batch that is over before it began.
    pub(crate) fn ended(batch: &Batch, setting: Setting, outcome: Result<(), Error>) -> Arc<Self> {
        let outcome =
            outcome.map(|()| Report { bytes: 0, ops: 0, transport: setting.transport, elapsed: Duration::ZERO });
        Self::with(batch, Plan::default(), setting, Some(outcome), 0)
    }

    fn with(
        batch: &Batch,
        plan: Plan,
        setting: Setting,
        outcome: Option<Result<Report, Error>>,
        frames: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            op: batch.op,
            key: batch.grant,
            segment: batch.target.segment,
            priority: batch.priority,
            regions: setting.uses.iter().map(|region| Arc::clone(region)).collect(),
            plan,
            notice: batch.notice.clone(),
            transport: setting.transport,
            copier: setting.copier,
            started: Instant::now(),
            timer: setting.timer,
            grace: setting.grace,
            peer: setting.peer,
            inner: Mutex::new(Inner {
                stages: (0..frames).map(|_| Stage::Waiting).collect(),
                unsettled: frames,
                failure: None,
                outcome,
                waker: None,
                awaited: false,
                on_end: None,
                start_notice: None,
                uses: if frames > 0 { setting.uses } else { Vec::new() },
            }),
            ended: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this batch counts for in the engine's limit: its bytes and what its bookkeeping takes.
    pub(crate) fn cost(&self) -> u64 {
        self.plan.bytes + 64 * self.plan.ranges.len() as u64
    }

    /// Runs `action` when the batch has ended; at once if it has.
    pub(crate) fn on_end(&self, action: impl FnOnce(&Result<Report, Error>) + Send + 'static) {
        let mut inner = self.lock();
        let Some(outcome) = inner.outcome.clone() else {
            inner.on_end = Some(Box::new(action));
            return;
        };
        drop(inner);
        action(&outcome);
    }

    /// How to hand the notice's frame over; at once if there is nothing it must wait for.
    pub(crate) fn on_data_sent(self: &Arc<Self>, start: impl FnOnce(Frame) + Send + 'static) {
        let mut inner = self.lock();
        if self.notice.is_none() || inner.outcome.is_some() {
            return;
        }
        if inner.unsettled == 1 && inner.failure.is_none() {
            drop(inner);
            start(Frame { batch: Arc::clone(self), index: self.plan.frames.len() });
        } else {
            inner.start_notice = Some(Box::new(start));
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.lock().outcome.is_some()
    }

    /// Looks for a moment whether a small batch ends: going to sleep and being woken takes longer than it does.
    fn look_out(&self) {
        let until = self.started + LOOK_OUT;
        while self.plan.bytes <= SMALL_BATCH && Instant::now() < until && !self.is_over() {
            std::thread::yield_now();
        }
    }

    /// The frames with data, to be handed to a transport; each fails as shut down if it is dropped unfinished.
    pub(crate) fn frames(self: &Arc<Self>) -> Vec<Frame> {
        (0..self.plan.frames.len()).map(|index| Frame { batch: Arc::clone(self), index }).collect()
    }

    /// Ends the batch with `error`: at once where nobody is in local memory, after the grace by force elsewhere.
    pub(crate) fn abort(self: &Arc<Self>, error: Error) {
        let mut inner = self.lock();
        if inner.outcome.is_some() {
            return;
        }
        inner.failure.get_or_insert(error);
        let mut settled = 0;
        for stage in &mut inner.stages {
            if matches!(stage, Stage::Waiting) {
                *stage = Stage::Settled;
                settled += 1;
            }
        }
        inner.unsettled -= settled;
        if inner.unsettled == 0 {
            self.resolve(inner);
        } else {
            drop(inner);
            let weak = Arc::downgrade(self);
            self.timer.at(Instant::now() + self.grace, move || {
                if let Some(batch) = weak.upgrade() {
                    batch.cut_busy();
                }
            });
        }
    }

    fn cut_busy(&self) {
        for stage in &self.lock().stages {
            if let Stage::Busy { cut, .. } = stage {
                cut.cut();
            }
        }
    }

    /// All frames are settled: tell everyone, outside the lock.
    fn resolve(&self, mut inner: MutexGuard<'_, Inner>) {
        inner.outcome = Some(match inner.failure.take() {
            Some(error) => Err(error),
            None => Ok(Report {
                bytes: self.plan.bytes,
                ops: self.plan.ranges.len() as u64,
                transport: self.transport,
                elapsed: self.started.elapsed(),
            }),
        });
        let (waker, on_end, awaited) = (inner.waker.take(), inner.on_end.take(), inner.awaited);
        let over = (inner.start_notice.take(), std::mem::take(&mut inner.uses));
        let outcome = on_end.and_then(|on_end| Some((on_end, inner.outcome.clone()?)));
        let ended = self.peer.as_ref().and_then(|peer| Some((peer, inner.outcome.clone()?)));
        drop(inner);
        drop(over);
        if let Some((peer, outcome)) = ended {
            peer.ended(self.op, self.plan.bytes, &outcome);
        }
        if awaited {
            self.ended.notify_all();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
        if let Some((on_end, outcome)) = outcome {
            on_end(&outcome);
        }
    }
}

impl Expire for BatchState {
    fn expire(self: Arc<Self>) {
        self.abort(Error::DeadlineExceeded);
    }
}

/// One frame of a batch, in a transport's hands. Dropped unfinished, it fails: no transfer is ever forgotten.
pub(crate) struct Frame {
    batch: Arc<BatchState>,
    index: usize,
}

impl Frame {
    pub(crate) fn batch(&self) -> &BatchState {
        &self.batch
    }

    /// `None` for the notice's frame.
    fn plan(&self) -> Option<&FramePlan> {
        self.batch.plan.frames.get(self.index)
    }

    /// What it moves: nothing if it is a notice's.
    pub(crate) fn ranges(&self) -> &[Range] {
        self.plan().map_or(&[], |plan| &self.batch.plan.ranges[plan.ranges.clone()])
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.plan().map_or(0, |plan| plan.bytes)
    }

    /// The message, if this is the frame that carries it.
    pub(crate) fn notice(&self) -> Option<&[u8]> {
        if self.plan().is_some() { None } else { self.batch.notice.as_deref() }
    }

    /// The region that holds a range's local bytes.
    pub(crate) fn region(&self, range: &Range) -> &Arc<Mapped> {
        let region = self.batch.regions.iter().find(|region| region.holds(range.local, range.len));
        region.expect("local ranges were found in regions when the batch was made")
    }

    /// Address of a range's local bytes. They may be touched only under [`Frame::touch`].
    pub(crate) fn local(&self, range: &Range) -> *mut u8 {
        self.region(range).at(range.local, range.len)
    }

    /// Whether nobody waits for this frame any more.
    pub(crate) fn is_settled(&self) -> bool {
        matches!(self.batch.lock().stages[self.index], Stage::Settled)
    }

    /// Leave to touch local memory until the returned value is dropped; `None` once the frame is settled. One thread at a
    /// time: transports see to that.
    pub(crate) fn touch(&self, cut: Arc<dyn Cut>) -> Option<Touch<'_>> {
        self.enter(cut).then(|| Touch { frame: self })
    }

    /// As [`Frame::touch`], with the frame itself in what is returned.
    pub(crate) fn hold(self: &Arc<Self>, cut: Arc<dyn Cut>) -> Option<Held> {
        self.enter(cut).then(|| Held(Arc::clone(self)))
    }

    fn enter(&self, cut: Arc<dyn Cut>) -> bool {
        let stage = &mut self.batch.lock().stages[self.index];
        match stage {
            Stage::Waiting => {
                *stage = Stage::Busy { cut, result: None };
                true
            }
            Stage::Busy { .. } => unreachable!("one thread at a time touches a frame"),
            Stage::Settled => false,
        }
    }

    fn leave(&self) {
        let mut inner = self.batch.lock();
        let aborted = inner.failure.is_some();
        let stage = &mut inner.stages[self.index];
        match std::mem::replace(stage, Stage::Waiting) {
            Stage::Busy { result: Some(result), .. } => self.settle(inner, result),
            // The failure is recorded already; which result goes with it does not matter.
            Stage::Busy { result: None, .. } if aborted => self.settle(inner, Ok(())),
            Stage::Busy { result: None, .. } => {}
            Stage::Waiting | Stage::Settled => unreachable!("a touched frame is busy until its touch ends"),
        }
    }

    /// Settles the frame (when the thread that touches it leaves, if one does). The first failure aborts the batch.
    pub(crate) fn finish(&self, result: Result<(), Error>) {
        let mut inner = self.batch.lock();
        match &mut inner.stages[self.index] {
            Stage::Settled => {}
            Stage::Busy { result: slot, .. } => {
                slot.get_or_insert(result);
            }
            Stage::Waiting => self.settle(inner, result),
        }
    }

    fn settle(&self, mut inner: MutexGuard<'_, Inner>, result: Result<(), Error>) {
        inner.stages[self.index] = Stage::Settled;
        inner.unsettled -= 1;
        let first_failure = inner.failure.is_none();
        if let Err(error) = result {
            inner.failure.get_or_insert(error);
        }
        if inner.unsettled == 0 {
            self.batch.resolve(inner);
        } else if first_failure && let Some(error) = inner.failure.clone() {
            drop(inner);
            self.batch.abort(error);
        } else if inner.unsettled == 1
            && inner.failure.is_none()
            && let Some(start) = inner.start_notice.take()
        {
            drop(inner);
            start(Frame { batch: Arc::clone(&self.batch), index: self.batch.plan.frames.len() });
        }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        self.finish(Err(Error::Shutdown));
    }
}

/// While it lives, its holder may touch the frame's local ranges.
#[must_use]
pub(crate) struct Touch<'a> {
    frame: &'a Frame,
}

impl Drop for Touch<'_> {
    fn drop(&mut self) {
        self.frame.leave();
    }
}

/// As [`Touch`], for a transport that hands the memory to hardware or a library and goes on: it keeps the frame alive.
#[must_use]
pub(crate) struct Held(Arc<Frame>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A submitted batch: a future of its [`Report`].
///
/// It always resolves: by completion, a typed error, its deadline or [`Transfer::cancel`]. When it has resolved, the
/// engine no longer touches the local ranges; and `Ok` of a write means that the owner has every byte in place. Dropping
/// it neither cancels nor waits: the ranges then stay in use until the deadline at the latest.
#[must_use = "local memory is in use until the transfer resolves"]
pub struct Transfer {
    state: Arc<BatchState>,
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BatchState { op, segment, plan, .. } = &*self.state;
        f.debug_struct("Transfer").field("op", op).field("segment", segment).field("bytes", &plan.bytes).finish()
    }
}

impl Transfer {
    pub(crate) fn new(state: Arc<BatchState>) -> Self {
        Self { state }
    }

    /// Makes it resolve soon, with [`Error::Cancelled`] unless it has completed: within the fence grace, and still only
    /// when local memory is out of reach. What was written at the far side stays written.
    pub fn cancel(&self) {
        self.state.abort(Error::Cancelled);
    }

    /// What became of it, if that is known yet.
    pub fn result(&self) -> Option<Result<Report, Error>> {
        self.state.lock().outcome.clone()
    }

    /// Blocks until it resolves: for threads without an executor.
    ///
    /// # Errors
    /// Those of the future.
    pub fn wait(self) -> Result<Report, Error> {
        // Rather than wait for another thread to copy, copy: nobody has to be woken, and two are faster than one.
        while let Some(copier) = &self.state.copier
            && !self.state.is_over()
            && copier.run_one()
        {}
        self.state.look_out();
        let mut inner = self.state.lock();
        loop {
            match &inner.outcome {
                Some(outcome) => return outcome.clone(),
                None => {
                    inner.awaited = true;
                    inner = self.state.ended.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

impl Future for Transfer {
    type Output = Result<Report, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut inner = self.state.lock();
        match &inner.outcome {
            Some(outcome) => Poll::Ready(outcome.clone()),
            None => {
                inner.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}
