//! The submitting side: lanes to peers, each with at most one connection.
//!
//! ```text
//! submit ─▶ lane 0 ─▶ [queue] ─▶ thread transfer-send ──── socket ───▶ owner
//!           lane 1 …                  │ frame noted as pending           │
//!                                     ▼                                  │
//!                                  pending ◀── thread transfer-recv ◀────┘ answers
//! ```
//!
//! Two threads a connection, blocking, and not one with `poll`: sending must go on while answers come (or both sides'
//! buffers fill and nothing moves), the kernel copies in both at once on two cores, and each thread reads from top to
//! bottom. The sending thread belongs to the lane and outlives connections: it connects on first use and again after a
//! failure, so `submit` never waits for a connect. A frame that was on a connection when it died is sent once more, on the
//! next one, after a short pause: reads and writes of the same bytes under the same grant may be repeated. After that, or
//! when no connection can be made twice in a row, frames fail. An idle lane without a connection leaves after
//! [`LANE_IDLE`], so restarted peers leave nothing behind.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, ToSocketAddrs},
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use kvasir_types::{Incarnation, PROTOCOL_VERSION, SegmentDescriptor, SegmentId};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{
    connection::{Connection, Job},
    frame::{Hello, Verdict, WELCOME_BYTES},
    link::Link,
};
use crate::{batch::Frame, counters::Counters, error::Error, grant::Cut, threads::Threads, transport::Target};

/// Pause between the death of a connection and the next attempt.
const BACK_OFF: Duration = Duration::from_millis(20);
/// How long a lane without connection and work stays.
const LANE_IDLE: Duration = Duration::from_secs(30);
/// How often a connect in progress looks whether it is still wanted.
const CONNECT_TICK: Duration = Duration::from_millis(50);

/// Who is at the other end: a restarted peer at the same address is another one.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct PeerKey {
    pub(super) address: Arc<str>,
    pub(super) segment: SegmentId,
    pub(super) incarnation: Incarnation,
}

type Peers<'a> = MutexGuard<'a, HashMap<PeerKey, Vec<Arc<Lane>>>>;

/// Everything the lanes of one engine share.
pub(super) struct Client {
    pub(super) threads: Arc<Threads>,
    pub(super) counters: Arc<Counters>,
    io_timeout: Duration,
    lanes_per_peer: usize,
    stopping: AtomicBool,
    peers: Mutex<HashMap<PeerKey, Vec<Arc<Lane>>>>,
}

/// A queue of frames to one peer and the thread that sends them.
pub(super) struct Lane {
    pub(super) peer: PeerKey,
    queue: Sender<Option<Arc<Job>>>,
    /// Bytes queued and in flight: the emptiest lane gets the next frame.
    load: Arc<AtomicU64>,
    /// The socket in use, to be cut by shutdown: also while it is shaking hands.
    link: Mutex<Option<Arc<Link>>>,
}

impl Client {
    pub(super) fn new(
        threads: Arc<Threads>,
        counters: Arc<Counters>,
        io_timeout: Duration,
        lanes_per_peer: usize,
    ) -> Arc<Self> {
        let (stopping, peers) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Self { threads, counters, io_timeout, lanes_per_peer, stopping, peers })
    }

    pub(super) fn start(self: &Arc<Self>, frames: Vec<Frame>, target: &Target) {
        let Target { descriptor: SegmentDescriptor { segment, incarnation, .. }, addresses } = target;
        let address = addresses.first().map_or("", String::as_str);
        let peer = PeerKey { address: address.into(), segment: *segment, incarnation: *incarnation };
        for frame in frames {
            // A frame is finished or dropped only outside the lock: that may start the next batch, right here.
            match self.lane_for(&peer) {
                Ok((lane, peers)) => {
                    let undelivered = lane.queue(Job::new(frame, Arc::clone(&lane.load)));
                    drop(peers);
                    drop(undelivered);
                }
                Err(error) => frame.finish(Err(error)), // settles the batch's other frames, too
            }
        }
    }

    /// The emptiest lane to a peer, a new one if none is idle and another is allowed. The list stays locked with it, so
    /// that it can't leave before it is used (see `retire`).
    fn lane_for(self: &Arc<Self>, peer: &PeerKey) -> Result<(Arc<Lane>, Peers<'_>), Error> {
        let mut peers = self.peers();
        let lanes = peers.get(peer).map_or(&[][..], Vec::as_slice);
        let best = lanes.iter().min_by_key(|lane| lane.load()).cloned();
        match best {
            Some(lane) if lane.load() == 0 || lanes.len() >= self.lanes_per_peer => Ok((lane, peers)),
            best => match (self.open(peer.clone()), best) {
                (Ok(lane), _) => {
                    peers.entry(peer.clone()).or_default().push(Arc::clone(&lane));
                    Ok((lane, peers))
                }
                (Err(_), Some(lane)) => Ok((lane, peers)), // fewer lanes do
                (Err(error), None) => Err(error),
            },
        }
    }

    fn open(self: &Arc<Self>, peer: PeerKey) -> Result<Arc<Lane>, Error> {
        if self.is_stopping() {
            return Err(Error::Shutdown);
        }
        let (queue, jobs) = unbounded();
        let lane = Arc::new(Lane { peer, queue, load: Arc::default(), link: Mutex::default() });
        let mut sending = Sending { client: Arc::clone(self), lane: Arc::clone(&lane), jobs, last_loss: None };
        self.threads.spawn("transfer-send", move || sending.run())?;
        Ok(lane)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(super) fn shutdown(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let peers = std::mem::take(&mut *self.peers());
        for lane in peers.values().flatten() {
            if let Some(link) = &*lane.link() {
                link.cut();
            }
            let _ = lane.queue.send(None); // wakes the thread
        }
    }

    fn peers(&self) -> Peers<'_> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an idle lane off the list, unless work has come meanwhile.
    fn retire(&self, lane: &Arc<Lane>) -> bool {
        let mut peers = self.peers();
        if !lane.queue.is_empty() {
            return false;
        }
        if let Some(lanes) = peers.get_mut(&lane.peer) {
            lanes.retain(|other| !Arc::ptr_eq(other, lane));
            if lanes.is_empty() {
                peers.remove(&lane.peer);
            }
        }
        true
    }
}

impl Lane {
    /// Puts a frame in the queue. If the lane's thread has ended it comes back; dropping it fails it.
    #[must_use]
    pub(super) fn queue(&self, job: Arc<Job>) -> Option<Arc<Job>> {
        self.queue.send(Some(job)).err().and_then(|refused| refused.0)
    }

    fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    fn link(&self) -> MutexGuard<'_, Option<Arc<Link>>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending thread of a lane.
struct Sending {
    client: Arc<Client>,
    lane: Arc<Lane>,
    jobs: Receiver<Option<Arc<Job>>>,
    last_loss: Option<Instant>,
}

/// Why there is no connection.
enum NoConnection {
    /// The peer answered, and it means no.
    Refused(Error),
    /// It may be different in a moment.
    Failed(Error),
}

impl Sending {
    fn run(&mut self) {
        let mut current: Option<Arc<Connection>> = None;
        // Asked before each wait, because `fail` may have swallowed the word that wakes: it is sent after the flag.
        while !self.client.is_stopping() {
            match self.jobs.recv_timeout(LANE_IDLE) {
                _ if self.client.is_stopping() => break,
                Ok(Some(job)) => self.send(&job, &mut current),
                Err(RecvTimeoutError::Timeout) => {
                    let connected = current.as_ref().is_some_and(|connection| connection.is_alive());
                    if !connected && self.client.retire(&self.lane) {
                        break;
                    }
                }
                Ok(None) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Some(connection) = current {
            connection.lost("this engine shut down");
        }
        self.fail(None, &Error::Shutdown);
    }

    fn send(&mut self, job: &Arc<Job>, current: &mut Option<Arc<Connection>>) {
        if job.frame.is_settled() {
            return;
        }
        if current.as_ref().is_some_and(|connection| !connection.is_alive()) {
            *current = None;
            self.last_loss = Some(Instant::now());
        }
        while current.is_none() {
            match self.connect() {
                Ok(connection) => *current = Some(connection),
                Err(NoConnection::Failed(_)) if job.may_retry(&self.client.counters) => {
                    self.last_loss = Some(Instant::now());
                }
                Err(NoConnection::Failed(error) | NoConnection::Refused(error)) => {
                    self.last_loss = Some(Instant::now());
                    return self.fail(Some(job), &error);
                }
            }
        }
        if let Some(connection) = current {
            connection.send(job);
        }
    }

    /// Fails a frame and those that wait behind it, which would only find out the same, one after another. They are taken
    /// out first: what a caller submits in answer to the failure gets a try of its own.
    fn fail(&self, job: Option<&Arc<Job>>, error: &Error) {
        let queued: Vec<_> = self.jobs.try_iter().flatten().collect();
        for job in job.into_iter().chain(&queued) {
            job.frame.finish(Err(error.clone()));
        }
    }

    fn connect(&self) -> Result<Arc<Connection>, NoConnection> {
        if let Some(loss) = self.last_loss {
            std::thread::sleep(BACK_OFF.saturating_sub(loss.elapsed()));
        }
        let peer = &self.lane.peer;
        let failed = |source: io::Error| {
            NoConnection::Failed(Error::Unreachable { peer: peer.address.to_string(), source: Arc::new(source) })
        };
        let link = self.open_socket().and_then(|socket| Link::new(socket, self.client.io_timeout)).map_err(failed)?;
        *self.lane.link() = Some(Arc::clone(&link));
        if self.client.is_stopping() {
            return Err(NoConnection::Refused(Error::Shutdown)); // shutdown may have looked for the link just before
        }
        self.shake_hands(&link)?;
        Connection::start(link, Arc::clone(&self.client), Arc::clone(&self.lane)).map_err(NoConnection::Refused)
    }

    /// Connects to the first address of the peer's name that answers, giving up early on shutdown.
    fn open_socket(&self) -> io::Result<Socket> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in self.lane.peer.address.to_socket_addrs()? {
            match self.connect_to(address) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn connect_to(&self, address: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        match socket.connect(&address.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        let until = Instant::now() + self.client.io_timeout;
        while !writable(&socket, CONNECT_TICK)? {
            if self.client.is_stopping() || Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        match SockRef::from(&socket).take_error()? {
            Some(error) => Err(error),
            None => Ok(socket),
        }
    }

    fn shake_hands(&self, link: &Link) -> Result<(), NoConnection> {
        let PeerKey { address, segment, incarnation } = &self.lane.peer;
        let peer = || address.to_string();
        let hello = Hello { version: PROTOCOL_VERSION, segment: *segment, incarnation: *incarnation };
        let mut welcome = [0; WELCOME_BYTES];
        let lost = |reason: String| NoConnection::Failed(Error::Disconnected { peer: peer(), reason: reason.into() });
        link.send_bytes(&hello.encode())
            .and_then(|()| link.receive_bytes(&mut welcome))
            .map_err(|error| lost(format!("in the handshake: {error}")))?;
        let (verdict, theirs) = Verdict::decode(&welcome).map_err(|error| lost(error.to_string()))?;
        Err(NoConnection::Refused(match verdict {
            Verdict::Welcome => return Ok(()),
            Verdict::Version => Error::Version { peer: peer(), ours: PROTOCOL_VERSION, theirs },
            Verdict::Stale => Error::Stale { segment: *segment, peer: peer() },
            Verdict::Busy => Error::Busy { who: peer(), what: "it accepts no more connections" },
        }))
    }
}

/// Waits until a connect has ended, one way or the other.
fn writable(socket: &Socket, timeout: Duration) -> io::Result<bool> {
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one entry, alive during the call, naming an open descriptor.
    let count = unsafe { libc::poll(&raw mut entry, 1, timeout.as_millis() as libc::c_int) };
    match count {
        0 => Ok(false),
        1.. => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
    }
}
