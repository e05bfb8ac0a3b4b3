//! What is known of one block, in 72 bytes: a node with a large disk has ten million of them.
//!
//! ```text
//!   memory:  no slot ── being read from disk ── good (leased or not) ── being written to disk as well
//!   disk:    no slot ── being written ───────── good ────────────────── being read
//! ```
//!
//! A block is *idle* in a tier if its bytes there are good and nobody is at them: then, and only then, the tier may give
//! them up. The rule for both tiers is [`Entry::idle_in`], and nowhere else.

use kvasir_types::BlockHash;

use super::{
    Checksum,
    slab::{Slot, Use},
};

/// Where bytes of blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Level {
    /// The registered arena, which clients read and write.
    Memory,
    /// The disk's file.
    Disk,
}

impl Level {
    pub(crate) const ALL: [Self; 2] = [Self::Memory, Self::Disk];

    pub(crate) fn other(self) -> Self {
        match self {
            Self::Memory => Self::Disk,
            Self::Disk => Self::Memory,
        }
    }
}

/// Which blocks are of one size and count against one quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClassId(pub(super) u8);

/// Whose blocks these are: a model and a tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct OriginId(pub(super) u16);

/// What a writer says of a block besides its hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// How many blocks of its prompt come before it; the largest stands for all that are larger.
    pub(crate) position: u16,
    /// First four bytes of the hash of the block before it; zero: it is the first, or its writer did not say.
    pub(crate) parent: u32,
    /// First eight bytes of the hash of its placement group's first block: what decides which node has it.
    pub(crate) group: u64,
    pub(crate) origin: OriginId,
}

/// What becomes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No block: the entry is free.
    Vacant,
    /// A writer fills its slot in memory.
    Reserved,
    /// Readers may find it.
    Present,
}

/// How strongly somebody wants it kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// As long as it is worth its place.
    #[default]
    Cached,
    /// Given up only when nothing else is left.
    Soft,
    /// Not given up at all.
    Hard,
}

/// What is under way between the tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moving {
    No,
    /// Memory to disk; the disk's bytes are not good yet.
    Down,
    /// Disk to memory; memory's bytes are not good yet.
    Up,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(super) hash: BlockHash,
    pub(super) checksum: Checksum,
    group: [u8; 8],
    /// One for each level.
    pub(super) slots: [Slot; 2],
    pub(super) parent: u32,
    pub(super) last_use: Use,
    /// Leases that hold it.
    pub(super) leases: u16,
    pub(super) position: u16,
    pub(super) origin: OriginId,
    pub(super) class: ClassId,
    /// State, what is under way, and how strongly it is wanted, two bits each.
    life: u8,
}

impl Entry {
    pub(super) const VACANT: Self = Self {
        hash: BlockHash([0; 16]),
        checksum: [0; 16],
        group: [0; 8],
        slots: [Slot::NONE; 2],
        parent: 0,
        last_use: Use(0),
        leases: 0,
        position: 0,
        origin: OriginId(0),
        class: ClassId(0),
        life: 0,
    };

    pub(super) fn new(hash: BlockHash, class: ClassId, facts: Facts, last_use: Use) -> Self {
        let Facts { position, parent, group, origin } = facts;
        Self { hash, class, position, parent, group: group.to_le_bytes(), origin, last_use, ..Self::VACANT }
    }

    /// What its writer said of it.
    pub(super) fn facts(&self) -> Facts {
        let group = u64::from_le_bytes(self.group);
        Facts { position: self.position, parent: self.parent, group, origin: self.origin }
    }

    pub(super) fn state(&self) -> State {
        match self.life & 3 {
            0 => State::Vacant,
            1 => State::Reserved,
            _ => State::Present,
        }
    }

    pub(super) fn moving(&self) -> Moving {
        match self.life >> 2 & 3 {
            0 => Moving::No,
            1 => Moving::Down,
            _ => Moving::Up,
        }
    }

    pub(super) fn keep(&self) -> Keep {
        match self.life >> 4 {
            0 => Keep::Cached,
            1 => Keep::Soft,
            _ => Keep::Hard,
        }
    }

    pub(super) fn set_state(&mut self, state: State) {
        self.life = self.life & !3 | state as u8;
    }

    pub(super) fn set_moving(&mut self, moving: Moving) {
        self.life = self.life & !(3 << 2) | (moving as u8) << 2;
    }

    pub(super) fn set_keep(&mut self, keep: Keep) {
        self.life = self.life & 15 | (keep as u8) << 4;
    }

    pub(super) fn has_slot(&self, level: Level) -> bool {
        self.slots[level as usize] != Slot::NONE
    }

    /// Whether its bytes can be used from there.
    pub(super) fn good_in(&self, level: Level) -> bool {
        let filling = match level {
            Level::Memory => self.moving() == Moving::Up,
            Level::Disk => self.moving() == Moving::Down,
        };
        self.state() == State::Present && self.has_slot(level) && !filling
    }

    /// Whether that tier may give it up.
    pub(super) fn idle_in(&self, level: Level) -> bool {
        let free_of_readers = match level {
            Level::Memory => self.leases == 0 && self.keep() != Keep::Hard,
            // A hard pin is a promise about the block, so its only copy stays too.
            Level::Disk => self.keep() != Keep::Hard || self.good_in(Level::Memory),
        };
        self.good_in(level) && self.moving() == Moving::No && free_of_readers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_stays_small() {
        assert!(size_of::<Entry>() <= 72, "{} bytes", size_of::<Entry>());
    }

    #[test]
    fn what_is_under_way_is_idle_nowhere() {
        let mut slabs = super::super::slab::Slabs::new(4096, 4096);
        let slot = slabs.take(super::super::BlockBytes(100), kvasir_types::BlockId(0)).expect("an empty slab");
        let mut both = Entry { slots: [slot; 2], ..Entry::VACANT };
        both.set_state(State::Present);
        assert!(Level::ALL.iter().all(|&level| both.good_in(level) && both.idle_in(level)));
        for moving in [Moving::Up, Moving::Down] {
            let mut entry = both;
            entry.set_moving(moving);
            assert_eq!((entry.state(), entry.moving(), entry.keep()), (State::Present, moving, Keep::Cached));
            assert!(Level::ALL.iter().all(|&level| !entry.idle_in(level)));
            assert_eq!(Level::ALL.iter().filter(|&&level| entry.good_in(level)).count(), 1);
        }
        let leased = Entry { leases: 1, ..both };
        assert!(!leased.idle_in(Level::Memory) && leased.idle_in(Level::Disk));
        let mut hard = Entry { slots: [Slot::NONE, slot], ..both };
        hard.set_keep(Keep::Hard);
        assert_eq!((hard.state(), hard.moving(), hard.keep()), (State::Present, Moving::No, Keep::Hard));
        assert!(!hard.idle_in(Level::Disk), "its only copy");
    }
}
