//! The local transport: segments of the same process, moved by memcpy.
//!
//! Small batches (up to [`INLINE_BYTES`]) are copied by the submitting thread: 128 KiB take about 10 µs, no more than waking
//! another thread would. Larger ones go to the engine's copying threads, because `submit` must not hold up its caller
//! (the engine's step loop) for milliseconds. Keys, bounds and incarnation are checked as over tcp. A fence needs no
//! force here: the owner waits for the memcpy of one frame.

use std::{
    collections::HashMap,
    fmt, ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use kvasir_types::{SegmentDescriptor, SegmentId, TransportAddress, TransportKind};

use crate::{
    batch::{Frame, Op, Priority},
    copier::{Copier, INLINE_BYTES},
    counters::Counters,
    error::Error,
    grant::Cut,
    owner::{Owner, random_u64},
    transport::{Target, Transport},
};

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

/// One engine's end of a [`LocalNet`].
pub(crate) struct LocalTransport {
    net: LocalNet,
    own: SegmentId,
    counters: Arc<Counters>,
    copier: Copier<Priority>,
    memcpy: Arc<Memcpy>,
}

impl LocalTransport {
    /// Makes `owner` reachable in `net`.
    pub(crate) fn new(net: LocalNet, owner: &Arc<Owner>, copier: Copier<Priority>) -> Self {
        net.lock().insert(owner.segment, Arc::downgrade(owner));
        Self { net, own: owner.segment, counters: Arc::clone(&owner.counters), copier, memcpy: Arc::new(Memcpy) }
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
        let inline = frames.iter().map(Frame::bytes).sum::<u64>() <= INLINE_BYTES;
        for frame in frames {
            if inline {
                copy(&frame, &owner, &self.counters, &self.memcpy);
                continue;
            }
            let (owner, counters, memcpy) = (Arc::clone(&owner), Arc::clone(&self.counters), Arc::clone(&self.memcpy));
            self.copier.push(frame.batch().priority, move || copy(&frame, &owner, &counters, &memcpy));
        }
    }

    fn shutdown(&self) {
        self.net.lock().remove(&self.own);
        self.copier.stop();
    }
}

/// A copy between two arenas ends by itself, soon.
struct Memcpy;

impl Cut for Memcpy {
    fn cut(&self) -> bool {
        false
    }
}

fn copy(frame: &Frame, owner: &Owner, counters: &Counters, memcpy: &Arc<Memcpy>) {
    let batch = frame.batch();
    if let Some(notice) = frame.notice() {
        let delivered = owner.deliver(batch.key, notice);
        return frame.finish(delivered.map_err(|refusal| Error::Refused { segment: batch.segment, refusal }));
    }
    let remote = frame.ranges().iter().map(|range| (range.remote, range.len));
    // The touch before the grant, so that the grant is left first: leaving a touch may resolve the caller's future.
    let Some(touch) = frame.touch(Arc::clone(memcpy) as _) else { return };
    let in_flight = match owner.grants.enter(batch.key, batch.op, remote, Arc::clone(memcpy) as _) {
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
