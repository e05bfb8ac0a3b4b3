//! The slab allocator: which bytes of the arena belong to which block.
//!
//! ```text
//!  arena  = | slab 0          | slab 1          | slab 2 ...
//!  slab   = | slot | slot | slot | tail |          slots of ONE size; the tail is smaller than a slot
//! ```
//!
//! All blocks of a model have one size, so a slab is cut into slots of one size and belongs to that size for as long as
//! any of its slots is taken; an empty slab goes back to all sizes at once. Nothing is ever moved: remote readers and
//! writers hold addresses. The rule guarded here: **two blocks never share a byte**, and taken + free = all, always.

use std::collections::{BTreeSet, HashMap};

use kvasir_types::BlockId;

/// Slots start at multiples of this, as the arena itself does: a cache line, and what vector loads want.
const ALIGN: u64 = 64;

/// Size of a block as its users see it, in bytes. One class of slots for each size in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockBytes(pub u64);

impl BlockBytes {
    /// Bytes from one slot of this size to the next.
    fn stride(self) -> u64 {
        self.0.next_multiple_of(ALIGN)
    }
}

/// Index of a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SlabId(u32);

/// One slot of one slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) slab: SlabId,
    index: u32,
}

/// When a block was last asked for: the n-th use of the store. A count, not a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Use(pub(crate) u64);

#[derive(Debug, Default)]
struct Slab {
    /// Whose slots it holds; `None` while it is free.
    size: Option<BlockBytes>,
    /// What lies in each slot.
    slots: Vec<Option<BlockId>>,
    /// Empty slots, the next one last.
    empty: Vec<u32>,
    /// Slots that somebody may be reading or writing: while there is one, the slab cannot be given to another size.
    held: u32,
    /// The latest use of any of its blocks.
    last_use: Use,
}

/// All slabs of the arena.
#[derive(Debug)]
pub(crate) struct Slabs {
    slab_bytes: u64,
    slabs: Vec<Slab>,
    /// Slabs without an owner, the lowest first, so that a half-used arena stays compact.
    free: BTreeSet<SlabId>,
    /// For each size, its slabs that have an empty slot.
    partial: HashMap<BlockBytes, BTreeSet<SlabId>>,
    used_bytes: u64,
}

impl Slabs {
    /// As many slabs of `slab_bytes` as fit into `capacity_bytes`.
    pub(crate) fn new(capacity_bytes: u64, slab_bytes: u64) -> Self {
        let count = u32::try_from(capacity_bytes / slab_bytes.max(1)).unwrap_or(u32::MAX);
        Self {
            slab_bytes,
            slabs: (0..count).map(|_| Slab::default()).collect(),
            free: (0..count).map(SlabId).collect(),
            partial: HashMap::new(),
            used_bytes: 0,
        }
    }

    /// How many blocks of this size one slab holds; zero if the size is none or too large.
    pub(crate) fn slots_per_slab(&self, size: BlockBytes) -> u64 {
        if size.0 == 0 || size.0 > self.slab_bytes { 0 } else { self.slab_bytes / size.stride() }
    }

    /// Bytes of slots taken.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Bytes of all slabs.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.slabs.len() as u64 * self.slab_bytes
    }

    /// An empty slot for `owner`: of a slab that has this size already, else of a free slab.
    pub(crate) fn take(&mut self, size: BlockBytes, owner: BlockId) -> Option<Slot> {
        let per_slab = self.slots_per_slab(size);
        if per_slab == 0 {
            return None;
        }
        let partial = self.partial.get(&size).and_then(BTreeSet::first).copied();
        let id = match partial {
            Some(id) => id,
            None => {
                let id = self.free.pop_first()?;
                let per_slab = u32::try_from(per_slab).expect("a slab is smaller than 2^32 slots of 64 bytes");
                let slab = self.slab_mut(id);
                slab.size = Some(size);
                slab.slots = vec![None; per_slab as usize];
                slab.empty = (0..per_slab).rev().collect();
                slab.last_use = Use::default();
                self.partial.entry(size).or_default().insert(id);
                id
            }
        };
        let slab = self.slab_mut(id);
        let index = slab.empty.pop().expect("a slab listed as partial has an empty slot");
        let before = slab.slots[index as usize].replace(owner);
        assert!(before.is_none(), "a slot listed as empty has an owner");
        if slab.empty.is_empty() {
            self.forget_partial(size, id);
        }
        self.used_bytes += size.stride();
        Some(Slot { slab: id, index })
    }

    /// A slot is empty again. A slab whose last slot that was is free for all sizes.
    pub(crate) fn put(&mut self, slot: Slot) {
        let slab = self.slab_mut(slot.slab);
        let size = slab.size.expect("a slab with a taken slot has a size");
        let owner = slab.slots[slot.index as usize].take();
        assert!(owner.is_some(), "a slot is given back once");
        slab.empty.push(slot.index);
        let all_empty = slab.empty.len() == slab.slots.len();
        if all_empty {
            debug_assert_eq!(slab.held, 0, "an empty slab is held by nobody");
            *slab = Slab::default();
        }
        if all_empty {
            self.forget_partial(size, slot.slab);
            self.free.insert(slot.slab);
        } else {
            self.partial.entry(size).or_default().insert(slot.slab);
        }
        self.used_bytes -= size.stride();
    }

    /// Where the slot starts in the arena.
    pub(crate) fn offset(&self, slot: Slot) -> u64 {
        let stride = self.slab(slot.slab).size.map_or(0, BlockBytes::stride);
        u64::from(slot.slab.0) * self.slab_bytes + u64::from(slot.index) * stride
    }

    /// Somebody may read or write the slot from now on.
    pub(crate) fn hold(&mut self, slot: Slot) {
        self.slab_mut(slot.slab).held += 1;
    }

    /// The opposite of [`Slabs::hold`].
    pub(crate) fn let_go(&mut self, slot: Slot) {
        let slab = self.slab_mut(slot.slab);
        slab.held = slab.held.checked_sub(1).expect("a slot is let go as often as it was held");
    }

    /// The block in the slot was asked for.
    pub(crate) fn touch(&mut self, slot: Slot, at: Use) {
        let slab = self.slab_mut(slot.slab);
        slab.last_use = slab.last_use.max(at);
    }

    /// Of the slabs of other sizes that nobody holds any slot of: the one whose blocks have gone unused the longest.
    pub(crate) fn coldest_other(&self, size: BlockBytes) -> Option<(SlabId, Use)> {
        self.slabs
            .iter()
            .zip(0..)
            .filter(|(slab, _)| slab.held == 0 && slab.size.is_some_and(|theirs| theirs != size))
            .map(|(slab, id)| (SlabId(id), slab.last_use))
            .min_by_key(|&(_, last_use)| last_use)
    }

    /// The blocks in a slab.
    pub(crate) fn blocks_in(&self, id: SlabId) -> Vec<BlockId> {
        self.slab(id).slots.iter().copied().flatten().collect()
    }

    fn forget_partial(&mut self, size: BlockBytes, id: SlabId) {
        if let Some(slabs) = self.partial.get_mut(&size) {
            slabs.remove(&id);
            if slabs.is_empty() {
                self.partial.remove(&size);
            }
        }
    }

    fn slab(&self, id: SlabId) -> &Slab {
        &self.slabs[id.0 as usize]
    }

    fn slab_mut(&mut self, id: SlabId) -> &mut Slab {
        &mut self.slabs[id.0 as usize]
    }

    /// Compares every counter with what it counts.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        let mut used = 0;
        for (slab, id) in self.slabs.iter().zip(0..) {
            let id = SlabId(id);
            assert_eq!(self.free.contains(&id), slab.size.is_none(), "{id:?}: free or of a size");
            let Some(size) = slab.size else { continue };
            let taken = slab.slots.iter().flatten().count();
            assert!(taken > 0, "{id:?}: a slab without blocks is free");
            assert_eq!(taken + slab.empty.len(), slab.slots.len(), "{id:?}: taken + empty = all");
            assert_eq!(self.partial.get(&size).is_some_and(|p| p.contains(&id)), !slab.empty.is_empty());
            used += taken as u64 * size.stride();
        }
        assert_eq!(used, self.used_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: BlockBytes = BlockBytes(100); // stride 128
    const LARGE: BlockBytes = BlockBytes(512);

    fn ids() -> impl Iterator<Item = BlockId> {
        (0..).map(BlockId)
    }

    #[test]
    fn slots_of_all_sizes_are_disjoint_and_aligned() {
        let mut slabs = Slabs::new(4096, 1024);
        let mut taken = Vec::new();
        for (id, size) in ids().zip([SMALL, LARGE].into_iter().cycle()).take(24) {
            if let Some(slot) = slabs.take(size, id) {
                taken.push((slabs.offset(slot), size.0));
            }
        }
        taken.sort_unstable();
        assert!(taken.iter().all(|(offset, len)| offset % ALIGN == 0 && offset + len <= 4096));
        assert!(taken.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        slabs.check();
    }

    #[test]
    fn an_emptied_slab_serves_another_size() {
        let mut slabs = Slabs::new(1024, 1024);
        let slots: Vec<_> = ids().map_while(|id| slabs.take(SMALL, id)).collect();
        assert_eq!(slots.len(), 8);
        assert_eq!(slabs.take(LARGE, BlockId(99)), None);
        slots.into_iter().for_each(|slot| slabs.put(slot));
        assert_eq!(slabs.used_bytes(), 0);
        assert!(slabs.take(LARGE, BlockId(99)).is_some());
        slabs.check();
    }

    #[test]
    fn a_size_that_no_slab_can_hold_gets_nothing() {
        let mut slabs = Slabs::new(4096, 1024);
        for size in [0, 1025, u64::MAX - 1, u64::MAX] {
            assert_eq!(slabs.take(BlockBytes(size), BlockId(0)), None, "{size}");
        }
        slabs.check();
    }

    #[test]
    fn a_held_slab_is_never_the_coldest() {
        let mut slabs = Slabs::new(2048, 1024);
        let old = slabs.take(LARGE, BlockId(0)).unwrap();
        assert_eq!(slabs.coldest_other(SMALL), Some((old.slab, Use(0))));
        slabs.hold(old);
        assert_eq!(slabs.coldest_other(SMALL), None);
        slabs.let_go(old);
        assert_eq!(slabs.coldest_other(LARGE), None, "only of other sizes");
    }
}
