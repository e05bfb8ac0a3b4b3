//! Whole placement groups, as handing over needs them: which there are, and one of them held.

use std::{collections::HashMap, time::Instant};

use kvasir_types::{BlockHash, BlockId};

use super::{
    Level, Origin, Store,
    entry::{Entry, OriginId, State},
    leases::LeaseId,
    slab::{BlockBytes, Use},
};

/// Entries looked at in one go.
const PIECE: u32 = 4096;

/// Blocks in memory of one placement group, of one size and one origin, as they were when they were looked for.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) group: u64,
    pub(crate) size: BlockBytes,
    pub(crate) last_use: Use,
    origin: OriginId,
    pub(crate) blocks: Vec<BlockId>,
}

/// The groups found so far.
pub(crate) type Groups = HashMap<(u64, BlockBytes, OriginId), Group>;

/// Blocks of one group that follow one another, held in memory by a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) lease: LeaseId,
    /// Hash and offset of each.
    pub(crate) blocks: Vec<(BlockHash, u64)>,
    /// How many blocks of the prompt come before the first of them.
    pub(crate) position: u32,
    /// How the hash of the block before the first of them begins.
    pub(crate) parent: u32,
    pub(crate) origin: Origin,
}

impl Store {
    /// Adds what is in memory of the wanted groups among the next entries; where to go on, `None` at the end. In pieces, so
    /// that the lock is not held for long.
    pub(crate) fn groups(&self, from: u32, wanted: &mut impl FnMut(u64) -> bool, groups: &mut Groups) -> Option<u32> {
        self.index.scan(from, PIECE, |id, entry| {
            // A block of which nobody said to which group it belongs can't be placed.
            let of = entry.facts().group;
            if of == 0 || !entry.good_in(Level::Memory) || !wanted(of) {
                return;
            }
            let size = self.index.size(id);
            let group = groups.entry((of, size, entry.origin)).or_insert_with(|| Group {
                group: of,
                size,
                last_use: Use::default(),
                origin: entry.origin,
                blocks: Vec::new(),
            });
            group.last_use = group.last_use.max(entry.last_use);
            group.blocks.push(id);
        })
    }

    /// Holds what is still there of a group, from its first block on as far as it is without a gap. Does not count as use.
    pub(crate) fn hold_group(&mut self, now: Instant, group: &Group) -> Option<Held> {
        if self.leases.is_full() {
            return None;
        }
        let still = |entry: &Entry| {
            entry.state() == State::Present
                && entry.facts().group == group.group
                && entry.origin == group.origin
                && entry.good_in(Level::Memory)
                && entry.leases < u16::MAX
        };
        let mut there: Vec<(u16, BlockId)> = group
            .blocks
            .iter()
            .map(|&id| (*self.index.entry(id), id))
            .filter(|(entry, id)| still(entry) && self.index.size(*id) == group.size)
            .map(|(entry, id)| (entry.position, id))
            .collect();
        there.sort_unstable();
        let (position, first) = *there.first()?;
        let in_a_row = |(n, (at, _)): (usize, &(u16, BlockId))| usize::from(*at) == usize::from(position) + n;
        let run = there.iter().enumerate().take_while(|&(n, block)| in_a_row((n, block))).map(|(_, &(_, id))| id);
        let run: Vec<BlockId> = run.collect();
        let (parent, origin) = (self.index.entry(first).parent, self.facts(first).1);
        let mut blocks = Vec::with_capacity(run.len());
        for &id in &run {
            assert!(self.index.lease(id), "it has fewer leases than can be counted");
            let place = self.index.place(id, Level::Memory);
            blocks.push((place.hash, place.offset));
        }
        let lease = self.leases.open(run, now + self.settings.lease);
        Some(Held { lease, blocks, position: u32::from(position), parent, origin })
    }
}
