//! The side that submits: connections to owners, made when first needed, closed when idle for long.
//!
//! A frame takes one of three ways. Its grant is open: it is copied, by the submitting thread or the copier. Its grant is
//! not open yet: it waits in its peer until the owner has answered. The connection ends meanwhile: it tries again over a new
//! one, a few times (an owner may close an idle connection at the moment we need it).

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_types::{Incarnation, PROTOCOL_VERSION, SegmentId, TransportKind};

use super::{
    address::Host,
    messages::ToOwner,
    peer::{Memcpy, Peer, PeerHandler},
    poller::{End, Poller, Wire},
    socket::Socket,
};
use crate::{
    batch::{Frame, Priority},
    copier::Copier,
    counters::{Counters, add_one},
    error::Error,
    grant::Cut,
    transport::Target,
};

/// A connection unused for so long is closed, and the owner's memory unmapped.
const IDLE: Duration = Duration::from_secs(60);

/// Which life of which segment a connection is to.
pub(super) type PeerId = (SegmentId, Incarnation);

/// A frame in our hands, its target for another attempt, and how many were made.
pub(super) struct Job {
    pub(super) frame: Frame,
    pub(super) target: Arc<Target>,
    pub(super) attempts: u32,
}

impl Job {
    pub(super) fn finish(self, result: Result<(), Error>) {
        self.frame.finish(result);
    }
}

/// What the client's end of the transport is to keep to.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub(super) connections: usize,
    pub(super) io_timeout: Duration,
    pub(super) retries: u32,
    pub(super) allowed_uids: Vec<u32>,
}

/// All connections to owners. Submitting threads add, the poller's thread takes out what ended.
pub(super) struct Client {
    pub(super) host: Host,
    pub(super) limits: Limits,
    pub(super) copier: Copier<Priority>,
    pub(super) counters: Arc<Counters>,
    /// How a copy is stopped: not at all. One for all of them.
    pub(super) memcpy: Arc<dyn Cut>,
    poller: Arc<Poller>,
    peers: Mutex<HashMap<PeerId, Arc<Peer>>>,
    stopping: AtomicBool,
}

impl Client {
    pub(super) fn new(
        host: Host,
        limits: Limits,
        copier: Copier<Priority>,
        counters: Arc<Counters>,
        poller: Arc<Poller>,
    ) -> Arc<Self> {
        let (peers, stopping) = (Mutex::default(), AtomicBool::new(false));
        Arc::new(Self { host, limits, copier, counters, memcpy: Arc::new(Memcpy), poller, peers, stopping })
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<PeerId, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over frames of one batch.
    pub(super) fn start(self: &Arc<Self>, frames: Vec<Frame>, target: &Arc<Target>) {
        let jobs = frames.into_iter().map(|frame| Job { frame, target: Arc::clone(target), attempts: 0 });
        self.start_jobs(jobs.collect(), target);
    }

    fn start_jobs(self: &Arc<Self>, jobs: Vec<Job>, target: &Arc<Target>) {
        match self.peer(target) {
            Ok(peer) => peer.take(jobs),
            Err(error) => jobs.into_iter().for_each(|job| job.finish(Err(error.clone()))),
        }
    }

    /// Frames whose connection ended before they moved a byte: once more, or failed with `error`.
    pub(super) fn retry(self: &Arc<Self>, jobs: Vec<Job>, error: &Error) {
        for mut job in jobs {
            let again = job.attempts < self.limits.retries && matches!(error, Error::Disconnected { .. });
            if self.is_stopping() {
                job.finish(Err(Error::Shutdown));
            } else if again && !job.frame.is_settled() {
                job.attempts += 1;
                add_one(&self.counters.retries);
                let target = Arc::clone(&job.target);
                self.start_jobs(vec![job], &target);
            } else {
                job.finish(Err(error.clone()));
            }
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn peer(self: &Arc<Self>, target: &Target) -> Result<Arc<Peer>, Error> {
        let id = (target.descriptor.segment, target.descriptor.incarnation);
        let mut peers = self.peers();
        if let Some(peer) = peers.get(&id) {
            peer.note_use();
            return Ok(Arc::clone(peer));
        }
        if self.is_stopping() {
            return Err(Error::Shutdown);
        }
        let evicted = if peers.len() < self.limits.connections { None } else { Some(Self::evict_one(&mut peers)?) };
        // Under the lock, so that nobody else makes a second one; a Unix socket connects at once or fails.
        let made = self.connect(id, target);
        if let Ok(peer) = &made {
            peers.insert(id, Arc::clone(peer));
        }
        drop(peers);
        if let Some(evicted) = evicted {
            evicted.close("closed here: too many connections");
        }
        let peer = made?;
        if let Err(error) = self.poller.add(&peer.wire, Arc::new(PeerHandler(Arc::clone(&peer)))) {
            let error = unreachable(&peer.address, error);
            peer.end(error.clone());
            return Err(error);
        }
        Ok(peer)
    }

    /// Makes room for another connection by taking out the one that was idle longest.
    fn evict_one(peers: &mut HashMap<PeerId, Arc<Peer>>) -> Result<Arc<Peer>, Error> {
        let idle = peers.values().filter(|peer| peer.is_idle()).min_by_key(|peer| peer.last_used());
        let id = idle.map(|peer| peer.id);
        id.and_then(|id| peers.remove(&id))
            .ok_or_else(|| Error::Busy { who: "this engine".into(), what: "all shm connections are in use" })
    }

    fn connect(self: &Arc<Self>, id: PeerId, target: &Target) -> Result<Arc<Peer>, Error> {
        let mut failure = None;
        for address in &target.addresses {
            let connected =
                self.host.resolve(address).map_err(io::Error::other).and_then(|name| Socket::connect(&name));
            match connected.and_then(|socket| self.greet(&socket, id).map(|()| socket)) {
                Ok(socket) => {
                    add_one(&self.counters.open_connections);
                    let wire = Wire::new(socket, &self.poller, End::Client);
                    return Ok(Peer::new(self, id, address.clone(), wire));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let what = "more connections wait there than it accepts";
                    failure = Some(Error::Busy { who: address.clone(), what });
                }
                Err(error) => failure = Some(unreachable(address, error)),
            }
        }
        Err(failure.unwrap_or_else(|| Error::TransportUnavailable {
            kind: TransportKind::Shm,
            reason: "the peer gave no address".into(),
        }))
    }

    /// Says hello, if the process on the other end is of a user whose memory we map.
    fn greet(&self, socket: &Socket, (segment, incarnation): PeerId) -> io::Result<()> {
        let uid = socket.peer_uid()?;
        if is_allowed(uid, &self.limits.allowed_uids) {
            let hello = ToOwner::Hello { version: PROTOCOL_VERSION, segment, incarnation };
            return socket.send(&hello.encode(), &[]); // a fresh socket has room for it
        }
        let reason = format!("it belongs to user {uid}, which is not in shm.allowed_uids");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
    }

    /// Makes sure that nobody finds a connection any more.
    pub(super) fn forget(&self, peer: &Arc<Peer>) {
        let mut peers = self.peers();
        if peers.get(&peer.id).is_some_and(|known| Arc::ptr_eq(known, peer)) {
            peers.remove(&peer.id);
        }
    }

    /// Whether a connection has been idle for so long that it is not worth its mappings.
    pub(super) fn is_stale(&self, peer: &Peer, now: Instant) -> bool {
        peer.is_idle() && now.saturating_duration_since(peer.last_used()) > IDLE
    }

    /// Stops calling a connection's handler; whether that was still to be done.
    pub(super) fn unhook(&self, peer: &Peer) -> bool {
        self.poller.remove(&peer.wire)
    }

    pub(super) fn shutdown(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let peers: Vec<_> = self.peers().drain().map(|(_, peer)| peer).collect();
        peers.iter().for_each(|peer| peer.close("closed here: shut down"));
    }
}

/// Whether processes of this user may map what processes of ours offer, and the reverse.
pub(super) fn is_allowed(uid: u32, others: &[u32]) -> bool {
    // SAFETY: always succeeds.
    uid == unsafe { libc::geteuid() } || others.contains(&uid)
}

pub(super) fn unreachable(peer: &str, error: io::Error) -> Error {
    Error::Unreachable { peer: peer.to_owned(), source: Arc::new(error) }
}
