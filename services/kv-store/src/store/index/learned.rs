//! What the orders of memory remember and have learned, by block size: that of all quotas together.

use std::collections::HashMap;

use kvasir_kv_cache::Learned;
use kvasir_types::BlockHash;

use super::{Class, Index};
use crate::store::{entry::Level, slab::BlockBytes};

impl Index {
    /// Whether a block of that name was given up by memory, not too long ago.
    pub(crate) fn remembers(&self, size: BlockBytes, hash: BlockHash) -> bool {
        self.in_use().any(|class| class.size == size && class.idle[Level::Memory as usize].remembers(hash))
    }

    /// What was counted here, for so many sizes: those with the most blocks.
    pub(crate) fn learned(&self, sizes: usize) -> Vec<(BlockBytes, Learned)> {
        let mut by_size: HashMap<BlockBytes, (u64, Learned)> = HashMap::new();
        for class in self.in_use() {
            let Some(learned) = class.idle[Level::Memory as usize].learned() else { continue };
            let (blocks, sum) = by_size.entry(class.size).or_default();
            *blocks += class.blocks;
            sum.add(&learned);
        }
        let mut learned: Vec<_> = by_size.into_iter().collect();
        learned.sort_unstable_by_key(|&(size, (blocks, _))| std::cmp::Reverse((blocks, size)));
        learned.into_iter().take(sizes).map(|(size, (_, learned))| (size, learned)).collect()
    }

    /// What all others have counted. Of sizes that are not named they have counted nothing.
    pub(crate) fn hear(&mut self, others: &HashMap<BlockBytes, Learned>) {
        for class in self.classes.iter_mut().filter(|class| class.blocks > 0) {
            let heard = others.get(&class.size).cloned().unwrap_or_default();
            class.idle[Level::Memory as usize].hear(heard);
        }
    }

    fn in_use(&self) -> impl Iterator<Item = &Class> {
        self.classes.iter().filter(|class| class.blocks > 0)
    }
}
