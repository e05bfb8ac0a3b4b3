//! A store node's index of what it has in memory, laid out for readers that read it one-sided: no call, no thread of the
//! node, no lease.
//!
//! ```text
//!   index = | set 0 | set 1 | ...        a block's set follows from its hash
//!   set   = | line × 8 |                 in any order; a block that found no room is not in the index
//!   line  = | offset / 64 : 42 bits, tag : 22 bits | check : 64 bits | checksum of the block's bytes : 128 bits |
//! ```
//!
//! It is read while it is written, and by machines that see half of a write. The **check** makes that harmless: it is
//! computed over everything else in the line, the block's whole hash, its size and the node's seed, so a line that is torn,
//! another block's, or left from another life of the node is not taken for the block's. And what a line says may be
//! outdated a moment later: the bytes are compared with the checksum, as always.

use kvasir_types::BlockHash;

use crate::rendezvous::{first_eight, mix};

/// Bytes of a line.
pub const LINE_BYTES: usize = 32;
/// Lines of a set.
pub const WAYS: usize = 8;
/// Bytes of a set.
pub const SET_BYTES: usize = LINE_BYTES * WAYS;

/// Blocks begin at multiples of this.
const ALIGN: u64 = 64;
/// Bits of the tag: what most lines of other blocks are told apart by.
const TAG_BITS: u32 = 22;

/// How an index is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// At least one.
    pub sets: u64,
    /// Random, of the node's life.
    pub seed: u64,
}

/// Where a block's bytes are, and their BLAKE3 (first 16 bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// In the node's segment, a multiple of 64.
    pub offset: u64,
    /// BLAKE3 of the block's bytes, first 16 bytes.
    pub checksum: [u8; 16],
}

impl Shape {
    /// In which set the block is, if it is in the index.
    pub fn set(&self, hash: &BlockHash) -> u64 {
        // The upper half of the product is below `sets`, and as even as the hash (Lemire 2016).
        ((u128::from(mix(first_eight(&hash.0) ^ self.seed)) * u128::from(self.sets)) >> 64) as u64
    }

    /// The line of a block of that size; `None` if its offset can't be told in one.
    pub fn encode(&self, hash: &BlockHash, block_bytes: u64, line: &Line) -> Option<[u8; LINE_BYTES]> {
        let at = line.offset / ALIGN;
        if !line.offset.is_multiple_of(ALIGN) || at >> (u64::BITS - TAG_BITS) != 0 {
            return None;
        }
        let place = at << TAG_BITS | tag(hash);
        let mut bytes = [0; LINE_BYTES];
        bytes[..8].copy_from_slice(&place.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.check(hash, block_bytes, place, &line.checksum).to_le_bytes());
        bytes[16..].copy_from_slice(&line.checksum);
        Some(bytes)
    }

    /// What a set's bytes, as they were read, say of a block of that size.
    pub fn find(&self, set: &[u8; SET_BYTES], hash: &BlockHash, block_bytes: u64) -> Option<Line> {
        let mut lines = set.as_chunks::<LINE_BYTES>().0.iter();
        lines.find_map(|line| {
            let place = word(line, 0);
            if place & ((1 << TAG_BITS) - 1) != tag(hash) {
                return None;
            }
            let mut checksum = [0; 16];
            checksum.copy_from_slice(&line[16..]);
            let good = word(line, 8) == self.check(hash, block_bytes, place, &checksum);
            good.then_some(Line { offset: (place >> TAG_BITS) * ALIGN, checksum })
        })
    }

    fn check(&self, hash: &BlockHash, block_bytes: u64, place: u64, checksum: &[u8; 16]) -> u64 {
        let words = [word(&hash.0, 0), word(&hash.0, 8), block_bytes, place, word(checksum, 0), word(checksum, 8)];
        words.into_iter().fold(self.seed, |sum, word| mix(sum.rotate_left(1) ^ word))
    }
}

/// Bits of the hash that its set does not follow from.
fn tag(hash: &BlockHash) -> u64 {
    word(&hash.0, 8) & ((1 << TAG_BITS) - 1)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: Shape = Shape { sets: 3, seed: 42 };

    fn set_with(at: usize, line: [u8; LINE_BYTES]) -> [u8; SET_BYTES] {
        let mut set = [0; SET_BYTES];
        set[at * LINE_BYTES..(at + 1) * LINE_BYTES].copy_from_slice(&line);
        set
    }

    proptest! {
        #[test]
        fn a_line_tells_its_block_and_nothing_else_of_it(
            hash: [u8; 16], other: [u8; 16], size in 1u64..1 << 30, at in 0u64..1 << 42, checksum: [u8; 16],
            way in 0..WAYS, flip in 0..LINE_BYTES * 8,
        ) {
            let (hash, other, line) = (BlockHash(hash), BlockHash(other), Line { offset: at * ALIGN, checksum });
            let encoded = SHAPE.encode(&hash, size, &line).unwrap();
            let set = set_with(way, encoded);
            prop_assert_eq!(SHAPE.find(&set, &hash, size), Some(line));
            prop_assert_eq!(SHAPE.find(&set, &hash, size + 1), None, "another size");
            prop_assert_eq!(Shape { seed: 43, ..SHAPE }.find(&set, &hash, size), None, "another life");
            prop_assert!(other == hash || SHAPE.find(&set, &other, size).is_none());
            let mut torn = encoded;
            torn[flip / 8] ^= 1 << (flip % 8);
            prop_assert_eq!(SHAPE.find(&set_with(way, torn), &hash, size), None, "a bit differs");
            prop_assert!(SHAPE.set(&hash) < SHAPE.sets);
        }

        #[test]
        fn any_bytes_are_no_block(set in proptest::collection::vec(any::<u8>(), SET_BYTES), hash: [u8; 16]) {
            let set: [u8; SET_BYTES] = set.try_into().unwrap();
            prop_assert_eq!(SHAPE.find(&set, &BlockHash(hash), 4096), None);
        }
    }

    #[test]
    fn what_a_line_cannot_tell_is_not_told() {
        let line = |offset| SHAPE.encode(&BlockHash([1; 16]), 4096, &Line { offset, checksum: [0; 16] });
        assert!(line(1 << 48).is_none() && line(32).is_none() && line((1 << 48) - 64).is_some());
        assert_eq!(SHAPE.find(&[0; SET_BYTES], &BlockHash([0; 16]), 0), None, "an empty line is nobody's");
    }
}
