//! The index: which block lies where, in which state, and who goes when room is needed.
//!
//! ```text
//!               reserve                publish (after the writer was fenced off)
//!   (not there) ───────▶ Reserved ─────────────────────────────────────────────▶ Present, idle
//!        ▲                  │ undo                                        pin │ ▲ unpin (last)
//!        ├──────────────────┘                                                 ▼ │
//!        └──────────────────────────── evicted ◀── only idle ones ── Present, pinned
//! ```
//!
//! The rule guarded here: **a block that somebody may be reading or writing is never given up**, and a block can be found
//! only while it is `Present`. Blocks are named by hash within their size: the same tokens may be there in two sizes.

use std::collections::HashMap;

use kvasir_kv_cache::{Evict, Lru};
use kvasir_types::{BlockHash, BlockId};

use super::{
    Checksum,
    slab::{BlockBytes, SlabId, Slabs, Slot, Use},
};

/// What is known of a block.
#[derive(Debug)]
struct Entry {
    hash: BlockHash,
    size: BlockBytes,
    slot: Slot,
    last_use: Use,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reserved,
    Present { checksum: Checksum, pins: u32 },
}

/// What the index says about a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing by that hash in that size.
    Nothing,
    /// A writer is at it.
    Reserved,
    /// It is there.
    Present(BlockId),
}

/// Where a block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) hash: BlockHash,
    pub(crate) offset: u64,
    pub(crate) size: BlockBytes,
}

/// Blocks of one size.
#[derive(Default)]
struct Class {
    by_hash: HashMap<BlockHash, BlockId>,
    /// Those present that nobody holds, in the order in which they go.
    idle: Lru,
    /// Blocks evicted to make room for others of this size.
    evictions: u64,
}

/// How many blocks there are, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Present, pinned ones included.
    pub(crate) present: u64,
    /// Present and held by at least one lease.
    pub(crate) pinned: u64,
    /// Held by a writer.
    pub(crate) reserved: u64,
}

/// Every block of the node.
pub(crate) struct Index {
    slabs: Slabs,
    entries: Vec<Option<Entry>>,
    vacant: Vec<BlockId>,
    classes: HashMap<BlockBytes, Class>,
    blocks: Blocks,
    uses: Use,
    evicted: u64,
}

impl Index {
    pub(crate) fn new(slabs: Slabs) -> Self {
        Self {
            slabs,
            entries: Vec::new(),
            vacant: Vec::new(),
            classes: HashMap::new(),
            blocks: Blocks::default(),
            uses: Use::default(),
            evicted: 0,
        }
    }

    pub(crate) fn slabs(&self) -> &Slabs {
        &self.slabs
    }

    pub(crate) fn blocks(&self) -> Blocks {
        self.blocks
    }

    /// Blocks given up for room, ever.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    pub(crate) fn find(&self, size: BlockBytes, hash: BlockHash) -> Known {
        let Some(&id) = self.classes.get(&size).and_then(|class| class.by_hash.get(&hash)) else {
            return Known::Nothing;
        };
        match self.entry(id).state {
            State::Reserved => Known::Reserved,
            State::Present { .. } => Known::Present(id),
        }
    }

    /// Whether a block of any size is there under this hash with these bytes.
    pub(crate) fn holds(&self, hash: BlockHash, sum: Checksum) -> bool {
        self.classes
            .values()
            .filter_map(|class| class.by_hash.get(&hash))
            .any(|&id| matches!(self.entry(id).state, State::Present { checksum, .. } if checksum == sum))
    }

    pub(crate) fn place(&self, id: BlockId) -> Place {
        let entry = self.entry(id);
        Place { hash: entry.hash, offset: self.slabs.offset(entry.slot), size: entry.size }
    }

    /// The checksum of a block that is present.
    pub(crate) fn checksum(&self, id: BlockId) -> Option<Checksum> {
        match self.entry(id).state {
            State::Present { checksum, .. } => Some(checksum),
            State::Reserved => None,
        }
    }

    /// Room for a block that is not there, evicting idle ones if need be. `None`: all that could be given up is in use, or
    /// the block is larger than a slab.
    ///
    /// # Panics
    /// If something is known under that hash and size.
    pub(crate) fn reserve(&mut self, size: BlockBytes, hash: BlockHash) -> Option<BlockId> {
        if self.slabs.slots_per_slab(size) == 0 {
            return None;
        }
        let id = self.vacant.pop().or_else(|| {
            let id = BlockId(u32::try_from(self.entries.len()).ok()?);
            self.entries.push(None);
            Some(id)
        })?;
        let Some(slot) = self.room(size, id) else {
            self.vacant.push(id);
            return None;
        };
        self.slabs.hold(slot);
        self.entries[id.0 as usize] = Some(Entry { hash, size, slot, last_use: self.uses, state: State::Reserved });
        let before = self.classes.entry(size).or_default().by_hash.insert(hash, id);
        assert!(before.is_none(), "only what is not known is reserved");
        self.blocks.reserved += 1;
        Some(id)
    }

    /// The writer is done and fenced off, the bytes are right: readers may find the block.
    pub(crate) fn publish(&mut self, id: BlockId, checksum: Checksum) {
        let entry = self.entry_mut(id);
        assert!(matches!(entry.state, State::Reserved), "a block is published once");
        entry.state = State::Present { checksum, pins: 0 };
        let (size, slot) = (entry.size, entry.slot);
        self.blocks.reserved -= 1;
        self.blocks.present += 1;
        self.slabs.let_go(slot);
        self.class_mut(size).idle.insert(id);
        self.touch(id);
    }

    /// The writer is fenced off, the bytes are not to be used: the slot is empty again.
    pub(crate) fn undo(&mut self, id: BlockId) {
        let entry = self.entry(id);
        assert!(matches!(entry.state, State::Reserved), "only a reservation is undone");
        self.slabs.let_go(entry.slot);
        self.blocks.reserved -= 1;
        self.remove(id);
    }

    /// A reader holds the block.
    pub(crate) fn pin(&mut self, id: BlockId) {
        let entry = self.entry_mut(id);
        let State::Present { pins, .. } = &mut entry.state else { panic!("only a present block is pinned") };
        *pins += 1;
        if *pins == 1 {
            let (size, slot) = (entry.size, entry.slot);
            self.blocks.pinned += 1;
            self.slabs.hold(slot);
            self.class_mut(size).idle.remove(&id);
        }
    }

    /// A reader holds it no longer, and can't reach it any more.
    pub(crate) fn unpin(&mut self, id: BlockId) {
        let entry = self.entry_mut(id);
        let State::Present { pins, .. } = &mut entry.state else { panic!("only a present block is unpinned") };
        *pins = pins.checked_sub(1).expect("a block is unpinned as often as it was pinned");
        if *pins == 0 {
            let (size, slot) = (entry.size, entry.slot);
            self.blocks.pinned -= 1;
            self.slabs.let_go(slot);
            self.class_mut(size).idle.insert(id);
        }
    }

    /// The block was asked for.
    pub(crate) fn touch(&mut self, id: BlockId) {
        self.uses.0 += 1;
        let now = self.uses;
        let entry = self.entry_mut(id);
        entry.last_use = now;
        let (size, slot) = (entry.size, entry.slot);
        self.slabs.touch(slot, now);
        self.class_mut(size).idle.touch(&id);
    }

    /// A slot, in this order: an empty one; that of this size's block which is next to go; one of a slab of another size
    /// whose blocks have gone unused the longest.
    fn room(&mut self, size: BlockBytes, owner: BlockId) -> Option<Slot> {
        if let Some(slot) = self.slabs.take(size, owner) {
            return Some(slot);
        }
        match self.next_victim(size) {
            Some((victim, look_around)) => {
                let age = self.entry(victim).last_use;
                self.evict(victim);
                if look_around
                    && let Some((slab, last_use)) = self.slabs.coldest_other(size)
                    && last_use < age
                {
                    self.evict_slab(slab);
                }
            }
            None => {
                let (slab, _) = self.slabs.coldest_other(size)?;
                self.evict_slab(slab);
            }
        }
        self.slabs.take(size, owner)
    }

    /// Takes out this size's block that goes next, and says whether it is time to look at the slabs of other sizes: one that
    /// nobody uses any more would keep its slabs for ever. Looking at all slabs costs, so it is done once for each slab's
    /// worth of evictions.
    fn next_victim(&mut self, size: BlockBytes) -> Option<(BlockId, bool)> {
        let per_slab = self.slabs.slots_per_slab(size);
        let class = self.classes.get_mut(&size)?;
        let victim = class.idle.pop()?;
        class.evictions += 1;
        Some((victim, class.evictions.is_multiple_of(per_slab)))
    }

    fn evict_slab(&mut self, slab: SlabId) {
        for id in self.slabs.blocks_in(slab) {
            let size = self.entry(id).size;
            let was_idle = self.class_mut(size).idle.remove(&id);
            assert!(was_idle, "a slab that nobody holds has idle blocks only");
            self.evict(id);
        }
    }

    /// Gives up a block that the eviction order has let go of.
    fn evict(&mut self, id: BlockId) {
        let state = self.entry(id).state;
        assert!(matches!(state, State::Present { pins: 0, .. }), "only an idle block is evicted");
        self.blocks.present -= 1;
        self.evicted += 1;
        self.remove(id);
    }

    fn remove(&mut self, id: BlockId) {
        let entry = self.entries[id.0 as usize].take().expect("a block is removed once");
        self.slabs.put(entry.slot);
        self.vacant.push(id);
        let class = self.class_mut(entry.size);
        class.by_hash.remove(&entry.hash);
        if class.by_hash.is_empty() {
            self.classes.remove(&entry.size);
        }
    }

    fn entry(&self, id: BlockId) -> &Entry {
        self.entries[id.0 as usize].as_ref().expect("ids in use name entries")
    }

    fn entry_mut(&mut self, id: BlockId) -> &mut Entry {
        self.entries[id.0 as usize].as_mut().expect("ids in use name entries")
    }

    fn class_mut(&mut self, size: BlockBytes) -> &mut Class {
        self.classes.get_mut(&size).expect("a size with blocks has a class")
    }

    /// Compares every counter and every index with the entries.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.slabs.check();
        let (mut count, mut places) = (Blocks::default(), Vec::new());
        for (entry, id) in self.entries.iter().zip(0..) {
            let Some(entry) = entry else { continue };
            let (id, class) = (BlockId(id), &self.classes[&entry.size]);
            assert_eq!(class.by_hash.get(&entry.hash), Some(&id));
            match entry.state {
                State::Reserved => count.reserved += 1,
                State::Present { pins, .. } => {
                    count.present += 1;
                    count.pinned += u64::from(pins > 0);
                }
            }
            let offset = self.slabs.offset(entry.slot);
            places.push((offset, offset + entry.size.0));
        }
        assert_eq!(count, self.blocks);
        assert_eq!(self.classes.values().map(|c| c.by_hash.len()).sum::<usize>(), places.len());
        let idle: usize = self.classes.values().map(|class| class.idle.len()).sum();
        assert_eq!(idle as u64, count.present - count.pinned, "idle = what may be evicted");
        assert_eq!(self.vacant.len() + places.len(), self.entries.len());
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "two blocks share a byte");
        assert!(places.last().is_none_or(|last| last.1 <= self.slabs.capacity_bytes()));
    }
}
