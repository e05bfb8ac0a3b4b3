//! Frames on one connection: what is handed to UCX, when, and when it is done.
//!
//! ```text
//!  push ─▶ ready (by direction and priority) ── caps allow ──▶ in UCX's hands ── all ranges done ──▶ read: finished
//!               │ settled, refused                             (frame held)                           write: unflushed
//!               ▼                                                                                        │ one flush at
//!            finished                                                              finished ◀────────────┘ a time
//! ```
//!
//! Few operations are outstanding at once: UCX 1.13 emulates puts over tcp, and with many of them under way its
//! throughput falls by ten; and a higher priority overtakes all that has not been handed over. A write is finished only
//! when a flush that was begun after its last put has ended; writes that end meanwhile share the next one.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    rc::Rc,
    sync::Arc,
};

use kvasir_types::{GrantKey, TransportKind};

use super::{
    connection::RemoteRegion,
    driver::{Core, Pending, unavailable},
    endpoint::{Endpoint, Local, Remote},
    messages::OpenId,
    registry::Registered,
};
use crate::{
    batch::{Frame, Held, Op, Priority, Range},
    counters::Counters,
    error::{Error, Refusal},
    grant::Cut,
    transport::Target,
};

/// A frame and where it is to go.
pub(super) struct Work {
    pub(super) frame: Arc<Frame>,
    pub(super) target: Arc<Target>,
    /// Attempts that a lost connection ended.
    pub(super) attempts: u32,
}

impl Work {
    pub(super) fn new(frame: Frame, target: Arc<Target>) -> Self {
        Self { frame: Arc::new(frame), target, attempts: 0 }
    }

    fn key(&self) -> GrantKey {
        self.frame.batch().key
    }
}

/// A frame on its way.
struct Job {
    work: Work,
    /// While its local memory is in UCX's hands.
    held: Option<Held>,
    /// The registrations of its local memory, one a range: they outlive the operations that use them.
    local: Vec<Rc<Registered>>,
    /// Ranges begun.
    next: usize,
    /// Of those, the ones that have not ended.
    outstanding: usize,
    /// Its grant was revoked before all of its ranges were begun.
    revoked: bool,
}

#[derive(Default)]
pub(super) struct Flow {
    jobs: HashMap<u64, Job>,
    ready: [[VecDeque<u64>; Priority::COUNT]; 2],
    outstanding: [usize; 2],
    /// Writes whose puts have ended.
    unflushed: Vec<u64>,
    /// Those that the flush under way covers.
    flushing: Option<Vec<u64>>,
    /// Jobs that have begun, by grant.
    active: HashMap<GrantKey, usize>,
    /// Revoked grants with active jobs.
    revoked: HashMap<GrantKey, OpenId>,
    /// Revoked grants under which nothing is under way.
    left: Vec<OpenId>,
}

fn index(op: Op) -> usize {
    match op {
        Op::Read => 0,
        Op::Write => 1,
    }
}

impl Flow {
    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.is_quiet()
    }

    /// Whether UCX has given back everything.
    pub(super) fn is_quiet(&self) -> bool {
        self.outstanding == [0, 0] && self.flushing.is_none()
    }

    /// Takes a frame whose grant is open.
    pub(super) fn push(&mut self, core: &mut Core, work: Work) {
        let id = core.number();
        let batch = work.frame.batch();
        self.ready[index(batch.op)][batch.priority as usize].push_back(id);
        let job = Job { work, held: None, local: Vec::new(), next: 0, outstanding: 0, revoked: false };
        self.jobs.insert(id, job);
    }

    /// Starts what the caps allow, higher priorities first.
    pub(super) fn pump(
        &mut self,
        core: &mut Core,
        connection: u64,
        endpoint: &Endpoint,
        regions: &BTreeMap<u64, RemoteRegion>,
        check: impl Fn(&Work) -> Result<(), Refusal>,
        cut: impl Fn() -> Arc<dyn Cut>,
    ) {
        for (op, cap) in [(Op::Read, core.limits.max_gets), (Op::Write, core.limits.max_puts)] {
            while self.outstanding[index(op)] < cap {
                let Some(queue) = self.ready[index(op)].iter_mut().rev().find(|queue| !queue.is_empty()) else { break };
                let Some(&id) = queue.front() else { break };
                let Some(job) = self.jobs.get_mut(&id) else {
                    queue.pop_front();
                    continue;
                };
                if job.held.is_none() {
                    if let Err(error) = begin(job, core, regions, &check, &cut) {
                        queue.pop_front();
                        if let Some(job) = self.jobs.remove(&id) {
                            job.work.frame.finish(Err(error));
                        }
                        continue;
                    }
                    *self.active.entry(job.work.key()).or_default() += 1;
                }
                let ranges = job.work.frame.ranges();
                if self.revoked.contains_key(&job.work.key()) {
                    job.revoked = true;
                } else if let Some(range) = ranges.get(job.next) {
                    let token = core.token(Pending::Operation { connection, job: id });
                    start(op, job, range, regions, endpoint, token);
                    job.next += 1;
                    job.outstanding += 1;
                    self.outstanding[index(op)] += 1;
                }
                if job.revoked || job.next == ranges.len() {
                    queue.pop_front();
                    if job.outstanding == 0 {
                        self.ranges_done(&core.owner.counters, id);
                    }
                }
            }
        }
        if self.flushing.is_none() && !self.unflushed.is_empty() {
            self.flushing = Some(std::mem::take(&mut self.unflushed));
            endpoint.flush(core.token(Pending::Flush { connection }));
        }
    }

    /// A put or get has ended. After a failure the connection is lost, and the job is tried again from its beginning.
    pub(super) fn done(&mut self, counters: &Counters, id: u64, failed: bool) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.outstanding -= 1;
        self.outstanding[index(job.work.frame.batch().op)] -= 1;
        let all_begun = job.revoked || job.next == job.work.frame.ranges().len();
        if !failed && all_begun && job.outstanding == 0 {
            self.ranges_done(counters, id);
        }
    }

    fn ranges_done(&mut self, counters: &Counters, id: u64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match job.work.frame.batch().op {
            Op::Read => self.finish(counters, id),
            Op::Write => {
                job.held = None; // UCX is done with the local bytes
                self.unflushed.push(id);
            }
        }
    }

    /// The flush has ended.
    pub(super) fn flushed(&mut self, counters: &Counters, well: bool) {
        let covered = self.flushing.take().unwrap_or_default();
        if well {
            covered.into_iter().for_each(|id| self.finish(counters, id));
        }
    }

    fn finish(&mut self, counters: &Counters, id: u64) {
        let Some(Job { work, held, revoked, .. }) = self.jobs.remove(&id) else { return };
        let (frame, key) = (&work.frame, work.key());
        let batch = frame.batch();
        if revoked {
            frame.finish(Err(Error::Refused { segment: batch.segment, refusal: Refusal::UnknownGrant }));
        } else {
            counters.client_moved(TransportKind::Ucx, batch.op, frame.bytes(), frame.ranges().len() as u64);
            frame.finish(Ok(()));
        }
        drop(held);
        if let Some(count) = self.active.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.active.remove(&key);
                self.left.extend(self.revoked.remove(&key));
            }
        }
    }

    /// A grant is revoked: nothing more is begun under it.
    pub(super) fn revoke(&mut self, grant: OpenId, key: GrantKey) {
        if self.active.contains_key(&key) {
            self.revoked.insert(key, grant);
        } else {
            self.left.push(grant);
        }
    }

    /// Revoked grants under which nothing of ours can land any more, once each.
    pub(super) fn take_left(&mut self) -> Vec<OpenId> {
        std::mem::take(&mut self.left)
    }

    /// What is left of it when its connection has been closed, in the order of submission.
    pub(super) fn into_work(self) -> Vec<Work> {
        debug_assert!(self.is_quiet());
        let mut jobs: Vec<_> = self.jobs.into_iter().collect();
        jobs.sort_unstable_by_key(|(id, _)| *id);
        jobs.into_iter().map(|(_, Job { work, .. })| work).collect()
    }
}

/// Checks a frame against its grant and takes hold of its local memory.
fn begin(
    job: &mut Job,
    core: &mut Core,
    regions: &BTreeMap<u64, RemoteRegion>,
    check: &impl Fn(&Work) -> Result<(), Refusal>,
    cut: &impl Fn() -> Arc<dyn Cut>,
) -> Result<(), Error> {
    let frame = &job.work.frame;
    let refused = |refusal| Error::Refused { segment: frame.batch().segment, refusal };
    check(&job.work).map_err(refused)?;
    let mut local: Vec<Rc<Registered>> = Vec::with_capacity(frame.ranges().len());
    for range in frame.ranges() {
        // Granted ranges lie in regions; an owner that says otherwise is not believed.
        find(regions, range).ok_or_else(|| refused(Refusal::Bounds))?;
        let registered = core.registry.get(&core.worker, frame.region(range));
        local.push(registered.map_err(|status| unavailable(format!("memory cannot be registered: {status}")))?);
    }
    job.local = local;
    // Nobody waits for a settled frame, so it does not matter what it fails with.
    job.held = Some(frame.hold(cut()).ok_or(Error::Cancelled)?);
    Ok(())
}

fn find<'a>(regions: &'a BTreeMap<u64, RemoteRegion>, range: &Range) -> Option<(&'a RemoteRegion, u64)> {
    let (base, region) = regions.range(..=range.remote).next_back()?;
    let from = range.remote - base;
    (from.checked_add(range.len)? <= region.len).then_some((region, from))
}

fn start(op: Op, job: &Job, range: &Range, regions: &BTreeMap<u64, RemoteRegion>, endpoint: &Endpoint, token: u64) {
    let (region, from) = find(regions, range).expect("found when the job began; regions are not forgotten");
    let local =
        Local { address: job.work.frame.local(range), len: range.len as usize, memory: &job.local[job.next].memory };
    let remote = Remote { address: region.address + from, key: &region.key };
    match op {
        // SAFETY: the bytes lie in their registered region, which the frame's batch keeps in use; the job holds the
        // frame until every operation of it has ended.
        Op::Read => unsafe { endpoint.get(local, remote, token) },
        // SAFETY: as above.
        Op::Write => unsafe { endpoint.put(local, remote, token) },
    }
}
