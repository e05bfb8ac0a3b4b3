//! One connection to an owner, from the submitting side: its memory, the grants it opened, and who waits for what.
//!
//! Whoever copies holds the peer, and with it the socket: the owner takes the socket's end for the promise that nobody here
//! touches its memory any more, so it must not end before the last copy has.

use std::{
    collections::{BTreeMap, HashMap},
    io, mem, ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use kvasir_types::{GrantKey, PROTOCOL_VERSION, TransportKind};

use super::{
    client::{Client, Job, PeerId, unreachable},
    control::{ClientControl, SLOTS},
    granted::{Arriving, OpenGrant, Remote},
    mapping::Mapping,
    messages::{Declined, MAX_MESSAGE, Malformed, ToClient, ToOwner, Verdict},
    poller::{Handler, Next, Wire},
    socket::Received,
};
use crate::{
    batch::{Frame, Op},
    copier::SHM_INLINE_BYTES,
    counters::sub_one,
    error::{Error, Refusal},
    grant::Cut,
};

/// Most regions of one owner.
const MAX_REGIONS: usize = 4096;
/// Most ranges of open grants that are remembered for one owner.
const MAX_CACHED_RANGES: usize = 1 << 20;
/// Messages taken from one socket before the others have their turn.
const TURN: usize = 64;

/// A copy between two mappings ends by itself, soon.
pub(super) struct Memcpy;

impl Cut for Memcpy {
    fn cut(&self) -> bool {
        false
    }
}

#[derive(Default)]
struct State {
    ended: Option<Error>,
    /// Jobs that wait for their grant to be opened.
    opening: HashMap<u64, Vec<Job>>,
    /// The grant whose ranges are being told: key, nonce, slot.
    arriving: Option<(GrantKey, u64, u32, Arriving)>,
    regions: BTreeMap<u64, Arc<Remote>>,
    notices: HashMap<u64, Job>,
    next_notice: u64,
    cached_ranges: usize,
    /// Since when an answer is due.
    waiting_since: Option<Instant>,
}

/// See the module. Submitting and copying threads use it, the poller's thread takes in what the owner says.
pub(super) struct Peer {
    pub(super) id: PeerId,
    pub(super) address: String,
    client: Weak<Client>,
    control: OnceLock<ClientControl>,
    /// Open grants by key. Read for every batch, written when one is opened or found revoked.
    grants: RwLock<HashMap<u64, Arc<OpenGrant>>>,
    state: Mutex<State>,
    /// As `state.ended`, to be asked without the lock.
    has_ended: AtomicBool,
    /// Jobs in the copier's queue.
    queued: AtomicUsize,
    /// Whether it was used since the last tick.
    used: AtomicBool,
    last_used: Mutex<Instant>,
    pub(super) wire: Wire,
}

impl Peer {
    pub(super) fn new(client: &Arc<Client>, id: PeerId, address: String, wire: Wire) -> Arc<Self> {
        Arc::new(Self {
            id,
            address,
            client: Arc::downgrade(client),
            control: OnceLock::new(),
            grants: RwLock::default(),
            state: Mutex::new(State { waiting_since: Some(Instant::now()), ..State::default() }),
            has_ended: AtomicBool::new(false),
            queued: AtomicUsize::new(0),
            used: AtomicBool::new(true),
            last_used: Mutex::new(Instant::now()),
            wire,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note_use(&self) {
        self.used.store(true, Ordering::Relaxed); // when, the next tick finds out: asking a clock here would be felt
    }

    /// To the grain of a tick.
    pub(super) fn last_used(&self) -> Instant {
        let mut last_used = self.last_used.lock().unwrap_or_else(PoisonError::into_inner);
        if self.used.swap(false, Ordering::Relaxed) {
            *last_used = Instant::now();
        }
        *last_used
    }

    /// Whether nobody waits for the owner or for the copier.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state();
        state.opening.is_empty() && state.notices.is_empty() && self.queued.load(Ordering::SeqCst) == 0
    }

    fn say(self: &Arc<Self>, what: ToOwner<'_>) {
        match self.wire.send(what.encode(), Vec::new()) {
            Ok(()) => {}
            // The owner has closed. It may have said why: whoever listens will hear that first, and then the end.
            Err(error) if is_closed(&error) => {}
            Err(error) => self.close(&error.to_string()),
        }
    }

    fn disconnected(&self, reason: &str) -> Error {
        Error::Disconnected { peer: self.address.clone(), reason: reason.into() }
    }

    /// Takes over jobs of one batch.
    pub(super) fn take(self: &Arc<Self>, jobs: Vec<Job>) {
        let (notices, data): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.frame.notice().is_some());
        notices.into_iter().for_each(|job| self.send_notice(job));
        let Some(key) = data.first().map(|job| job.frame.batch().key) else { return };
        match self.grant(key) {
            Some(grant) => self.copy_all(data, &grant),
            None => self.open(key, data),
        }
    }

    fn grant(&self, key: GrantKey) -> Option<Arc<OpenGrant>> {
        self.grants.read().unwrap_or_else(PoisonError::into_inner).get(&key.0).cloned()
    }

    /// Asks for a grant, once however many jobs wait for it.
    fn open(self: &Arc<Self>, key: GrantKey, jobs: Vec<Job>) {
        let mut state = self.state();
        if let Some(error) = state.ended.clone() {
            drop(state);
            return self.give_back(jobs, &error);
        }
        // The answer may have come since `grant` was asked: it is entered under this lock.
        if let Some(grant) = self.grant(key) {
            drop(state);
            return self.copy_all(jobs, &grant);
        }
        state.waiting_since.get_or_insert_with(Instant::now);
        let first = !state.opening.contains_key(&key.0);
        state.opening.entry(key.0).or_default().extend(jobs);
        drop(state);
        if first {
            self.say(ToOwner::Open { key });
        }
    }

    fn send_notice(self: &Arc<Self>, job: Job) {
        let Some(bytes) = job.frame.notice().map(<[u8]>::to_vec) else { return };
        let key = job.frame.batch().key;
        let mut state = self.state();
        if let Some(error) = state.ended.clone() {
            drop(state);
            return self.give_back(vec![job], &error);
        }
        state.waiting_since.get_or_insert_with(Instant::now);
        let id = state.next_notice;
        state.next_notice += 1;
        state.notices.insert(id, job);
        drop(state);
        self.say(ToOwner::Notice { id, key, bytes: &bytes });
    }

    fn give_back(&self, jobs: Vec<Job>, error: &Error) {
        match self.client.upgrade() {
            Some(client) => client.retry(jobs, error),
            None => jobs.into_iter().for_each(|job| job.finish(Err(Error::Shutdown))),
        }
    }

    /// Copies here what is small, and has the copier do the rest.
    fn copy_all(self: &Arc<Self>, jobs: Vec<Job>, grant: &Arc<OpenGrant>) {
        let bytes: u64 = jobs.iter().map(|job| job.frame.bytes()).sum();
        let Some(client) = self.client.upgrade() else { return };
        for job in jobs {
            if bytes <= SHM_INLINE_BYTES {
                self.copy(job, grant, &client);
                continue;
            }
            let (queued, grant, client_then) = (Queued::new(self), Arc::clone(grant), Arc::clone(&client));
            client.copier.push(job.frame.batch().priority, move || queued.0.copy(job, &grant, &client_then));
        }
    }

    fn copy(self: &Arc<Self>, job: Job, grant: &OpenGrant, client: &Arc<Client>) {
        let Some(touch) = job.frame.touch(Arc::clone(&client.memcpy)) else { return };
        let result = self.copy_under(grant, &job.frame, client);
        drop(touch);
        match result {
            Err(error @ Error::Disconnected { .. }) => self.give_back(vec![job], &error),
            result => job.finish(result),
        }
    }

    fn copy_under(self: &Arc<Self>, grant: &OpenGrant, frame: &Frame, client: &Client) -> Result<(), Error> {
        let batch = frame.batch();
        let refused = |refusal| Error::Refused { segment: batch.segment, refusal };
        for range in frame.ranges() {
            grant.at(batch.op, range.remote, range.len).map_err(refused)?;
        }
        let control = self.control.get().expect("no grant is open before the owner's welcome");
        let Some(inside) = control.enter(grant.slot, grant.nonce, |slot| self.say(ToOwner::Left { slot })) else {
            self.drop_grant(batch.key, grant);
            return Err(refused(Refusal::UnknownGrant));
        };
        // A dead owner revokes nothing: what is written for it would be lost, and be called a success.
        if self.has_ended.load(Ordering::SeqCst) {
            return Err(self.disconnected("closed"));
        }
        for range in frame.ranges() {
            let (near, far) = (frame.local(range), grant.at(batch.op, range.remote, range.len).map_err(refused)?);
            let (from, to) = match batch.op {
                Op::Read => (far, near),
                Op::Write => (near, far),
            };
            // SAFETY: `near` is registered memory that the touch keeps registered; `far` lies in a mapping that `grant`
            // holds, over a file that can't shrink; nobody holds references into either; `copy` allows overlap.
            unsafe { ptr::copy(from, to, range.len as usize) };
        }
        let (bytes, ops) = (frame.bytes(), frame.ranges().len() as u64);
        inside.note_moved(batch.op, bytes, ops);
        client.counters.client_moved(TransportKind::Shm, batch.op, bytes, ops);
        Ok(())
    }

    /// Forgets a grant that was found revoked.
    fn drop_grant(&self, key: GrantKey, revoked: &OpenGrant) {
        let mut state = self.state();
        let mut grants = self.grants.write().unwrap_or_else(PoisonError::into_inner);
        if grants.get(&key.0).is_some_and(|known| known.nonce == revoked.nonce) {
            grants.remove(&key.0);
            state.cached_ranges -= revoked.ranges();
        }
    }

    /// Ends the connection from this side.
    pub(super) fn close(self: &Arc<Self>, reason: &str) {
        self.end(self.disconnected(reason));
        if let Some(client) = self.client.upgrade() {
            client.unhook(self);
        }
    }

    /// Fails or gives back what waits. Only the first call does anything.
    pub(super) fn end(self: &Arc<Self>, error: Error) {
        let (mut jobs, notices) = {
            let mut state = self.state();
            if state.ended.is_some() {
                return;
            }
            state.ended = Some(error.clone());
            self.has_ended.store(true, Ordering::SeqCst);
            let jobs: Vec<Job> = mem::take(&mut state.opening).into_values().flatten().collect();
            (jobs, mem::take(&mut state.notices))
        };
        tracing::debug!(peer = %self.address, waiting = jobs.len(), %error, "shm connection ended");
        // A notice may have been delivered: said twice would be worse than an error.
        notices.into_values().for_each(|job| job.finish(Err(error.clone())));
        let Some(client) = self.client.upgrade() else {
            return jobs.into_iter().for_each(|job| job.finish(Err(Error::Shutdown)));
        };
        sub_one(&client.counters.open_connections);
        client.forget(self); // first, so that a retry doesn't find this one
        jobs.retain(|job| !job.frame.is_settled());
        client.retry(jobs, &error);
    }

    fn receive_some(self: &Arc<Self>) -> Result<Next, Error> {
        let lost = |error: io::Error| self.disconnected(&error.to_string());
        match self.wire.flush() {
            Err(error) if !is_closed(&error) => return Err(lost(error)),
            _ => {}
        }
        let mut buffer = vec![0; MAX_MESSAGE];
        for _ in 0..TURN {
            let Received { len, fds } = match self.wire.socket.receive(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It closed without having heard all; what it said before is still there, and then comes the end.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
                Err(error) => return Err(lost(error)),
            };
            if len == 0 {
                return Err(self.disconnected("closed by the peer"));
            }
            let malformed = |error: Malformed| self.disconnected(&error.to_string());
            self.hear(ToClient::decode(&buffer[..len]).map_err(malformed)?, &fds)?;
        }
        Ok(Next::Stay)
    }

    fn hear(self: &Arc<Self>, said: ToClient<'_>, fds: &[std::os::fd::OwnedFd]) -> Result<(), Error> {
        let malformed = |error: Malformed| self.disconnected(&error.to_string());
        let mut state = self.state();
        match said {
            ToClient::Welcome { version, verdict } => self.judge(version, verdict, fds)?,
            _ if self.control.get().is_none() => {
                return Err(malformed(Malformed::Unexpected("a word before the welcome")));
            }
            ToClient::Region { base, len, fd_offset, writable } => {
                use std::os::fd::AsFd;
                let fd = fds.first().ok_or_else(|| malformed(Malformed::Unexpected("a region without memory")))?;
                if state.regions.len() >= MAX_REGIONS {
                    return Err(malformed(Malformed::Unexpected("one region more")));
                }
                let mapping = Mapping::new(fd.as_fd(), fd_offset, len, writable).map_err(|unfit| {
                    Error::TransportUnavailable {
                        kind: TransportKind::Shm,
                        reason: format!("the peer's memory: {unfit}"),
                    }
                })?;
                state.regions.insert(base, Arc::new(Remote { base, mapping, writable }));
            }
            ToClient::Gone { base } => {
                state.regions.remove(&base);
                self.sweep(&mut state); // grants over it hold it mapped
            }
            ToClient::Opened { key, nonce, slot, readable, writable } => {
                if slot >= SLOTS || nonce == 0 || state.arriving.is_some() || !state.opening.contains_key(&key.0) {
                    return Err(malformed(Malformed::Unexpected("a grant")));
                }
                state.arriving = Some((key, nonce, slot, Arriving::new(readable, writable)));
            }
            ToClient::Ranges(ranges) => match &mut state.arriving {
                Some((.., arriving)) => arriving.take(&ranges).map_err(malformed)?,
                None => return Err(malformed(Malformed::Unexpected("ranges"))),
            },
            ToClient::Declined { key, why } => {
                let jobs = state.opening.remove(&key.0);
                let jobs = jobs.ok_or_else(|| malformed(Malformed::Unexpected("a refusal")))?;
                self.answered(&mut state);
                drop(state);
                jobs.into_iter().for_each(|job| self.decline(job, why));
                return Ok(());
            }
            ToClient::Noticed { id, result } => {
                let job = state.notices.remove(&id);
                let job = job.ok_or_else(|| malformed(Malformed::Unexpected("an acknowledgement")))?;
                self.answered(&mut state);
                drop(state);
                let segment = job.frame.batch().segment;
                job.finish(result.map_err(|refusal| Error::Refused { segment, refusal }));
                return Ok(());
            }
        }
        self.answered(&mut state);
        if let Some((key, nonce, slot, arriving)) = state.arriving.take_if(|(.., arriving)| arriving.is_complete()) {
            let find = |offset| state.regions.range(..=offset).next_back().map(|(_, region)| Arc::clone(region));
            let grant = Arc::new(arriving.complete(slot, nonce, find).map_err(malformed)?);
            let jobs = state.opening.remove(&key.0).unwrap_or_default();
            self.enter_grant(&mut state, key, &grant);
            self.answered(&mut state);
            drop(state);
            self.copy_all(jobs, &grant);
        }
        Ok(())
    }

    /// The owner has said something: its time to answer what is left begins anew.
    fn answered(&self, state: &mut State) {
        let waits = !state.opening.is_empty() || !state.notices.is_empty();
        state.waiting_since = waits.then(Instant::now);
    }

    fn judge(&self, version: u32, verdict: Verdict, fds: &[std::os::fd::OwnedFd]) -> Result<(), Error> {
        let peer = self.address.clone();
        match (verdict, fds) {
            (Verdict::Welcome, [slots, counts]) if self.control.get().is_none() => {
                let control = ClientControl::new(slots, counts).map_err(|unfit| Error::TransportUnavailable {
                    kind: TransportKind::Shm,
                    reason: format!("the peer's control pages: {unfit}"),
                })?;
                let _ = self.control.set(control); // only this thread does
                Ok(())
            }
            (Verdict::Welcome, _) => Err(self.disconnected("a welcome that is none")),
            (Verdict::Version, _) => Err(Error::Version { peer, ours: PROTOCOL_VERSION, theirs: version }),
            (Verdict::Stale, _) => Err(Error::Stale { segment: self.id.0, peer }),
            (Verdict::Busy, _) => Err(Error::Busy { who: peer, what: "it has all the connections it accepts" }),
            (Verdict::Forbidden, _) => {
                let reason = "it serves no processes of this user: see its shm.allowed_uids";
                Err(unreachable(&peer, io::Error::new(io::ErrorKind::PermissionDenied, reason)))
            }
        }
    }

    /// Remembers an open grant. Those that were revoked meanwhile are forgotten when the list has grown long.
    fn enter_grant(&self, state: &mut State, key: GrantKey, grant: &Arc<OpenGrant>) {
        let crowded = |state: &State| {
            let known = self.grants.read().unwrap_or_else(PoisonError::into_inner).len();
            known >= SLOTS as usize || state.cached_ranges + grant.ranges() > MAX_CACHED_RANGES
        };
        if crowded(state) {
            self.sweep(state);
        }
        // If it is still crowded, this one serves who waits for it now, and is asked for again.
        if !crowded(state) {
            let mut grants = self.grants.write().unwrap_or_else(PoisonError::into_inner);
            state.cached_ranges += grant.ranges();
            if let Some(before) = grants.insert(key.0, Arc::clone(grant)) {
                state.cached_ranges -= before.ranges();
            }
        }
    }

    /// Forgets the grants that have been revoked.
    fn sweep(&self, state: &mut State) {
        let Some(control) = self.control.get() else { return };
        let mut grants = self.grants.write().unwrap_or_else(PoisonError::into_inner);
        grants.retain(|_, known| control.is_open(known.slot, known.nonce));
        state.cached_ranges = grants.values().map(|known| known.ranges()).sum();
    }

    fn decline(&self, job: Job, why: Declined) {
        let error = match why {
            Declined::Refused(refusal) => Error::Refused { segment: job.frame.batch().segment, refusal },
            Declined::Busy => Error::Busy { who: self.address.clone(), what: "no more grants can be opened to us" },
            Declined::NotShared => Error::TransportUnavailable {
                kind: TransportKind::Shm,
                reason: "a region of the grant can't be mapped by others".into(),
            },
        };
        job.finish(Err(error));
    }
}

/// Whether a Unix socket says that its other end is no more.
pub(super) fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Counts a job in the copier's queue, and keeps the socket open until it has been copied.
struct Queued(Arc<Peer>);

impl Queued {
    fn new(peer: &Arc<Peer>) -> Self {
        peer.queued.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(peer))
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::SeqCst);
        self.0.note_use();
    }
}

/// What the poller calls.
pub(super) struct PeerHandler(pub(super) Arc<Peer>);

impl Handler for PeerHandler {
    fn ready(&self) -> Next {
        match self.0.receive_some() {
            Ok(next) => next,
            Err(error) => {
                self.0.end(error);
                Next::Leave
            }
        }
    }

    fn tick(&self, now: Instant) -> Next {
        let Some(client) = self.0.client.upgrade() else { return Next::Leave };
        let waiting = {
            let mut state = self.0.state();
            // Cancelled meanwhile. The question stays: its answer will come.
            state.opening.values_mut().for_each(|jobs| jobs.retain(|job| !job.frame.is_settled()));
            state.waiting_since
        };
        if waiting.is_some_and(|since| now.saturating_duration_since(since) > client.limits.io_timeout) {
            self.0.end(self.0.disconnected("no answer in time"));
            return Next::Leave;
        }
        if client.is_stale(&self.0, now) {
            self.0.end(self.0.disconnected("closed here: idle"));
            return Next::Leave;
        }
        Next::Stay
    }

    fn holds_memory(&self) -> bool {
        false // ours is held by whoever copies
    }

    fn ended(&self) {
        self.0.end(Error::Shutdown);
    }
}
