//! One connection to a peer, seen from the submitting side: the grants opened over it, what was asked and is not answered
//! yet, and the frames on their way.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Instant,
};

use kvasir_types::{GrantKey, Incarnation, SegmentId};

use super::{
    courier::Courier,
    driver::Core,
    endpoint::{Endpoint, RemoteKey},
    flow::{Flow, Work},
    mailbox::{Command, Mailbox},
    messages::{Message, OpenId, RequestId},
    opening::{OpenGrant, Opening},
};
use crate::{
    error::{Error, Refusal},
    grant::Cut,
};

/// Most regions of one peer that are remembered: far beyond what a process registers.
const MAX_REGIONS: usize = 4096;

/// Who is at the other end: a restarted peer at the same address is another one.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct PeerKey {
    pub(super) address: String,
    pub(super) segment: SegmentId,
    pub(super) incarnation: Incarnation,
}

/// A peer's region, reachable through one connection.
pub(super) struct RemoteRegion {
    pub(super) len: u64,
    pub(super) address: u64,
    pub(super) key: RemoteKey,
}

pub(super) enum Phase {
    Resolving,
    Greeting,
    Ready,
    /// Its endpoint is being closed, or never was made; what becomes of its frames.
    Closing(Error),
}

/// A grant of the peer's.
pub(super) enum PeerGrant {
    Opening { opening: Opening, waiting: Vec<Work> },
    Open(OpenGrant),
}

/// What the peer owes us an answer to.
pub(super) enum Request {
    Open(GrantKey),
    Notice(Work),
}

pub(super) struct Connection {
    pub(super) peer: PeerKey,
    pub(super) phase: Phase,
    pub(super) endpoint: Option<Endpoint>,
    pub(super) close_pending: bool,
    pub(super) cut: Arc<ConnectionCut>,
    /// Frames that wait for the welcome.
    pub(super) early: Vec<Work>,
    pub(super) grants: HashMap<GrantKey, PeerGrant>,
    pub(super) keys: HashMap<OpenId, GrantKey>,
    /// Revoked before we heard that they were opened.
    pub(super) revoked_early: Vec<OpenId>,
    pub(super) requests: HashMap<RequestId, Request>,
    /// By their base.
    pub(super) regions: BTreeMap<u64, RemoteRegion>,
    /// How frames travel by RMA, if the owner allows that.
    pub(super) flow: Flow,
    pub(super) rma: bool,
    /// How they travel otherwise.
    pub(super) courier: Courier,
    pub(super) last_progress: Instant,
}

/// Takes local memory back from a connection by closing it.
pub(super) struct ConnectionCut {
    connection: u64,
    mailbox: Arc<Mailbox>,
    cut: AtomicBool,
}

impl Cut for ConnectionCut {
    fn cut(&self) -> bool {
        let first = !self.cut.swap(true, SeqCst);
        if first {
            self.mailbox.send(Command::CutClient { connection: self.connection });
        }
        first
    }
}

impl Connection {
    pub(super) fn new(peer: PeerKey, id: u64, mailbox: Arc<Mailbox>) -> Self {
        Self {
            peer,
            phase: Phase::Resolving,
            endpoint: None,
            close_pending: false,
            cut: Arc::new(ConnectionCut { connection: id, mailbox, cut: AtomicBool::new(false) }),
            early: Vec::new(),
            grants: HashMap::new(),
            keys: HashMap::new(),
            revoked_early: Vec::new(),
            requests: HashMap::new(),
            regions: BTreeMap::new(),
            flow: Flow::default(),
            rma: false,
            courier: Courier::default(),
            last_progress: Instant::now(),
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.early.is_empty() && self.requests.is_empty() && self.flow.is_idle() && self.courier.is_idle()
    }

    pub(super) fn disconnected(&self, reason: impl Into<Arc<str>>) -> Error {
        Error::Disconnected { peer: self.peer.address.clone(), reason: reason.into() }
    }
}

/// Sends a notice, or sees that the frame's grant is open and hands it to the flow.
pub(super) fn route(core: &mut Core, connection: &mut Connection, work: Work) {
    let Some(endpoint) = &connection.endpoint else { return }; // dropped, it fails
    if work.frame.is_settled() {
        return;
    }
    let key = work.frame.batch().key;
    if let Some(bytes) = work.frame.notice() {
        let request = RequestId(core.number());
        core.send(endpoint, &Message::Notice { request, key, bytes });
        connection.requests.insert(request, Request::Notice(work));
        return;
    }
    if !connection.rma {
        return connection.courier.push(core, work);
    }
    match connection.grants.get_mut(&key) {
        Some(PeerGrant::Open(_)) => connection.flow.push(core, work),
        Some(PeerGrant::Opening { waiting, .. }) => waiting.push(work),
        None => {
            let request = RequestId(core.number());
            core.send(endpoint, &Message::Open { request, key });
            connection.requests.insert(request, Request::Open(key));
            let opening = PeerGrant::Opening { opening: Opening::default(), waiting: vec![work] };
            connection.grants.insert(key, opening);
        }
    }
}

/// Takes an answer, or a revocation; `None` if it answers nothing that was asked.
pub(super) fn answer(core: &mut Core, connection: &mut Connection, message: Message<'_>) -> Option<()> {
    match message {
        Message::Opened { request, grant, readable, writable, regions } => {
            let (key, opening) = opening_of(connection, request)?;
            opening.announce(grant, (readable, writable), regions).ok()?;
            open_if_complete(core, connection, request, key)
        }
        Message::Ranges { request, writable, first, ranges } => {
            let (key, opening) = opening_of(connection, request)?;
            opening.add_ranges(writable, first, ranges).ok()?;
            open_if_complete(core, connection, request, key)
        }
        Message::Region { request, index, base, len, address, key: packed } => {
            let (key, opening) = opening_of(connection, request)?;
            opening.add_region(index).ok()?;
            if !connection.regions.contains_key(&base) {
                if connection.regions.len() >= MAX_REGIONS {
                    return None;
                }
                let remote_key = RemoteKey::unpack(connection.endpoint.as_ref()?, packed).ok()?;
                connection.regions.insert(base, RemoteRegion { len, address, key: remote_key });
            }
            open_if_complete(core, connection, request, key)
        }
        Message::Wrote { request } => connection.courier.wrote(&core.owner.counters, request),
        Message::Data { request, bytes } => connection.courier.data(&core.owner.counters, request, bytes),
        Message::Unable { request } => {
            let reason = "the owner's libucp cannot offer this memory".into();
            fail_opening(connection, request, &super::driver::unavailable(reason))
        }
        Message::Revoke { grant } => {
            match connection.keys.remove(&grant) {
                Some(key) => {
                    connection.grants.remove(&key);
                    connection.flow.revoke(grant, key);
                    send_lefts(core, connection);
                }
                // On its way to us still; nothing was done under it.
                None => connection.revoked_early.push(grant),
            }
            // What is revoked before it was opened is bounded by what is being opened.
            (connection.revoked_early.len() <= connection.requests.len()).then_some(())
        }
        Message::Noticed { request, result } => {
            let Some(Request::Notice(work)) = connection.requests.remove(&request) else { return None };
            let segment = connection.peer.segment;
            work.frame.finish(result.map_err(|refusal| Error::Refused { segment, refusal }));
            Some(())
        }
        Message::Hello { .. }
        | Message::Welcome { .. }
        | Message::Refused { .. }
        | Message::Write { .. }
        | Message::Read { .. }
        | Message::Open { .. }
        | Message::Left { .. }
        | Message::Notice { .. } => None,
    }
}

fn opening_of(connection: &mut Connection, request: RequestId) -> Option<(GrantKey, &mut Opening)> {
    let Some(&Request::Open(key)) = connection.requests.get(&request) else { return None };
    match connection.grants.get_mut(&key)? {
        PeerGrant::Opening { opening, .. } => Some((key, opening)),
        PeerGrant::Open(_) => None,
    }
}

/// Once all parts of an opened grant are there: its frames may go.
fn open_if_complete(core: &mut Core, connection: &mut Connection, request: RequestId, key: GrantKey) -> Option<()> {
    let Some(PeerGrant::Opening { opening, .. }) = connection.grants.get(&key) else { return None };
    if !opening.is_complete() {
        return Some(());
    }
    connection.requests.remove(&request);
    let Some(PeerGrant::Opening { opening, waiting }) = connection.grants.remove(&key) else { return None };
    let Ok(grant) = opening.finish() else {
        connection.early.extend(waiting); // to be tried again when the connection is closed
        return None;
    };
    if let Some(at) = connection.revoked_early.iter().position(|&revoked| revoked == grant.id) {
        connection.revoked_early.swap_remove(at);
        core.send(connection.endpoint.as_ref()?, &Message::Left { grant: grant.id });
        let refused = Error::Refused { segment: connection.peer.segment, refusal: Refusal::UnknownGrant };
        waiting.into_iter().for_each(|work| work.frame.finish(Err(refused.clone())));
        return Some(());
    }
    connection.keys.insert(grant.id, key);
    connection.grants.insert(key, PeerGrant::Open(grant));
    waiting.into_iter().for_each(|work| connection.flow.push(core, work));
    Some(())
}

pub(super) fn fail_opening(connection: &mut Connection, request: RequestId, error: &Error) -> Option<()> {
    let Some(Request::Open(key)) = connection.requests.remove(&request) else { return None };
    let Some(PeerGrant::Opening { waiting, .. }) = connection.grants.remove(&key) else { return None };
    waiting.into_iter().for_each(|work| work.frame.finish(Err(error.clone())));
    Some(())
}

/// Answers revocations under which nothing is under way any more.
pub(super) fn send_lefts(core: &mut Core, connection: &mut Connection) {
    let Some(endpoint) = &connection.endpoint else { return };
    for grant in connection.flow.take_left() {
        core.send(endpoint, &Message::Left { grant });
    }
}
