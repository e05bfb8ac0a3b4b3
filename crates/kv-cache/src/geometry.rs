//! How many blocks of which group a sequence needs, and for how long.
//!
//! A token at position `p` of a sliding window `w` looks at the positions `p + 1 - w ..= p`. So with `n` tokens computed
//! and the next one at position `n`, blocks wholly before `n + 1 - w` are needed no more:
//!
//! ```text
//!   n = 10, blocks of 4      0 1 2 3 | 4 5 6 7 | 8 9 . .
//!   w = 5                                6 7     8 9 n      block 0 may go: first_needed = 1
//! ```

use std::sync::Arc;

use kvasir_types::{BlockHash, GroupKind, KvGroups};

/// The sizes that tables follow from: tokens in a block, and the kinds of the groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    block_size: usize,
    kinds: Arc<[GroupKind]>,
}

impl Geometry {
    /// For blocks of `block_size` tokens of one group each.
    ///
    /// # Panics
    /// If the block size is zero.
    pub fn new(block_size: usize, groups: &KvGroups) -> Self {
        assert!(block_size > 0, "a block holds tokens");
        Self { block_size, kinds: groups.iter().map(|group| group.kind).collect() }
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The groups' kinds, by index.
    pub fn kinds(&self) -> &[GroupKind] {
        &self.kinds
    }

    /// Whether blocks can be found again for another sequence: not where a state sums up all that was before, unless
    /// that state had been kept at the very cut.
    pub fn has_prefixes(&self) -> bool {
        !self.kinds.contains(&GroupKind::Recurrent)
    }

    /// Index of the first block that a group still needs once `tokens` tokens are computed.
    pub fn first_needed(&self, kind: GroupKind, tokens: usize) -> usize {
        match kind {
            GroupKind::Full | GroupKind::Recurrent => 0,
            GroupKind::Sliding { window } => (tokens + 1).saturating_sub(window as usize) / self.block_size,
        }
    }

    /// Blocks of a group that a sequence of `tokens` tokens needs at most at any time beside the first `cut` ones, which
    /// it found, if no more than `chunk` tokens are computed at once.
    pub fn needed_beyond(&self, kind: GroupKind, cut: usize, tokens: usize, chunk: usize) -> usize {
        let all = tokens.div_ceil(self.block_size).saturating_sub(cut);
        match kind {
            GroupKind::Full => all,
            // The window before the chunk, the chunk, and one block more because neither starts at a block.
            GroupKind::Sliding { window } => {
                all.min((window as usize - 1 + chunk.max(self.block_size)).div_ceil(self.block_size) + 1)
            }
            GroupKind::Recurrent => 1,
        }
    }

    /// Blocks of full groups that several continuations of the same `tokens` tokens have together.
    pub fn shared(&self, tokens: usize) -> usize {
        self.kinds.iter().filter(|&&kind| kind == GroupKind::Full).count() * (tokens / self.block_size)
    }

    /// Blocks of all groups that a sequence of `tokens` tokens needs at most at any time.
    pub fn needed(&self, tokens: usize, chunk: usize) -> usize {
        self.kinds.iter().map(|&kind| self.needed_beyond(kind, 0, tokens, chunk)).sum()
    }
}

/// The name in group `group` of the block that the prompt's chain calls `hash`.
///
/// In group 0 it is the same, so that blocks of models with one group keep the names they always had. The others' names
/// differ from it by a constant of the group: chain hashes are 128 random bits, so two of them differ by just that as
/// often as two of them are equal.
pub fn in_group(hash: BlockHash, group: usize) -> BlockHash {
    // SplitMix64's output function over the group's number, twice: 0 stays 0.
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let low = mix(group as u64);
    let difference = u128::from(low) | u128::from(mix(low)) << 64;
    BlockHash((u128::from_le_bytes(hash.0) ^ difference).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLIDING: GroupKind = GroupKind::Sliding { window: 5 };

    fn geometry() -> Geometry {
        Geometry::new(4, &KvGroups::of_layers(&[SLIDING, GroupKind::Full]))
    }

    #[test]
    fn a_block_is_needed_as_long_as_any_of_its_tokens_is_seen() {
        let geometry = geometry();
        for tokens in 0..40usize {
            // The next token stands at `tokens` and sees five positions, its own included.
            let oldest_seen = tokens.saturating_sub(4);
            assert_eq!(geometry.first_needed(SLIDING, tokens), oldest_seen / 4);
            assert_eq!(geometry.first_needed(GroupKind::Full, tokens), 0);
        }
    }

    #[test]
    fn the_quota_of_a_window_covers_every_chunk() {
        let geometry = geometry();
        for chunk in 4..20 {
            let quota = geometry.needed_beyond(SLIDING, 0, 1000, chunk);
            for start in 0..60 {
                let held = (start + chunk).div_ceil(4) - geometry.first_needed(SLIDING, start);
                assert!(held <= quota, "{held} blocks for a chunk of {chunk} at {start}, quota {quota}");
            }
        }
        assert_eq!(geometry.needed_beyond(SLIDING, 0, 7, 100), 2, "never more than there are tokens for");
    }

    #[test]
    fn groups_have_different_names_and_the_first_keeps_its_own() {
        let hash = BlockHash([7; 16]);
        assert_eq!(in_group(hash, 0), hash);
        let names: std::collections::HashSet<_> = (0..100).map(|group| in_group(hash, group)).collect();
        assert_eq!(names.len(), 100);
        // Stored blocks bear these names: a change makes them unreachable.
        assert_eq!(in_group(BlockHash([0; 16]), 1).to_string(), "e5050b101d1692567d3a360f090eb47a");
    }
}
