//! The slab allocator: which bytes of a tier (the arena, or the disk's file) belong to which block.
//!
//! ```text
//!  tier   = | slab 0          | slab 1          | slab 2 ...
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
/// Slots of blocks from this size on start at multiples of it: files are read and written past the page cache only so.
const PAGE: u64 = 4096;

/// Size of a block as its users see it, in bytes. One class of slots for each size in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockBytes(pub u64);

/// Index of a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SlabId(u32);

/// One slot of one slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) slab: SlabId,
    index: u32,
}

impl Slot {
    /// Stands for no slot: four bytes less than an `Option`, in an index of millions.
    pub(crate) const NONE: Self = Self { slab: SlabId(u32::MAX), index: 0 };
}

/// When a block was last asked for, in sixteenths of a second since the store was made: enough for eight years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Use(pub(crate) u32);

/// Stands for an empty slot among the owners of a slab's slots.
const NOBODY: BlockId = BlockId(u32::MAX);

#[derive(Debug, Default)]
struct Slab {
    /// Whose slots it holds; `None` while it is free.
    size: Option<BlockBytes>,
    /// What lies in each slot, or [`NOBODY`].
    slots: Vec<BlockId>,
    /// Empty slots, the next one last.
    empty: Vec<u32>,
    /// Slots that somebody may be reading or writing: while there is one, the slab cannot be given to another size.
    held: u32,
    /// The latest use of any of its blocks.
    last_use: Use,
}

/// All slabs of a tier.
#[derive(Debug)]
pub(crate) struct Slabs {
    slab_bytes: u64,
    /// Slots start at multiples of this, whatever their size.
    align: u64,
    slabs: Vec<Slab>,
    /// Slabs without an owner, the lowest first, so that a half-used arena stays compact.
    free: BTreeSet<SlabId>,
    /// For each size, its slabs that have an empty slot.
    partial: HashMap<BlockBytes, BTreeSet<SlabId>>,
    used_bytes: u64,
    /// No slab is taken that has not been used before: there is less room than was thought.
    closed: bool,
}

impl Slabs {
    /// Memory: as many slabs of `slab_bytes` as fit into `capacity_bytes`.
    pub(crate) fn new(capacity_bytes: u64, slab_bytes: u64) -> Self {
        Self::aligned(capacity_bytes, slab_bytes, ALIGN)
    }

    /// The same of a disk, where all slots are whole pages.
    pub(crate) fn of_disk(capacity_bytes: u64, slab_bytes: u64) -> Self {
        Self::aligned(capacity_bytes, slab_bytes, PAGE)
    }

    fn aligned(capacity_bytes: u64, slab_bytes: u64, align: u64) -> Self {
        let count = u32::try_from(capacity_bytes / slab_bytes.max(1)).unwrap_or(u32::MAX);
        Self {
            slab_bytes,
            align,
            slabs: (0..count).map(|_| Slab::default()).collect(),
            free: (0..count).map(SlabId).collect(),
            partial: HashMap::new(),
            used_bytes: 0,
            closed: false,
        }
    }

    /// Whether free slabs may be taken into use. A disk that is full says no: what it holds already can still be replaced.
    pub(crate) fn close(&mut self, closed: bool) {
        self.closed = closed;
    }

    /// The slot at an offset, taken for `owner`: what a disk held when the process started. `None`: nothing of that size can
    /// be there, or something is.
    pub(crate) fn claim(&mut self, size: BlockBytes, offset: u64, owner: BlockId) -> Option<Slot> {
        let per_slab = u32::try_from(self.slots_per_slab(size)).ok().filter(|&slots| slots > 0)?;
        let id = SlabId(u32::try_from(offset / self.slab_bytes).ok()?);
        let within = offset % self.slab_bytes;
        let index = u32::try_from(within / self.stride(size)).ok().filter(|&index| index < per_slab)?;
        if !within.is_multiple_of(self.stride(size)) {
            return None;
        }
        match self.slabs.get(id.0 as usize)?.size {
            None => self.open_slab(id, size, per_slab),
            Some(theirs) if theirs == size => {}
            Some(_) => return None,
        }
        let slab = self.slab_mut(id);
        // Ascending offsets, as disks are read, are found at once: the lowest is the last of the empty ones.
        let at = slab.empty.iter().rposition(|&empty| empty == index)?;
        slab.empty.swap_remove(at);
        slab.slots[index as usize] = owner;
        if slab.empty.is_empty() {
            self.forget_partial(size, id);
        }
        self.used_bytes += self.stride(size);
        Some(Slot { slab: id, index })
    }

    /// A free slab gets a size.
    fn open_slab(&mut self, id: SlabId, size: BlockBytes, per_slab: u32) {
        self.free.remove(&id);
        let slab = self.slab_mut(id);
        slab.size = Some(size);
        slab.slots = vec![NOBODY; per_slab as usize];
        slab.empty = (0..per_slab).rev().collect();
        slab.last_use = Use::default();
        self.partial.entry(size).or_default().insert(id);
    }

    /// Bytes from one slot of this size to the next.
    fn stride(&self, size: BlockBytes) -> u64 {
        size.0.next_multiple_of(if size.0 < PAGE { self.align } else { PAGE })
    }

    /// How many blocks of this size one slab holds; zero if the size is none or too large.
    pub(crate) fn slots_per_slab(&self, size: BlockBytes) -> u64 {
        if size.0 == 0 || size.0 > self.slab_bytes { 0 } else { self.slab_bytes / self.stride(size) }
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
                let id = self.free.first().copied().filter(|_| !self.closed)?;
                let per_slab = u32::try_from(per_slab).expect("a slab is smaller than 2^32 slots of 64 bytes");
                self.open_slab(id, size, per_slab);
                id
            }
        };
        let slab = self.slab_mut(id);
        let index = slab.empty.pop().expect("a slab listed as partial has an empty slot");
        let before = std::mem::replace(&mut slab.slots[index as usize], owner);
        assert_eq!(before, NOBODY, "a slot listed as empty has an owner");
        if slab.empty.is_empty() {
            self.forget_partial(size, id);
        }
        self.used_bytes += self.stride(size);
        Some(Slot { slab: id, index })
    }

    /// A slot is empty again. A slab whose last slot that was is free for all sizes.
    pub(crate) fn put(&mut self, slot: Slot) {
        let slab = self.slab_mut(slot.slab);
        let size = slab.size.expect("a slab with a taken slot has a size");
        let owner = std::mem::replace(&mut slab.slots[slot.index as usize], NOBODY);
        assert_ne!(owner, NOBODY, "a slot is given back once");
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
        self.used_bytes -= self.stride(size);
    }

    /// The slot's number among all slots, if all slabs were of this size.
    pub(crate) fn number(&self, size: BlockBytes, slot: Slot) -> u32 {
        let per_slab = u32::try_from(self.slots_per_slab(size)).expect("a slab has fewer slots");
        slot.slab.0 * per_slab + slot.index
    }

    /// The block in the slot of that number.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn owner(&self, size: BlockBytes, number: u32) -> BlockId {
        let per_slab = u32::try_from(self.slots_per_slab(size)).expect("a slab has fewer slots");
        let owner = self.slab(SlabId(number / per_slab)).slots[(number % per_slab) as usize];
        assert_ne!(owner, NOBODY, "a number in use names a block");
        owner
    }

    /// Where the slot starts in the tier.
    pub(crate) fn offset(&self, slot: Slot) -> u64 {
        let stride = self.slab(slot.slab).size.map_or(0, |size| self.stride(size));
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
        self.slab(id).slots.iter().copied().filter(|&owner| owner != NOBODY).collect()
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
            let taken = slab.slots.iter().filter(|&&owner| owner != NOBODY).count();
            assert!(taken > 0, "{id:?}: a slab without blocks is free");
            assert_eq!(taken + slab.empty.len(), slab.slots.len(), "{id:?}: taken + empty = all");
            assert_eq!(self.partial.get(&size).is_some_and(|p| p.contains(&id)), !slab.empty.is_empty());
            used += taken as u64 * self.stride(size);
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
    fn what_was_at_an_offset_is_claimed_there_and_nothing_beside_it() {
        let mut slabs = Slabs::new(4096, 1024);
        let slot = slabs.claim(SMALL, 2048 + 256, BlockId(1)).unwrap();
        assert_eq!(slabs.offset(slot), 2048 + 256);
        for (size, offset) in [(SMALL, 2048 + 256), (SMALL, 2048 + 64), (LARGE, 2048), (SMALL, 4096), (SMALL, u64::MAX)]
        {
            assert_eq!(slabs.claim(size, offset, BlockId(2)), None, "{size:?} at {offset}");
        }
        let beside = slabs.take(SMALL, BlockId(2)).unwrap();
        assert_eq!((beside.slab, slabs.used_bytes()), (slot.slab, 256));
        slabs.check();
    }

    #[test]
    fn a_closed_tier_uses_what_it_has() {
        let mut slabs = Slabs::new(4096, 1024);
        let slot = slabs.take(LARGE, BlockId(0)).unwrap();
        slabs.close(true);
        assert!(slabs.take(LARGE, BlockId(1)).is_some(), "its slab has another slot");
        assert_eq!(slabs.take(LARGE, BlockId(2)), None);
        slabs.put(slot);
        assert!(slabs.take(LARGE, BlockId(2)).is_some());
        slabs.close(false);
        assert!(slabs.take(SMALL, BlockId(3)).is_some());
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
