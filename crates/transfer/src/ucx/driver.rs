//! The progress thread: everything of UCX happens on it, nothing of it is shared.
//!
//! ```text
//!             ┌──────────────────────────────────────────────────────────────────────────────┐
//!             ▼                                                                              │
//!   commands (mailbox) → progress UCX → events → client, server → start what may start → tick? → sleep in poll(2)
//! ```
//!
//! It sleeps whenever there is nothing to do, on UCX's event descriptor and the mailbox's: a thread that spins takes
//! the core from whoever should feed it (measured: a tenth of the throughput on busy cores).

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::SocketAddr,
    os::fd::RawFd,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use super::{
    client::Client,
    courier::MAX_WINDOW,
    endpoint::{Endpoint, EndpointId},
    flow::Flow,
    mailbox::{Command, Mailbox},
    messages::Message,
    registry::Registry,
    server::Server,
    worker::{Event, Listener, Settings, Worker, has_events, library, take_events},
};
use crate::{counters::add_one, error::Error, grant::InFlight, owner::Owner, threads::Threads};

/// How long the end waits for endpoints to close; then the worker is destroyed with what is left.
const CLOSING: Duration = Duration::from_secs(2);
/// Most progress calls before commands are looked at again.
const PROGRESS_AT_ONCE: usize = 32;

/// What the thread needs to know.
#[derive(Clone)]
pub(super) struct Limits {
    pub(super) io_timeout: Duration,
    pub(super) retries: u32,
    pub(super) retry_pause: Duration,
    pub(super) max_open: usize,
    pub(super) max_accepted: usize,
    pub(super) max_puts: usize,
    pub(super) max_gets: usize,
    /// Whether memory is reached by RMA where the peer allows it.
    pub(super) rma: bool,
    /// Whether closing an endpoint keeps its peer away from our memory; see the module `ucx`.
    pub(super) close_fences: bool,
}

/// Where a token that UCX gives back belongs.
pub(super) enum Pending {
    /// A put or get of one of a connection's jobs.
    Operation {
        connection: u64,
        job: u64,
    },
    Flush {
        connection: u64,
    },
    CloseConnection {
        connection: u64,
    },
    ClosePeer {
        peer: u64,
    },
    /// A message to a peer.
    Answer {
        peer: u64,
        bytes: usize,
    },
}

/// Which side of ours an endpoint is.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// A connection we made.
    Client(u64),
    /// One we accepted.
    Server(u64),
}

/// What client and server share.
pub(super) struct Core {
    pub(super) worker: Worker,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) owner: Arc<Owner>,
    pub(super) registry: Registry,
    pub(super) limits: Limits,
    pub(super) threads: Arc<Threads>,
    pub(super) endpoints: HashMap<EndpointId, Side>,
    pending: HashMap<u64, Pending>,
    next: u64,
}

impl Core {
    /// A number not used before on this thread.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A token for UCX to give back once.
    pub(super) fn token(&mut self, pending: Pending) -> u64 {
        let token = self.number();
        self.pending.insert(token, pending);
        token
    }

    pub(super) fn send(&mut self, endpoint: &Endpoint, message: &Message<'_>) {
        let mut bytes = Vec::with_capacity(64);
        message.encode(&mut bytes);
        endpoint.send(bytes);
    }
}

/// What the thread is started with.
pub(super) struct Setup {
    pub(super) settings: Settings,
    pub(super) bind: SocketAddr,
    /// Whether RMA is asked for.
    pub(super) rma: Option<bool>,
    pub(super) limits: Limits,
    pub(super) owner: Arc<Owner>,
    pub(super) threads: Arc<Threads>,
    pub(super) mailbox: Arc<Mailbox>,
}

/// The thread's body: says through `started` whether it could begin, then serves until told to stop.
pub(super) fn run(setup: Setup, started: &mpsc::SyncSender<Result<SocketAddr, String>>) {
    let mailbox = Arc::clone(&setup.mailbox);
    let _closed = CloseOnExit(&mailbox);
    match begin(setup) {
        Ok((mut driver, address)) => {
            // The engine waits for it; if it has gone, the mailbox holds a stop.
            let _ = started.send(Ok(address));
            driver.serve();
        }
        Err(reason) => drop(started.send(Err(reason))),
    }
}

/// Whatever ends the thread, nothing waits for it for ever.
struct CloseOnExit<'a>(&'a Mailbox);

impl Drop for CloseOnExit<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn begin(setup: Setup) -> Result<(Driver, SocketAddr), String> {
    let Setup { mut settings, bind, rma, mut limits, owner, threads, mailbox } = setup;
    let library = library().map_err(|error| error.to_string())?;
    limits.rma = super::use_rma(rma, library.number(), super::has_rdma())?;
    settings.rma = limits.rma;
    if !limits.rma {
        // 1.13 cuts a message into 8 KiB packets, and more than two pieces under way cost it twice the processor time
        // (1.4 s/GiB for 0.7); later ones, with larger packets, are at their best with eight or more (0.5 s/GiB).
        let window = if library.number() > (1, 13) { MAX_WINDOW } else { 2 };
        (limits.max_puts, limits.max_gets) = (limits.max_puts.min(window), limits.max_gets.min(window));
    }
    let worker = Worker::new(library, &settings)?;
    let event_fd = worker.event_fd().map_err(|status| format!("UCX has no event descriptor: {status}"))?;
    let listener = Listener::bind(&worker, bind).map_err(|status| format!("UCX cannot listen on {bind}: {status}"))?;
    let address = listener.address().map_err(|status| format!("UCX does not say where it listens: {status}"))?;
    let core = Core {
        worker,
        mailbox,
        owner,
        registry: Registry::default(),
        limits,
        threads,
        endpoints: HashMap::new(),
        pending: HashMap::new(),
        next: 0,
    };
    let (client, server, kept) = (Client::default(), Server::default(), Default::default());
    Ok((Driver { client, server, listener: Some(listener), core, event_fd, kept }, address))
}

/// Fields in the order in which they must go, however the thread ends: endpoints and keys, then the worker, and only
/// then what says that UCX touches memory no more.
struct Driver {
    client: Client,
    server: Server,
    listener: Option<Listener>,
    core: Core,
    event_fd: RawFd,
    kept: (Vec<Flow>, Vec<InFlight>),
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.kept = (self.client.take_flows(), self.server.take_in_flight());
    }
}

impl Driver {
    fn serve(&mut self) {
        let (mut commands, mut events) = (VecDeque::new(), Vec::new());
        let mut last_tick = Instant::now();
        let mut rounds = 0u64;
        let mut stop_at: Option<Instant> = None;
        loop {
            self.core.mailbox.take(&mut commands);
            for command in commands.drain(..) {
                if matches!(command, Command::Stop) {
                    stop_at.get_or_insert_with(|| Instant::now() + CLOSING);
                    self.stop();
                } else {
                    self.obey(command);
                }
            }
            let mut busy = false;
            for _ in 0..PROGRESS_AT_ONCE {
                if !self.core.worker.progress() {
                    break;
                }
                busy = true;
            }
            // Events before new operations: an endpoint that is known to have failed gets none. Starting operations may end
            // some at once, which is an event again.
            while {
                take_events(&mut events);
                busy |= !events.is_empty();
                for event in events.drain(..) {
                    self.handle(event);
                }
                self.client.pump(&mut self.core);
                has_events()
            } {}
            rounds += 1;
            if busy && !rounds.is_multiple_of(64) {
                continue;
            }
            let now = Instant::now();
            if now >= self.next_tick(last_tick) {
                last_tick = now;
                self.client.tick(&mut self.core, now);
                self.server.tick(&mut self.core, now);
                self.core.registry.sweep();
                busy = true; // it may have started something
            }
            if let Some(until) = stop_at
                && (now >= until || (self.client.is_empty() && self.server.is_empty()))
            {
                break;
            }
            if !busy {
                self.sleep(now, self.next_tick(last_tick));
            }
        }
    }

    /// When to look at what no event tells of.
    fn next_tick(&self, last: Instant) -> Instant {
        let interval = if self.client.is_busy() || self.server.is_busy() {
            (self.core.limits.io_timeout / 4).clamp(Duration::from_millis(5), Duration::from_millis(250))
        } else {
            Duration::from_secs(5)
        };
        let regular = last + interval;
        self.client.next_due().map_or(regular, |due| due.min(regular))
    }

    fn sleep(&self, now: Instant, until: Instant) {
        if !self.core.mailbox.may_sleep() {
            return;
        }
        match self.core.worker.arm() {
            Ok(true) => {
                let mut fds = [self.event_fd, self.core.mailbox.event_fd()].map(|fd| libc::pollfd {
                    fd,
                    events: libc::POLLIN,
                    revents: 0,
                });
                let wait = until.saturating_duration_since(now);
                let wait_ms = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX).max(1);
                // SAFETY: two valid structures. Being interrupted is as good as being woken.
                unsafe { libc::poll(fds.as_mut_ptr(), 2, wait_ms) };
            }
            Ok(false) => {}
            Err(status) => {
                // Not seen so far; then at least not at full speed.
                tracing::warn!(%status, "ucx: cannot arm the event descriptor");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.core.mailbox.awake();
    }

    fn stop(&mut self) {
        self.listener = None;
        self.client.close_all(&mut self.core);
        self.server.close_all(&mut self.core);
    }

    fn obey(&mut self, command: Command) {
        let core = &mut self.core;
        match command {
            Command::Start { frames, target } => self.client.start(core, frames, &target),
            Command::Resolved { connection, address } => self.client.resolved(core, connection, address),
            Command::CutClient { connection } => self.client.cut(core, connection),
            Command::Revoked { peer, grant, in_flight } => self.server.revoked(core, peer, grant, in_flight),
            Command::CutPeer { peer } => self.server.cut(core, peer),
            Command::Stop => {}
        }
    }

    fn handle(&mut self, event: Event) {
        let core = &mut self.core;
        match event {
            Event::Done { token, result } => match core.pending.remove(&token) {
                Some(Pending::Operation { connection, job }) => self.client.done(core, connection, job, result),
                Some(Pending::Flush { connection }) => self.client.flushed(core, connection, result),
                Some(Pending::CloseConnection { connection }) => self.client.closed(core, connection),
                Some(Pending::Answer { peer, bytes }) => self.server.taken(peer, bytes),
                Some(Pending::ClosePeer { peer }) => self.server.closed(core, peer),
                None => debug_assert!(false, "UCX gives each token back once"),
            },
            Event::Message { from, bytes } => self.receive(from, bytes.as_deref()),
            Event::Incoming(incoming) => {
                // Without a listener the request has gone with it.
                if let Some(listener) = &self.listener {
                    self.server.accept(core, listener, incoming);
                }
            }
            Event::Failed { endpoint, status } => {
                self.client.failed(core, endpoint, status);
                self.server.failed(core, endpoint, status);
            }
        }
    }

    fn receive(&mut self, from: EndpointId, bytes: Option<&[u8]>) {
        let core = &mut self.core;
        let Some(&side) = core.endpoints.get(&from) else { return }; // closed meanwhile
        let message = match bytes.map(Message::decode) {
            Some(Ok(message)) => Some(message),
            Some(Err(error)) => {
                tracing::warn!(%error, "ucx: closed a connection that sent no valid message");
                None
            }
            None => {
                tracing::warn!("ucx: closed a connection that sent too long a message");
                None
            }
        };
        let understood = match (message, side) {
            (None, _) => false,
            (Some(message), Side::Client(connection)) => self.client.receive(core, connection, message),
            (Some(message), Side::Server(peer)) => self.server.receive(core, peer, message),
        };
        if !understood {
            add_one(&core.owner.counters.malformed);
            match side {
                Side::Client(connection) => self.client.broken(core, connection),
                Side::Server(peer) => self.server.cut(core, peer),
            }
        }
    }
}

/// What an engine says where UCX can't be had.
pub(super) fn unavailable(reason: String) -> Error {
    Error::TransportUnavailable { kind: kvasir_types::TransportKind::Ucx, reason }
}

/// As [`unavailable`], for what the system refuses.
pub(super) fn no_descriptor(error: &io::Error) -> Error {
    unavailable(format!("no event descriptor: {error}"))
}
