//! Which blocks have been asked for before.

use std::collections::HashSet;

use kvasir_types::BlockHash;

/// Remembers names of blocks for a while: of the last so many at least, of twice as many at most.
pub(super) struct Reuse {
    limit: usize,
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Reuse {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, young: HashSet::new(), old: HashSet::new() }
    }

    /// How many blocks of a chain, from its first one on, an earlier chain had, too. From now on this one is an earlier one.
    pub(super) fn ask(&mut self, chain: &[BlockHash]) -> usize {
        let mut known = 0;
        for (index, hash) in chain.iter().enumerate() {
            // Half a name: mistaking one block for another writes a block too many.
            let [low @ .., _, _, _, _, _, _, _, _] = hash.0;
            let name = u64::from_le_bytes(low);
            let before = self.young.contains(&name) || self.old.contains(&name);
            if before && known == index {
                known += 1;
            }
            self.young.insert(name);
            if self.young.len() >= self.limit {
                self.old = std::mem::take(&mut self.young);
            }
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(names: std::ops::Range<u64>) -> Vec<BlockHash> {
        names.map(|name| BlockHash((u128::from(name) + 1).to_le_bytes())).collect()
    }

    #[test]
    fn what_a_second_one_begins_with_is_known() {
        let mut reuse = Reuse::new(100);
        assert_eq!(reuse.ask(&chain(0..10)), 0);
        assert_eq!(reuse.ask(&[chain(0..4), chain(50..60)].concat()), 4);
        assert_eq!(reuse.ask(&[chain(0..4), chain(50..60)].concat()), 14);
        assert_eq!(reuse.ask(&[chain(90..91), chain(1..4)].concat()), 0, "only from the first one on");
    }

    #[test]
    fn what_was_asked_for_long_ago_is_forgotten() {
        let mut reuse = Reuse::new(8);
        reuse.ask(&chain(0..4));
        reuse.ask(&chain(10..18));
        assert_eq!(reuse.ask(&chain(10..18)), 8);
        reuse.ask(&chain(20..36));
        assert_eq!(reuse.ask(&chain(0..4)), 0);
        assert!(reuse.young.len() + reuse.old.len() <= 16);
    }
}
