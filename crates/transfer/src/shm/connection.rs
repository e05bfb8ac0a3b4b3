//! One client, from the side that owns the memory: what it has opened, what it was told, and how it is fenced.
//!
//! Our processor takes part in opening a grant and in ending one, not in what happens between. [`super::control`] has the
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
    fs::File,
    io, mem,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use kvasir_types::{GrantKey, PROTOCOL_VERSION, TransportKind};

use super::{
    control::{Moved, OwnerControl, SLOTS},
    messages::{Declined, MAX_MESSAGE, MAX_RANGES, Malformed, ToClient, ToOwner, Verdict, encode_ranges},
    peer::is_closed,
    poller::{Handler, Next, Wire},
    server::Server,
    socket::Received,
};
use crate::{
    batch::Op,
    counters::add_one,
    error::Refusal,
    grant::{Cut, InFlight, Opened, Opener},
    space::Mapped,
};

/// Messages taken from one socket before the others have their turn.
const TURN: usize = 64;

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
pub(super) struct Connection {
    id: u64,
    server: Weak<Server>,
    state: Mutex<State>,
    pub(super) wire: Wire,
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
    pub(super) fn new(id: u64, server: &Arc<Server>, wire: Wire) -> Arc<Self> {
        Arc::new(Self { id, server: Arc::downgrade(server), state: Mutex::default(), wire })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was let in and has nothing open.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state();
        state.control.is_some() && state.entries.is_empty()
    }

    /// When it last said something.
    pub(super) fn heard(&self) -> Instant {
        self.state().heard
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
            let fd = if region.writable { backing.fd.try_clone()? } else { read_only(&backing.fd)? };
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
    pub(super) fn end(&self) {
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
            server.forget(self.id);
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

/// A descriptor of the same file that can't be written by.
fn read_only(fd: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags >= 0 && flags & libc::O_ACCMODE == libc::O_RDONLY {
        return fd.try_clone();
    }
    Ok(File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?.into())
}

/// What the poller calls.
pub(super) struct Serving(pub(super) Arc<Connection>);

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
