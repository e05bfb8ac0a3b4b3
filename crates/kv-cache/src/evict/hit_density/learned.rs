//! What was counted of returns, so that it can be told to others, and how it looks on the way.
//!
//! ```text
//!   version   then for each class of which something is known, the lesser first
//!   1 byte    class u16 │ first step u8 │ steps u8 │ for each of them: reached, hit (the upper halves of two f32)
//! ```
//!
//! All numbers little-endian. Whoever changes classes or steps changes the version: counts of another one are of no use.
//! What comes from outside is bounded in size and value; a node that lies spoils the order of eviction, nothing else.

use super::class::{AGES, CLASSES};

const VERSION: u8 = 1;
/// More than that of one kind nobody counts: what is older counts half again and again.
const MOST: f32 = (1 << 20) as f32;

/// By class and step of age: sampled blocks that reached the step without being asked for, and those asked for in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Learned {
    pub(super) reached: Vec<f32>,
    pub(super) hit: Vec<f32>,
}

/// Bytes that are nothing anybody has learned.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq)]
pub enum NotLearned {
    /// By a node of another version, perhaps.
    #[error("counts of version {0} are of no use here, only those of {VERSION} are")]
    Version(u8),
    /// They end too early, or too late.
    #[error("counts of {0} bytes are not complete, or more than that")]
    Length(usize),
    /// No such class, no such step, or not in order.
    #[error("there is no class {class} with {steps} steps of age from step {first} on behind the one before it")]
    Place {
        /// See [`NotLearned::Place`].
        class: u16,
        /// See [`NotLearned::Place`].
        first: u8,
        /// See [`NotLearned::Place`].
        steps: u8,
    },
    /// Not a count.
    #[error("{0} is no count of blocks")]
    Count(f32),
}

impl Default for Learned {
    fn default() -> Self {
        Self { reached: vec![0.0; CLASSES * AGES], hit: vec![0.0; CLASSES * AGES] }
    }
}

impl Learned {
    /// Most bytes that [`Learned::encode`] makes; what is longer need not be looked at.
    pub const MAX_BYTES: usize = 1 + CLASSES * (4 + 4 * AGES);

    /// How many sampled blocks that is.
    pub fn samples(&self) -> f32 {
        self.reached.iter().step_by(AGES).sum()
    }

    /// Counts another's with these.
    pub fn add(&mut self, other: &Self) {
        let sum = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        sum(&mut self.reached, &other.reached);
        sum(&mut self.hit, &other.hit);
    }

    pub(super) fn with(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.add(other);
        both
    }

    /// Old counts count half.
    pub(super) fn halve(&mut self) {
        self.reached.iter_mut().chain(&mut self.hit).for_each(|count| *count /= 2.0);
    }

    /// For the way to others, exact to one part in 256.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        for class in 0..CLASSES {
            let (reached, hit) = (&self.reached[class * AGES..][..AGES], &self.hit[class * AGES..][..AGES]);
            let some = |step: &usize| half(reached[*step]) != 0 || half(hit[*step]) != 0;
            let (Some(first), Some(last)) = ((0..AGES).find(some), (0..AGES).rfind(some)) else { continue };
            bytes.extend_from_slice(&(class as u16).to_le_bytes());
            bytes.extend_from_slice(&[first as u8, (last - first + 1) as u8]);
            for step in first..=last {
                bytes.extend_from_slice(&half(reached[step]).to_le_bytes());
                bytes.extend_from_slice(&half(hit[step]).to_le_bytes());
            }
        }
        bytes
    }

    /// The opposite of [`Learned::encode`].
    ///
    /// # Errors
    /// If the bytes are none that it makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, NotLearned> {
        let length = || NotLearned::Length(bytes.len());
        let (&version, mut rest) = bytes.split_first().ok_or_else(length)?;
        if version != VERSION {
            return Err(NotLearned::Version(version));
        }
        if bytes.len() > Self::MAX_BYTES {
            return Err(length());
        }
        let (mut learned, mut next) = (Self::default(), 0);
        while !rest.is_empty() {
            let (&[low, high, first, steps], behind) = rest.split_first_chunk().ok_or_else(length)?;
            let class = u16::from_le_bytes([low, high]);
            let (at, from, count) = (usize::from(class), usize::from(first), usize::from(steps));
            if at < next || at >= CLASSES || count == 0 || from + count > AGES {
                return Err(NotLearned::Place { class, first, steps });
            }
            let (counts, behind) = behind.split_at_checked(count * 4).ok_or_else(length)?;
            for (step, pair) in counts.as_chunks::<4>().0.iter().enumerate() {
                let &[a, b, c, d] = pair;
                learned.reached[at * AGES + from + step] = whole([a, b])?;
                learned.hit[at * AGES + from + step] = whole([c, d])?;
            }
            (next, rest) = (at + 1, behind);
        }
        Ok(learned)
    }
}

/// The upper half of a count, rounded.
fn half(count: f32) -> u16 {
    (count.clamp(0.0, MOST).to_bits().saturating_add(1 << 15) >> 16) as u16
}

fn whole(half: [u8; 2]) -> Result<f32, NotLearned> {
    let count = f32::from_bits(u32::from(u16::from_le_bytes(half)) << 16);
    // Also what is not a number.
    if (0.0..=MOST).contains(&count) { Ok(count) } else { Err(NotLearned::Count(count)) }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{BlockHash, BlockId};
    use proptest::prelude::*;

    use super::*;
    use crate::{Ask, Evict, Facts, HitDensity, Tick};

    fn learned() -> impl Strategy<Value = Learned> {
        let counts = prop::collection::vec((0..CLASSES * AGES, 0.0f32..MOST, 0.0f32..MOST), 0..200);
        counts.prop_map(|counts| {
            let mut learned = Learned::default();
            for (at, reached, hit) in counts {
                (learned.reached[at], learned.hit[at]) = (reached, hit);
            }
            learned
        })
    }

    proptest! {
        #[test]
        fn what_was_told_is_heard(learned in learned()) {
            let bytes = learned.encode();
            prop_assert!(bytes.len() <= Learned::MAX_BYTES);
            let heard = Learned::decode(&bytes).unwrap();
            let pairs = learned.reached.iter().zip(&heard.reached).chain(learned.hit.iter().zip(&heard.hit));
            for (told, heard) in pairs {
                prop_assert!((told - heard).abs() <= told / 256.0, "{told} became {heard}");
            }
            prop_assert_eq!(heard.encode(), bytes, "once rounded, it stays");
        }

        #[test]
        fn no_bytes_from_outside_break_anything(
            mut bytes in prop_oneof![
                learned().prop_map(|learned| learned.encode()),
                prop::collection::vec(any::<u8>(), 0..400),
            ],
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            versioned in any::<bool>(),
        ) {
            for (at, byte) in changes {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
            }
            if let Some(version) = bytes.first_mut().filter(|_| versioned) {
                *version = VERSION;
            }
            if let Ok(heard) = Learned::decode(&bytes) {
                prop_assert!(heard.encode().len() <= Learned::MAX_BYTES);
                // Whatever it says, the order holds all blocks.
                let mut policy = HitDensity::with_capacity(8);
                policy.hear(heard);
                for id in 0..8 {
                    let ask = Ask { found: id, blocks: 8 };
                    policy.ask(Tick(id * 100), ask);
                    let hash = BlockHash([id as u8; 16]);
                    policy.describe(BlockId(id), Facts { hash, parent: None, position: id, ask });
                    policy.insert(BlockId(id));
                }
                prop_assert_eq!(std::iter::from_fn(|| policy.pop()).count(), 8);
            }
        }
    }

    #[test]
    fn what_says_nothing_good_is_refused() {
        let refused = |bytes: &[u8]| Learned::decode(bytes).unwrap_err();
        assert_eq!(refused(&[]), NotLearned::Length(0));
        assert_eq!(refused(&[9, 0]), NotLearned::Version(9));
        assert_eq!(refused(&[1, 0, 0]), NotLearned::Length(3));
        assert_eq!(refused(&[1, 0, 0, 0, 2, 0, 0, 0, 0]), NotLearned::Length(9));
        assert_eq!(refused(&[1, 0, 0, 47, 2]), NotLearned::Place { class: 0, first: 47, steps: 2 });
        let twice = [[1u8].as_slice(), &[0, 0, 0, 1, 0, 0, 0, 0], &[0, 0, 0, 1, 0, 0, 0, 0]].concat();
        assert!(matches!(refused(&twice), NotLearned::Place { .. }));
        for wrong in [f32::INFINITY, -1.0, 1e30] {
            let [_, _, low, high] = wrong.to_le_bytes();
            assert_eq!(
                refused(&[1, 0, 0, 0, 1, low, high, 0, 0]),
                NotLearned::Count(f32::from_bits(wrong.to_bits() >> 16 << 16))
            );
        }
        assert!(matches!(refused(&[1, 0, 0, 0, 1, 0xff, 0x7f, 0, 0]), NotLearned::Count(_)), "not a number");
    }
}
