//! Going through all blocks, a piece at a time: what an operator evicts, and what another node is to have.
//!
//! A node may have ten million blocks; whoever goes through them holds the lock for one piece only. Blocks come and go
//! meanwhile, so what is seen was there at some moment of the walk, no more.

use std::collections::HashSet;

use kvasir_types::{BlockHash, BlockId};

use super::{BlockBytes, Facts, Level, Place, Store, entry::Entry};

/// Entries looked at with the lock held.
const PIECE: u32 = 1 << 16;

/// Which blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// All of them.
    All,
    /// Those of a model, a tenant, or both.
    Of { model: Option<[u8; 16]>, tenant: Option<String> },
    /// Those that follow a block whose hash begins so, directly.
    After(HashSet<u32>),
}

/// How far a walk has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sift {
    /// Where to go on; `None` at the end.
    pub(crate) next: Option<u32>,
    /// Blocks given up.
    pub(crate) evicted: u64,
    /// Blocks that were meant, but are in use.
    pub(crate) in_use: u64,
    /// Copies that the disk is to forget; each block is gone once that is told to [`Store::forgotten`].
    pub(crate) forget: Vec<Forget>,
}

/// A copy on disk to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forget {
    pub(crate) block: BlockId,
    pub(crate) place: Place,
}

/// What is known of a block that a walk passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) hash: BlockHash,
    pub(crate) size: BlockBytes,
    pub(crate) facts: Facts,
    pub(crate) in_memory: bool,
    /// In sixteenths of a second since the store was made.
    pub(crate) last_use: u32,
}

/// First four bytes of a hash: enough to tell a block's parent among those of one walk.
pub(crate) fn tag(hash: BlockHash) -> u32 {
    let mut first = [0; 4];
    first.copy_from_slice(&hash.0[..4]);
    u32::from_le_bytes(first)
}

impl Store {
    /// Gives up, of one piece of all blocks, those that are meant. The hashes of those are given to `each`.
    pub(crate) fn evict(&mut self, from: u32, which: &Which, mut each: impl FnMut(BlockHash)) -> Sift {
        let mut meant = Vec::new();
        let next = self.index.scan(from, PIECE, |id, entry| meant.push((id, entry.hash, entry.origin, entry.parent)));
        let mut sift = Sift { next, ..Sift::default() };
        for (id, hash, origin, parent) in meant {
            let is_meant = match which {
                Which::All => true,
                Which::After(parents) => parents.contains(&parent) && parent != 0,
                Which::Of { model, tenant } => {
                    let name = self.index.quotas().name(origin);
                    model.is_none_or(|model| model == name.model) && tenant.as_ref().is_none_or(|t| *t == name.tenant)
                }
            };
            if !is_meant {
                continue;
            }
            if self.give_up(id, &mut sift) {
                each(hash);
            }
        }
        sift
    }

    /// Gives these blocks up.
    pub(crate) fn evict_these(&mut self, size: BlockBytes, hashes: &[BlockHash]) -> Sift {
        let mut sift = Sift::default();
        // Backwards: a run is never without its beginning.
        for &hash in hashes.iter().rev() {
            let Some(id) = self.index.find(size, hash) else { continue };
            self.give_up(id, &mut sift);
        }
        sift
    }

    /// The disk has forgotten a copy, or can't be asked. Whether the block is gone.
    pub(crate) fn forgotten(&mut self, block: BlockId) -> bool {
        let gone = self.index.end_forget(block);
        if gone {
            self.pins.forget(block);
        }
        gone
    }

    #[expect(dead_code, reason = "for handing blocks over to other nodes")]
    /// Shows one piece of all blocks; where to go on, `None` at the end.
    pub(crate) fn walk(&self, from: u32, mut each: impl FnMut(Seen)) -> Option<u32> {
        self.index.scan(from, PIECE, |id, entry: &Entry| {
            each(Seen {
                hash: entry.hash,
                size: self.index.size(id),
                facts: entry.facts(),
                in_memory: entry.good_in(Level::Memory),
                last_use: entry.last_use.0,
            });
        })
    }

    /// What somebody pinned is given up like the rest: who asks for it by name means it. Whether it goes.
    fn give_up(&mut self, id: BlockId, sift: &mut Sift) -> bool {
        if self.index.give_up(id) {
            self.pins.forget(id);
            sift.evicted += 1;
            return true;
        }
        match self.index.start_forget(id) {
            Some(place) => sift.forget.push(Forget { block: id, place }),
            None => sift.in_use += 1,
        }
        sift.forget.last().is_some_and(|forget| forget.block == id)
    }
}
