//! The submitting side: lanes to peers, each with at most one connection.
//!
//! ```text
//! submit ─▶ lane 0 ─▶ [queue] ─▶ thread transfer-send ──── socket ───▶ owner
//!           lane 1 …                  │ frame noted as pending           │
//!                                     ▼                                  │
//!                                  pending ◀── thread transfer-recv ◀────┘ answers
//! ```
//!
//! A small frame for a lane that has nothing else to do is sent by whoever submits it: a switch to another thread would cost
//! more than the sending.
//!
//! Two threads a connection, blocking, and not one with `poll`: sending must go on while answers come (or both sides'
//! buffers fill and nothing moves), the kernel copies in both at once on two cores, and each thread reads from top to
//! bottom. The sending thread belongs to the lane and outlives connections ([`super::lane`]).
//!
//! A peer with several addresses (rails) has its lanes spread over them. A frame whose connection died under it is sent again,
//! over another lane if there is one: reads and writes of the same bytes under the same grant may be repeated. An idle lane
//! without a connection leaves after a while, so restarted peers leave nothing behind, and the number of lanes to all
//! peers together is bounded: the one that was idle longest gives way.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvasir_types::{Incarnation, SegmentDescriptor, SegmentId};

use super::{connection::Job, lane::Lane, tls::Tls};
use crate::{batch::Frame, config::Config, counters::Counters, error::Error, threads::Threads, transport::Target};

/// Who is at the other end: a restarted peer at the same address is another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PeerKey {
    pub(super) segment: SegmentId,
    pub(super) incarnation: Incarnation,
}

/// The lanes to one peer.
struct Peer {
    addresses: Arc<[String]>,
    lanes: Vec<Arc<Lane>>,
    /// Lanes opened so far: the next one gets the next address.
    opened: usize,
}

type Peers<'a> = MutexGuard<'a, HashMap<PeerKey, Peer>>;

/// What the lanes need to know of the settings.
pub(super) struct Limits {
    pub(super) io_timeout: Duration,
    pub(super) lanes_per_peer: usize,
    pub(super) lanes: usize,
    pub(super) retries: u32,
    pub(super) retry_pause: Duration,
}

/// Everything the lanes of one engine share.
pub(super) struct Client {
    pub(super) threads: Arc<Threads>,
    pub(super) counters: Arc<Counters>,
    pub(super) limits: Limits,
    pub(super) tls: Option<Arc<Tls>>,
    stopping: AtomicBool,
    peers: Mutex<HashMap<PeerKey, Peer>>,
}

impl Client {
    pub(super) fn new(
        threads: Arc<Threads>,
        counters: Arc<Counters>,
        config: &Config,
        tls: Option<Arc<Tls>>,
    ) -> Arc<Self> {
        let limits = Limits {
            io_timeout: config.io_timeout,
            lanes_per_peer: config.connections_per_peer,
            lanes: config.max_open_connections,
            retries: config.retries,
            retry_pause: config.retry_pause,
        };
        Arc::new(Self { threads, counters, limits, tls, stopping: AtomicBool::new(false), peers: Mutex::default() })
    }

    pub(super) fn start(self: &Arc<Self>, frames: Vec<Frame>, target: &Target) {
        let Target { descriptor: SegmentDescriptor { segment, incarnation, .. }, addresses } = target;
        let key = PeerKey { segment: *segment, incarnation: *incarnation };
        for frame in frames {
            self.queue(&Job::new(frame), key, addresses, None);
        }
    }

    /// Gives a job to the emptiest lane, another than `not` if there is another.
    fn queue(self: &Arc<Self>, job: &Arc<Job>, key: PeerKey, addresses: &[String], not: Option<&Arc<Lane>>) {
        // A frame is finished or dropped only outside the lock: that may start the next batch, right here.
        match self.lane_for(key, addresses, not) {
            Ok((lane, peers)) => {
                job.charge(&lane);
                if not.is_none()
                    && let Some(idle) = lane.idle_for(job)
                {
                    drop(peers);
                    return idle.send(job);
                }
                let undelivered = lane.queue.push(Arc::clone(job));
                drop(peers);
                drop(undelivered);
            }
            Err(error) => job.frame.finish(Err(error)), // settles the batch's other frames, too
        }
    }

    /// A frame whose connection died: once more, after a pause that the lane's thread takes, or failed.
    pub(super) fn retry(self: &Arc<Self>, job: &Arc<Job>, lane: &Arc<Lane>, error: impl FnOnce() -> Error) {
        if self.is_stopping() {
            job.frame.finish(Err(Error::Shutdown));
        } else if job.may_retry(self.limits.retries, &self.counters) {
            self.queue(job, lane.peer, &lane.addresses, Some(lane));
        } else {
            job.frame.finish(Err(error()));
        }
    }

    /// The emptiest lane to a peer, a new one if none is idle and another is allowed. The list stays locked with it, so
    /// that it can't leave before it is used (see `retire`).
    fn lane_for(
        self: &Arc<Self>,
        key: PeerKey,
        addresses: &[String],
        not: Option<&Arc<Lane>>,
    ) -> Result<(Arc<Lane>, Peers<'_>), Error> {
        let mut peers = self.peers();
        let lanes = peers.get(&key).map_or(&[][..], |peer| &peer.lanes);
        let other = |lane: &&Arc<Lane>| not.is_none_or(|not| lanes.len() == 1 || !Arc::ptr_eq(lane, not));
        let best = lanes.iter().filter(other).min_by_key(|lane| lane.load()).cloned();
        match best {
            Some(lane) if lane.load() == 0 || lanes.len() >= self.limits.lanes_per_peer => Ok((lane, peers)),
            best => match (self.open(&mut peers, key, addresses), best) {
                (Ok(lane), _) | (Err(_), Some(lane)) => Ok((lane, peers)), // fewer lanes do
                (Err(error), None) => Err(error),
            },
        }
    }

    fn open(self: &Arc<Self>, peers: &mut Peers<'_>, key: PeerKey, addresses: &[String]) -> Result<Arc<Lane>, Error> {
        if self.is_stopping() {
            return Err(Error::Shutdown);
        }
        self.make_room(peers)?;
        let peer =
            peers.entry(key).or_insert_with(|| Peer { addresses: addresses.into(), lanes: Vec::new(), opened: 0 });
        let lane = Lane::open(Arc::clone(self), key, Arc::clone(&peer.addresses), peer.opened)?;
        peer.opened += 1;
        peer.lanes.push(Arc::clone(&lane));
        Ok(lane)
    }

    /// Closes the lane that was idle longest, if there are as many as there may be.
    fn make_room(&self, peers: &mut Peers<'_>) -> Result<(), Error> {
        if peers.values().map(|peer| peer.lanes.len()).sum::<usize>() < self.limits.lanes {
            return Ok(());
        }
        let lanes = peers.values().flat_map(|peer| &peer.lanes);
        let idle = lanes.filter(|lane| lane.load() == 0 && lane.queue.is_empty()).min_by_key(|lane| lane.last_used());
        let Some(idle) = idle.cloned() else {
            return Err(Error::Busy { who: "this engine".into(), what: "all its connections are in use" });
        };
        remove(peers, &idle);
        idle.queue.close();
        Ok(())
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(super) fn shutdown(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let peers = std::mem::take(&mut *self.peers());
        for lane in peers.values().flat_map(|peer| &peer.lanes) {
            lane.close();
        }
    }

    fn peers(&self) -> Peers<'_> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an idle lane off the list, unless work has come meanwhile.
    pub(super) fn retire(&self, lane: &Arc<Lane>) -> bool {
        let mut peers = self.peers();
        if !lane.queue.is_empty() {
            return false;
        }
        remove(&mut peers, lane);
        true
    }
}

fn remove(peers: &mut Peers<'_>, lane: &Arc<Lane>) {
    if let Some(peer) = peers.get_mut(&lane.peer) {
        peer.lanes.retain(|other| !Arc::ptr_eq(other, lane));
        if peer.lanes.is_empty() {
            peers.remove(&lane.peer);
        }
    }
}
