//! How far prompts were known when they were looked for.
//!
//! Who writes a prompt's new blocks tells the nodes how many of it had been there before: each node sees its own part only,
//! and what they think of a prompt must not depend on which part that is (docs/eviction.md). A lookup is what finds out;
//! the write comes later, under the same names. So for each lookup the last known block is remembered by name, for some
//! thousand prompts; a prompt that is forgotten is written as if it were new to the others.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use kvasir_types::BlockHash;

/// So many names are remembered at least, and twice as many at most.
const GENERATION: usize = 1 << 13;

/// Written by lookups, read by writes; the lock is held for as many look-ups as a prompt has blocks.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<[HashSet<BlockHash>; 2]>);

impl Known {
    /// The first so many blocks are known somewhere.
    pub(crate) fn note(&self, blocks: &[(BlockHash, u64)], known: usize) {
        let Some(&(last, _)) = known.checked_sub(1).and_then(|last| blocks.get(last)) else { return };
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if names[0].len() >= GENERATION {
            names.swap(0, 1);
            names[0].clear();
        }
        names[0].insert(last);
    }

    /// How many of these blocks, from the first on, somebody found to be known.
    pub(crate) fn of(&self, blocks: &[(BlockHash, u64)]) -> usize {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_last = |&(hash, _): &(BlockHash, u64)| names.iter().any(|names| names.contains(&hash));
        blocks.iter().rposition(is_last).map_or(0, |last| last + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: u32, blocks: u32) -> Vec<(BlockHash, u64)> {
        let root = BlockHash([1; 16]).extend(&[kvasir_types::TokenId(name)]);
        (0..blocks).map(|n| (root.extend(&[kvasir_types::TokenId(n)]), 0)).collect()
    }

    #[test]
    fn a_longer_prompt_is_known_as_far_as_the_shorter_one_was() {
        let known = Known::default();
        known.note(&chain(1, 8), 0);
        assert_eq!(known.of(&chain(1, 8)), 0);
        known.note(&chain(1, 8), 5);
        known.note(&chain(1, 8), 3);
        assert_eq!((known.of(&chain(1, 20)), known.of(&chain(1, 4)), known.of(&chain(2, 8))), (5, 3, 0));
    }

    #[test]
    fn no_more_than_so_many_are_remembered_and_the_last_ones_are() {
        let known = Known::default();
        let prompts = GENERATION as u32 * 4;
        (0..prompts).for_each(|name| known.note(&chain(name, 1), 1));
        assert_eq!(known.of(&chain(prompts - GENERATION as u32, 1)), 1);
        assert_eq!(known.of(&chain(0, 1)), 0);
        assert!(known.0.lock().unwrap().iter().all(|names| names.len() <= GENERATION));
    }
}
