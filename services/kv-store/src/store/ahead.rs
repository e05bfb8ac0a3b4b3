//! Room made ahead: a slot for the block that a writer is about to write, before it says which.
//!
//! ```text
//!   reserve_ahead ─▶ the client writes ─▶ begin_commit_of(hash) ─▶ (from here on as any other reservation that is committed)
//!        │                                  └ the block is there, or another writer is at it: the slot is given back
//!        └ not committed in half a second, or a named block finds no room: expires
//! ```
//!
//! Such a slot is a reserved entry under a stand-in for a name, which nobody can ask for. The rules guarded here: **there are
//! few of them**, so that writers who do not come back take no room to speak of; **no policy of eviction hears of one**
//! before it has a name, or blocks that never come back would be counted; and they are the first to go.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use kvasir_kv_cache::Ask;
use kvasir_types::BlockHash;

use super::{
    BlockBytes, Facts, ReservationId, SlotState, Store, Written,
    entry::{Level, OriginId, State},
    leases::mix,
};

/// For how long: a writer whose next block comes later asks for room then.
const LASTS: Duration = Duration::from_millis(500);
/// How many at a time,
const MOST: usize = 64;
/// and of the memory at most one part in so many.
const PART: u64 = 8;

/// The reservations that were made ahead and are open.
#[derive(Debug)]
pub(super) struct Aheads {
    open: HashMap<ReservationId, BlockBytes>,
    /// Stand-ins follow from it.
    seed: u64,
}

/// A slot reserved ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub(crate) reservation: ReservationId,
    pub(crate) lasts: Duration,
    pub(crate) offset: u64,
    pub(crate) size: BlockBytes,
}

impl Aheads {
    pub(super) fn new(seed: u64) -> Self {
        // Another start than that of the ids of leases and reservations.
        Self { open: HashMap::new(), seed: seed.rotate_left(32) }
    }

    /// A reservation is closed; whether it was one of these.
    pub(super) fn over(&mut self, id: ReservationId) -> bool {
        self.open.remove(&id).is_some()
    }

    fn has_room(&self, size: BlockBytes, capacity_bytes: u64) -> bool {
        let bytes: u64 = self.open.values().map(|size| size.0).sum();
        self.open.len() < MOST && bytes.saturating_add(size.0) <= capacity_bytes / PART
    }

    fn stand_in(&mut self) -> BlockHash {
        let mut name = [0; 16];
        for half in name.chunks_exact_mut(8) {
            self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            half.copy_from_slice(&mix(self.seed).to_le_bytes());
        }
        BlockHash(name)
    }
}

impl Store {
    /// A slot for a block of this origin that is to be named by its commit. `None`: there are enough of them, or no room.
    pub(crate) fn reserve_ahead(&mut self, now: Instant, size: BlockBytes, origin: OriginId) -> Option<Ahead> {
        let capacity = self.index.slabs(Level::Memory).capacity_bytes();
        if self.reservations.is_full() || !self.ahead.has_room(size, capacity) {
            return None;
        }
        let stand_in = self.ahead.stand_in();
        let facts = Facts { origin, ..Facts::default() };
        let block = self.index.reserve_ahead(size, stand_in, facts, self.tick(now))?;
        let lasts = LASTS.min(self.settings.reservation);
        let reservation = self.reservations.open(vec![block], now + lasts);
        self.ahead.open.insert(reservation, size);
        Some(Ahead { reservation, lasts, offset: self.index.place(block, Level::Memory).offset, size })
    }

    /// Its writer has written this block. What to do is what [`Store::begin_commit`] says; what became of the block: reserved
    /// only if it is to be committed, in any other case there is nothing of that name to commit. `None`: there is no such
    /// reservation, or no longer, or for blocks of another size.
    pub(crate) fn begin_commit_of(
        &mut self,
        reservation: ReservationId,
        size: BlockBytes,
        hash: BlockHash,
        prompt: Ask,
        facts: Facts,
    ) -> Option<(SlotState, Vec<Written>)> {
        if *self.ahead.open.get(&reservation)? != size {
            return None;
        }
        let mut written = self.begin_commit(reservation)?;
        let block = written.first()?.block;
        let state = match self.index.find(size, hash).map(|id| self.index.entry(id).state()) {
            Some(State::Present) => SlotState::Present,
            Some(State::Reserved | State::Vacant) => SlotState::Busy,
            // Its slot was counted for somebody else.
            None if self.index.entry(block).facts().origin != facts.origin => SlotState::Full,
            None => {
                let blocks = prompt.blocks.max(u32::from(facts.position) + 1);
                self.index.writing(Ask { found: prompt.found.min(blocks), blocks });
                self.index.name(block, hash, facts);
                let place = self.index.place(block, Level::Memory);
                written = vec![Written { block, place }];
                SlotState::Reserved { offset: place.offset }
            }
        };
        Some((state, written))
    }

    /// A block that has a name finds no room: those without one make way, for the next who asks.
    pub(super) fn recall_ahead(&mut self, now: Instant) {
        self.ahead.open.keys().for_each(|&id| self.reservations.hasten(id, now));
    }
}
