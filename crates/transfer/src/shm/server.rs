//! The side that owns the memory: who may connect, what each client has been told, and how it is fenced.
//!
//! Its processor takes part in opening a grant and in ending one, not in what happens between. [`super::control`] has the
//! argument why a revocation that has ended lets no byte in any more.
//!
//! A client's slots, from here:
//!
//! ```text
//!            told to the client            revoked, client inside            `left`, or its socket ended
//! opening ───────────────────────▶ open ──────────────────────────▶ leaving ───────────────────────────▶ free
//!    │ revoked meanwhile             │ revoked, client outside                                            ▲
//!    └───────────────────────────────┴────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A client that sends what is no message is **sent away**: its slots are closed and it hears nothing more, but its socket
//! stays ours until its own end closes, because only that tells that it is out of the memory.

use std::{
    collections::HashMap,
    io, mem,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_types::{GrantKey, PROTOCOL_VERSION, TransportKind};

use super::{
    client::is_allowed,
    control::{Moved, OwnerControl, SLOTS},
    messages::{Declined, MAX_MESSAGE, MAX_RANGES, Malformed, ToClient, ToOwner, Verdict, encode_ranges},
    peer::is_closed,
    poller::{End, Handler, Next, Poller, Wire},
    socket::{Received, Socket},
};
use crate::{
    batch::Op,
    counters::{add_one, sub_one},
    error::Refusal,
    grant::{Cut, InFlight, Opened, Opener},
    owner::Owner,
    space::Mapped,
};

/// Messages taken from one socket before the others have their turn.
const TURN: usize = 64;

/// The listener, and all that connections have in common.
pub(super) struct Server {
    owner: Arc<Owner>,
    poller: Arc<Poller>,
    /// The poller has it, and closes it: what connects to a socket that nobody listens to waits in vain.
    listener: Weak<Wire>,
    limit: usize,
    io_timeout: Duration,
    allowed_uids: Vec<u32>,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    next_connection: AtomicU64,
    next_nonce: AtomicU64,
}

impl Server {
    pub(super) fn start(
        listener: Socket,
        owner: Arc<Owner>,
        poller: Arc<Poller>,
        limit: usize,
        io_timeout: Duration,
        allowed_uids: Vec<u32>,
    ) -> io::Result<Arc<Self>> {
        let listener = Arc::new(Wire::new(listener, &poller, End::Owner));
        let server = Arc::new(Self {
            owner,
            listener: Arc::downgrade(&listener),
            poller,
            limit,
            io_timeout,
            allowed_uids,
            connections: Mutex::default(),
            next_connection: AtomicU64::new(0),
            next_nonce: AtomicU64::new(1),
        });
        server.poller.add(
            &listener,
            Arc::new(Listening {
                server: Arc::clone(&server),
                wire: Arc::clone(&listener),
                paused: AtomicBool::new(false),
            }),
        )?;
        Ok(server)
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(self: &Arc<Self>, socket: Socket) {
        let counters = &self.owner.counters;
        let turn_away = |verdict| {
            // A fresh socket has room for it; whoever has gone already need not hear it.
            let _ = socket.send(&ToClient::Welcome { version: PROTOCOL_VERSION, verdict }.encode(), &[]);
        };
        match socket.peer_uid() {
            Ok(uid) if is_allowed(uid, &self.allowed_uids) => {}
            Ok(uid) => {
                add_one(&counters.forbidden);
                tracing::warn!(uid, "refused a process of a user not in shm.allowed_uids");
                return turn_away(Verdict::Forbidden);
            }
            Err(_) => return, // gone already
        }
        if self.connections().len() >= self.limit && !self.evict_one() {
            add_one(&counters.busy);
            return turn_away(Verdict::Busy);
        }
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            server: Arc::downgrade(self),
            state: Mutex::new(State { heard: Instant::now(), ..State::default() }),
            wire: Wire::new(socket, &self.poller, End::Owner),
        });
        self.connections().insert(id, Arc::clone(&connection));
        add_one(&counters.accepted_connections);
        if self.poller.add(&connection.wire, Arc::new(Serving(Arc::clone(&connection)))).is_err() {
            connection.end();
        }
    }

    /// Makes room for another connection by closing the one that was silent longest, of those that have nothing open.
    fn evict_one(&self) -> bool {
        let connections: Vec<_> = self.connections().values().cloned().collect();
        let idle = connections.iter().filter(|connection| connection.is_idle());
        let Some(oldest) = idle.min_by_key(|connection| connection.state().heard) else { return false };
        self.poller.remove(&oldest.wire);
        oldest.end(); // the socket closes with its last holder: it has nothing to wait for
        true
    }

    fn nonce(&self) -> u64 {
        self.next_nonce.fetch_add(1, Ordering::Relaxed)
    }

    /// Nobody new is let in.
    pub(super) fn shutdown(&self) {
        if let Some(listener) = self.listener.upgrade() {
            self.poller.remove(&listener);
        }
    }
}

struct Listening {
    server: Arc<Server>,
    wire: Arc<Wire>,
    /// Set while there are no descriptors to accept with.
    paused: AtomicBool,
}

impl Listening {
    fn accept_all(&self) {
        loop {
            match self.wire.socket.accept() {
                Ok(socket) => self.server.admit(socket),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of descriptors, usually: those in use will be closed; look again at the next tick.
                    tracing::warn!(%error, "cannot accept an shm connection");
                    self.paused.store(self.wire.pause().is_ok(), Ordering::Relaxed);
                    return;
                }
            }
        }
    }
}

impl Handler for Listening {
    fn ready(&self) -> Next {
        self.accept_all();
        Next::Stay
    }

    fn tick(&self, _now: Instant) -> Next {
        if self.paused.swap(false, Ordering::Relaxed) {
            let _ = self.wire.resume(); // fails only once the poller has let go of it
        }
        Next::Stay
    }

    fn wants_ticks(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    fn holds_memory(&self) -> bool {
        false
    }

    fn ended(&self) {}
}

enum Phase {
    Opening,
    Open,
    Leaving(#[expect(dead_code, reason = "held to be dropped")] InFlight),
}

struct Entry {
    nonce: u64,
    phase: Phase,
}

struct State {
    control: Option<OwnerControl>,
    entries: HashMap<u32, Entry>,
    free: Vec<u32>,
    /// Slots never used yet start here.
    next_slot: u32,
    /// What was counted already of what the client moved in each slot.
    counted: HashMap<u32, Moved>,
    /// Regions that the client was told of.
    told: HashMap<u64, Weak<Mapped>>,
    /// It has been sent away.
    away: bool,
    ended: bool,
    heard: Instant,
}

impl Default for State {
    fn default() -> Self {
        Self {
            control: None,
            entries: HashMap::new(),
            free: Vec::new(),
            next_slot: 0,
            counted: HashMap::new(),
            told: HashMap::new(),
            away: false,
            ended: false,
            heard: Instant::now(),
        }
    }
}

impl State {
    fn take_slot(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let slot = self.next_slot;
            (slot < SLOTS).then(|| {
                self.next_slot += 1;
                slot
            })
        })
    }

    fn give_slot_back(&mut self, slot: u32) {
        self.entries.remove(&slot);
        self.free.push(slot);
    }

    fn entry(&mut self, slot: u32, nonce: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&slot).filter(|entry| entry.nonce == nonce)
    }

    fn close_all(&self) {
        if let Some(control) = &self.control {
            self.entries.keys().for_each(|slot| control.close(*slot));
        }
    }

    /// Whether the client is out of a closed slot.
    fn is_out(&self, slot: u32) -> bool {
        self.control.as_ref().is_none_or(|control| control.is_empty(slot))
    }
}

/// One client. The poller's thread listens to it; any thread may revoke what it has opened.
struct Connection {
    id: u64,
    server: Weak<Server>,
    state: Mutex<State>,
    wire: Wire,
}

/// Why a connection is not served any further.
enum Fault {
    /// The client's end has closed, or it was never let in: it touches nothing of ours.
    Gone,
    /// It sent what is no message.
    Malformed(Malformed),
    /// We can't go on with it. It may be inside granted memory.
    Failed(io::Error),
}

impl From<Malformed> for Fault {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        // That it is closed a Unix socket says only when it is, as long as we have not ended the sending ourselves.
        if is_closed(&error) { Self::Gone } else { Self::Failed(error) }
    }
}

impl Connection {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_idle(&self) -> bool {
        let state = self.state();
        state.control.is_some() && state.entries.is_empty()
    }

    fn say(&self, what: ToClient<'_>) -> Result<(), Fault> {
        Ok(self.wire.send(what.encode(), Vec::new())?)
    }

    fn listen(self: &Arc<Self>, server: &Arc<Server>) -> Result<(), Fault> {
        if !self.wire.flush()? {
            return Ok(()); // who doesn't listen isn't answered
        }
        let mut buffer = vec![0; MAX_MESSAGE];
        for _ in 0..TURN {
            let Received { len, fds } = match self.wire.socket.receive(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It closed without having heard all; what it said before is still there, and then comes the end.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(Malformed::Unexpected("a message beyond the bounds").into());
                }
                Err(error) => return Err(error.into()),
            };
            if len == 0 {
                return Err(Fault::Gone);
            }
            if !fds.is_empty() {
                return Err(Malformed::Unexpected("a descriptor").into());
            }
            let greeted = {
                let mut state = self.state();
                state.heard = Instant::now();
                if state.away {
                    continue;
                }
                state.control.is_some()
            };
            match (ToOwner::decode(&buffer[..len])?, greeted) {
                (ToOwner::Hello { version, segment, incarnation }, false) => {
                    let (owner, counters) = (&server.owner, &server.owner.counters);
                    if version != PROTOCOL_VERSION {
                        add_one(&counters.version);
                        self.say(ToClient::Welcome { version: PROTOCOL_VERSION, verdict: Verdict::Version })?;
                        return Err(Fault::Gone);
                    }
                    if (segment, incarnation) != (owner.segment, owner.incarnation) {
                        add_one(&counters.stale);
                        self.say(ToClient::Welcome { version: PROTOCOL_VERSION, verdict: Verdict::Stale })?;
                        return Err(Fault::Gone);
                    }
                    self.welcome()?;
                }
                (_, false) => return Err(Malformed::Unexpected("a word before the hello").into()),
                (ToOwner::Hello { .. }, true) => return Err(Malformed::Unexpected("a hello").into()),
                (ToOwner::Open { key }, true) => self.open(server, key)?,
                (ToOwner::Left { slot }, true) if slot >= SLOTS => return Err(Malformed::Unexpected("a slot").into()),
                (ToOwner::Left { slot }, true) => self.left(server, slot),
                (ToOwner::Notice { id, key, bytes }, true) => {
                    let result = server.owner.deliver(key, bytes);
                    self.say(ToClient::Noticed { id, result })?;
                }
            }
        }
        Ok(())
    }

    fn welcome(&self) -> Result<(), Fault> {
        let (control, fds) = OwnerControl::new().map_err(|error| {
            tracing::warn!(%error, "cannot make control pages for an shm client");
            Fault::Gone
        })?;
        let fds = Vec::from(fds);
        self.state().control = Some(control);
        let welcome = ToClient::Welcome { version: PROTOCOL_VERSION, verdict: Verdict::Welcome };
        Ok(self.wire.send(welcome.encode(), fds)?)
    }

    fn open(self: &Arc<Self>, server: &Server, key: GrantKey) -> Result<(), Fault> {
        let nonce = server.nonce();
        let slot = {
            let mut state = self.state();
            let slot = state.take_slot();
            if let Some(slot) = slot {
                state.entries.insert(slot, Entry { nonce, phase: Phase::Opening });
            }
            slot
        };
        let Some(slot) = slot else {
            add_one(&server.owner.counters.busy);
            return self.say(ToClient::Declined { key, why: Declined::Busy });
        };
        let opener = SlotOpener { connection: Arc::downgrade(self), slot, nonce, held: AtomicBool::new(false) };
        let told = match server.owner.grants.open_remote(key, Arc::new(opener)) {
            Ok(opened) => self.tell_regions(&opened)?.map(|()| opened),
            Err(refusal) => Err(Declined::Refused(refusal)),
        };
        let opened = {
            let mut state = self.state();
            // Revoked meanwhile: the slot is free again, and perhaps another's.
            let mine = state.entry(slot, nonce).is_some();
            match told {
                Ok(opened) if mine => {
                    if let Some(control) = &state.control {
                        control.open(slot, nonce);
                    }
                    state.entries.insert(slot, Entry { nonce, phase: Phase::Open });
                    Ok(opened)
                }
                Ok(_) => Err(Declined::Refused(Refusal::UnknownGrant)),
                Err(why) => {
                    if mine {
                        state.give_slot_back(slot);
                    }
                    Err(why)
                }
            }
        };
        match opened {
            Ok(Opened { readable, writable, .. }) => {
                let counts = (readable.len() as u32, writable.len() as u32);
                self.say(ToClient::Opened { key, nonce, slot, readable: counts.0, writable: counts.1 })?;
                for message in encode_ranges(&readable).chain(encode_ranges(&writable)) {
                    self.wire.send(message, Vec::new())?;
                }
                Ok(())
            }
            Err(why) => self.say(ToClient::Declined { key, why }),
        }
    }

    /// Tells the client of the grant's regions, those that it doesn't know yet.
    fn tell_regions(&self, opened: &Opened) -> Result<Result<(), Declined>, Fault> {
        if opened.readable.len() > MAX_RANGES || opened.writable.len() > MAX_RANGES {
            return Ok(Err(Declined::Busy));
        }
        for region in &opened.regions {
            let Some(backing) = &region.backing else { return Ok(Err(Declined::NotShared)) };
            let known = self.state().told.get(&region.base).is_some_and(|told| told.strong_count() > 0);
            if known {
                continue;
            }
            let fd: OwnedFd = backing.fd.try_clone()?;
            let (base, len) = (region.base, region.len);
            let said = ToClient::Region { base, len, fd_offset: backing.offset, writable: region.writable };
            self.wire.send(said.encode(), vec![fd])?;
            self.state().told.insert(base, Arc::downgrade(region));
        }
        Ok(Ok(()))
    }

    /// The grant in a slot has been revoked. Runs on the revoking thread.
    fn revoked(&self, slot: u32, nonce: u64, in_flight: InFlight) {
        let mut state = self.state();
        let phase = state.entry(slot, nonce).map(|entry| mem::replace(&mut entry.phase, Phase::Open));
        match phase {
            // Given back already, or the connection has ended.
            None => {}
            Some(Phase::Opening) => state.give_slot_back(slot),
            Some(Phase::Open | Phase::Leaving(_)) => {
                if let Some(control) = &state.control {
                    control.close(slot);
                }
                if state.is_out(slot) {
                    self.count(&mut state, slot);
                    state.give_slot_back(slot);
                } else if let Some(entry) = state.entry(slot, nonce) {
                    entry.phase = Phase::Leaving(in_flight);
                    return;
                }
            }
        }
        drop(state); // what waits for the operation is woken outside the lock
        drop(in_flight);
    }

    /// The client has left a closed slot, it says.
    fn left(&self, server: &Server, slot: u32) {
        let mut state = self.state();
        let leaving = matches!(state.entries.get(&slot), Some(Entry { phase: Phase::Leaving(_), .. }));
        if !leaving || !state.is_out(slot) {
            return; // out of a slot that is another grant's by now, or one of several threads
        }
        self.count_for(server, &mut state, slot);
        let entry = state.entries.remove(&slot);
        state.free.push(slot);
        drop(state);
        drop(entry);
    }

    fn count(&self, state: &mut State, slot: u32) {
        if let Some(server) = self.server.upgrade() {
            self.count_for(&server, state, slot);
        }
    }

    fn count_all(&self, server: &Server, state: &mut State) {
        let open: Vec<u32> = state.entries.keys().copied().collect();
        open.iter().for_each(|slot| self.count_for(server, state, *slot));
    }

    /// Enters what the client says it has moved in our metrics.
    fn count_for(&self, server: &Server, state: &mut State, slot: u32) {
        let Some(now) = state.control.as_ref().map(|control| control.moved(slot)) else { return };
        let Moved { read_bytes, read_ops, written_bytes, written_ops } =
            now.since(state.counted.insert(slot, now).unwrap_or_default());
        let counters = &server.owner.counters;
        if read_ops > 0 {
            counters.owner_moved(TransportKind::Shm, Op::Read, read_bytes, read_ops);
        }
        if written_ops > 0 {
            counters.owner_moved(TransportKind::Shm, Op::Write, written_bytes, written_ops);
        }
    }

    /// Closes every slot and says nothing more: its program sees our end close.
    fn send_away(&self, why: &dyn std::fmt::Display) {
        let mut state = self.state();
        if mem::replace(&mut state.away, true) {
            return;
        }
        self.wire.socket.finish_sending();
        state.close_all();
        drop(state);
        tracing::warn!(error = %why, "sent an shm client away");
    }

    /// Gives back what clients have left without a word, and whether this one is out of everything for good.
    fn look_again(&self) -> bool {
        let mut left = Vec::new();
        let mut state = self.state();
        let leaving: Vec<u32> = state
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.phase, Phase::Leaving(_)))
            .map(|(slot, _)| *slot)
            .collect();
        for slot in leaving {
            if state.is_out(slot) {
                left.extend(state.entries.remove(&slot));
                state.free.push(slot);
            }
        }
        let out = state.away && state.entries.keys().all(|slot| state.is_out(*slot));
        drop(state);
        drop(left);
        out
    }

    /// The client's socket has ended, or it is known to be out of everything: nothing of ours is its to touch any more.
    fn end(&self) {
        let (entries, server) = {
            let mut state = self.state();
            if mem::replace(&mut state.ended, true) {
                return;
            }
            let server = self.server.upgrade();
            state.close_all();
            if let Some(server) = &server {
                self.count_all(server, &mut state);
            }
            state.control = None;
            (mem::take(&mut state.entries), server)
        };
        if let Some(server) = server {
            server.connections().remove(&self.id);
            sub_one(&server.owner.counters.accepted_connections);
        }
        drop(entries); // with what was in flight: outside the lock
    }

    fn tick(&self, server: &Server, now: Instant) -> Result<(), Fault> {
        let gone: Vec<u64> = {
            let mut state = self.state();
            let late = now.saturating_duration_since(state.heard) > server.io_timeout;
            if state.control.is_none() && late {
                return Err(Fault::Gone); // connected and said nothing
            }
            self.count_all(server, &mut state);
            if state.away {
                Vec::new()
            } else {
                let gone = state.told.extract_if(|_, region| region.strong_count() == 0);
                gone.map(|(base, _)| base).collect()
            }
        };
        for base in gone {
            self.say(ToClient::Gone { base })?;
        }
        Ok(())
    }

    fn next(&self, server: &Server, result: Result<(), Fault>) -> Next {
        match result {
            Ok(()) => {}
            Err(Fault::Gone) => return Next::Leave,
            Err(Fault::Malformed(why)) => {
                add_one(&server.owner.counters.malformed);
                self.send_away(&why);
            }
            Err(Fault::Failed(error)) => self.send_away(&error),
        }
        if self.look_again() { Next::Leave } else { Next::Stay }
    }
}

struct Serving(Arc<Connection>);

impl Handler for Serving {
    fn ready(&self) -> Next {
        let Some(server) = self.0.server.upgrade() else { return Next::Leave };
        self.0.next(&server, self.0.listen(&server))
    }

    fn tick(&self, now: Instant) -> Next {
        let Some(server) = self.0.server.upgrade() else { return Next::Leave };
        self.0.next(&server, self.0.tick(&server, now))
    }

    fn holds_memory(&self) -> bool {
        let state = self.0.state();
        state.entries.values().any(|entry| matches!(entry.phase, Phase::Leaving(_)))
    }

    fn ended(&self) {
        self.0.end();
    }
}

/// One grant that a client has opened. Holds the connection weakly: a grant may outlive many connections.
struct SlotOpener {
    connection: Weak<Connection>,
    slot: u32,
    nonce: u64,
    held: AtomicBool,
}

impl Cut for SlotOpener {
    /// A copy in another process can't be stopped. It is waited for; that it takes so long is worth a word.
    fn cut(&self) -> bool {
        if let Some(server) = self.connection.upgrade().and_then(|connection| connection.server.upgrade())
            && !self.held.swap(true, Ordering::SeqCst)
        {
            add_one(&server.owner.counters.held_fences);
            tracing::warn!(
                "a process of this host stays inside a revoked grant: its ranges stay fenced until it leaves or ends"
            );
        }
        false
    }
}

impl Opener for SlotOpener {
    fn revoked(&self, _key: GrantKey, in_flight: InFlight) {
        match self.connection.upgrade() {
            Some(connection) => connection.revoked(self.slot, self.nonce, in_flight),
            None => drop(in_flight),
        }
    }

    fn is_gone(&self) -> bool {
        self.connection.strong_count() == 0
    }
}
