//! Grants: who may touch which bytes of our memory, until we say stop.
//!
//! The owner of an arena opens ranges of it to whoever holds a random key, and takes them back. Taking back is the fence
//! on which block reuse rests:
//!
//! ```text
//!           enter(key, ranges): all checked, then counted in          revoke: key gone, nobody enters any more
//! open ──────────────────────────────────────────────────▶ in flight ─────────────────────────┐
//!                                                              │ leave (op ended)             ▼
//!                                                              └──────────────▶ none in flight: revoked
//!                                                          still there after the grace: its connection is cut,
//!                                                          which makes it leave
//! ```
//!
//! A transport whose owner side takes part (local, tcp) calls [`GrantTable::enter`] before it touches memory and holds the
//! [`InFlight`] until its last byte has been copied. Entering and revoking take the same lock, so an operation is either
//! refused or waited for. A thread must never resolve a future or run foreign code while it holds an `InFlight`.
//!
//! Where a peer touches the memory without asking (shm, ucx), it opens the grant once ([`GrantTable::open_remote`]), and the
//! grant remembers through whom: on revocation each such [`Opener`] is handed an `InFlight`, to keep until its peer has
//! said, or can be known, not to touch the ranges any more.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, PoisonError, Weak, atomic::Ordering::Relaxed},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use kvasir_types::GrantKey;

use crate::{
    batch::Op,
    counters::Counters,
    error::Refusal,
    space::{Mapped, Use},
    timer::Timer,
};

/// What a peer may do with a granted range. One or the other: a block that lands is not readable meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Peers may read it.
    Read,
    /// Peers may write it.
    Write,
}

/// A stretch of the arena opened by a [`Grant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantRange {
    /// Where it starts in the arena.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// For what.
    pub access: Access,
}

/// Something that can be stopped in mid-operation: a connection by shutting it down. A memcpy ends by itself.
pub(crate) trait Cut: Send + Sync {
    /// Stops it; whether it was not stopped before. Must not block. Something that can't be stopped says `false`.
    fn cut(&self) -> bool;
}

/// A peer that has opened a grant and touches its ranges without our taking part.
pub(crate) trait Opener: Cut {
    /// The grant has been revoked, on the revoking thread: must not block. `in_flight` is to be kept until the peer can't
    /// touch the ranges any more. After the fence grace, `cut` is called if that has not happened.
    fn revoked(&self, key: GrantKey, in_flight: InFlight);
    /// Whether the peer has gone for good: it need not be told any more.
    fn is_gone(&self) -> bool {
        false
    }
}

/// What a peer may touch under a grant it has opened.
pub(crate) struct Opened {
    /// Half-open byte ranges `[start, end)`, sorted, neighbours merged.
    pub(crate) readable: Vec<Bytes>,
    /// As `readable`.
    pub(crate) writable: Vec<Bytes>,
    /// The regions they lie in.
    pub(crate) regions: Vec<Arc<Mapped>>,
}

/// Half-open byte range `[start, end)` of a segment.
pub(crate) type Bytes = (u64, u64);

struct State {
    key: GrantKey,
    readable: Vec<Bytes>,
    writable: Vec<Bytes>,
    regions: Vec<Arc<Mapped>>,
    inner: Mutex<Inner>,
    none_in_flight: Condvar,
}

#[derive(Default)]
struct Inner {
    revoked: bool,
    next_op: u64,
    in_flight: Vec<(u64, Arc<dyn Cut>)>,
    openers: Vec<Arc<dyn Opener>>,
    /// The regions stay registered until nobody touches them under this grant.
    uses: Vec<Use>,
    waker: Option<Waker>,
    /// A thread blocks until none is in flight: nobody else costs a system call to wake.
    awaited: bool,
}

impl Inner {
    fn enter(&mut self, cut: Arc<dyn Cut>) -> u64 {
        self.next_op += 1;
        self.in_flight.push((self.next_op, cut));
        self.next_op
    }

    /// The uses to drop, outside the lock, if nothing can touch the ranges any more.
    fn settle(&mut self) -> Vec<Use> {
        if self.revoked && self.in_flight.is_empty() { std::mem::take(&mut self.uses) } else { Vec::new() }
    }
}

impl State {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, op: Op, offset: u64, len: u64) -> Result<(), Refusal> {
        check_granted(&self.readable, &self.writable, op, offset, len)
    }

    /// Lets nobody in any more, and has everybody told who comes without asking.
    fn close(self: &Arc<Self>) {
        let (told, uses) = {
            let mut inner = self.lock();
            inner.revoked = true;
            let openers = std::mem::take(&mut inner.openers);
            let told: Vec<_> = openers
                .into_iter()
                .map(|opener| {
                    let op = inner.enter(Arc::clone(&opener) as Arc<dyn Cut>);
                    (opener, InFlight { state: Arc::clone(self), op })
                })
                .collect();
            (told, inner.settle())
        };
        drop(uses);
        for (opener, in_flight) in told {
            opener.revoked(self.key, in_flight);
        }
    }

    fn wait_none_in_flight(&self) {
        let mut inner = self.lock();
        while !inner.in_flight.is_empty() {
            inner.awaited = true;
            inner = self.none_in_flight.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Cuts whatever is still in flight. Counted before any of it can leave: who waits finds the counter right.
    fn cut(&self, counters: &Counters) {
        // Shutting a socket down does not block and calls nobody back, so it may happen under the lock.
        let inner = self.lock();
        let connections: u64 = inner.in_flight.iter().map(|(_, op)| u64::from(op.cut())).sum();
        if connections > 0 {
            counters.fenced_connections.fetch_add(connections, Relaxed);
            drop(inner);
            tracing::info!(connections, "cut connections with operations in flight under a revoked grant");
        }
    }
}

/// Whether ranges granted for reading and for writing, each sorted and merged, allow an operation: the one check, made by the
/// owner, and by a peer's engine where the owner takes no part.
pub(crate) fn check_granted(
    readable: &[Bytes],
    writable: &[Bytes],
    op: Op,
    offset: u64,
    len: u64,
) -> Result<(), Refusal> {
    let (wanted, other) = match op {
        Op::Read => (readable, writable),
        Op::Write => (writable, readable),
    };
    if covers(wanted, offset, len) {
        Ok(())
    } else if covers(other, offset, len) {
        Err(Refusal::Access)
    } else {
        Err(Refusal::Bounds)
    }
}

/// Whether the sorted, merged ranges hold all of `[offset, offset + len)`.
fn covers(ranges: &[Bytes], offset: u64, len: u64) -> bool {
    let Some(end) = offset.checked_add(len) else { return false };
    let after = ranges.partition_point(|&(start, _)| start <= offset);
    after.checked_sub(1).is_some_and(|at| end <= ranges[at].1)
}

/// The ranges of one access, sorted; neighbours become one, so that an operation may span two granted blocks.
fn merged(ranges: &[GrantRange], access: Access) -> Vec<Bytes> {
    let mut sorted: Vec<Bytes> =
        ranges.iter().filter(|r| r.access == access && r.len > 0).map(|r| (r.offset, r.offset + r.len)).collect();
    sorted.sort_unstable();
    let mut merged: Vec<Bytes> = Vec::with_capacity(sorted.len());
    for (start, end) in sorted {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

/// All live grants of one arena. Written by the owner's threads (grant, revoke), read by every transport.
pub(crate) struct GrantTable {
    grants: Mutex<HashMap<u64, Arc<State>>>,
    timer: Timer,
    fence_grace: Duration,
    counters: Arc<Counters>,
}

impl GrantTable {
    pub(crate) fn new(timer: Timer, fence_grace: Duration, counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self { grants: Mutex::default(), timer, fence_grace, counters })
    }

    /// Opens ranges, each already found in one of `uses`, under a fresh key.
    pub(crate) fn open(self: &Arc<Self>, ranges: &[GrantRange], uses: Vec<Use>, key: GrantKey) -> Grant {
        let state = Arc::new(State {
            key,
            readable: merged(ranges, Access::Read),
            writable: merged(ranges, Access::Write),
            regions: uses.iter().map(|region| Arc::clone(region)).collect(),
            inner: Mutex::new(Inner { uses, ..Inner::default() }),
            none_in_flight: Condvar::new(),
        });
        self.lock().insert(key.0, Arc::clone(&state));
        Grant { state, table: Arc::clone(self), over: false }
    }

    /// Checks every range of an operation and counts it in; `cut` is how to stop it. Refusals are counted.
    pub(crate) fn enter(
        &self,
        key: GrantKey,
        op: Op,
        ranges: impl Iterator<Item = (u64, u64)>,
        cut: Arc<dyn Cut>,
    ) -> Result<InFlight, Refusal> {
        let entered = self.try_enter(key, op, ranges, cut);
        if let Err(refusal) = entered {
            self.counters.refused(refusal);
        }
        entered
    }

    fn try_enter(
        &self,
        key: GrantKey,
        op: Op,
        mut ranges: impl Iterator<Item = (u64, u64)>,
        cut: Arc<dyn Cut>,
    ) -> Result<InFlight, Refusal> {
        let state = self.lock().get(&key.0).cloned().ok_or(Refusal::UnknownGrant)?;
        ranges.try_for_each(|(offset, len)| state.check(op, offset, len))?;
        let op = {
            let mut inner = state.lock();
            if inner.revoked {
                return Err(Refusal::UnknownGrant);
            }
            inner.enter(cut)
        };
        Ok(InFlight { state, op })
    }

    /// Tells a peer what it may touch without asking again, and remembers whom to tell when that ends. A peer that opens
    /// the same grant twice is remembered twice.
    pub(crate) fn open_remote(&self, key: GrantKey, opener: Arc<dyn Opener>) -> Result<Opened, Refusal> {
        let opened = self.try_open_remote(key, opener);
        if let Err(refusal) = opened {
            self.counters.refused(refusal);
        }
        opened
    }

    fn try_open_remote(&self, key: GrantKey, opener: Arc<dyn Opener>) -> Result<Opened, Refusal> {
        let state = self.lock().get(&key.0).cloned().ok_or(Refusal::UnknownGrant)?;
        {
            let mut inner = state.lock();
            if inner.revoked {
                return Err(Refusal::UnknownGrant);
            }
            // Peers come and go under a grant that lasts: now and then those that went are forgotten.
            if inner.openers.len() >= 16 && inner.openers.len().is_power_of_two() {
                inner.openers.retain(|opener| !opener.is_gone());
            }
            inner.openers.push(opener);
        }
        let (readable, writable) = (state.readable.clone(), state.writable.clone());
        Ok(Opened { readable, writable, regions: state.regions.clone() })
    }

    /// Whether a grant has this key now.
    pub(crate) fn knows(&self, key: GrantKey) -> bool {
        self.lock().contains_key(&key.0)
    }

    /// Revokes every grant over a region, with the usual grace. It is over when nobody uses the region any more.
    pub(crate) fn close_over(self: &Arc<Self>, base: u64) {
        let over = |state: &Arc<State>| state.regions.iter().any(|region| region.base == base);
        let states: Vec<_> = self.lock().extract_if(|_, state| over(state)).map(|(_, state)| state).collect();
        for state in states {
            state.close();
            self.plan_cut(&state);
        }
    }

    /// Cuts what is in flight under a closed grant when the grace has passed.
    fn plan_cut(self: &Arc<Self>, state: &Arc<State>) {
        if state.lock().in_flight.is_empty() {
            return;
        }
        let (state, table): (Weak<State>, Weak<Self>) = (Arc::downgrade(state), Arc::downgrade(self));
        self.timer.at(Instant::now() + self.fence_grace, move || {
            if let (Some(state), Some(table)) = (state.upgrade(), table.upgrade()) {
                state.cut(&table.counters);
            }
        });
    }

    /// Revokes every grant, by force.
    pub(crate) fn close_all(&self) {
        let states: Vec<_> = self.lock().drain().map(|(_, state)| state).collect();
        for state in states {
            state.close();
            state.cut(&self.counters);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<State>>> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An operation that may be touching granted memory right now. Dropping it is the promise that it no longer does.
#[must_use]
pub(crate) struct InFlight {
    state: Arc<State>,
    op: u64,
}

impl InFlight {
    /// Address of a range that was checked on entering.
    ///
    /// # Panics
    /// If it is in none of the grant's regions: this guards memory.
    pub(crate) fn at(&self, offset: u64, len: u64) -> *mut u8 {
        let region = self.state.regions.iter().find(|region| region.holds(offset, len));
        region.expect("granted ranges lie in the grant's regions").at(offset, len)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let (waker, uses) = {
            let mut inner = self.state.lock();
            inner.in_flight.retain(|(op, _)| *op != self.op);
            if !inner.in_flight.is_empty() {
                return;
            }
            if inner.awaited {
                self.state.none_in_flight.notify_all();
            }
            (inner.waker.take(), inner.settle())
        };
        drop(uses);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Ranges of this engine's memory that peers with the key may touch.
///
/// End it with [`Grant::revoke`], which lets operations in flight finish. Dropping it does the same at once: connections
/// with an operation in flight under it are cut, and the drop returns when the copy that was going on has stopped.
#[must_use = "dropping a grant revokes it"]
pub struct Grant {
    state: Arc<State>,
    table: Arc<GrantTable>,
    over: bool,
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let State { readable, writable, .. } = &*self.state;
        f.debug_struct("Grant").field("readable", &readable.len()).field("writable", &writable.len()).finish()
    }
}

impl Grant {
    /// What a peer must show. Give it only to the peer meant.
    pub fn key(&self) -> GrantKey {
        self.state.key
    }

    /// Takes the ranges back. Once the future resolves, no byte can land in them or be read from them under this key.
    pub fn revoke(self) -> Revoke {
        Revoke { grant: self, fence_planned: false }
    }

    fn close(&self) {
        self.table.lock().remove(&self.state.key.0);
        self.state.close();
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        self.close();
        self.state.cut(&self.table.counters);
        self.state.wait_none_in_flight();
    }
}

/// Resolves when nothing is in flight under the grant any more: at the latest a moment after
/// [`crate::Config::fence_grace`], when stalled connections are cut. Dropped unfinished, it ends as dropping the grant
/// does.
#[must_use = "a revocation is complete only when it has been awaited"]
#[derive(Debug)]
pub struct Revoke {
    grant: Grant,
    fence_planned: bool,
}

impl Revoke {
    /// Blocks until revoked: for threads without an executor.
    pub fn wait(mut self) {
        self.begin();
        self.grant.state.wait_none_in_flight();
        self.grant.over = true;
    }

    /// Closes the grant and, if something is in flight, plans the cut.
    fn begin(&mut self) {
        if self.fence_planned {
            return;
        }
        self.fence_planned = true;
        self.grant.close();
        self.grant.table.plan_cut(&self.grant.state);
    }
}

impl Future for Revoke {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.begin();
        {
            let mut inner = self.grant.state.lock();
            if !inner.in_flight.is_empty() {
                inner.waker = Some(context.waker().clone());
                return Poll::Pending;
            }
        }
        self.grant.over = true;
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Switch(AtomicBool);

    impl Cut for Switch {
        fn cut(&self) -> bool {
            !self.0.swap(true, SeqCst)
        }
    }

    fn table() -> Arc<GrantTable> {
        GrantTable::new(Timer::default(), Duration::from_millis(1), Arc::default())
    }

    fn range(offset: u64, len: u64, access: Access) -> GrantRange {
        GrantRange { offset, len, access }
    }

    #[test]
    fn nothing_enters_after_a_revocation_began_and_it_waits_for_what_had_entered() {
        let table = table();
        let grant = table.open(&[range(0, 10, Access::Write)], Vec::new(), GrantKey(1));
        let one = || [(0, 10)].into_iter();
        let op = table.enter(GrantKey(1), Op::Write, one(), Arc::<Switch>::default()).unwrap();
        let mut revoke = grant.revoke();
        let mut context = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut revoke).poll(&mut context).is_pending());
        let late = table.enter(GrantKey(1), Op::Write, one(), Arc::<Switch>::default());
        assert!(matches!(late, Err(Refusal::UnknownGrant)));
        drop(op);
        assert!(Pin::new(&mut revoke).poll(&mut context).is_ready());
    }

    #[test]
    fn dropping_a_grant_cuts_what_is_in_flight_and_waits_until_it_left() {
        let table = table();
        let grant = table.open(&[range(0, 10, Access::Write)], Vec::new(), GrantKey(1));
        let switch = Arc::<Switch>::default();
        let op = table.enter(GrantKey(1), Op::Write, [(0, 1)].into_iter(), switch.clone()).unwrap();
        let dropper = std::thread::spawn(move || drop(grant));
        while !switch.0.load(SeqCst) {
            std::thread::yield_now();
        }
        assert!(!dropper.is_finished());
        drop(op);
        dropper.join().unwrap();
    }

    proptest! {
        #[test]
        fn an_operation_enters_exactly_if_every_byte_is_granted_for_it(
            ranges in prop::collection::vec((0u64..40, 0u64..12, any::<bool>()), 0..8),
            (offset, len, write) in (0u64..50, 1u64..20, any::<bool>()),
        ) {
            let access = |write| if write { Access::Write } else { Access::Read };
            let granted: Vec<_> = ranges.iter().map(|&(o, l, w)| range(o, l, access(w))).collect();
            let table = table();
            let _grant = table.open(&granted, Vec::new(), GrantKey(1));
            let op = if write { Op::Write } else { Op::Read };
            let entered = table.enter(GrantKey(1), op, [(offset, len)].into_iter(), Arc::<Switch>::default()).is_ok();
            let every_byte = (offset..offset + len).all(|byte| {
                granted.iter().any(|r| r.access == access(write) && (r.offset..r.offset + r.len).contains(&byte))
            });
            prop_assert_eq!(entered, every_byte);
        }
    }
}
