//! Pins: blocks that an operator or a client wants kept, and until when.
//!
//! A **soft** pin makes a block go last, a **hard** one not at all. Every pin ends: a pin that outlived whoever asked for
//! it would take its memory for ever.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use kvasir_types::{BlockHash, BlockId};

use super::{BlockBytes, Keep, Store, entry::State};

/// Pinned blocks by when their pins end.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    until: HashMap<BlockId, Instant>,
    by_end: BTreeSet<(Instant, BlockId)>,
}

impl Pins {
    fn set(&mut self, block: BlockId, until: Instant) {
        self.forget(block);
        self.until.insert(block, until);
        self.by_end.insert((until, block));
    }

    /// The block is not pinned any more, or is gone.
    pub(super) fn forget(&mut self, block: BlockId) {
        if let Some(until) = self.until.remove(&block) {
            self.by_end.remove(&(until, block));
        }
    }

    /// Those whose time is over.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<BlockId> {
        let mut over = Vec::new();
        while let Some(&(until, block)) = self.by_end.first()
            && until <= now
        {
            self.forget(block);
            over.push(block);
        }
        over
    }

    pub(super) fn next_end(&self) -> Option<Instant> {
        self.by_end.first().map(|&(until, _)| until)
    }
}

impl Store {
    /// So many percent of the memory may be kept by hard pins from now on. Those that are there stay.
    pub(crate) fn set_max_pinned_percent(&mut self, percent: u8) {
        self.settings.max_pinned_percent = percent;
    }

    /// Keeps those of `hashes` that are here until then; `Keep::Cached` ends pins. How many are kept so now: hard pins are
    /// taken only as long as there is room for them, and only of blocks in memory.
    pub(crate) fn keep(&mut self, size: BlockBytes, hashes: &[BlockHash], keep: Keep, until: Instant) -> usize {
        let percent = u64::from(self.settings.max_pinned_percent);
        let most = u128::from(self.index.slabs(super::Level::Memory).capacity_bytes()) * u128::from(percent) / 100;
        let mut kept = 0;
        for &hash in hashes {
            let Some(id) = self.index.find(size, hash) else { continue };
            let entry = *self.index.entry(id);
            if entry.state() != State::Present {
                continue;
            }
            if keep == Keep::Hard && entry.keep() != Keep::Hard {
                let would_be = u128::from(self.index.blocks().hard + 1) * u128::from(size.0);
                if would_be > most || !entry.good_in(super::Level::Memory) {
                    continue;
                }
            }
            self.index.keep(id, keep);
            match keep {
                Keep::Cached => self.pins.forget(id),
                Keep::Soft | Keep::Hard => self.pins.set(id, until),
            }
            kept += 1;
        }
        kept
    }
}
