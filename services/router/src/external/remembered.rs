//! Which prompts an engine was sent: what its cache is thought to hold, as it tells nobody.
//!
//! The names of the prompts' blocks go into the router's index under the engine's number, as those of a worker's cache do. Of
//! these no more than a bound are kept; the longest unused go first. It is an estimate: what the engine has given up, and
//! what other routers sent there, is not known.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kvasir_types::BlockHash;

use crate::cache::{Index, Number};

/// What was sent to one engine. Written by requests; closed by the engine's feed before its number is given to another.
#[derive(Debug)]
pub(crate) struct Remembered {
    /// Leaf lock but for the index's shards, held for the blocks of one prompt.
    blocks: Mutex<Recent>,
    limit: usize,
}

impl Remembered {
    /// At most so many blocks.
    pub(crate) fn new(limit: usize) -> Self {
        Self { blocks: Mutex::default(), limit }
    }

    /// Whether anything is remembered at all.
    pub(crate) fn remembers(&self) -> bool {
        self.limit > 0
    }

    /// From here on, under this number.
    pub(crate) fn open(&self, number: Number) {
        self.lock().number = Some(number);
    }

    /// Nothing more, until it is opened again. What is in the index is for others to sweep.
    pub(crate) fn close(&self) {
        *self.lock() = Recent::default();
    }

    /// The engine has been sent a prompt of these blocks.
    pub(crate) fn sent(&self, index: &Index, blocks: impl Iterator<Item = BlockHash>) {
        let mut recent = self.lock();
        let Some(number) = recent.number else { return };
        // From the end on: a prompt's first blocks are worth most, and go last.
        let blocks: Vec<BlockHash> = blocks.take(self.limit).collect();
        for hash in blocks.iter().rev() {
            if recent.touch(*hash) {
                index.insert(hash, number);
            }
        }
        while recent.used.len() > self.limit {
            let Some(oldest) = recent.forget_oldest() else { break };
            index.remove(&oldest, number);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Recent> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks by when they were last used.
#[derive(Debug, Default)]
struct Recent {
    number: Option<Number>,
    clock: u64,
    used: HashMap<BlockHash, u64>,
    order: BTreeMap<u64, BlockHash>,
}

impl Recent {
    /// It was used now; whether it is new.
    fn touch(&mut self, hash: BlockHash) -> bool {
        self.clock += 1;
        self.order.insert(self.clock, hash);
        match self.used.insert(hash, self.clock) {
            Some(before) => {
                self.order.remove(&before);
                false
            }
            None => true,
        }
    }

    fn forget_oldest(&mut self) -> Option<BlockHash> {
        let (_, hash) = self.order.pop_first()?;
        self.used.remove(&hash);
        Some(hash)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cache::Lookup;

    fn name(number: u32) -> BlockHash {
        BlockHash(u128::from(number).to_le_bytes())
    }

    fn held(index: &Index, chain: std::ops::Range<u32>) -> u32 {
        let mut lookup = Lookup::default();
        index.lookup(chain.map(name), &mut lookup);
        lookup.found().first().map_or(0, |found| found.1)
    }

    #[test]
    fn what_was_sent_is_found_until_others_take_its_place() {
        let (index, remembered) = (Index::default(), Remembered::new(10));
        remembered.sent(&index, (0..4).map(name));
        assert_eq!(held(&index, 0..4), 0, "nobody follows it yet");
        remembered.open(index.join().unwrap());
        remembered.sent(&index, (0..4).map(name));
        remembered.sent(&index, (100..104).map(name));
        assert_eq!((held(&index, 0..4), held(&index, 100..104), held(&index, 0..9)), (4, 4, 4));
        // Four more: the first prompt's last blocks go.
        remembered.sent(&index, (200..204).map(name));
        assert_eq!((held(&index, 0..4), held(&index, 100..104), held(&index, 200..204)), (2, 4, 4));
        assert_eq!(index.held(), 10);
        // One that is longer than all: its beginning.
        remembered.sent(&index, (300..400).map(name));
        assert_eq!((held(&index, 300..400), index.held()), (10, 10));
        remembered.close();
        remembered.sent(&index, (0..4).map(name));
        assert_eq!(held(&index, 0..4), 0, "closed is closed");
    }

    proptest! {
        #[test]
        fn the_index_holds_what_is_remembered_and_no_more(prompts in prop::collection::vec((0u32..30, 1u32..12), 0..60), limit in 0usize..20) {
            let (index, remembered) = (Index::default(), Remembered::new(limit));
            remembered.open(index.join().unwrap());
            for (first, len) in prompts {
                remembered.sent(&index, (first..first + len).map(name));
                prop_assert!(index.held() as usize <= limit);
                prop_assert_eq!(held(&index, first..first + len), len.min(limit as u32));
            }
            let recent = remembered.lock();
            prop_assert_eq!((recent.used.len(), recent.order.len() as u64), (recent.order.len(), index.held()));
        }
    }
}
