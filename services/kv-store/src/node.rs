//! The node: the store's decisions, the transfer engine's grants and the disk, kept in step.
//!
//! All readers share one grant over the whole arena, which lasts as long as the node: what protects a reader is the
//! checksum that came with each block, and its lease only keeps the block where it is. Each writer has a grant of his own,
//! over the slots that are reserved for him. What the store decides and the grant that goes with it happen under one lock;
//! waiting for a revocation happens under none:
//!
//! ```text
//!   under the lock: store closes the reservation, its grant is taken out
//!   no lock:        the grant is revoked; when that is done nobody outside can write the blocks
//!   under the lock: store finishes the reservation
//! ```
//!
//! The three steps must not be torn apart, or the reservation stays closing for ever and its blocks are lost. So they run
//! in tasks of their own, which no caller's disappearance cancels: see [`crate::service`] and [`crate::expiry`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, atomic::AtomicU64},
    time::{Duration, Instant},
};

use kvasir_kv_cache::Ask;
use kvasir_transfer::{Access, Grant, GrantRange, TransferEngine};
use kvasir_types::{BlockHash, GrantKey};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::{
    disk::Disk,
    error::Error,
    published::{Published, Whereabouts},
    store::{
        BlockBytes, Checksum, Facts, Found, Keep, LeaseId, Origin, Place, ReservationId, Reserved, Settings, Sift,
        SlotState, Store, Totals, Usage, Written,
    },
};

/// Committed bytes that are verified before anything else, because handing them to another thread takes as long; more are
/// verified after they became visible.
const VERIFIED_AT_ONCE: u64 = 256 << 10;

/// How often it is tried to give up torn blocks that somebody holds, which is longer than leases last by themselves; after
/// that the next reader reports them.
const MAX_TRIES: u32 = 200;
/// And after how long again.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// One store node. Shared by all tasks.
pub(crate) struct Node {
    pub(super) engine: TransferEngine,
    pub(super) disk: Option<DiskTier>,
    verify_on_commit: bool,
    /// What everybody reads with.
    reading: Grant,
    /// Where the index is that clients read by themselves.
    published: Option<Whereabouts>,
    pub(super) state: Mutex<State>,
    /// A hold was opened that ends before all others.
    opened: Notify,
    /// Blocks have come from the disk, or will not come.
    pub(super) arrived: Notify,
    /// How many others' counts of returns are counted with this node's. Written by the exchange, for metrics.
    pub(super) heard_from: AtomicU64,
    /// One permit for each core: verifying is all computing.
    verifiers: Arc<Semaphore>,
}

/// The disk, and the names of whose blocks are on it.
pub(crate) struct DiskTier {
    pub(super) disk: Arc<Disk>,
    pub(super) origins: crate::disk::Origins,
}

/// Written and read by whatever task serves a call, ends a hold, or moves blocks from and to disk; the lock is held for as
/// long as one call's blocks take to look up, and never across an await.
pub(super) struct State {
    pub(super) store: Store,
    pub(super) reservations: HashMap<ReservationId, Option<Grant>>,
    torn_blocks: u64,
}

/// A closed reservation, and the grant to revoke before it is finished; none if nobody outside could write.
#[must_use = "a closed reservation that is not finished keeps its blocks for ever"]
pub(crate) struct Closed {
    pub(super) id: ReservationId,
    pub(super) grant: Option<Grant>,
}

/// A closed reservation that may still become blocks.
#[must_use = "a closed reservation that is not finished keeps its blocks for ever"]
pub(crate) struct Committing {
    pub(super) closed: Closed,
    pub(super) written: Vec<Written>,
}

/// Committed blocks whose bytes nobody has looked at yet; they are held meanwhile.
#[must_use = "blocks that are not verified are held for ever"]
pub(crate) struct Unverified {
    claimed: Vec<(Written, Checksum)>,
    turn: OwnedSemaphorePermit,
}

/// What a writer offers.
pub(crate) struct Offer<'a> {
    pub(crate) size: BlockBytes,
    pub(crate) hashes: &'a [BlockHash],
    /// One for each hash, its origin left open.
    pub(crate) facts: &'a [Facts],
    pub(crate) origin: &'a Origin,
    /// How long the prompt is that they belong to, and how far it was known, as far as told.
    pub(crate) prompt: Ask,
}

impl Node {
    /// # Errors
    /// If the engine has no memory to grant.
    pub(crate) fn new(
        engine: TransferEngine,
        settings: Settings,
        disk: Option<DiskTier>,
        verify_on_commit: bool,
    ) -> Result<Self, kvasir_transfer::Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let read = |offset, len| GrantRange { offset, len, access: Access::Read };
        let mut readable = vec![read(0, settings.capacity_bytes)];
        let (index_bytes, seed) = (settings.published_bytes, settings.seed);
        let mut store = Store::new(settings, Instant::now());
        let mut whereabouts = None;
        if index_bytes > 0 {
            let published = Published::new(&engine, index_bytes, seed)?;
            let there = published.whereabouts();
            readable.push(read(there.offset, published.bytes()));
            whereabouts = Some(there);
            store.publish_to(Box::new(published));
        }
        Ok(Self {
            reading: engine.grant(readable)?,
            published: whereabouts,
            engine,
            disk,
            verify_on_commit,
            state: Mutex::new(State { store, reservations: HashMap::new(), torn_blocks: 0 }),
            opened: Notify::new(),
            arrived: Notify::new(),
            heard_from: AtomicU64::new(0),
            verifiers: Arc::new(Semaphore::new(cores)),
        })
    }

    /// The key that everybody reads the arena with.
    pub(crate) fn reading(&self) -> GrantKey {
        self.reading.key()
    }

    /// Where the index is that clients read by themselves; `None`: there is none.
    pub(crate) fn published(&self) -> Option<Whereabouts> {
        self.published
    }

    /// Readers have read these by themselves; the groups to which they belong.
    pub(crate) fn used(&self, size: BlockBytes, hashes: &[BlockHash], prompt_blocks: u32) -> Vec<u64> {
        self.lock().store.used(Instant::now(), size, hashes, prompt_blocks)
    }

    /// The longest run that is in memory, held by a lease, and how many blocks behind it are coming from disk. Waits for
    /// those until then, holding nothing meanwhile.
    pub(crate) async fn lookup(
        self: &Arc<Self>,
        size: BlockBytes,
        hashes: &[BlockHash],
        prompt_blocks: u32,
        until: Instant,
    ) -> Result<(Option<Found>, usize), Error> {
        loop {
            // Before the look: what arrives between the two is not missed.
            let arrived = self.arrived.notified();
            let now = Instant::now();
            let (coming, all_sent) = self.fetch(size, hashes);
            if coming == 0 || !all_sent || now >= until {
                return Ok((self.look_up(now, size, hashes, prompt_blocks)?, coming));
            }
            // A timeout loses nothing: the loop looks once more.
            let _came_or_too_late = tokio::time::timeout_at(until.into(), arrived).await;
        }
    }

    fn look_up(
        &self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
        prompt_blocks: u32,
    ) -> Result<Option<Found>, Error> {
        let mut state = self.lock();
        let before = state.store.next_end();
        let found = state.store.lookup(now, size, hashes, prompt_blocks)?;
        self.wake(before, &state);
        Ok(found)
    }

    /// How many of these blocks, of which so many were found, were here once, as far as is remembered.
    pub(crate) fn known(&self, size: BlockBytes, hashes: &[BlockHash], found: usize) -> usize {
        if found == hashes.len() { found } else { self.lock().store.known(size, hashes, found) }
    }

    /// Ends leases early; those that have ended already are passed over.
    pub(crate) fn end_leases(&self, leases: impl IntoIterator<Item = LeaseId>) {
        let mut state = self.lock();
        for lease in leases {
            if state.store.close_lease(lease) {
                state.store.finish_lease(lease);
            }
        }
    }

    pub(crate) fn exists(&self, size: BlockBytes, hashes: &[BlockHash]) -> Vec<[bool; 2]> {
        self.lock().store.exists(size, hashes)
    }

    /// So many percent of the memory may be kept by hard pins from now on.
    pub(crate) fn set_max_pinned_percent(&self, percent: u8) {
        self.lock().store.set_max_pinned_percent(percent);
    }

    /// Keeps blocks until then, or no longer; how many are kept so now.
    pub(crate) fn keep(&self, size: BlockBytes, hashes: &[BlockHash], keep: Keep, until: Instant) -> usize {
        let mut state = self.lock();
        let before = state.store.next_end();
        let kept = state.store.keep(size, hashes, keep, until);
        self.wake(before, &state);
        kept
    }

    /// Room for what is not there, and the key to write it with.
    pub(crate) fn reserve(&self, now: Instant, offer: &Offer<'_>) -> Result<(Reserved, Option<GrantKey>), Error> {
        let mut state = self.lock();
        let before = state.store.next_end();
        let reserved = state.reserve(now, offer)?;
        // Also if there is nothing to write: where there was no room, what was reserved ahead ends now.
        self.wake(before, &state);
        let Some(reservation) = reserved.reservation else { return Ok((reserved, None)) };
        let ranges = reserved
            .slots
            .iter()
            .filter_map(|slot| match *slot {
                SlotState::Reserved { offset } => Some(GrantRange { offset, len: offer.size.0, access: Access::Write }),
                SlotState::Present | SlotState::Busy | SlotState::Full => None,
            })
            .collect();
        match self.engine.grant(ranges) {
            Ok(grant) => {
                let key = grant.key();
                state.reservations.insert(reservation, Some(grant));
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

    /// The same for bytes that came with the call: nobody gets a key, the blocks are written here. What to commit.
    pub(crate) fn reserve_and_fill<B: AsRef<[u8]>>(
        &self,
        now: Instant,
        offer: &Offer<'_>,
        blocks: &[B],
    ) -> Result<(Option<Committing>, Vec<SlotState>), Error> {
        let (reserved, committing) = {
            let mut state = self.lock();
            let before = state.store.next_end();
            let reserved = state.reserve(now, offer)?;
            self.wake(before, &state);
            let committing = reserved.reservation.map(|id| {
                let written = state.store.begin_commit(id).expect("it was opened above");
                Committing { closed: Closed { id, grant: None }, written }
            });
            (reserved, committing)
        };
        let mut filled = Ok(());
        for (slot, block) in reserved.slots.iter().zip(blocks) {
            if let SlotState::Reserved { offset } = *slot {
                filled = filled.and_then(|()| self.engine.write_bytes(offset, block.as_ref()));
            }
        }
        match (filled, committing) {
            (Ok(()), committing) => Ok((committing, reserved.slots)),
            (Err(error), committing) => {
                if let Some(Committing { closed, .. }) = committing {
                    self.lock().store.finish_reservation(closed.id, &HashMap::new());
                }
                Err(Error::Grant(error))
            }
        }
    }

    /// Closes a reservation for its commit, unless another end of it came first.
    pub(crate) fn close_reservation(&self, id: ReservationId) -> Option<Committing> {
        let mut state = self.lock();
        let written = state.store.begin_commit(id)?;
        let grant = state.reservations.remove(&id).expect("an open reservation has a grant");
        Some(Committing { closed: Closed { id, grant }, written })
    }

    /// Ends what has expired. Leases end at once; reservations are closed, to be undone. How many leases.
    pub(crate) fn expire(&self, now: Instant) -> (usize, Vec<Closed>) {
        let mut state = self.lock();
        let expired = state.store.expire(now);
        expired.leases.iter().for_each(|&lease| state.store.finish_lease(lease));
        let reservations = &mut state.reservations;
        let close = |id| Closed { id, grant: reservations.remove(&id).expect("an open reservation has a grant") };
        (expired.leases.len(), expired.reservations.into_iter().map(close).collect())
    }

    /// Ends a reservation without blocks: its writer is fenced off, then its room is free.
    pub(crate) async fn undo(&self, closed: Closed) {
        let id = closed.id;
        closed.revoke().await;
        self.lock().store.finish_reservation(id, &HashMap::new());
    }

    /// Ends a reservation with those of its blocks that `named` gives a checksum of. How many became visible, and what of them
    /// is still to be compared with its bytes, see [`Node::verify`].
    pub(crate) async fn commit(
        self: &Arc<Self>,
        committing: Committing,
        named: HashMap<BlockHash, Checksum>,
    ) -> (usize, Option<Unverified>) {
        let Committing { closed, written } = committing;
        let id = closed.id;
        closed.revoke().await;
        // From here on the bytes can't change: what is verified is what is read.
        let mut claimed: Vec<(Written, Checksum)> =
            written.into_iter().filter_map(|w| named.get(&w.place.hash).map(|&sum| (w, sum))).collect();
        let claims = claimed.len();
        let small = claimed.iter().map(|(written, _)| written.place.size.0).sum::<u64>() <= VERIFIED_AT_ONCE;
        if self.verify_on_commit && small {
            claimed.retain(|(Written { place, .. }, sum)| {
                self.engine.checksum(place.offset, place.size.0).is_ok_and(|found| found == *sum)
            });
        }
        let torn = (claims - claimed.len()) as u64;
        let verified = if self.verify_on_commit && !small {
            // A writer that is faster than all cores verify waits here.
            self.verifiers.clone().acquire_owned().await.ok()
        } else {
            None
        };
        let good = claimed.iter().map(|(written, sum)| (written.block, *sum)).collect();
        {
            let mut state = self.lock();
            state.torn_blocks += torn;
            state.store.finish_reservation(id, &good);
            // What is being verified stays where it is.
            if verified.is_some() {
                state.store.hold_written(&claimed);
            }
        }
        self.write_behind();
        (good.len(), verified.map(|turn| Unverified { claimed, turn }))
    }

    /// Compares blocks that readers may find already with what their writer said of them, and gives up those that differ:
    /// readers compare, too, so nobody was given wrong bytes; but they take room, and keep the right ones out.
    pub(crate) async fn verify(self: &Arc<Self>, unverified: Unverified) {
        let Unverified { claimed, turn } = unverified;
        let places = claimed.iter().map(|&(written, sum)| (written.place, sum)).collect();
        let right = self.verified(places).await;
        drop(turn);
        self.lock().store.let_go_written(&claimed);
        let wrong = claimed.iter().zip(right).filter_map(|((written, _), right)| (!right).then_some(written.place));
        let mut wrong: Vec<Place> = wrong.collect();
        for place in &wrong {
            tracing::warn!(hash = %place.hash, "a block was not written with the bytes its writer said, it is given up");
        }
        // Readers who are just finding that out hold them for a while.
        for _ in 0..MAX_TRIES {
            let mut held = Vec::new();
            for place in wrong {
                if self.give_up_torn(place.size, &[place.hash]).await.in_use > 0 {
                    held.push(place);
                }
            }
            if held.is_empty() {
                return;
            }
            wrong = held;
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    /// For each place, whether its bytes have that checksum.
    async fn verified(&self, places: Vec<(Place, Checksum)>) -> Vec<bool> {
        let (engine, count) = (self.engine.clone(), places.len());
        let verified = tokio::task::spawn_blocking(move || {
            let right = |&(place, sum): &(Place, Checksum)| {
                engine.checksum(place.offset, place.size.0).is_ok_and(|found| found == sum)
            };
            places.iter().map(right).collect()
        });
        // It fails only if the process is ending: then nothing is verified.
        verified.await.unwrap_or_else(|_| vec![false; count])
    }

    /// A reader says that these blocks have other bytes than were stored. Those of which it is true are given up; how many.
    pub(crate) async fn report(self: &Arc<Self>, size: BlockBytes, hashes: &[BlockHash]) -> Result<usize, Error> {
        let mut broken = Vec::new();
        for &hash in hashes {
            let Some(found) = self.look_up(Instant::now(), size, &[hash], 0)? else { continue };
            let places: Vec<_> =
                found.blocks.iter().map(|block| (Place { hash, offset: block.offset, size }, block.checksum)).collect();
            let turn = self.verifiers.clone().acquire_owned().await;
            let right = self.verified(places).await;
            drop(turn);
            self.end_leases([found.lease]);
            if right.contains(&false) {
                tracing::warn!(%hash, "a block's bytes have changed in memory, it is given up");
                broken.push(hash);
            }
        }
        Ok(self.give_up_torn(size, &broken).await.evicted as usize)
    }

    /// Counts those that go: somebody else may have been first, or is at them.
    async fn give_up_torn(self: &Arc<Self>, size: BlockBytes, hashes: &[BlockHash]) -> Sift {
        let sift = self.evict_these(size, hashes).await;
        self.lock().torn_blocks += sift.evicted;
        sift
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

    /// Origins that have blocks here, and how many.
    pub(crate) fn origins(&self) -> Vec<(Origin, u64)> {
        self.lock().store.origins()
    }

    pub(crate) fn totals(&self) -> (Totals, u64) {
        let state = self.lock();
        (state.store.totals(), state.torn_blocks)
    }

    pub(crate) fn engine(&self) -> &TransferEngine {
        &self.engine
    }

    /// Wakes the expiry if it would sleep too long.
    pub(super) fn wake(&self, before: Option<Instant>, state: &State) {
        let is_before = |end| before.is_none_or(|before| end < before);
        if state.store.next_end().is_some_and(is_before) {
            self.opened.notify_one();
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }
}

impl State {
    fn reserve(&mut self, now: Instant, offer: &Offer<'_>) -> Result<Reserved, Error> {
        let origin = self.store.origin(offer.origin);
        let facts = |n: usize| Facts { origin, ..offer.facts.get(n).copied().unwrap_or_default() };
        Ok(self.store.reserve(now, offer.size, offer.hashes, offer.prompt, facts)?)
    }
}

impl Closed {
    async fn revoke(self) {
        if let Some(grant) = self.grant {
            grant.revoke().await;
        }
    }
}

/// For how long a pin may last.
pub(crate) const MAX_PIN: Duration = Duration::from_secs(7 * 24 * 3600);
