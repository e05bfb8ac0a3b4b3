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

mod ahead;
mod entry;
mod groups;
mod index;
mod leases;
mod pins;
mod quota;
mod sift;
mod slab;
mod tiers;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tier_tests;

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use kvasir_kv_cache::{Ask, Learned};
use kvasir_types::{BlockHash, BlockId};

use ahead::Aheads;
use entry::State;
use index::Index;
use leases::Holds;
use pins::Pins;
use quota::Quotas;
use slab::{Slabs, Use};

pub(crate) use ahead::Ahead;
pub(crate) use entry::{Facts, Keep, Level};
pub(crate) use groups::{Group, Groups, Held};
pub use index::Policy;
pub(crate) use index::{Place, Policies, Publish, ReadEnd};
pub use leases::{LeaseId, ReservationId};
pub(crate) use quota::{Limits, Origin};
pub(crate) use sift::{Forget, Sift, Which, tag};
pub use slab::BlockBytes;
pub(crate) use tiers::{Move, Recovered};

/// BLAKE3 of a block's bytes, first 16 bytes.
pub(crate) type Checksum = [u8; 16];

/// What a store is made with.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) capacity_bytes: u64,
    pub(crate) slab_bytes: u64,
    /// Zero: there is no disk.
    pub(crate) disk_bytes: u64,
    pub(crate) lease: Duration,
    pub(crate) reservation: Duration,
    pub(crate) max_leases: usize,
    pub(crate) max_reservations: usize,
    /// Blocks on their way from disk to memory, and the other way, at the same time.
    pub(crate) max_moves: usize,
    /// Of the memory, what hard pins may keep, in percent.
    pub(crate) max_pinned_percent: u8,
    pub(crate) quotas: Limits,
    pub(crate) policies: Policies,
    /// Of the index that clients read by themselves; zero: there is none.
    pub(crate) published_bytes: u64,
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

/// A block may be forgotten and those behind it not: so many strangers in a row are believed.
const MAX_STRANGERS: usize = 3;

/// A block that a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) offset: u64,
    pub(crate) checksum: Checksum,
    /// The placement group it belongs to.
    pub(crate) group: u64,
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
    /// Blocks given up for room, their last copy.
    pub(crate) evicted_blocks: u64,
    /// Blocks given up by memory that are on disk.
    pub(crate) demoted_blocks: u64,
    /// Blocks read from disk into memory, and blocks written to disk.
    pub(crate) promoted_blocks: u64,
    pub(crate) written_blocks: u64,
    /// Blocks on disk whose bytes were not those that had been written.
    pub(crate) torn_on_disk_blocks: u64,
    /// Of the hit blocks, those that came from disk for the call.
    pub(crate) hit_disk_blocks: u64,
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
    /// Present, in memory or on disk.
    pub(crate) blocks: u64,
    pub(crate) memory_blocks: u64,
    pub(crate) disk_blocks: u64,
    pub(crate) disk_capacity_bytes: u64,
    pub(crate) disk_used_bytes: u64,
    /// Held by readers.
    pub(crate) pinned: u64,
    pub(crate) reserved: u64,
    /// Kept by soft and hard pins.
    pub(crate) kept: u64,
    /// Waiting to be written to disk, at most.
    pub(crate) dirty: u64,
}

/// One node's blocks. See the module.
pub(crate) struct Store {
    settings: Settings,
    started: Instant,
    index: Index,
    leases: Holds<LeaseId>,
    reservations: Holds<ReservationId>,
    /// Of the reservations, those made ahead.
    ahead: Aheads,
    pins: Pins,
    /// Blocks to be written to disk, the oldest first; some are gone by the time it is their turn.
    dirty: VecDeque<BlockId>,
    /// Blocks that the disk did not take, to be tried again; the oldest first, and some are gone or written since.
    refused: VecDeque<BlockId>,
    /// Under way from and to disk.
    moves: [usize; 2],
    totals: Totals,
}

impl Store {
    pub(crate) fn new(settings: Settings, now: Instant) -> Self {
        let memory = Slabs::new(settings.capacity_bytes, settings.slab_bytes);
        let disk = Slabs::of_disk(settings.disk_bytes, settings.slab_bytes);
        let quotas = Quotas::new(settings.quotas.clone());
        Self {
            started: now,
            index: Index::new(memory, disk, quotas, settings.policies, settings.seed),
            leases: Holds::new(settings.max_leases, settings.seed),
            // Another start: the id of a lease never opens a reservation.
            reservations: Holds::new(settings.max_reservations, !settings.seed),
            ahead: Aheads::new(settings.seed),
            pins: Pins::default(),
            dirty: VecDeque::new(),
            refused: VecDeque::new(),
            moves: [0; 2],
            settings,
            totals: Totals::default(),
        }
    }

    /// From now on it is told which blocks are in memory, which are none yet.
    pub(crate) fn publish_to(&mut self, published: Box<dyn Publish>) {
        self.index.publish_to(published);
    }

    /// The longest run of `hashes` that is in memory, from the first one on, held by a new lease. They are blocks of a prompt
    /// of so many; fewer than there are hashes: nobody says.
    pub(crate) fn lookup(
        &mut self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
        prompt_blocks: u32,
    ) -> Result<Option<Found>, Refused> {
        if self.leases.is_full() {
            self.totals.refused_calls += 1;
            return Err(Refused::Leases(self.settings.max_leases));
        }
        let run: Vec<BlockId> = hashes
            .iter()
            .map_while(|&hash| self.index.find(size, hash).filter(|&id| self.index.entry(id).good_in(Level::Memory)))
            .take_while(|&id| self.index.entry(id).leases < u16::MAX)
            .collect();
        self.totals.lookups += 1;
        self.totals.hit_blocks += run.len() as u64;
        self.totals.missed_blocks += (hashes.len() - run.len()) as u64;
        self.begin(now, size, &run, hashes.len(), prompt_blocks);
        if run.is_empty() {
            return Ok(None);
        }
        self.touch_run(now, &run);
        let mut blocks = Vec::with_capacity(run.len());
        for &id in &run {
            assert!(self.index.lease(id), "it has fewer leases than can be counted");
            let place = self.index.place(id, Level::Memory);
            let entry = self.index.entry(id);
            blocks.push(Stored { offset: place.offset, checksum: entry.checksum, group: entry.facts().group });
        }
        let lease = self.leases.open(run, now + self.settings.lease);
        Ok(Some(Found { lease, blocks }))
    }

    /// A reader found these by itself, in the published index, and read them. Counts as a lookup that found what of them is
    /// still in memory; the groups to which they belong.
    pub(crate) fn used(
        &mut self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
        prompt_blocks: u32,
    ) -> Vec<u64> {
        let find = |&hash| self.index.find(size, hash).filter(|&id| self.index.entry(id).good_in(Level::Memory));
        let run: Vec<BlockId> = hashes.iter().filter_map(find).collect();
        self.totals.lookups += 1;
        self.totals.hit_blocks += hashes.len() as u64;
        self.begin(now, size, &run, hashes.len(), prompt_blocks);
        self.touch_run(now, &run);
        run.iter().map(|&id| self.index.entry(id).facts().group).collect()
    }

    /// For each hash, in which tiers it is: memory, disk. Nothing is touched.
    pub(crate) fn exists(&self, size: BlockBytes, hashes: &[BlockHash]) -> Vec<[bool; 2]> {
        let one = |&hash| {
            let entry = self.index.find(size, hash).map(|id| *self.index.entry(id));
            Level::ALL.map(|level| entry.is_some_and(|entry| entry.good_in(level)))
        };
        hashes.iter().map(one).collect()
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
            self.index.end_lease(id);
        }
    }

    /// Room for those of `hashes` that are neither there nor on their way; `facts` says what is to be known of each.
    pub(crate) fn reserve(
        &mut self,
        now: Instant,
        size: BlockBytes,
        hashes: &[BlockHash],
        prompt: Ask,
        facts: impl Fn(usize) -> Facts,
    ) -> Result<Reserved, Refused> {
        if self.reservations.is_full() {
            self.totals.refused_calls += 1;
            return Err(Refused::Reservations(self.settings.max_reservations));
        }
        // What is there stays while room is made: a prompt's end must not push out its beginning.
        let present: Vec<BlockId> = hashes.iter().filter_map(|&hash| self.index.find(size, hash)).collect();
        let held = self.index.hold(&present);
        let blocks_told = (0..hashes.len()).map(|n| u32::from(facts(n).position) + 1).max().unwrap_or(0);
        let here = self.ask(&held, hashes.len(), blocks_told.max(prompt.blocks));
        let ask = Ask { found: here.found.max(prompt.found.min(here.blocks)), ..here };
        self.index.writing(ask);
        let at = self.tick(now);
        let mut blocks = Vec::new();
        let mut before: Option<(BlockId, u16)> = None;
        let mut slots = Vec::with_capacity(hashes.len());
        for (n, &hash) in hashes.iter().enumerate() {
            let facts = facts(n);
            let after =
                before.filter(|&(_, position)| position.checked_add(1) == Some(facts.position)).map(|(id, _)| id);
            let known = self.index.find(size, hash);
            slots.push(match known.map(|id| self.index.entry(id).state()) {
                Some(State::Present) => SlotState::Present,
                Some(State::Reserved | State::Vacant) => SlotState::Busy,
                None => match self.index.reserve(size, hash, facts, after, at) {
                    Some(block) => {
                        blocks.push(block);
                        SlotState::Reserved { offset: self.index.place(block, Level::Memory).offset }
                    }
                    None => {
                        self.recall_ahead(now);
                        self.totals.full_blocks += 1;
                        SlotState::Full
                    }
                },
            });
            before = known.or_else(|| self.index.find(size, hash)).map(|id| (id, facts.position));
        }
        self.index.let_go(&held);
        let until = now + self.settings.reservation;
        let reservation = (!blocks.is_empty()).then(|| self.reservations.open(blocks, until));
        Ok(Reserved { reservation, slots })
    }

    /// How many of these blocks, of which so many were found, were here once, as far as is remembered.
    pub(crate) fn known(&self, size: BlockBytes, hashes: &[BlockHash], found: usize) -> usize {
        let (mut known, mut strangers) = (found, 0);
        for (n, &hash) in hashes.iter().enumerate().skip(found) {
            let was = self.index.find(size, hash).is_some() || self.index.remembers(size, hash);
            (known, strangers) = if was { (n + 1, 0) } else { (known, strangers + 1) };
            if strangers == MAX_STRANGERS {
                break;
            }
        }
        known
    }

    /// What was counted here of blocks that came back, for so many sizes: those with the most blocks.
    pub(crate) fn learned(&self, sizes: usize) -> Vec<(BlockBytes, Learned)> {
        self.index.learned(sizes)
    }

    /// What all others have counted.
    pub(crate) fn hear(&mut self, others: &HashMap<BlockBytes, Learned>) {
        self.index.hear(others);
    }

    /// The number of an origin, for [`Facts`].
    pub(crate) fn origin(&mut self, origin: &Origin) -> entry::OriginId {
        self.index.quotas().origin(origin)
    }

    /// A writer says it is done. The caller revokes its grant, verifies what was written, then calls
    /// [`Store::finish_reservation`]. `None`: there is no such reservation, or another end of it came first.
    pub(crate) fn begin_commit(&mut self, reservation: ReservationId) -> Option<Vec<Written>> {
        let blocks = self.reservations.close(reservation)?;
        self.ahead.over(reservation);
        Some(blocks.iter().map(|&block| Written { block, place: self.index.place(block, Level::Memory) }).collect())
    }

    /// The grant of a closed reservation is revoked: `good` blocks become visible, its other blocks are undone.
    pub(crate) fn finish_reservation(&mut self, reservation: ReservationId, good: &HashMap<BlockId, Checksum>) {
        let mut published = Vec::new();
        // Backwards, as always: of what came together the end is to go first.
        for id in self.reservations.finish(reservation).into_iter().rev() {
            match good.get(&id) {
                Some(&checksum) => {
                    self.index.publish(id, checksum);
                    published.push(id);
                }
                None => self.index.undo(id),
            }
        }
        self.totals.committed_blocks += published.len() as u64;
        if self.settings.disk_bytes > 0 {
            self.dirty.extend(published);
        }
    }

    /// Blocks that have just become visible are kept where they are until [`Store::let_go_written`].
    pub(crate) fn hold_written(&mut self, written: &[(Written, Checksum)]) {
        for (written, _) in written {
            assert!(self.index.lease(written.block), "a new block has no leases yet");
        }
    }

    /// The opposite.
    pub(crate) fn let_go_written(&mut self, written: &[(Written, Checksum)]) {
        // The end first, as always.
        written.iter().rev().for_each(|(written, _)| self.index.end_lease(written.block));
    }

    /// Whether a block with these bytes is there under this hash, in any size: what a repeated commit wants to know.
    pub(crate) fn holds(&self, hash: BlockHash, checksum: Checksum) -> bool {
        self.index.holds(hash, checksum)
    }

    /// Closes every hold whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) -> Expired {
        for id in self.pins.expire(now) {
            self.index.keep(id, Keep::Cached);
        }
        let expired = Expired { leases: self.leases.expire(now), reservations: self.reservations.expire(now) };
        self.totals.expired_leases += expired.leases.len() as u64;
        // That nothing follows on a block is no writer's failure.
        let failed = expired.reservations.iter().filter(|&&id| !self.ahead.over(id)).count();
        self.totals.expired_reservations += failed as u64;
        expired
    }

    /// When [`Store::expire`] next has something to do.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        [self.leases.next_end(), self.reservations.next_end(), self.pins.next_end()].into_iter().flatten().min()
    }

    pub(crate) fn totals(&self) -> Totals {
        let (memory, disk) = (self.index.evicted(Level::Memory), self.index.evicted(Level::Disk));
        Totals { evicted_blocks: memory.lost + disk.lost, demoted_blocks: memory.demoted, ..self.totals }
    }

    pub(crate) fn usage(&self) -> Usage {
        let blocks = self.index.blocks();
        let [memory, disk] = Level::ALL.map(|level| self.index.slabs(level));
        Usage {
            capacity_bytes: memory.capacity_bytes(),
            used_bytes: memory.used_bytes(),
            blocks: blocks.present,
            memory_blocks: blocks.good[Level::Memory as usize],
            disk_blocks: blocks.good[Level::Disk as usize],
            disk_capacity_bytes: disk.capacity_bytes(),
            disk_used_bytes: disk.used_bytes(),
            pinned: blocks.leased,
            reserved: blocks.reserved,
            kept: blocks.kept,
            dirty: self.dirty.len() as u64,
        }
    }

    /// Origins that have blocks here, and how many.
    pub(crate) fn origins(&mut self) -> Vec<(Origin, u64)> {
        self.index.quotas().in_use().map(|(origin, blocks)| (origin.clone(), blocks)).collect()
    }

    /// A request for so many blocks of a prompt finds this run.
    fn begin(&mut self, now: Instant, size: BlockBytes, run: &[BlockId], blocks: usize, prompt_blocks: u32) {
        let ask = self.ask(run, blocks, prompt_blocks);
        // Who is asked for a part of a prompt does not see how far all of it got.
        let whole = blocks >= prompt_blocks as usize;
        let ask = if whole { ask } else { Ask { found: Ask::UNKNOWN, ..ask } };
        self.index.ask(size, self.tick(now), ask);
    }

    /// How far a request for so many blocks of a prompt gets with the first of them, as far as is known here.
    fn ask(&self, run: &[BlockId], blocks: usize, prompt_blocks: u32) -> Ask {
        let place = |id: &BlockId| u32::from(self.index.entry(*id).position);
        let found = run.last().map_or(0, |last| place(last) + 1);
        let told = run.first().map_or(0, place) + u32::try_from(blocks).unwrap_or(u32::MAX);
        Ask { found, blocks: told.max(prompt_blocks) }
    }

    /// Counts a run as used, its end first: so its end is also evicted first, which leaves a shorter run, while evicting
    /// its beginning would make all of it useless.
    fn touch_run(&mut self, now: Instant, run: &[BlockId]) {
        let at = self.tick(now);
        for &id in run.iter().rev() {
            self.index.touch(id, at);
        }
    }

    fn tick(&self, now: Instant) -> Use {
        let sixteenths = now.saturating_duration_since(self.started).as_millis() * 16 / 1000;
        Use(u32::try_from(sixteenths).unwrap_or(u32::MAX))
    }
}
