//! The owner's side: greets peers, lets them open grants, and sees them out.
//!
//! ```text
//! conn request ─▶ accepted ── hello ──▶ greeted ── open ──▶ has opened grants
//!                    │                     │                   │ revoked: told; InFlight kept
//!                    │ bad or late hello   │                   │ left: InFlight dropped
//!                    ▼                     ▼                   ▼ cut after the grace, failed, malformed
//!                 closing ◀────────────────┴───────────────────┘
//!                    │ close done: every InFlight kept for this peer is dropped
//!                    ▼
//!                   gone
//! ```

use std::{
    collections::HashMap,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use kvasir_types::{GrantKey, PROTOCOL_VERSION, TransportKind};

use super::{
    courier::append,
    driver::{Core, Pending, Side},
    endpoint::Endpoint,
    mailbox::{Command, Mailbox},
    messages::{
        MAX_GRANT_RANGES, MAX_GRANT_REGIONS, MAX_KEY, Message, OpenId, PIECE_HEAD, RANGES_PER_MESSAGE, RequestId, Span,
        Verdict,
    },
    worker::{Incoming, Listener, Status},
};
use crate::{
    batch::Op,
    counters::{add_one, sub_one},
    error::Refusal,
    grant::{Bytes, Cut, InFlight, Opened, Opener},
};

/// Most grants that one peer may have open at once: bounds what it can make us remember.
const MAX_OPEN: usize = 64 << 10;

/// Most bytes of answers that one peer has not taken yet: beyond it, it is not an engine of ours that reads what it
/// asked for, and is disconnected. Ours have at most [`super::courier::MAX_WINDOW`] pieces under way each way.
const MAX_UNTAKEN: usize = 16 << 20;

/// The peers that are connected to us.
#[derive(Default)]
pub(super) struct Server {
    peers: HashMap<u64, Peer>,
    next_open: u64,
}

struct Peer {
    /// `None` once it is being closed.
    endpoint: Option<Endpoint>,
    stage: Stage,
    /// When it came to that stage.
    since: Instant,
    /// Bytes of answers that UCX has not got rid of yet.
    untaken: usize,
    fence: Arc<Fence>,
    /// The grants it has opened; with what is kept in flight once they are revoked.
    open: HashMap<OpenId, Option<InFlight>>,
}

impl Peer {
    fn send(&mut self, core: &mut Core, message: &Message<'_>) {
        let mut bytes = Vec::with_capacity(64);
        message.encode(&mut bytes);
        self.send_bytes(core, bytes);
    }

    fn send_bytes(&mut self, core: &mut Core, message: Vec<u8>) {
        let Some(endpoint) = &self.endpoint else { return };
        self.untaken += message.len();
        let token = core.token(Pending::Answer { peer: self.fence.peer, bytes: message.len() });
        endpoint.send_tracked(message, token);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Accepted,
    /// Told to go; it closes, or the tick does.
    Refused,
    Greeted,
}

/// How a peer is kept away from our memory.
struct Fence {
    peer: u64,
    mailbox: Arc<Mailbox>,
    /// Whether closing its endpoint does that.
    by_close: bool,
    cut: AtomicBool,
}

impl Fence {
    fn cut(&self) -> bool {
        if !self.by_close {
            tracing::warn!(
                peer = self.peer,
                "ucx: a peer over shared memory has not left a revoked grant; its ranges stay reserved until it does or dies"
            );
            return false;
        }
        let first = !self.cut.swap(true, SeqCst);
        if first {
            self.mailbox.send(Command::CutPeer { peer: self.peer });
        }
        first
    }
}

/// One grant opened by one peer.
struct PeerOpening {
    fence: Arc<Fence>,
    grant: OpenId,
}

impl Cut for PeerOpening {
    fn cut(&self) -> bool {
        self.fence.cut()
    }
}

impl Opener for PeerOpening {
    fn revoked(&self, _: GrantKey, in_flight: InFlight) {
        let Fence { peer, mailbox, .. } = &*self.fence;
        mailbox.send(Command::Revoked { peer: *peer, grant: self.grant, in_flight });
    }
}

impl Server {
    pub(super) fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// Whether the tick has something to look after.
    pub(super) fn is_busy(&self) -> bool {
        self.peers.values().any(|peer| peer.stage != Stage::Greeted)
    }

    pub(super) fn accept(&mut self, core: &mut Core, listener: &Listener, incoming: Incoming) {
        if self.peers.len() >= core.limits.max_accepted {
            add_one(&core.owner.counters.busy);
            return listener.reject(incoming);
        }
        let id = core.number();
        let endpoint = match Endpoint::accept(&core.worker, incoming, id) {
            Ok(endpoint) => endpoint,
            Err(status) => return tracing::debug!(%status, "ucx: a connection could not be accepted"),
        };
        core.endpoints.insert(endpoint.id(), Side::Server(id));
        add_one(&core.owner.counters.accepted_connections);
        let (mailbox, by_close) = (Arc::clone(&core.mailbox), core.limits.close_fences);
        let peer = Peer {
            endpoint: Some(endpoint),
            stage: Stage::Accepted,
            since: Instant::now(),
            untaken: 0,
            fence: Arc::new(Fence { peer: id, mailbox, by_close, cut: AtomicBool::new(false) }),
            open: HashMap::new(),
        };
        self.peers.insert(id, peer);
    }

    /// Takes a peer's message; whether it was one that a peer may send now.
    pub(super) fn receive(&mut self, core: &mut Core, id: u64, message: Message<'_>) -> bool {
        let Some(peer) = self.peers.get_mut(&id) else { return true };
        if peer.endpoint.is_none() {
            return true;
        }
        if peer.untaken > MAX_UNTAKEN {
            tracing::warn!(bytes = peer.untaken, "ucx: closed a connection that takes no answers");
            return false;
        }
        match (message, peer.stage) {
            (Message::Hello { version, segment, incarnation }, Stage::Accepted) => {
                let counters = &core.owner.counters;
                let verdict = if version != PROTOCOL_VERSION {
                    add_one(&counters.version);
                    Verdict::Version
                } else if (segment, incarnation) != (core.owner.segment, core.owner.incarnation) {
                    add_one(&counters.stale);
                    Verdict::Stale
                } else {
                    Verdict::Welcome
                };
                peer.stage = if verdict == Verdict::Welcome { Stage::Greeted } else { Stage::Refused };
                let rma = core.limits.rma;
                peer.send(core, &Message::Welcome { version: PROTOCOL_VERSION, verdict, rma });
            }
            (Message::Write { request, key, spans, bytes }, Stage::Greeted) => {
                let answer = match write(core, key, &spans, bytes) {
                    Ok(()) => Message::Wrote { request },
                    Err(refusal) => {
                        if refusal != Refusal::UnknownGrant {
                            tracing::warn!(%refusal, "ucx: a peer wrote what was not granted; nothing more is taken from it");
                            (peer.stage, peer.since) = (Stage::Refused, Instant::now());
                        }
                        Message::Refused { request, refusal }
                    }
                };
                peer.send(core, &answer);
            }
            (Message::Read { request, key, spans }, Stage::Greeted) => match read(core, request, key, &spans) {
                Ok(message) => peer.send_bytes(core, message),
                Err(refusal) => peer.send(core, &Message::Refused { request, refusal }),
            },
            (Message::Open { request, key }, Stage::Greeted) if core.limits.rma => {
                self.next_open += 1;
                open(core, peer, request, (key, OpenId(self.next_open)));
            }
            (Message::Left { grant }, Stage::Greeted) => match peer.open.remove(&grant) {
                Some(Some(in_flight)) => drop(in_flight),
                // Nobody has told it to leave, or it never was there.
                Some(None) | None => return false,
            },
            (Message::Notice { request, key, bytes }, Stage::Greeted) => {
                let result = core.owner.deliver(key, bytes);
                peer.send(core, &Message::Noticed { request, result });
            }
            (_, Stage::Refused) => {}
            _ => return false,
        }
        true
    }

    /// UCX has got rid of an answer.
    pub(super) fn taken(&mut self, id: u64, bytes: usize) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.untaken -= bytes;
        }
    }

    /// A grant that this peer has opened is revoked.
    pub(super) fn revoked(&mut self, core: &mut Core, id: u64, grant: OpenId, in_flight: InFlight) {
        // Not connected any more, or never told of it: it can't touch anything.
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let Some(kept) = peer.open.get_mut(&grant) else { return };
        *kept = Some(in_flight);
        peer.send(core, &Message::Revoke { grant });
    }

    /// Closes a peer's endpoint by force.
    pub(super) fn cut(&mut self, core: &mut Core, id: u64) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let Some(endpoint) = peer.endpoint.take() else { return };
        core.endpoints.remove(&endpoint.id());
        endpoint.close(core.token(Pending::ClosePeer { peer: id }));
    }

    pub(super) fn failed(&mut self, core: &mut Core, id: u64, status: Status) {
        if self.peers.contains_key(&id) {
            tracing::debug!(peer = id, %status, "ucx: connection of a peer ended");
            self.cut(core, id);
        }
    }

    /// A peer's endpoint is closed: nothing can come over it any more.
    pub(super) fn closed(&mut self, core: &mut Core, id: u64) {
        if let Some(peer) = self.peers.remove(&id) {
            sub_one(&core.owner.counters.accepted_connections);
            drop(peer); // and with it every operation that was kept in flight
        }
    }

    /// Sees out who has not said hello, or stays after having been refused.
    pub(super) fn tick(&mut self, core: &mut Core, now: Instant) {
        let limit: Duration = core.limits.io_timeout;
        let late = |peer: &Peer| peer.stage != Stage::Greeted && now.duration_since(peer.since) >= limit;
        let late: Vec<u64> = self.peers.iter().filter(|(_, peer)| late(peer)).map(|(&id, _)| id).collect();
        late.into_iter().for_each(|id| self.cut(core, id));
    }

    /// What is kept in flight for peers, for who sees that they are gone.
    pub(super) fn take_in_flight(&mut self) -> Vec<InFlight> {
        self.peers.values_mut().flat_map(|peer| std::mem::take(&mut peer.open).into_values().flatten()).collect()
    }

    pub(super) fn close_all(&mut self, core: &mut Core) {
        let ids: Vec<u64> = self.peers.keys().copied().collect();
        ids.into_iter().for_each(|id| self.cut(core, id));
    }
}

/// A copy on this thread: there is nothing to stop.
struct Copying;

impl Cut for Copying {
    fn cut(&self) -> bool {
        false
    }
}

fn enter(core: &Core, key: GrantKey, op: Op, spans: &[Span]) -> Result<InFlight, Refusal> {
    let ranges = spans.iter().map(|span| (span.offset, u64::from(span.len)));
    core.owner.grants.enter(key, op, ranges, Arc::new(Copying))
}

/// Takes a peer's bytes in.
fn write(core: &Core, key: GrantKey, spans: &[Span], bytes: &[u8]) -> Result<(), Refusal> {
    let in_flight = enter(core, key, Op::Write, spans)?;
    let mut rest = bytes;
    for span in spans {
        let (part, more) = rest.split_at(span.len as usize); // the decoder has seen to the sum
        // SAFETY: granted, in a region that `in_flight` keeps in use; nobody holds references into registered memory.
        unsafe { ptr::copy_nonoverlapping(part.as_ptr(), in_flight.at(span.offset, span.len.into()), part.len()) };
        rest = more;
    }
    drop(in_flight);
    core.owner.counters.owner_moved(TransportKind::Ucx, Op::Write, bytes.len() as u64, spans.len() as u64);
    Ok(())
}

/// The message with the bytes that a peer asks for.
fn read(core: &Core, request: RequestId, key: GrantKey, spans: &[Span]) -> Result<Vec<u8>, Refusal> {
    let in_flight = enter(core, key, Op::Read, spans)?;
    let payload: usize = spans.iter().map(|span| span.len as usize).sum(); // the decoder has bounded it
    let mut message = Vec::with_capacity(PIECE_HEAD + payload);
    Message::Data { request, bytes: &[] }.encode(&mut message);
    for span in spans {
        // SAFETY: granted, in a region that `in_flight` keeps in use.
        unsafe { append(&mut message, in_flight.at(span.offset, span.len.into()), span.len as usize) };
    }
    drop(in_flight);
    core.owner.counters.owner_moved(TransportKind::Ucx, Op::Read, payload as u64, spans.len() as u64);
    Ok(message)
}

/// Opens a grant for a peer and tells it all it needs.
fn open(core: &mut Core, peer: &mut Peer, request: RequestId, (key, grant): (GrantKey, OpenId)) {
    if peer.open.len() >= MAX_OPEN {
        return peer.send(core, &Message::Unable { request });
    }
    let opening = Arc::new(PeerOpening { fence: Arc::clone(&peer.fence), grant });
    let opened = match core.owner.grants.open_remote(key, opening) {
        Ok(opened) => opened,
        Err(refusal) => return peer.send(core, &Message::Refused { request, refusal }),
    };
    if let Err(reason) = describe(core, peer, request, grant, &opened) {
        tracing::warn!(reason, "ucx: a grant cannot be opened over this transport");
        return peer.send(core, &Message::Unable { request });
    }
    peer.open.insert(grant, None);
}

fn describe(
    core: &mut Core,
    peer: &mut Peer,
    request: RequestId,
    grant: OpenId,
    opened: &Opened,
) -> Result<(), String> {
    let Opened { readable, writable, regions } = opened;
    if readable.len() > MAX_GRANT_RANGES || writable.len() > MAX_GRANT_RANGES || regions.len() > MAX_GRANT_REGIONS {
        return Err(format!("{} ranges in {} regions", readable.len() + writable.len(), regions.len()));
    }
    // All registrations first: nothing is told of a grant of which a part can't be reached.
    let registered: Vec<_> = regions
        .iter()
        .map(|region| Ok((region, core.registry.get(&core.worker, region)?)))
        .collect::<Result<_, Status>>()
        .map_err(|status| format!("memory cannot be registered: {status}"))?;
    if let Some((_, long)) = registered.iter().find(|(_, registered)| registered.key.len() > MAX_KEY) {
        return Err(format!("a remote key of {} bytes", long.key.len()));
    }
    let (readable_count, writable_count) = (readable.len() as u32, writable.len() as u32);
    let count = regions.len() as u16;
    let head = Message::Opened { request, grant, readable: readable_count, writable: writable_count, regions: count };
    peer.send(core, &head);
    for (index, (region, registered)) in registered.iter().enumerate() {
        let (base, len) = (region.base, region.len);
        let (index, address) = (index as u16, region.at(base, len).addr() as u64);
        peer.send(core, &Message::Region { request, index, base, len, address, key: &registered.key });
    }
    send_ranges(core, peer, request, false, readable);
    send_ranges(core, peer, request, true, writable);
    Ok(())
}

fn send_ranges(core: &mut Core, peer: &mut Peer, request: RequestId, writable: bool, ranges: &[Bytes]) {
    for (index, run) in ranges.chunks(RANGES_PER_MESSAGE).enumerate() {
        let first = (index * RANGES_PER_MESSAGE) as u32;
        peer.send(core, &Message::Ranges { request, writable, first, ranges: run.to_vec() });
    }
}
