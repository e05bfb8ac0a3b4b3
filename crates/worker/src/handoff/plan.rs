//! Decides who computes a prompt and lays out the memory for it.
//!
//! ```text
//! prompt blocks   | cached here | cached here |  to land  |  to land  | to land (partial) |
//! grant           |<------ read ------------->|<-------------- write ------------------->|
//! ```
//!
//! Of a model whose layers form several groups (sliding windows beside full attention), every group has such a row, and
//! blocks that no later token looks at are in neither part of it.
//!
//! Blocks that the decode worker holds are offered for reading: a prefill worker that lacks them reads them rather than
//! computing them again. Nothing else of the arena is open to it.

use kvasir_proto::v1::BlockTarget;
use kvasir_transfer::{Access, GrantRange};
use kvasir_types::{BlockId, KvLayout};

/// A prompt laid out in the decode worker's arena for a prefill worker.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Landing {
    /// One for every block of the prompt, in order; group after group.
    pub(crate) targets: Vec<BlockTarget>,
    /// What a grant must open.
    pub(crate) ranges: Vec<GrantRange>,
}

/// Lays out the blocks of `tables` for a prefill worker, or `None` if the decode worker should compute the prompt itself: nobody to
/// ask, or at most `local_tokens` left to compute.
pub(crate) fn plan(
    layout: &KvLayout,
    tables: &[Vec<BlockId>],
    prompt_tokens: usize,
    cached_tokens: usize,
    candidates: usize,
    local_tokens: usize,
) -> Option<Landing> {
    if candidates == 0 || prompt_tokens - cached_tokens <= local_tokens {
        return None;
    }
    let cached_blocks = cached_tokens / layout.block_size as usize;
    let len = layout.block_bytes() as u64;
    let mut ranges: Vec<GrantRange> = Vec::new();
    let mut targets = Vec::with_capacity(tables.iter().map(Vec::len).sum());
    for (index, &block) in tables.iter().flat_map(|table| table.iter().enumerate()) {
        if block == BlockId::GONE {
            targets.push(BlockTarget { absent: true, ..BlockTarget::default() });
            continue;
        }
        let (offset, present) = (layout.block_offset(block) as u64, index < cached_blocks);
        let access = if present { Access::Read } else { Access::Write };
        targets.push(BlockTarget { offset, present, absent: false });
        match ranges.last_mut() {
            // Neighbours in the arena with the same right become one range: fewer to send and to check.
            Some(last) if last.offset + last.len == offset && last.access == access => last.len += len,
            _ => ranges.push(GrantRange { offset, len, access }),
        }
    }
    Some(Landing { targets, ranges })
}

#[cfg(test)]
mod tests {
    use kvasir_types::KvDtype;

    use super::*;

    const LAYOUT: KvLayout =
        KvLayout { block_size: 4, layers: 1, kv_heads: 1, k_dim: 1, v_dim: 1, dtype: KvDtype::F32 };

    fn blocks(ids: &[u32]) -> Vec<Vec<BlockId>> {
        vec![ids.iter().copied().map(BlockId).collect()]
    }

    #[test]
    fn little_work_or_nobody_to_ask_means_local() {
        let table = blocks(&[0, 1, 2]);
        assert_eq!(plan(&LAYOUT, &table, 10, 8, 3, 2), None);
        assert_eq!(plan(&LAYOUT, &table, 10, 0, 0, 2), None);
        assert!(plan(&LAYOUT, &table, 10, 4, 1, 2).is_some());
    }

    #[test]
    fn cached_blocks_are_readable_the_rest_writable_and_nothing_else_is_open() {
        let landing = plan(&LAYOUT, &blocks(&[7, 8, 2, 3, 9]), 18, 8, 1, 0).unwrap();
        let bytes = LAYOUT.block_bytes() as u64;
        let present: Vec<bool> = landing.targets.iter().map(|t| t.present).collect();
        assert_eq!(present, [true, true, false, false, false]);
        let range = |first, blocks, access| GrantRange { offset: first * bytes, len: blocks * bytes, access };
        let expected = [range(7, 2, Access::Read), range(2, 2, Access::Write), range(9, 1, Access::Write)];
        assert_eq!(landing.ranges, expected);
    }

    #[test]
    fn what_lies_before_a_window_is_neither_offered_nor_opened() {
        let gone = BlockId::GONE.0;
        let tables = [blocks(&[0, 1, 2, 3, 4]), blocks(&[gone, 8, gone, gone, 9])].concat();
        let landing = plan(&LAYOUT, &tables, 18, 8, 1, 0).unwrap();
        let told: Vec<_> = landing.targets[5..].iter().map(|t| (t.present, t.absent)).collect();
        assert_eq!(told, [(false, true), (true, false), (false, true), (false, true), (false, false)]);
        let bytes = LAYOUT.block_bytes() as u64;
        let range = |first, blocks, access| GrantRange { offset: first * bytes, len: blocks * bytes, access };
        assert_eq!(
            landing.ranges,
            [
                range(0, 2, Access::Read),
                range(2, 3, Access::Write),
                range(8, 1, Access::Read),
                range(9, 1, Access::Write)
            ]
        );
    }

    #[test]
    fn a_readable_and_a_writable_neighbour_stay_apart() {
        let landing = plan(&LAYOUT, &blocks(&[0, 1]), 8, 4, 1, 0).unwrap();
        assert_eq!(landing.ranges.len(), 2);
    }
}
