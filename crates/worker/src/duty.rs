//! What a worker works as: prefill or decode, changed while it runs.
//!
//! ```text
//!   planner, person ──SetDuty──▶ Duties ─▶ the member's record (etcd) ─▶ routers: other requests come
//!                                   └────▶ Duty: what this worker says of itself
//! ```
//!
//! A worker takes both kinds of work at any time: what changes is what it is offered for. So nothing is dropped when it is
//! moved: answers under way go on to their end, prompts that were sent before routers heard of it are computed, and
//! blocks in its cache stay.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use kvasir_cluster::{Event, EventKind, Member, Registry};
use kvasir_proto::{check_protocol, v1};
use kvasir_rpc::operator::Operator;
use kvasir_types::{Role, Stage};
use tokio::sync::Mutex;
use tonic::Status;

use crate::{error::Error, host::Host};

/// Most bytes of a reason.
const MAX_REASON: usize = 1024;

/// What it works as. Written by [`Duties`]; read by everybody.
#[derive(Debug)]
pub(crate) struct Duty {
    decode: AtomicBool,
    pinned: AtomicBool,
}

impl Duty {
    /// To begin with.
    pub(crate) fn new(role: Role, pinned: bool) -> Self {
        Self { decode: AtomicBool::new(role == Role::Decode), pinned: AtomicBool::new(pinned) }
    }

    /// Prefill or decode.
    pub(crate) fn role(&self) -> Role {
        if self.decode.load(Relaxed) { Role::Decode } else { Role::Prefill }
    }

    /// Only a person may change it.
    pub(crate) fn pinned(&self) -> bool {
        self.pinned.load(Relaxed)
    }
}

/// Changes what a worker works as.
pub(crate) struct Duties {
    pub(crate) host: Arc<Host>,
    registry: Arc<dyn Registry>,
    /// Held while a change is published, so that two do not cross.
    pub(crate) now: Mutex<Now>,
}

/// What is published.
pub(crate) struct Now {
    /// The record.
    pub(crate) member: Member,
    /// The latest planner's term of office that was heard of.
    term: u64,
}

impl Now {
    /// Whether this life of the worker is meant; 0: any.
    pub(crate) fn is_life(&self, incarnation: u64) -> Result<(), Status> {
        let ours = self.member.incarnation;
        if incarnation == 0 || incarnation == ours.0 {
            return Ok(());
        }
        Err(Status::failed_precondition(format!("this is life {ours}, not {incarnation:016x}")))
    }
}

/// Whether a reason can be logged.
pub(crate) fn check_reason(reason: &str) -> Result<(), Status> {
    if reason.len() <= MAX_REASON && !reason.chars().any(char::is_control) {
        return Ok(());
    }
    Err(Status::invalid_argument(format!("reason: allowed are up to {MAX_REASON} bytes without control characters")))
}

/// A change that was asked for.
struct Wanted {
    role: Option<Role>,
    pinned: Option<bool>,
    term: u64,
    reason: String,
}

impl Wanted {
    fn read(request: v1::SetDutyRequest) -> Result<Self, Status> {
        let role = match request.role.as_str() {
            "" => None,
            "prefill" => Some(Role::Prefill),
            "decode" => Some(Role::Decode),
            _ => return Err(Status::invalid_argument("role: allowed are prefill, decode and nothing")),
        };
        let pinned = match v1::Pin::try_from(request.pin) {
            Ok(v1::Pin::Unspecified) => None,
            Ok(v1::Pin::Set) => Some(true),
            Ok(v1::Pin::Clear) => Some(false),
            Err(_) => return Err(Status::invalid_argument("pin: not a value that this version knows")),
        };
        check_reason(&request.reason)?;
        if request.term > 0 && pinned.is_some() {
            return Err(Status::invalid_argument("pin: for people, not for planners (term is above 0)"));
        }
        Ok(Self { role, pinned, term: request.term, reason: request.reason })
    }
}

impl Duties {
    /// Of a worker with this record.
    pub(crate) fn new(host: Arc<Host>, member: Member, registry: Arc<dyn Registry>) -> Self {
        Self { host, registry, now: Mutex::new(Now { member, term: 0 }) }
    }

    /// Does what is asked, or says why not. Asking for what is so already is fine.
    pub(crate) async fn set(&self, request: v1::SetDutyRequest, who: Operator) -> Result<v1::SetDutyResponse, Status> {
        check_protocol(request.protocol_version).map_err(|error| Error::from(error).to_status())?;
        let incarnation = request.incarnation;
        let wanted = Wanted::read(request)?;
        let mut now = self.now.lock().await;
        now.is_life(incarnation)?;
        if self.host.ending() {
            return Err(Status::failed_precondition("this worker's process is ending"));
        }
        let stage = now.member.duty.stage;
        let out_of_service = if wanted.term > 0 { !stage.serves() } else { stage >= Stage::Draining };
        if out_of_service && (wanted.term > 0 || wanted.role.is_some()) {
            return Err(Status::failed_precondition(format!("this worker is {stage}: undrain it first")));
        }
        if wanted.term > 0 && wanted.term < now.term {
            return Err(Status::failed_precondition(format!(
                "term {} is over, this worker has heard from a planner of term {}",
                wanted.term, now.term
            )));
        }
        if wanted.term > 0 && now.member.duty.pinned {
            return Err(Status::failed_precondition("this worker is pinned to its role"));
        }
        now.term = now.term.max(wanted.term);
        let former = now.member.works_as();
        let mut member = now.member.clone();
        let to = wanted.role.unwrap_or(former);
        member.duty.moved_to = (to != member.role).then_some(to);
        member.duty.pinned = wanted.pinned.unwrap_or(member.duty.pinned);
        if member.duty != now.member.duty {
            self.announce(&mut now, member).await?;
            tracing::info!(
                worker = %now.member.id,
                works_as = %to,
                before = %former,
                pinned = now.member.duty.pinned,
                term = wanted.term,
                reason = wanted.reason,
                "another duty"
            );
            let pinned = if now.member.duty.pinned { ", pinned" } else { "" };
            let who = if wanted.term > 0 { format!("the planner, term {}", wanted.term) } else { who.to_string() };
            let what = format!("works as {to}{pinned} (before: {former}): {}", wanted.reason);
            self.note(EventKind::Role, what, who);
            let duty = &self.host.duty;
            duty.decode.store(to == Role::Decode, Relaxed);
            duty.pinned.store(now.member.duty.pinned, Relaxed);
            self.host.metrics.works_as(to);
            if to != former {
                self.host.metrics.moved();
            }
        }
        Ok(v1::SetDutyResponse {
            role: to.to_string(),
            pinned: now.member.duty.pinned,
            former_role: former.to_string(),
        })
    }

    /// Something happened to this worker.
    pub(crate) fn note(&self, kind: EventKind, what: String, who: String) {
        let id = &self.host.id;
        self.registry.note(Event::now(kind, id, id.as_str(), what).by(who));
    }

    /// Publishes a record. If the metadata is away that is done once it is back, and until then others send what they sent
    /// before.
    pub(crate) async fn announce(&self, now: &mut Now, member: Member) -> Result<(), Status> {
        let announced = self.registry.update(member.clone()).await;
        announced
            .map_err(|error| Status::unavailable(format!("this worker is not announced yet, try again: {error}")))?;
        now.member = member;
        Ok(())
    }
}
