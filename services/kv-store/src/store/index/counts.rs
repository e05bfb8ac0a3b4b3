//! How many blocks there are, by what is true of them.

use crate::store::entry::{Entry, Keep, Level, State};

/// How many blocks there are, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Present, wherever they are.
    pub(crate) present: u64,
    /// Present with good bytes in memory, and on disk.
    pub(crate) good: [u64; 2],
    /// Present and held by at least one lease.
    pub(crate) leased: u64,
    /// Held by a writer.
    pub(crate) reserved: u64,
    /// Soft and hard pins, and the hard ones among them.
    pub(crate) kept: u64,
    pub(crate) hard: u64,
}

/// What a tier gave up, ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// Blocks that are still in the other tier.
    pub(crate) demoted: u64,
    /// Blocks that are gone.
    pub(crate) lost: u64,
}

impl Blocks {
    fn count(&mut self, entry: &Entry, add: impl Fn(&mut u64)) {
        match entry.state() {
            State::Vacant => return,
            State::Reserved => add(&mut self.reserved),
            State::Present => add(&mut self.present),
        }
        for level in Level::ALL {
            if entry.good_in(level) {
                add(&mut self.good[level as usize]);
            }
        }
        if entry.leases > 0 {
            add(&mut self.leased);
        }
        if entry.keep() != Keep::Cached {
            add(&mut self.kept);
        }
        if entry.keep() == Keep::Hard {
            add(&mut self.hard);
        }
    }

    pub(super) fn enter(&mut self, entry: &Entry) {
        self.count(entry, |n| *n += 1);
    }

    pub(super) fn leave(&mut self, entry: &Entry) {
        self.count(entry, |n| *n -= 1);
    }
}
