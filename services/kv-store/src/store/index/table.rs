//! The table from hashes to blocks: four bytes a block, since the hash itself is in the entry.

use hashbrown::HashTable;
use kvasir_types::{BlockHash, BlockId};

/// The table is cut into so many: one that grows moves all it has, with the lock held.
const PARTS: usize = 256;

pub(super) struct Table {
    parts: Vec<HashTable<u32>>,
    seed: u64,
}

impl Table {
    pub(super) fn new(seed: u64) -> Self {
        Self { parts: (0..PARTS).map(|_| HashTable::new()).collect(), seed }
    }

    /// The block for which `is` says yes, of those with that hash and of a few others.
    pub(super) fn find(&self, hash: BlockHash, is: impl Fn(BlockId) -> bool) -> Option<BlockId> {
        let (part, key) = place(hash, self.seed);
        self.parts[part].find(key, |&id| is(BlockId(id))).map(|&id| BlockId(id))
    }

    /// `hash_of` tells the hash of a block that is in the table.
    pub(super) fn insert(&mut self, hash: BlockHash, id: BlockId, hash_of: impl Fn(BlockId) -> BlockHash) {
        let ((part, key), seed) = (place(hash, self.seed), self.seed);
        self.parts[part].insert_unique(key, id.0, |&id| place(hash_of(BlockId(id)), seed).1);
    }

    /// # Panics
    /// If it is not there.
    pub(super) fn remove(&mut self, hash: BlockHash, id: BlockId) {
        let (part, key) = place(hash, self.seed);
        let found = self.parts[part].find_entry(key, |&other| other == id.0);
        found.expect("a block that is there is in the table").remove();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(HashTable::len).sum()
    }
}

/// Which part, and the key in it. Hashes come from outside, and a writer could choose many that fall together: the seed is
/// the node's own.
fn place(hash: BlockHash, seed: u64) -> (usize, u64) {
    let mut first = [0; 8];
    first.copy_from_slice(&hash.0[..8]);
    let wide = u128::from(u64::from_le_bytes(first) ^ seed) * u128::from(0x9e37_79b9_7f4a_7c15_u64);
    let key = (wide >> 64) as u64 ^ wide as u64;
    // Bits that a part itself uses neither for the bucket nor for the tag.
    ((key >> 48) as usize % PARTS, key)
}
