//! The store itself: all decisions of a node, none of its waiting.
//!
//! No async, no clock (`now` is an argument), no bytes (offsets only), no locks. The service around it opens and revokes
//! grants and moves messages; the tests around it play any order of events. The life of a block:
//!
//! ```text
//!   reserve ─▶ the client writes ─▶ begin_commit ─▶ (the service revokes the write grant, verifies) ─▶ finish_commit
//!                                                                                                      found from here on
//!   lookup ──▶ the client reads ──▶ close_lease ──▶ (the service revokes the read grant) ────────────▶ finish_lease
//!                                                                                                      evictable again
//! ```
//!
//! A lease or reservation that nobody ends is handed out by [`Store::expire`] and goes the same way. The laws, checked
//! against a model in `model_tests`: what a lookup finds was committed under that hash, in that size, with that checksum,
//! and is not taken from under its reader; no two blocks share a byte; taken + free = all.

mod index;
mod leases;
mod slab;

#[cfg(test)]
mod model_tests;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use kvasir_types::{BlockHash, BlockId};

use index::{Index, Known};
use leases::Holds;
use slab::Slabs;

pub(crate) use index::Place;
pub use leases::{LeaseId, ReservationId};
pub use slab::BlockBytes;

/// BLAKE3 of a block's bytes, first 16 bytes.
pub(crate) type Checksum = [u8; 16];

/// What a store is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) capacity_bytes: u64,
    pub(crate) slab_bytes: u64,
    pub(crate) lease: Duration,
    pub(crate) reservation: Duration,
    pub(crate) max_leases: usize,
    pub(crate) max_reservations: usize,
    /// Random: ids of leases and reservations follow from it.
    pub(crate) seed: u64,
}

/// Why a call was refused; trying later may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("{0} leases are open, no more are given")]
    Leases(usize),
    #[error("{0} reservations are open, no more are given")]
    Reservations(usize),
}

/// A block that a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) offset: u64,
    pub(crate) checksum: Checksum,
}

/// What a lookup found: at least one block, held until the lease ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) lease: LeaseId,
    pub(crate) blocks: Vec<Stored>,
}

/// The answer for one hash of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// Write it there.
    Reserved { offset: u64 },
    /// It is there already.
    Present,
    /// Another writer is at it.
    Busy,
    /// No room.
    Full,
}

/// The answer to a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reserved {
    /// `None` if there is nothing to write.
    pub(crate) reservation: Option<ReservationId>,
    pub(crate) slots: Vec<SlotState>,
}

/// A block of a reservation that is being committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) block: BlockId,
    pub(crate) place: Place,
}

/// Holds whose time is over. They are closed; each is to be finished once its grant is revoked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expired {
    pub(crate) leases: Vec<LeaseId>,
    pub(crate) reservations: Vec<ReservationId>,
}

/// What happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) lookups: u64,
    /// Blocks asked for in lookups that were found.
    pub(crate) hit_blocks: u64,
    /// Blocks asked for in lookups from the first missing one on.
    pub(crate) missed_blocks: u64,
    pub(crate) committed_blocks: u64,
    pub(crate) evicted_blocks: u64,
    /// Blocks for which there was no room.
    pub(crate) full_blocks: u64,
    /// Lookups and reservations refused because of the limit on how many are open.
    pub(crate) refused_calls: u64,
    pub(crate) expired_leases: u64,
    pub(crate) expired_reservations: u64,
}

/// What is there now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) capacity_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) pinned: u64,
    pub(crate) reserved: u64,
}

/// One node's blocks. See the module.
pub(crate) struct Store {
    settings: Settings,
    index: Index,
    leases: Holds<LeaseId>,
    reservations: Holds<ReservationId>,
    totals: Totals,
}

impl Store {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            index: Index::new(Slabs::new(settings.capacity_bytes, settings.slab_bytes)),
            leases: Holds::new(settings.max_leases, settings.seed),
            // Another start: the id of a lease never opens a reservation.
            reservations: Holds::new(settings.max_reservations, !settings.seed),
            settings,
            totals: Totals::default(),
        }
    }

    /// The longest run of `hashes` that is there, from the first one on, held by a new lease.
    pub(crate) fn lookup(
        &mut self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
    ) -> Result<Option<Found>, Refused> {
        if self.leases.is_full() {
            self.totals.refused_calls += 1;
            return Err(Refused::Leases(self.settings.max_leases));
        }
        let run: Vec<BlockId> = hashes
            .iter()
            .map_while(|&hash| match self.index.find(size, hash) {
                Known::Present(id) => Some(id),
                Known::Reserved | Known::Nothing => None,
            })
            .collect();
        self.totals.lookups += 1;
        self.totals.hit_blocks += run.len() as u64;
        self.totals.missed_blocks += (hashes.len() - run.len()) as u64;
        if run.is_empty() {
            return Ok(None);
        }
        self.touch_run(&run);
        let blocks = run
            .iter()
            .map(|&id| {
                self.index.pin(id);
                let checksum = self.index.checksum(id).expect("what was found is present");
                Stored { offset: self.index.place(id).offset, checksum }
            })
            .collect();
        let lease = self.leases.open(run, now + self.settings.lease);
        Ok(Some(Found { lease, blocks }))
    }

    /// Whether each of them is in memory, and whether on disk.
    pub(crate) fn exists(&self, size: BlockBytes, hashes: &[BlockHash]) -> Vec<[bool; 2]> {
        hashes.iter().map(|&hash| [matches!(self.index.find(size, hash), Known::Present(_)), false]).collect()
    }

    /// Ends a lease early. If `true`, the caller revokes its grant, then calls [`Store::finish_lease`]; if not, somebody
    /// else does or has.
    pub(crate) fn close_lease(&mut self, lease: LeaseId) -> bool {
        self.leases.close(lease).is_some()
    }

    /// The grant of a closed lease is revoked.
    pub(crate) fn finish_lease(&mut self, lease: LeaseId) {
        // Backwards, so that of a run that nobody else wants the end goes first: without its beginning it is useless.
        for id in self.leases.finish(lease).into_iter().rev() {
            self.index.unpin(id);
        }
    }

    /// Room for those of `hashes` that are neither there nor on their way.
    pub(crate) fn reserve(
        &mut self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
    ) -> Result<Reserved, Refused> {
        if self.reservations.is_full() {
            self.totals.refused_calls += 1;
            return Err(Refused::Reservations(self.settings.max_reservations));
        }
        // What is there counts as used before anything is evicted: a prompt's end must not push out its beginning.
        let present: Vec<BlockId> = hashes
            .iter()
            .filter_map(|&hash| match self.index.find(size, hash) {
                Known::Present(block) => Some(block),
                Known::Reserved | Known::Nothing => None,
            })
            .collect();
        self.touch_run(&present);
        let mut blocks = Vec::new();
        let slots = hashes
            .iter()
            .map(|&hash| match self.index.find(size, hash) {
                Known::Present(_) => SlotState::Present,
                Known::Reserved => SlotState::Busy,
                Known::Nothing => match self.index.reserve(size, hash) {
                    Some(block) => {
                        blocks.push(block);
                        SlotState::Reserved { offset: self.index.place(block).offset }
                    }
                    None => {
                        self.totals.full_blocks += 1;
                        SlotState::Full
                    }
                },
            })
            .collect();
        let until = now + self.settings.reservation;
        let reservation = (!blocks.is_empty()).then(|| self.reservations.open(blocks, until));
        Ok(Reserved { reservation, slots })
    }

    /// A writer says it is done. The caller revokes its grant, verifies what was written, then calls
    /// [`Store::finish_reservation`]. `None`: there is no such reservation, or another end of it came first.
    pub(crate) fn begin_commit(&mut self, reservation: ReservationId) -> Option<Vec<Written>> {
        let blocks = self.reservations.close(reservation)?;
        Some(blocks.iter().map(|&block| Written { block, place: self.index.place(block) }).collect())
    }

    /// The grant of a closed reservation is revoked: `good` blocks become visible, its other blocks are undone.
    pub(crate) fn finish_reservation(&mut self, reservation: ReservationId, good: &HashMap<BlockId, Checksum>) {
        let mut published = Vec::new();
        for id in self.reservations.finish(reservation) {
            match good.get(&id) {
                Some(&checksum) => {
                    self.index.publish(id, checksum);
                    published.push(id);
                }
                None => self.index.undo(id),
            }
        }
        self.totals.committed_blocks += published.len() as u64;
        self.touch_run(&published);
    }

    /// Whether a block with these bytes is there under this hash, in any size: what a repeated commit wants to know.
    pub(crate) fn holds(&self, hash: BlockHash, checksum: Checksum) -> bool {
        self.index.holds(hash, checksum)
    }

    /// Closes every hold whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) -> Expired {
        let expired = Expired { leases: self.leases.expire(now), reservations: self.reservations.expire(now) };
        self.totals.expired_leases += expired.leases.len() as u64;
        self.totals.expired_reservations += expired.reservations.len() as u64;
        expired
    }

    /// When [`Store::expire`] next has something to do.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        [self.leases.next_end(), self.reservations.next_end()].into_iter().flatten().min()
    }

    pub(crate) fn totals(&self) -> Totals {
        Totals { evicted_blocks: self.index.evicted(), ..self.totals }
    }

    pub(crate) fn usage(&self) -> Usage {
        let (slabs, blocks) = (self.index.slabs(), self.index.blocks());
        Usage {
            capacity_bytes: slabs.capacity_bytes(),
            used_bytes: slabs.used_bytes(),
            blocks: blocks.present,
            pinned: blocks.pinned,
            reserved: blocks.reserved,
        }
    }

    /// Counts a run as used, its end first: so its end is also evicted first, which leaves a shorter run, while evicting
    /// its beginning would make all of it useless.
    fn touch_run(&mut self, run: &[BlockId]) {
        for &id in run.iter().rev() {
            self.index.touch(id);
        }
    }
}
