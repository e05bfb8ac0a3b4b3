//! The blocks of one sequence: a table for each group.
//!
//! ```text
//!   tokens        0 … computed …
//!   full group    [sealed][sealed][sealed][filling][filling]     whole prompt, reserved when it starts
//!   sliding       [ gone ][ gone ][sealed][filling]              only what the window sees; grows and is shortened
//!   stock         (filling)(filling)                             reserved for the sliding groups' next blocks
//! ```
//!
//! A table holds the typed shares of its blocks, so what may be done with each is in its slot. All changes go through
//! [`crate::KvCache`], which owns the pool.

use kvasir_types::BlockId;

use crate::{Filling, Landing, Sealed};

/// One block of a table, and what may be done with it.
#[derive(Debug)]
pub(crate) enum Slot {
    /// Given back: nothing looks at its tokens any more.
    Gone,
    /// To be written by this sequence.
    Open(Filling),
    /// A peer may be writing it.
    Landing(Landing),
    /// Complete.
    Sealed(Sealed),
}

/// The blocks of a sequence, in all groups. Give it back with [`crate::KvCache::give_back`].
#[derive(Debug, Default)]
#[must_use = "a table that is dropped keeps its blocks for ever"]
pub struct Table {
    /// What runners are given; as long as `slots`, group by group.
    pub(crate) ids: Vec<Vec<BlockId>>,
    pub(crate) slots: Vec<Vec<Slot>>,
    /// By group: every block before this index is gone.
    pub(crate) gone: Vec<usize>,
    /// By group: no block before this index is open or landing.
    pub(crate) sealed: Vec<usize>,
    /// Reserved, and not in any group's table yet.
    pub(crate) stock: Vec<Filling>,
    /// KV of so many tokens, from the first one on, is there (as far as it is still needed).
    pub computed: usize,
}

impl Table {
    pub(crate) fn new(groups: usize) -> Self {
        let slots = (0..groups).map(|_| Vec::new()).collect();
        Self {
            ids: vec![Vec::new(); groups],
            slots,
            gone: vec![0; groups],
            sealed: vec![0; groups],
            stock: Vec::new(),
            computed: 0,
        }
    }

    /// The tables, one for each group; [`BlockId::GONE`] where a block is not needed any more.
    pub fn ids(&self) -> &[Vec<BlockId>] {
        &self.ids
    }

    /// Blocks held, those in stock included.
    pub fn len(&self) -> usize {
        let held = self.slots.iter().flatten().filter(|slot| !matches!(slot, Slot::Gone)).count();
        held + self.stock.len()
    }

    /// Whether it holds no block at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Blocks that only this sequence has, for the owner's checks: each may be written, by it or by a peer.
    pub fn open_ids(&self) -> impl Iterator<Item = BlockId> {
        let open = |slot: &Slot| match slot {
            Slot::Open(block) => Some(block.id()),
            Slot::Landing(block) => Some(block.id()),
            Slot::Gone | Slot::Sealed(_) => None,
        };
        self.slots.iter().flatten().filter_map(open).chain(self.stock.iter().map(Filling::id))
    }

    /// Blocks that are complete: group, index in that group's table, block. They may be read as long as the table has them.
    pub fn sealed_ids(&self) -> impl Iterator<Item = (usize, usize, BlockId)> {
        self.slots.iter().enumerate().flat_map(|(group, slots)| {
            slots.iter().enumerate().filter_map(move |(index, slot)| match slot {
                Slot::Sealed(share) => Some((group, index, share.id())),
                _ => None,
            })
        })
    }

    pub(crate) fn push(&mut self, group: usize, slot: Slot) {
        let id = match &slot {
            Slot::Gone => BlockId::GONE,
            Slot::Open(block) => block.id(),
            Slot::Landing(block) => block.id(),
            Slot::Sealed(share) => share.id(),
        };
        if self.sealed[group] == self.slots[group].len() && matches!(slot, Slot::Gone | Slot::Sealed(_)) {
            self.sealed[group] += 1;
        }
        self.ids[group].push(id);
        self.slots[group].push(slot);
    }

    /// Exchanges one block of a table; the one that was there.
    pub(crate) fn replace(&mut self, group: usize, index: usize, slot: Slot) -> Slot {
        self.ids[group][index] = match &slot {
            Slot::Gone => BlockId::GONE,
            Slot::Open(block) => block.id(),
            Slot::Landing(block) => block.id(),
            Slot::Sealed(share) => share.id(),
        };
        std::mem::replace(&mut self.slots[group][index], slot)
    }
}
