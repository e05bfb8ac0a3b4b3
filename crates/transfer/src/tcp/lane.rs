//! One lane: a queue of frames to one peer, and the thread that sends them.
//!
//! The thread connects on first use and again after a failure, so `submit` never waits for a connect. Between attempts it
//! pauses, longer each time; a peer with several addresses is tried at the next one. When every attempt that a frame has is
//! used up, it fails, and with it what waits behind it, which would only find out the same, one after another.
//!
//! Whoever holds the lane's connection sends on it: the thread, or a submitter with a small frame that finds the lane idle
//! ([`Lane::idle_for`]). Nothing is pending on the connection then, so the peer has taken everything that was sent, the
//! socket's buffer is empty, and a frame that fits into it does not make the submitter wait.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_types::PROTOCOL_VERSION;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{
    client::{Client, PeerKey},
    connection::{Connection, Job},
    frame::Hello,
    handshake::{NoConnection, shake_hands},
    link::Link,
    queue::{Next, Queue},
};
use crate::{batch::Op, error::Error, grant::Cut};

/// The longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a lane that could not connect stays when it has no work: as long as it may have to pause before the next
/// attempt. One that has lost its connection leaves at once: a thread and a socket for every peer that ever was add up.
const LANE_IDLE: Duration = Duration::from_secs(2);
/// How often a connect in progress looks whether it is still wanted.
const CONNECT_TICK: Duration = Duration::from_millis(50);

/// Most payload bytes that a submitter sends itself: less than any socket's buffer.
const SMALL: u64 = 8 << 10;

/// A queue of frames to one peer.
pub(super) struct Lane {
    pub(super) peer: PeerKey,
    pub(super) addresses: Arc<[String]>,
    pub(super) queue: Queue,
    /// Which of the addresses is in use.
    rail: AtomicUsize,
    /// Bytes queued and in flight: the emptiest lane gets the next frame.
    pub(super) load: Arc<AtomicU64>,
    last_used: Mutex<Instant>,
    /// The socket in use, to be cut by shutdown: also while it is shaking hands.
    link: Mutex<Option<Arc<Link>>>,
    /// The connection, if there is one; held by whoever sends on it or makes it.
    current: Mutex<Option<Arc<Connection>>>,
}

/// A lane that has nothing to do but one frame.
pub(super) struct Idle<'a> {
    lane: &'a Lane,
    current: MutexGuard<'a, Option<Arc<Connection>>>,
}

impl Idle<'_> {
    pub(super) fn send(self, job: &Arc<Job>) {
        if let Some(connection) = &*self.current {
            self.lane.note_use();
            connection.send(job);
        }
    }
}

impl Lane {
    /// A lane that starts at the `rail`-th address (counted round), and its thread.
    pub(super) fn open(
        client: Arc<Client>,
        peer: PeerKey,
        addresses: Arc<[String]>,
        rail: usize,
    ) -> Result<Arc<Self>, Error> {
        let lane = Arc::new(Self {
            peer,
            addresses,
            queue: Queue::default(),
            rail: AtomicUsize::new(rail),
            load: Arc::default(),
            last_used: Mutex::new(Instant::now()),
            link: Mutex::default(),
            current: Mutex::default(),
        });
        let mut sending = Sending { client, lane: Arc::clone(&lane), losses: 0, last_loss: None };
        let client = Arc::clone(&sending.client);
        client.threads.spawn("transfer-send", move || sending.run())?;
        Ok(lane)
    }

    /// The address in use.
    pub(super) fn address(&self) -> &str {
        let rail = self.rail.load(Ordering::Relaxed);
        self.addresses.get(rail % self.addresses.len().max(1)).map_or("", String::as_str)
    }

    pub(super) fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    pub(super) fn note_use(&self) {
        *self.last_used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn last_used(&self) -> Instant {
        *self.last_used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts what is under way and ends the thread.
    pub(super) fn close(&self) {
        if let Some(link) = &*self.link() {
            link.cut();
        }
        self.queue.close();
    }

    /// The lane for this thread to send on, if it is idle and the frame small.
    pub(super) fn idle_for(&self, job: &Job) -> Option<Idle<'_>> {
        let bytes = if job.frame.batch().op == Op::Write { job.frame.bytes() } else { 0 };
        if bytes > SMALL || !self.queue.is_empty() {
            return None;
        }
        let current = self.current.try_lock().ok()?;
        let idle = current.as_ref().is_some_and(|connection| connection.is_idle());
        idle.then_some(Idle { lane: self, current })
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self) -> MutexGuard<'_, Option<Arc<Link>>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending thread of a lane.
struct Sending {
    client: Arc<Client>,
    lane: Arc<Lane>,
    /// Connections lost, or not made, in a row.
    losses: u32,
    last_loss: Option<Instant>,
}

impl Sending {
    fn run(&mut self) {
        loop {
            match self.lane.queue.pop(LANE_IDLE) {
                Next::Closed => break,
                Next::Job(job) => self.send(&job),
                Next::Idle => {
                    let connected = self.lane.current().as_ref().is_some_and(|connection| connection.is_alive());
                    if !connected && self.client.retire(&self.lane) {
                        self.lane.queue.close();
                    }
                }
            }
        }
        // Out of the lane first: what is lost with it comes back to a lane, and may come here.
        let last = self.lane.current().take();
        if let Some(connection) = last {
            connection.lost("this side closed it");
        }
        self.fail(None, &Error::Shutdown);
    }

    fn send(&mut self, job: &Arc<Job>) {
        if job.frame.is_settled() {
            return;
        }
        let lane = Arc::clone(&self.lane);
        let mut current = lane.current();
        if current.as_ref().is_some_and(|connection| !connection.is_alive()) {
            *current = None;
            self.note_loss();
        }
        while current.is_none() {
            if self.lane.queue.is_closed() || job.frame.is_settled() {
                return;
            }
            match self.connect() {
                Ok(connection) => {
                    self.losses = 0;
                    *current = Some(connection);
                }
                Err(NoConnection::Failed(_)) if job.may_retry(self.client.limits.retries, &self.client.counters) => {
                    self.note_loss();
                }
                Err(NoConnection::Failed(error) | NoConnection::Refused(error)) => {
                    self.note_loss();
                    return self.fail(Some(job), &error);
                }
            }
        }
        if let Some(connection) = &*current {
            self.lane.note_use();
            connection.send(job);
        }
    }

    fn note_loss(&mut self) {
        self.losses += 1;
        self.last_loss = Some(Instant::now());
        self.lane.rail.fetch_add(1, Ordering::Relaxed);
    }

    /// Fails a frame and those that wait behind it. They are taken out first: what a caller submits in answer to the
    /// failure gets a try of its own.
    fn fail(&self, job: Option<&Arc<Job>>, error: &Error) {
        let queued = self.lane.queue.take_all();
        for job in job.into_iter().chain(&queued) {
            job.frame.finish(Err(error.clone()));
        }
    }

    fn connect(&self) -> Result<Arc<Connection>, NoConnection> {
        if let Some(loss) = self.last_loss {
            let doublings = self.losses.saturating_sub(1).min(16);
            let pause = self.client.limits.retry_pause.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
            self.lane.queue.pause(pause.saturating_sub(loss.elapsed()));
        }
        let address = self.lane.address();
        let failed = |source: io::Error| {
            NoConnection::Failed(Error::Unreachable { peer: address.to_owned(), source: Arc::new(source) })
        };
        let socket = self.open_socket(address).map_err(failed)?;
        let link = Link::new(socket, self.client.limits.io_timeout).map_err(failed)?;
        *self.lane.link() = Some(Arc::clone(&link));
        if self.client.is_stopping() {
            return Err(NoConnection::Refused(Error::Shutdown)); // shutdown may have looked for the link just before
        }
        let PeerKey { segment, incarnation } = self.lane.peer;
        let hello = Hello { version: PROTOCOL_VERSION, segment, incarnation };
        shake_hands(&link, self.client.tls.as_deref(), address, hello, &self.client.counters)?;
        Connection::start(link, Arc::clone(&self.client), Arc::clone(&self.lane)).map_err(NoConnection::Refused)
    }

    /// Connects to the first address of the peer's name that answers, giving up early when the lane is closed.
    fn open_socket(&self, address: &str) -> io::Result<Socket> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in address.to_socket_addrs()? {
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
        let until = Instant::now() + self.client.limits.io_timeout;
        while !writable(&socket, CONNECT_TICK)? {
            if self.lane.queue.is_closed() || Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        match SockRef::from(&socket).take_error()? {
            Some(error) => Err(error),
            None => Ok(socket),
        }
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
