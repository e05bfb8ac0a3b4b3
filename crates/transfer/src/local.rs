//! The local transport: segments of the same process, moved by memcpy.
//!
//! Small batches (up to [`INLINE_BYTES`]) are copied by the submitting thread: 128 KiB take about 10 µs, no more than waking
//! another thread would. Larger ones go to the engine's one copying thread, because `submit` must not hold up its caller
//! (the engine's step loop) for milliseconds. Keys, bounds and incarnation are checked as over tcp. A fence needs no
//! force here: the owner waits for the memcpy of one frame.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use crossbeam_channel::{Receiver, Sender, unbounded};
use std::ptr;

use kvasir_types::{SegmentDescriptor, SegmentId, TransportAddress, TransportKind};

use crate::{
    batch::{Frame, Op},
    counters::Counters,
    error::Error,
    grant::Cut,
    owner::{Owner, random_u64},
    threads::Threads,
    transport::{Target, Transport},
};

/// Largest batch that is copied on the submitting thread.
const INLINE_BYTES: u64 = 256 << 10;

/// The segments of this process that can be reached by memcpy. Hand the same one to every engine of the process that
/// shall see the others; an engine with a net of its own is reached by nobody locally.
#[derive(Clone)]
pub struct LocalNet {
    token: Arc<str>,
    segments: Arc<Mutex<HashMap<SegmentId, Weak<Owner>>>>,
}

impl Default for LocalNet {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for LocalNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalNet").field("token", &self.token).finish()
    }
}

impl LocalNet {
    /// An empty net with a fresh random token.
    pub fn new() -> Self {
        Self { token: format!("{:016x}", random_u64()).into(), segments: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SegmentId, Weak<Owner>>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Job {
    frame: Frame,
    owner: Arc<Owner>,
}

/// One engine's end of a [`LocalNet`].
pub(crate) struct LocalTransport {
    net: LocalNet,
    own: SegmentId,
    counters: Arc<Counters>,
    stopping: Arc<AtomicBool>,
    // `None` after shutdown, which ends the thread.
    jobs: Mutex<Option<Sender<Job>>>,
}

impl LocalTransport {
    /// Makes `owner` reachable in `net` and starts the copying thread.
    pub(crate) fn new(net: LocalNet, owner: &Arc<Owner>, threads: &Threads) -> Result<Self, Error> {
        let (sender, receiver) = unbounded();
        let counters = Arc::clone(&owner.counters);
        let stopping = Arc::<AtomicBool>::default();
        let (stop, copying) = (Arc::clone(&stopping), Arc::clone(&counters));
        threads.spawn("transfer-local", move || copy_all(&receiver, &copying, &stop))?;
        net.lock().insert(owner.segment, Arc::downgrade(owner));
        Ok(Self { net, own: owner.segment, counters, stopping, jobs: Mutex::new(Some(sender)) })
    }

    fn find(&self, target: &SegmentDescriptor) -> Option<Arc<Owner>> {
        let owner = self.net.lock().get(&target.segment)?.upgrade()?;
        (owner.incarnation == target.incarnation).then_some(owner)
    }
}

impl Transport for LocalTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Local
    }

    fn addresses(&self) -> Vec<TransportAddress> {
        vec![TransportAddress { kind: TransportKind::Local, address: self.net.token.as_ref().to_owned() }]
    }

    fn reaches(&self, address: &str) -> Result<(), String> {
        if *self.net.token == *address { Ok(()) } else { Err("another process".into()) }
    }

    fn start(&self, frames: Vec<Frame>, target: &Arc<Target>) {
        let Some(owner) = self.find(&target.descriptor) else {
            let stale = Error::Stale { segment: target.descriptor.segment, peer: "this process".into() };
            frames.iter().for_each(|frame| frame.finish(Err(stale.clone())));
            return;
        };
        if frames.iter().map(Frame::bytes).sum::<u64>() <= INLINE_BYTES {
            frames.into_iter().for_each(|frame| copy(&Job { frame, owner: Arc::clone(&owner) }, &self.counters));
            return;
        }
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for frame in frames {
            if let Some(jobs) = &jobs {
                // A closed queue gives the job back; dropping it fails its frame as shut down.
                let _ = jobs.send(Job { frame, owner: Arc::clone(&owner) });
            }
        }
    }

    fn shutdown(&self) {
        self.net.lock().remove(&self.own);
        self.stopping.store(true, Ordering::SeqCst);
        *self.jobs.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn copy_all(jobs: &Receiver<Job>, counters: &Counters, stopping: &AtomicBool) {
    // What is left in the queue then is dropped, and with that fails as shut down.
    jobs.iter().take_while(|_| !stopping.load(Ordering::SeqCst)).for_each(|job| copy(&job, counters));
}

/// A copy between two arenas ends by itself, soon.
struct Memcpy;

impl Cut for Memcpy {
    fn cut(&self) -> bool {
        false
    }
}

fn copy(Job { frame, owner }: &Job, counters: &Counters) {
    let (batch, memcpy) = (frame.batch(), Arc::new(Memcpy));
    if let Some(notice) = frame.notice() {
        let delivered = owner.deliver(batch.key, notice);
        return frame.finish(delivered.map_err(|refusal| Error::Refused { segment: batch.segment, refusal }));
    }
    let remote = frame.ranges().iter().map(|range| (range.remote, range.len));
    // The touch before the grant, so that the grant is left first: leaving a touch may resolve the caller's future.
    let Some(touch) = frame.touch(memcpy.clone()) else { return };
    let in_flight = match owner.grants.enter(batch.key, batch.op, remote, memcpy) {
        Ok(in_flight) => in_flight,
        Err(refusal) => {
            drop(touch);
            return frame.finish(Err(Error::Refused { segment: batch.segment, refusal }));
        }
    };
    for range in frame.ranges() {
        let (near, far) = (frame.local(range), in_flight.at(range.remote, range.len));
        let (from, to) = match batch.op {
            Op::Read => (far, near),
            Op::Write => (near, far),
        };
        // SAFETY: both are `len` bytes of registered memory, which the touch and the grant keep registered; nobody holds
        // references into it; an engine may copy within itself, and `copy` allows overlap.
        unsafe { ptr::copy(from, to, range.len as usize) };
    }
    let ops = frame.ranges().len() as u64;
    owner.counters.owner_moved(TransportKind::Local, batch.op, frame.bytes(), ops);
    counters.client_moved(TransportKind::Local, batch.op, frame.bytes(), ops);
    drop(in_flight);
    drop(touch);
    frame.finish(Ok(()));
}
