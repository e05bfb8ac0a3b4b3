//! The node: the store's decisions and the transfer engine's grants, kept in step.
//!
//! Every open lease and reservation has one grant. What the store decides and the grant that goes with it happen under
//! one lock; waiting for a revocation happens under none:
//!
//! ```text
//!   under the lock: store closes the hold, its grant is taken out
//!   no lock:        the grant is revoked; when that is done nobody outside can touch the blocks
//!   under the lock: store finishes the hold
//! ```
//!
//! The three steps must not be torn apart, or the hold stays closing for ever and its blocks are lost. So they run in
//! tasks of their own, which no caller's disappearance cancels: see [`crate::service`] and [`crate::expiry`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

use kvasir_transfer::{Access, Grant, GrantRange, TransferEngine};
use kvasir_types::{BlockHash, BlockId, GrantKey};
use tokio::sync::{Notify, Semaphore};

use crate::{
    error::Error,
    store::{
        BlockBytes, Checksum, Found, LeaseId, ReservationId, Reserved, Settings, SlotState, Store, Totals, Usage,
        Written,
    },
};

/// One store node. Shared by all tasks.
pub(crate) struct Node {
    engine: TransferEngine,
    verify_on_commit: bool,
    state: Mutex<State>,
    /// A hold was opened that ends before all others.
    opened: Notify,
    /// One permit for each core: verifying is all computing.
    verifiers: Arc<Semaphore>,
}

/// Written and read by whatever task serves a call or ends a hold; the lock is held for as long as one call's blocks take
/// to look up, and never across an await.
struct State {
    store: Store,
    leases: HashMap<LeaseId, Grant>,
    reservations: HashMap<ReservationId, Grant>,
    torn_blocks: u64,
}

/// A closed hold, and the grant to revoke before it is finished.
#[must_use = "a closed hold that is not finished keeps its blocks for ever"]
pub(crate) struct Closed<Id> {
    id: Id,
    grant: Grant,
}

/// A closed reservation that may still become blocks.
#[must_use = "a closed reservation that is not finished keeps its blocks for ever"]
pub(crate) struct Committing {
    closed: Closed<ReservationId>,
    written: Vec<Written>,
}

impl Node {
    pub(crate) fn new(engine: TransferEngine, settings: Settings, verify_on_commit: bool) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            engine,
            verify_on_commit,
            state: Mutex::new(State {
                store: Store::new(settings),
                leases: HashMap::new(),
                reservations: HashMap::new(),
                torn_blocks: 0,
            }),
            opened: Notify::new(),
            verifiers: Arc::new(Semaphore::new(cores)),
        }
    }

    /// The longest run that is there, and the key to read it with.
    pub(crate) fn lookup(
        &self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
    ) -> Result<Option<(Found, GrantKey)>, Error> {
        let mut state = self.lock();
        let before = state.store.next_end();
        let Some(found) = state.store.lookup(now, size, hashes)? else { return Ok(None) };
        let range = |offset| GrantRange { offset, len: size.0, access: Access::Read };
        match self.engine.grant(found.blocks.iter().map(|block| range(block.offset)).collect()) {
            Ok(grant) => {
                let key = grant.key();
                state.leases.insert(found.lease, grant);
                self.wake(before, &state);
                Ok(Some((found, key)))
            }
            Err(error) => {
                // Nobody ever had a key to it.
                assert!(state.store.close_lease(found.lease), "it was opened above");
                state.store.finish_lease(found.lease);
                Err(Error::Grant(error))
            }
        }
    }

    /// Whether each of them is in memory, and whether on disk.
    pub(crate) fn exists(&self, size: BlockBytes, hashes: &[BlockHash]) -> Vec<[bool; 2]> {
        self.lock().store.exists(size, hashes)
    }

    /// Room for what is not there, and the key to write it with.
    pub(crate) fn reserve(
        &self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
    ) -> Result<(Reserved, Option<GrantKey>), Error> {
        let mut state = self.lock();
        let before = state.store.next_end();
        let reserved = state.store.reserve(now, size, hashes)?;
        let Some(reservation) = reserved.reservation else { return Ok((reserved, None)) };
        let ranges = reserved
            .slots
            .iter()
            .filter_map(|slot| match *slot {
                SlotState::Reserved { offset } => Some(GrantRange { offset, len: size.0, access: Access::Write }),
                SlotState::Present | SlotState::Busy | SlotState::Full => None,
            })
            .collect();
        match self.engine.grant(ranges) {
            Ok(grant) => {
                let key = grant.key();
                state.reservations.insert(reservation, grant);
                self.wake(before, &state);
                Ok((reserved, Some(key)))
            }
            Err(error) => {
                // Nobody ever had a key to it.
                state.store.begin_commit(reservation).expect("it was opened above");
                state.store.finish_reservation(reservation, &HashMap::new());
                Err(Error::Grant(error))
            }
        }
    }

    /// Closes a lease, unless another end of it came first.
    pub(crate) fn close_lease(&self, id: LeaseId) -> Option<Closed<LeaseId>> {
        let mut state = self.lock();
        if !state.store.close_lease(id) {
            return None;
        }
        let grant = state.leases.remove(&id).expect("an open lease has a grant");
        Some(Closed { id, grant })
    }

    /// Closes a reservation for its commit, unless another end of it came first.
    pub(crate) fn close_reservation(&self, id: ReservationId) -> Option<Committing> {
        let mut state = self.lock();
        let written = state.store.begin_commit(id)?;
        let grant = state.reservations.remove(&id).expect("an open reservation has a grant");
        Some(Committing { closed: Closed { id, grant }, written })
    }

    /// Closes what has expired.
    pub(crate) fn expire(&self, now: Instant) -> (Vec<Closed<LeaseId>>, Vec<Closed<ReservationId>>) {
        let mut state = self.lock();
        let expired = state.store.expire(now);
        let State { leases, reservations, .. } = &mut *state;
        let lease = |id| Closed { id, grant: leases.remove(&id).expect("an open lease has a grant") };
        let reservation = |id| Closed { id, grant: reservations.remove(&id).expect("an open reservation has a grant") };
        (expired.leases.into_iter().map(lease).collect(), expired.reservations.into_iter().map(reservation).collect())
    }

    /// Ends a lease: its reader is fenced off, then its blocks may go.
    pub(crate) async fn end_lease(&self, closed: Closed<LeaseId>) {
        closed.grant.revoke().await;
        self.lock().store.finish_lease(closed.id);
    }

    /// Ends a reservation without blocks: its writer is fenced off, then its room is free.
    pub(crate) async fn undo(&self, closed: Closed<ReservationId>) {
        closed.grant.revoke().await;
        self.lock().store.finish_reservation(closed.id, &HashMap::new());
    }

    /// Ends a reservation with those of its blocks that `named` gives the right checksum of. How many became visible.
    pub(crate) async fn commit(&self, committing: Committing, named: HashMap<BlockHash, Checksum>) -> usize {
        let Committing { closed, written } = committing;
        closed.grant.revoke().await;
        // From here on the bytes can't change: what is verified is what will be read.
        let claimed: Vec<(Written, Checksum)> =
            written.into_iter().filter_map(|w| named.get(&w.place.hash).map(|&sum| (w, sum))).collect();
        let claims = claimed.len();
        let good = if self.verify_on_commit && claims > 0 { self.verify(claimed).await } else { by_block(claimed) };
        let mut state = self.lock();
        state.torn_blocks += (claims - good.len()) as u64;
        state.store.finish_reservation(closed.id, &good);
        good.len()
    }

    /// Those whose bytes have the checksum they are claimed to have.
    async fn verify(&self, claimed: Vec<(Written, Checksum)>) -> HashMap<BlockId, Checksum> {
        let engine = self.engine.clone();
        let permit = self.verifiers.clone().acquire_owned().await;
        let verified = tokio::task::spawn_blocking(move || {
            let right = |(written, sum): &(Written, Checksum)| {
                engine.checksum(written.place.offset, written.place.size.0).is_ok_and(|found| found == *sum)
            };
            let good = by_block(claimed.into_iter().filter(right).collect());
            drop(permit);
            good
        });
        // It fails only if the process is ending: then nothing is verified.
        verified.await.unwrap_or_default()
    }

    /// How many of the named blocks are there with these bytes.
    pub(crate) fn count_present(&self, named: &HashMap<BlockHash, Checksum>) -> usize {
        let state = self.lock();
        named.iter().filter(|&(&hash, &sum)| state.store.holds(hash, sum)).count()
    }

    /// When the first open hold expires.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.lock().store.next_end()
    }

    /// Returns once a hold was opened that ends before all others.
    pub(crate) async fn opened(&self) {
        self.opened.notified().await;
    }

    pub(crate) fn usage(&self) -> Usage {
        self.lock().store.usage()
    }

    pub(crate) fn totals(&self) -> (Totals, u64) {
        let state = self.lock();
        (state.store.totals(), state.torn_blocks)
    }

    pub(crate) fn engine(&self) -> &TransferEngine {
        &self.engine
    }

    /// Wakes the expiry if it would sleep too long.
    fn wake(&self, before: Option<Instant>, state: &State) {
        if before.is_none_or(|before| state.store.next_end().is_some_and(|end| end < before)) {
            self.opened.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }
}

fn by_block(claimed: Vec<(Written, Checksum)>) -> HashMap<BlockId, Checksum> {
    claimed.into_iter().map(|(written, sum)| (written.block, sum)).collect()
}
