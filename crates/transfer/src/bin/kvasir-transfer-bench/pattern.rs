//! Which block goes where, and what bytes it holds.
//!
//! Blocks of the near side are walked in order, those of the far side in a fixed scattered one: as the blocks of a KV
//! cache lie, and so that neither hardware nor engine can make one long copy out of a batch of small ones. Contents are a
//! function of a seed and the byte's place at the far side, so either side can check what arrived without a copy of it.

/// Where block `i` of the near side lies at the far side: a bijection of `0..blocks`.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    blocks: u64,
    stride: u64,
}

impl Walk {
    /// A walk through `blocks` blocks, which are more than none.
    pub fn new(blocks: u64, sequential: bool) -> Self {
        assert!(blocks > 0, "a walk has a block to go to");
        // Steps of about the golden section visit far places in turn; without a common divisor they visit all.
        let golden = (blocks as f64 * 0.618) as u64;
        let scattered =
            (golden.max(1)..).find(|&stride| gcd(stride, blocks) == 1).expect("there is always a next prime");
        Self { blocks, stride: if sequential { 1 } else { scattered } }
    }

    /// The far block of near block `block`.
    pub fn far(&self, block: u64) -> u64 {
        (u128::from(block) * u128::from(self.stride) % u128::from(self.blocks)) as u64
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The eight bytes at `offset`, a multiple of 8 (splitmix64's finalizer: neighbouring inputs, unrelated outputs).
fn word(seed: u64, offset: u64) -> u64 {
    let mut x = (seed ^ offset).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 31)
}

/// Writes what belongs at `offset`.
pub fn fill(seed: u64, offset: u64, into: &mut [u8]) {
    if offset.is_multiple_of(8) && into.len().is_multiple_of(8) {
        // The usual case, several times as fast.
        for (place, at) in into.chunks_exact_mut(8).zip((offset..).step_by(8)) {
            place.copy_from_slice(&word(seed, at).to_le_bytes());
        }
        return;
    }
    for_each_word(offset, into.len(), |at, skip, len| {
        into[at..at + len].copy_from_slice(&word(seed, (offset + at as u64) & !7).to_le_bytes()[skip..skip + len]);
    });
}

/// The first place in `bytes` that does not hold what belongs at `offset`.
pub fn first_wrong(seed: u64, offset: u64, bytes: &[u8]) -> Option<usize> {
    if offset.is_multiple_of(8) && bytes.len().is_multiple_of(8) {
        let mut words = bytes.chunks_exact(8).zip((offset..).step_by(8));
        if words.all(|(found, at)| found == word(seed, at).to_le_bytes()) {
            return None;
        }
    }
    let mut wrong = None;
    for_each_word(offset, bytes.len(), |at, skip, len| {
        let right = word(seed, (offset + at as u64) & !7).to_le_bytes();
        if wrong.is_none() && bytes[at..at + len] != right[skip..skip + len] {
            wrong = (0..len).find(|&i| bytes[at + i] != right[skip + i]).map(|i| at + i);
        }
    });
    wrong
}

/// Calls with (place in the slice, bytes of the word to skip, bytes of the word to take).
fn for_each_word(offset: u64, len: usize, mut call: impl FnMut(usize, usize, usize)) {
    let mut at = 0;
    while at < len {
        let skip = ((offset + at as u64) & 7) as usize;
        let take = (8 - skip).min(len - at);
        call(at, skip, take);
        at += take;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_visits_every_block_once() {
        for blocks in [1, 2, 3, 4, 16, 255, 256, 1000, 4096] {
            for sequential in [false, true] {
                let walk = Walk::new(blocks, sequential);
                let mut seen: Vec<_> = (0..blocks).map(|block| walk.far(block)).collect();
                seen.sort_unstable();
                assert!(seen.iter().copied().eq(0..blocks), "{walk:?}");
            }
        }
    }

    #[test]
    fn a_scattered_walk_has_no_neighbours_to_merge() {
        for blocks in [4, 16, 256, 4096, 65536] {
            let walk = Walk::new(blocks, false);
            assert!((1..blocks).all(|block| walk.far(block) != walk.far(block - 1) + 1), "{walk:?}");
        }
    }

    #[test]
    fn one_wrong_byte_is_found_wherever_it_is() {
        for offset in [0, 3, 4096, 4099] {
            let mut bytes = vec![0; 1003];
            fill(7, offset, &mut bytes);
            assert_eq!(first_wrong(7, offset, &bytes), None);
            assert!(first_wrong(8, offset, &bytes).is_some() && first_wrong(7, offset + 8, &bytes).is_some());
            for at in [0, 1, 6, 500, 1002] {
                bytes[at] ^= 0x40;
                assert_eq!(first_wrong(7, offset, &bytes), Some(at));
                bytes[at] ^= 0x40;
            }
        }
    }

    #[test]
    fn contents_belong_to_places_not_to_calls() {
        let mut whole = vec![0; 256];
        fill(1, 1000, &mut whole);
        let mut part = vec![0; 100];
        fill(1, 1050, &mut part);
        assert_eq!(part, whole[50..150]);
    }
}
