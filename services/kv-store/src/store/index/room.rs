//! Making room: who gives up a place for a block that comes.

use kvasir_types::BlockId;

use super::{Class, Index};
use crate::store::{
    entry::{ClassId, Level},
    slab::{BlockBytes, SlabId, Slot},
};

impl Index {
    /// A slot: an empty one; else one of a slab of another size, if all its blocks have gone unused for longer than the
    /// block of this size that is next to go; else that block's. Who is over a quota pays with blocks of his own.
    pub(super) fn room(&mut self, level: Level, class: ClassId, owner: BlockId) -> Option<Slot> {
        let size = self.class(class).size;
        let over =
            self.quotas.is_over(self.class(class).share, level, size, self.slabs[level as usize].capacity_bytes());
        if !over && let Some(slot) = self.slabs[level as usize].take(size, owner) {
            return Some(slot);
        }
        let candidates = if over { vec![class.0 as usize] } else { self.of_size(size, level) };
        if !over && let Some(slab) = self.colder_slab(level, class, &candidates) {
            self.evict_slab(slab, level);
        } else if let Some(victim) = self.next_victim(level, size, &candidates) {
            self.evict(victim, level);
        } else if over {
            return None;
        } else {
            let (slab, _) = self.slabs[level as usize].coldest_other(size)?;
            self.evict_slab(slab, level);
        }
        self.slabs[level as usize].take(size, owner)
    }

    /// The classes of this size that have blocks, those first whose blocks to go next are the oldest.
    fn of_size(&self, size: BlockBytes, level: Level) -> Vec<usize> {
        let mut candidates: Vec<usize> = (0..self.classes.len())
            .filter(|&at| self.classes[at].size == size && self.classes[at].blocks > 0)
            .collect();
        candidates.sort_by_key(|&class| self.classes[class].tail[level as usize]);
        candidates
    }

    /// A slab of another size that is colder than what this size would give up: a size that nobody uses any more would keep
    /// its slabs for ever. Looking at all slabs costs, so once none was found, a slab's worth of evictions goes by first.
    fn colder_slab(&mut self, level: Level, class: ClassId, candidates: &[usize]) -> Option<SlabId> {
        let (size, at) = (self.class(class).size, level as usize);
        let wait = &mut self.classes[class.0 as usize].look_after[at];
        if *wait > 0 {
            *wait -= 1;
            return None;
        }
        let age = candidates.first().map(|&class| self.classes[class].tail[at]);
        let slabs = &self.slabs[at];
        let found = slabs.coldest_other(size).filter(|&(_, last_use)| age.is_some_and(|age| last_use < age));
        if found.is_none() {
            self.classes[class.0 as usize].look_after[at] = slabs.slots_per_slab(size);
        }
        found.map(|(slab, _)| slab)
    }

    /// Takes out the block of these classes that goes next.
    fn next_victim(&mut self, level: Level, size: BlockBytes, candidates: &[usize]) -> Option<BlockId> {
        let pop = |soft: bool, classes: &mut [Class]| {
            candidates.iter().find_map(|&class| Some((class, classes[class].pop(level, soft)?)))
        };
        let (from, key) = pop(false, &mut self.classes).or_else(|| pop(true, &mut self.classes))?;
        let victim = self.block_at(size, level, key);
        self.classes[from].tail[level as usize] = self.entry(victim).last_use;
        Some(victim)
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
