//! What a block is called and what is in it, which follow from the run's namespace and the block's number.
//!
//! Nobody has to remember what was written: a reader knows what must be there. Every word of a block's bytes depends on the
//! block and on its place in it, so bytes of another block, or of another place, are seen.

use kvasir_types::BlockHash;

/// Names of one trace's blocks.
#[derive(Clone, Debug)]
pub struct Names {
    root: [u8; 32],
}

impl Names {
    /// Other names for another namespace, another trace or another size.
    pub fn new(namespace: &str, trace: &str, bytes: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("kvasir-replay 2026 names of a trace's blocks");
        for part in [namespace.as_bytes(), trace.as_bytes(), &bytes.to_le_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        Self { root: *hasher.finalize().as_bytes() }
    }

    /// The name of the block of that number.
    pub fn hash(&self, block: u64) -> BlockHash {
        let mut hash = BlockHash([0; 16]);
        hash.0.copy_from_slice(&blake3::keyed_hash(&self.root, &block.to_le_bytes()).as_bytes()[..16]);
        hash
    }

    /// Words of the block of that number, without end. SplitMix64 (Steele, Lea, Flood 2014).
    pub fn words(&self, block: u64) -> impl Iterator<Item = u64> + use<> {
        let mut state = u64::from_le_bytes(self.hash(block).0[..8].try_into().expect("eight of sixteen bytes"));
        std::iter::repeat_with(move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        })
    }

    /// Fills `bytes` with what is in the block of that number.
    pub fn fill(&self, block: u64, bytes: &mut [u8]) {
        for (place, word) in bytes.chunks_mut(8).zip(self.words(block)) {
            place.copy_from_slice(&word.to_le_bytes()[..place.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_name_is_one_blocks_of_one_trace_of_one_run() {
        let all = [("a", "b", 1), ("ab", "", 1), ("a", "b", 2), ("b", "a", 1)];
        let names: HashSet<_> = all
            .iter()
            .flat_map(|&(run, trace, bytes)| (0..100).map(move |n| Names::new(run, trace, bytes).hash(n)))
            .collect();
        assert_eq!(names.len(), 400);
        assert_eq!(Names::new("a", "b", 1).hash(7), Names::new("a", "b", 1).hash(7));
    }

    #[test]
    fn bytes_are_the_blocks_own_at_their_own_place() {
        let (names, mut one, mut other) = (Names::new("a", "b", 1), vec![0; 1003], vec![0; 1003]);
        names.fill(3, &mut one);
        names.fill(4, &mut other);
        let words = |bytes: &[u8]| bytes.chunks_exact(8).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let different: HashSet<_> = words(&one).into_iter().chain(words(&other)).collect();
        assert_eq!(different.len(), 2 * (1003 / 8));
        assert!(one[1000..] != [0; 3]);
        names.fill(3, &mut other);
        assert_eq!(one, other);
    }
}
