//! The submitting side: connections to peers, each greeted once, and the grants opened over them.
//!
//! ```text
//! frames ─▶ connection: resolving ─▶ greeting ─▶ ready ──── lost ────▶ closing ─▶ gone
//!             │ wait                   │ wait      │                      │ frames in UCX's hands end,
//!             └────────────────────────┘           ▼                      │ then are tried again or fail
//!                             grant: opening ─▶ open ─▶ revoked
//!                               │ wait            │        │ nothing under way: `left` is sent
//!                               └─────────────────┴─▶ [`Flow`]: puts, gets, flushes
//! ```
//!
//! A frame that was on a connection when it died is tried again on the next one, after a pause, as often as the
//! configuration says: reads and writes of the same bytes under the same grant may be repeated.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, ToSocketAddrs},
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_types::PROTOCOL_VERSION;

use super::{
    connection::{Connection, PeerGrant, PeerKey, Phase, Request, answer, fail_opening, route, send_lefts},
    driver::{Core, Pending, Side},
    endpoint::Endpoint,
    flow::{Flow, Work},
    mailbox::Command,
    messages::{Message, RequestId, Verdict},
    worker::Status,
};
use crate::{
    batch::{Frame, Op},
    counters::{add_one, sub_one},
    error::{Error, Refusal},
    grant::Cut,
    transport::Target,
};

/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Our connections.
#[derive(Default)]
pub(super) struct Client {
    connections: HashMap<u64, Connection>,
    /// Those that take new frames.
    current: HashMap<PeerKey, u64>,
    /// Those with something to start.
    eager: Vec<u64>,
    /// Frames to be tried again.
    later: Vec<(Instant, Work)>,
    stopping: bool,
}

impl Client {
    pub(super) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Whether the tick has something to look after.
    pub(super) fn is_busy(&self) -> bool {
        self.connections.values().any(|connection| !connection.is_idle())
    }

    /// When frames are to be tried again.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.later.iter().map(|(at, _)| *at).min()
    }

    pub(super) fn start(&mut self, core: &mut Core, frames: Vec<Frame>, target: &Arc<Target>) {
        for frame in frames {
            self.place(core, Work::new(frame, Arc::clone(target)));
        }
    }

    /// Finds a frame its connection.
    fn place(&mut self, core: &mut Core, work: Work) {
        if work.frame.is_settled() {
            return;
        }
        let id = match self.connection_for(core, &work) {
            Ok(id) => id,
            Err(error) => return work.frame.finish(Err(error)),
        };
        let connection = self.connections.get_mut(&id).expect("just found");
        if connection.is_idle() {
            connection.last_progress = Instant::now(); // the wait for an answer begins
        }
        match connection.phase {
            Phase::Ready => {
                route(core, connection, work);
                self.eager.push(id);
            }
            _ => connection.early.push(work),
        }
    }

    fn connection_for(&mut self, core: &mut Core, work: &Work) -> Result<u64, Error> {
        if self.stopping {
            return Err(Error::Shutdown);
        }
        let Target { descriptor, addresses } = &*work.target;
        // With each attempt the next of its addresses.
        let address = addresses.get(work.attempts as usize % addresses.len().max(1)).cloned().unwrap_or_default();
        let peer = PeerKey { address, segment: descriptor.segment, incarnation: descriptor.incarnation };
        if let Some(&id) = self.current.get(&peer) {
            return Ok(id);
        }
        self.make_room(core)?;
        let id = core.number();
        let connection = Connection::new(peer.clone(), id, Arc::clone(&core.mailbox));
        self.connections.insert(id, connection);
        self.current.insert(peer.clone(), id);
        add_one(&core.owner.counters.open_connections);
        match peer.address.parse() {
            Ok(address) => self.connect(core, id, address),
            Err(_) => look_up(core, id, peer.address)?,
        }
        Ok(id)
    }

    /// Keeps the number of connections within its bound: the one idle longest goes.
    fn make_room(&mut self, core: &mut Core) -> Result<(), Error> {
        if self.current.len() < core.limits.max_open {
            return Ok(());
        }
        let idle = self.connections.iter().filter(|(_, c)| c.is_idle() && matches!(c.phase, Phase::Ready));
        let oldest = idle.min_by_key(|(_, connection)| connection.last_progress).map(|(&id, _)| id);
        let Some(oldest) = oldest else {
            return Err(Error::Busy { who: "this engine".into(), what: "no connection left" });
        };
        self.lose(core, oldest, Error::Shutdown);
        Ok(())
    }

    /// The address was looked up.
    pub(super) fn resolved(&mut self, core: &mut Core, id: u64, address: io::Result<SocketAddr>) {
        match (self.connections.get(&id), address) {
            (Some(Connection { phase: Phase::Resolving, .. }), Ok(address)) => self.connect(core, id, address),
            (Some(Connection { phase: Phase::Resolving, peer, .. }), Err(error)) => {
                let error = Error::Unreachable { peer: peer.address.clone(), source: Arc::new(error) };
                self.lose(core, id, error);
            }
            _ => {} // given up meanwhile
        }
    }

    fn connect(&mut self, core: &mut Core, id: u64, address: SocketAddr) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match Endpoint::connect(&core.worker, address, id) {
            Ok(endpoint) => {
                core.endpoints.insert(endpoint.id(), Side::Client(id));
                let PeerKey { segment, incarnation, .. } = connection.peer;
                core.send(&endpoint, &Message::Hello { version: PROTOCOL_VERSION, segment, incarnation });
                connection.endpoint = Some(endpoint);
                connection.phase = Phase::Greeting;
            }
            Err(status) => self.unreachable(core, id, status),
        }
    }

    fn unreachable(&mut self, core: &mut Core, id: u64, status: Status) {
        let Some(connection) = self.connections.get(&id) else { return };
        let source = Arc::new(io::Error::other(status.to_string()));
        self.lose(core, id, Error::Unreachable { peer: connection.peer.address.clone(), source });
    }

    /// Takes the owner's message; whether it is one that an owner may send now.
    pub(super) fn receive(&mut self, core: &mut Core, id: u64, message: Message<'_>) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else { return true };
        connection.last_progress = Instant::now();
        match (message, &connection.phase) {
            (Message::Welcome { version, verdict, rma }, Phase::Greeting) => {
                connection.rma = rma && core.limits.rma;
                self.welcomed(core, id, version, verdict);
                true
            }
            (_, Phase::Closing(_)) => true,
            (Message::Refused { request, refusal }, Phase::Ready) => {
                self.eager.push(id);
                self.refused(core, id, request, refusal).is_some()
            }
            (message, Phase::Ready) => {
                self.eager.push(id);
                answer(core, connection, message).is_some()
            }
            _ => false,
        }
    }

    /// The owner turned something down.
    fn refused(&mut self, core: &mut Core, id: u64, request: RequestId, refusal: Refusal) -> Option<()> {
        let connection = self.connections.get_mut(&id)?;
        let segment = connection.peer.segment;
        if connection.requests.contains_key(&request) {
            return fail_opening(connection, request, &Error::Refused { segment, refusal });
        }
        let op = connection.courier.refused(&core.owner.counters, request, refusal)?;
        if op == Op::Write && refusal != Refusal::UnknownGrant {
            // After a write that was not granted the owner takes nothing more from us.
            let error = connection.disconnected("the owner closed it after a write that was not granted");
            self.lose(core, id, error);
        }
        Some(())
    }

    fn welcomed(&mut self, core: &mut Core, id: u64, theirs: u32, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let PeerKey { address: peer, segment, .. } = connection.peer.clone();
        let error = match verdict {
            Verdict::Welcome => {
                connection.phase = Phase::Ready;
                for work in std::mem::take(&mut connection.early) {
                    route(core, connection, work);
                }
                return self.eager.push(id);
            }
            Verdict::Version => Error::Version { peer, ours: PROTOCOL_VERSION, theirs },
            Verdict::Stale => Error::Stale { segment, peer },
            Verdict::Busy => Error::Busy { who: peer, what: "it accepts no more connections" },
        };
        self.lose(core, id, error);
    }

    /// Starts what the caps allow on every connection that may have something.
    pub(super) fn pump(&mut self, core: &mut Core) {
        while let Some(id) = self.eager.pop() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let Connection { phase: Phase::Ready, endpoint: Some(endpoint), .. } = connection else { continue };
            if !connection.rma {
                connection.courier.pump(core, endpoint);
                continue;
            }
            let Connection { grants, regions, flow, cut, .. } = connection;
            let cut = || Arc::clone(cut) as Arc<dyn Cut>;
            let check = |work: &Work| match grants.get(&work.frame.batch().key) {
                Some(PeerGrant::Open(grant)) => {
                    let op = work.frame.batch().op;
                    work.frame.ranges().iter().try_for_each(|range| grant.check(op, range.remote, range.len))
                }
                _ => Err(Refusal::UnknownGrant),
            };
            flow.pump(core, id, endpoint, regions, check, cut);
            send_lefts(core, connection);
        }
    }

    /// A put or get has ended.
    pub(super) fn done(&mut self, core: &mut Core, id: u64, job: u64, result: Result<(), Status>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.last_progress = Instant::now();
        self.eager.push(id);
        let failed = result.is_err();
        connection.flow.done(&core.owner.counters, job, failed);
        if let Err(status) = result {
            self.failed(core, id, status);
        }
        self.bury(core, id);
    }

    /// Every put begun before the flush has arrived.
    pub(super) fn flushed(&mut self, core: &mut Core, id: u64, result: Result<(), Status>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.last_progress = Instant::now();
        self.eager.push(id);
        connection.flow.flushed(&core.owner.counters, result.is_ok());
        if let Err(status) = result {
            self.failed(core, id, status);
        }
        self.bury(core, id);
    }

    /// Its endpoint has failed.
    pub(super) fn failed(&mut self, core: &mut Core, id: u64, status: Status) {
        let Some(connection) = self.connections.get(&id) else { return };
        match connection.phase {
            Phase::Closing(_) => {}
            Phase::Ready => {
                let error = connection.disconnected(status.to_string());
                self.lose(core, id, error);
            }
            Phase::Resolving | Phase::Greeting if status == Status::REJECTED => {
                let (who, what) = (connection.peer.address.clone(), "it accepts no more connections");
                self.lose(core, id, Error::Busy { who, what });
            }
            Phase::Resolving | Phase::Greeting => self.unreachable(core, id, status),
        }
    }

    /// It sent what no owner sends.
    pub(super) fn broken(&mut self, core: &mut Core, id: u64) {
        if let Some(connection) = self.connections.get(&id) {
            let error = connection.disconnected("it sent an invalid message");
            self.lose(core, id, error);
        }
    }

    /// Local memory is wanted back.
    pub(super) fn cut(&mut self, core: &mut Core, id: u64) {
        if let Some(connection) = self.connections.get(&id) {
            let error = connection.disconnected("cut: a transfer over it was given up");
            self.lose(core, id, error);
        }
    }

    /// Takes a connection out of use and closes it; its frames are seen to when UCX has let go of all of them.
    fn lose(&mut self, core: &mut Core, id: u64, error: Error) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if matches!(connection.phase, Phase::Closing(_)) {
            return;
        }
        tracing::debug!(peer = connection.peer.address, %error, "ucx: connection ended");
        connection.phase = Phase::Closing(error);
        if self.current.get(&connection.peer) == Some(&id) {
            self.current.remove(&connection.peer);
        }
        if let Some(endpoint) = connection.endpoint.take() {
            connection.close_pending = true;
            core.endpoints.remove(&endpoint.id());
            endpoint.close(core.token(Pending::CloseConnection { connection: id }));
        }
        self.bury(core, id);
    }

    /// Its endpoint is closed.
    pub(super) fn closed(&mut self, core: &mut Core, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.close_pending = false;
            self.bury(core, id);
        }
    }

    /// Forgets a connection that UCX has let go of, and finds its frames another or fails them.
    fn bury(&mut self, core: &mut Core, id: u64) {
        let over = |connection: &Connection| {
            matches!(connection.phase, Phase::Closing(_)) && !connection.close_pending && connection.flow.is_quiet()
        };
        if !self.connections.get(&id).is_some_and(over) {
            return;
        }
        let Some(connection) = self.connections.remove(&id) else { return };
        sub_one(&core.owner.counters.open_connections);
        let Connection { phase, early, grants, requests, flow, courier, regions, .. } = connection;
        drop(regions); // the keys, now that nothing uses them
        let Phase::Closing(error) = phase else { return };
        let opening = grants.into_values().filter_map(|grant| match grant {
            PeerGrant::Opening { waiting, .. } => Some(waiting),
            PeerGrant::Open(_) => None,
        });
        let notices = requests.into_values().filter_map(|request| match request {
            Request::Notice(work) => Some(work),
            Request::Open(_) => None,
        });
        let works: Vec<Work> = early
            .into_iter()
            .chain(opening.flatten())
            .chain(notices)
            .chain(flow.into_work())
            .chain(courier.into_work())
            .collect();
        works.into_iter().for_each(|work| self.give_back(core, work, &error));
    }

    /// A frame whose connection ended under it: once more, or failed.
    fn give_back(&mut self, core: &mut Core, mut work: Work, error: &Error) {
        let transient = matches!(error, Error::Disconnected { .. } | Error::Unreachable { .. });
        if self.stopping {
            return work.frame.finish(Err(Error::Shutdown));
        }
        if !transient || work.attempts >= core.limits.retries || work.frame.is_settled() {
            return work.frame.finish(Err(error.clone()));
        }
        let pause = core.limits.retry_pause.saturating_mul(1 << work.attempts.min(16)).min(LONGEST_PAUSE);
        work.attempts += 1;
        add_one(&core.owner.counters.retries);
        self.later.push((Instant::now() + pause, work));
    }

    /// What no event tells of: retries that are due, peers that keep silent.
    pub(super) fn tick(&mut self, core: &mut Core, now: Instant) {
        let due: Vec<_> = self.later.extract_if(.., |(at, work)| *at <= now || work.frame.is_settled()).collect();
        due.into_iter().for_each(|(_, work)| self.place(core, work));
        let limit = core.limits.io_timeout;
        let stalled = |connection: &Connection| {
            !connection.is_idle()
                && !matches!(connection.phase, Phase::Closing(_))
                && now.duration_since(connection.last_progress) >= limit
        };
        let stalled: Vec<u64> = self.connections.iter().filter(|(_, c)| stalled(c)).map(|(&id, _)| id).collect();
        for id in stalled {
            let Some(connection) = self.connections.get(&id) else { continue };
            let error = match connection.phase {
                Phase::Ready => connection.disconnected(format!("no progress for {limit:?}")),
                _ => Error::Unreachable {
                    peer: connection.peer.address.clone(),
                    source: Arc::new(io::ErrorKind::TimedOut.into()),
                },
            };
            self.lose(core, id, error);
        }
    }

    /// What is in UCX's hands, for who sees that it is given back.
    pub(super) fn take_flows(&mut self) -> Vec<Flow> {
        self.connections.values_mut().map(|connection| std::mem::take(&mut connection.flow)).collect()
    }

    pub(super) fn close_all(&mut self, core: &mut Core) {
        self.stopping = true;
        std::mem::take(&mut self.later).into_iter().for_each(|(_, work)| work.frame.finish(Err(Error::Shutdown)));
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.lose(core, id, Error::Shutdown));
    }
}

/// Names are looked up on a thread of their own, which may take its time.
fn look_up(core: &Core, connection: u64, name: String) -> Result<(), Error> {
    let mailbox = Arc::clone(&core.mailbox);
    core.threads.spawn("transfer-lookup", move || {
        let address = name.to_socket_addrs().and_then(|mut addresses| {
            addresses.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
        });
        mailbox.send(Command::Resolved { connection, address });
    })
}
