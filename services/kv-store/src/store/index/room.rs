//! Making room: who gives up a place for a block that comes.

use kvasir_types::BlockId;

use super::{Class, Index};
use crate::store::{
    entry::{ClassId, Level},
    slab::{SlabId, Slot},
};

impl Index {
    /// A slot, in this order: an empty one; that of the block of this size which is next to go; one of a slab of another
    /// size whose blocks have gone unused the longest.
    pub(super) fn room(&mut self, level: Level, class: ClassId, owner: BlockId) -> Option<Slot> {
        let size = self.class(class).size;
        let over =
            self.quotas.is_over(self.class(class).share, level, size, self.slabs[level as usize].capacity_bytes());
        if !over && let Some(slot) = self.slabs[level as usize].take(size, owner) {
            return Some(slot);
        }
        match self.next_victim(level, class, over) {
            Some((victim, look_around)) => {
                let age = self.entry(victim).last_use;
                self.evict(victim, level);
                if look_around
                    && let Some((slab, last_use)) = self.slabs[level as usize].coldest_other(size)
                    && last_use < age
                {
                    self.evict_slab(slab, level);
                }
            }
            None if over => return None,
            None => {
                let (slab, _) = self.slabs[level as usize].coldest_other(size)?;
                self.evict_slab(slab, level);
            }
        }
        self.slabs[level as usize].take(size, owner)
    }

    /// Takes out the block that goes next, and says whether it is time to look at the slabs of other sizes: one that nobody
    /// uses any more would keep its slabs for ever. Looking at all slabs costs, so it is done once for each slab's worth of
    /// evictions. Who is over a quota pays with blocks of his own; else the class of this size whose blocks are oldest does.
    fn next_victim(&mut self, level: Level, class: ClassId, over: bool) -> Option<(BlockId, bool)> {
        let (size, at) = (self.class(class).size, level as usize);
        let per_slab = self.slabs[at].slots_per_slab(size);
        let mut candidates: Vec<usize> = if over {
            vec![class.0 as usize]
        } else {
            (0..self.classes.len()).filter(|&at| self.classes[at].size == size && self.classes[at].blocks > 0).collect()
        };
        candidates.sort_by_key(|&class| self.classes[class].tail[at]);
        let pop = |soft: bool, classes: &mut [Class]| {
            candidates.iter().find_map(|&class| Some((class, classes[class].pop(level, soft)?)))
        };
        let (from, key) = pop(false, &mut self.classes).or_else(|| pop(true, &mut self.classes))?;
        let victim = self.block_at(size, level, key);
        self.classes[from].tail[at] = self.entry(victim).last_use;
        let evictions = &mut self.classes[class.0 as usize].evictions[at];
        *evictions += 1;
        Some((victim, evictions.is_multiple_of(per_slab.max(1))))
    }

    fn evict_slab(&mut self, slab: SlabId, level: Level) {
        for id in self.slabs[level as usize].blocks_in(slab) {
            let entry = *self.entry(id);
            assert!(entry.idle_in(level), "a slab that nobody holds has idle blocks only");
            let key = self.order_key(id, &entry, level);
            self.class_mut(entry.class).remove(level, entry.keep(), key);
            self.evict(id, level);
        }
    }

    /// A tier gives up a block that its eviction order has let go of.
    fn evict(&mut self, id: BlockId, level: Level) {
        let entry = *self.entry(id);
        assert!(entry.idle_in(level), "only an idle block is evicted");
        if entry.good_in(level.other()) {
            self.evicted[level as usize].demoted += 1;
            self.take_slot(id, level);
        } else {
            self.evicted[level as usize].lost += 1;
            self.remove(id);
        }
    }
}
