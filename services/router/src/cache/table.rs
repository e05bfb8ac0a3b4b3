//! Which workers hold which block: one shard of the index. No lock, no clock.
//!
//! ```text
//!   slots   [ tag 40 bits │ holders 24 bits ]   open addressing, one word a block; 0: empty
//!   holders   a worker's number, or (top bit) which of `sets`
//! ```
//!
//! Most blocks are one worker's: they cost their word and the table's air, 11 to 14 bytes. A tag is 40 bits of the block's
//! hash, and the shard another 10: two blocks are taken for one once in 10^8 lookups even with ten million of them, and then
//! an estimate is wrong, nothing else.
//!
//! Blocks lie in the order of their tags, as far as there is room (linear probing from `tag × capacity / 2^40`), so a table can
//! have any size and grows by a quarter.

/// Bits of a tag.
pub(super) const TAG_BITS: u32 = 40;
/// Bits that say who holds the block.
const HOLDER_BITS: u32 = 24;
const HOLDER_MASK: u64 = (1 << HOLDER_BITS) - 1;
/// This bit of the holders: a set.
const IS_SET: u32 = 1 << (HOLDER_BITS - 1);
/// Workers have numbers below this: one more than fits beside the bit, so that no word with a block is 0.
pub const MAX_WORKERS: u32 = IS_SET - 1;
/// Holders that are kept in place, before a bitmap is made of them.
const FEW: usize = 3;
/// Smallest table that is not empty.
const LEAST: usize = 8;

/// Those who hold a block, if they are several.
#[derive(Clone, Debug)]
enum Set {
    Few {
        len: u8,
        workers: [u32; FEW],
    },
    Many(Box<Bitmap>),
    /// Taken by no block; the next free one, if any.
    Free(Option<u32>),
}

/// Workers by their numbers, and how many they are.
#[derive(Clone, Debug)]
struct Bitmap {
    len: u32,
    bits: Vec<u64>,
}

/// Those who hold a block.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holders<'a> {
    /// So many, by their numbers.
    Few(&'a [u32]),
    /// A bitmap.
    Many(&'a [u64]),
}

/// Part of the index.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Box<[u64]>,
    len: usize,
    sets: Vec<Set>,
    free: Option<u32>,
}

/// What a change did to the number of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changed {
    /// Nothing.
    No,
    /// Another holder, or one less.
    Holders,
    /// A block more, or one less.
    Blocks,
}

impl Table {
    /// Bytes taken.
    pub fn bytes(&self) -> usize {
        let many = |set: &Set| match set {
            Set::Many(map) => size_of::<Bitmap>() + map.bits.capacity() * 8,
            Set::Few { .. } | Set::Free(_) => 0,
        };
        self.slots.len() * 8
            + self.sets.capacity() * size_of::<Set>()
            + self.sets.iter().map(many).sum::<usize>()
            + size_of::<Self>()
    }

    /// Has `tell` look at those who hold a block; false: nobody does.
    pub fn holders<T>(&self, tag: u64, tell: impl FnOnce(Holders<'_>) -> T) -> Option<T> {
        let at = self.find(tag)?;
        let holder = holder_of(self.slots[at]);
        Some(match set_of(holder).map(|set| &self.sets[set]) {
            None => tell(Holders::Few(&[holder])),
            Some(Set::Few { len, workers }) => tell(Holders::Few(&workers[..usize::from(*len)])),
            Some(Set::Many(map)) => tell(Holders::Many(&map.bits)),
            Some(Set::Free(_)) => unreachable!("a block's set is not free"),
        })
    }

    /// This worker holds this block from now on.
    pub fn insert(&mut self, tag: u64, worker: u32) -> Changed {
        debug_assert!(worker < MAX_WORKERS && tag >> TAG_BITS == 0);
        let Some(at) = self.find(tag) else {
            if (self.len + 1) * 4 > self.slots.len() * 3 {
                self.resize((self.slots.len() + self.slots.len() / 4).max(LEAST));
            }
            self.place(word(tag, worker));
            self.len += 1;
            return Changed::Blocks;
        };
        let holder = holder_of(self.slots[at]);
        match set_of(holder) {
            None if holder == worker => Changed::No,
            None => {
                let mut workers = [0; FEW];
                (workers[0], workers[1]) = (holder, worker);
                match self.new_set(Set::Few { len: 2, workers }) {
                    Some(set) => {
                        self.slots[at] = word(tag, set | IS_SET);
                        Changed::Holders
                    }
                    // More sets than there are numbers: this block is known to be the first worker's only.
                    None => Changed::No,
                }
            }
            Some(set) => self.sets[set].add(worker),
        }
    }

    /// This worker holds this block no more.
    pub fn remove(&mut self, tag: u64, worker: u32) -> Changed {
        let Some(at) = self.find(tag) else { return Changed::No };
        let holder = holder_of(self.slots[at]);
        let Some(set) = set_of(holder) else {
            if holder != worker {
                return Changed::No;
            }
            self.take_out(at);
            self.len -= 1;
            return Changed::Blocks;
        };
        let changed = self.sets[set].take(worker);
        if let Some(last) = self.sets[set].sole() {
            self.free_set(set);
            self.slots[at] = word(tag, last);
        }
        changed
    }

    /// This worker holds nothing any more: how many blocks less, and how many of them it shared.
    pub fn forget(&mut self, worker: u32) -> (usize, usize) {
        let (mut gone, mut shared) = (0, 0);
        for at in 0..self.slots.len() {
            let slot = self.slots[at];
            if slot == 0 {
                continue;
            }
            let holder = holder_of(slot);
            match set_of(holder) {
                None if holder == worker => {
                    self.slots[at] = 0; // put right below
                    gone += 1;
                }
                None => {}
                Some(set) if self.sets[set].take(worker) == Changed::No => {}
                Some(set) => {
                    shared += 1;
                    if let Some(last) = self.sets[set].sole() {
                        self.free_set(set);
                        self.slots[at] = word(slot >> HOLDER_BITS, last);
                    }
                }
            }
        }
        if gone > 0 {
            self.len -= gone;
            self.resize(if self.len == 0 { 0 } else { (self.len + self.len / 2).max(LEAST) });
        }
        if self.len == 0 {
            (self.sets, self.free) = (Vec::new(), None);
        }
        (gone, shared)
    }

    fn home(&self, tag: u64) -> usize {
        ((u128::from(tag) * self.slots.len() as u128) >> TAG_BITS) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.slots.len() { 0 } else { at + 1 }
    }

    fn find(&self, tag: u64) -> Option<usize> {
        if self.slots.is_empty() {
            return None;
        }
        let mut at = self.home(tag);
        loop {
            match self.slots[at] {
                0 => return None,
                slot if slot >> HOLDER_BITS == tag => return Some(at),
                _ => at = self.after(at),
            }
        }
    }

    /// Puts a word where it belongs; there is room.
    fn place(&mut self, slot: u64) {
        let mut at = self.home(slot >> HOLDER_BITS);
        while self.slots[at] != 0 {
            at = self.after(at);
        }
        self.slots[at] = slot;
    }

    /// Empties a slot, and moves those behind it that could not be where they belong.
    fn take_out(&mut self, mut hole: usize) {
        let capacity = self.slots.len();
        let mut at = hole;
        loop {
            at = self.after(at);
            let slot = self.slots[at];
            if slot == 0 {
                break;
            }
            let home = self.home(slot >> HOLDER_BITS);
            // It may move to the hole if its home is not between the hole and where it is.
            if (at + capacity - home) % capacity >= (at + capacity - hole) % capacity {
                self.slots[hole] = slot;
                hole = at;
            }
        }
        self.slots[hole] = 0;
    }

    fn resize(&mut self, capacity: usize) {
        let old = std::mem::replace(&mut self.slots, vec![0; capacity].into());
        old.iter().filter(|&&slot| slot != 0).for_each(|&slot| self.place(slot));
    }

    fn new_set(&mut self, set: Set) -> Option<u32> {
        match self.free {
            Some(free) => {
                if let Set::Free(next) = std::mem::replace(&mut self.sets[free as usize], set) {
                    self.free = next;
                }
                Some(free)
            }
            None if self.sets.len() < MAX_WORKERS as usize => {
                if self.sets.len() == self.sets.capacity() {
                    self.sets.reserve_exact(self.sets.len() / 4 + 1);
                }
                self.sets.push(set);
                Some(self.sets.len() as u32 - 1)
            }
            None => None,
        }
    }

    fn free_set(&mut self, set: usize) {
        self.sets[set] = Set::Free(self.free.replace(set as u32));
    }
}

impl Set {
    fn add(&mut self, worker: u32) -> Changed {
        match self {
            Self::Few { len, workers } => {
                let taken = usize::from(*len);
                if workers[..taken].contains(&worker) {
                    return Changed::No;
                }
                if taken < FEW {
                    workers[taken] = worker;
                    *len += 1;
                    return Changed::Holders;
                }
                let most = workers.iter().copied().max().unwrap_or(0).max(worker);
                let mut bits = vec![0; most as usize / 64 + 1];
                workers.iter().chain([&worker]).for_each(|&worker| bits[worker as usize / 64] |= 1 << (worker % 64));
                *self = Self::Many(Box::new(Bitmap { len: FEW as u32 + 1, bits }));
                Changed::Holders
            }
            Self::Many(map) => {
                let (word, bit) = (worker as usize / 64, 1 << (worker % 64));
                if word >= map.bits.len() {
                    map.bits.reserve_exact(word + 1 - map.bits.len());
                    map.bits.resize(word + 1, 0);
                }
                if map.bits[word] & bit != 0 {
                    return Changed::No;
                }
                map.bits[word] |= bit;
                map.len += 1;
                Changed::Holders
            }
            Self::Free(_) => Changed::No,
        }
    }

    fn take(&mut self, worker: u32) -> Changed {
        match self {
            Self::Few { len, workers } => {
                let taken = usize::from(*len);
                let Some(at) = workers[..taken].iter().position(|&known| known == worker) else { return Changed::No };
                workers[at] = workers[taken - 1];
                *len -= 1;
                Changed::Holders
            }
            Self::Many(map) => {
                let (word, bit) = (worker as usize / 64, 1 << (worker % 64));
                if map.bits.get(word).is_none_or(|bits| bits & bit == 0) {
                    return Changed::No;
                }
                map.bits[word] &= !bit;
                map.len -= 1;
                Changed::Holders
            }
            Self::Free(_) => Changed::No,
        }
    }

    /// The only one in it.
    fn sole(&self) -> Option<u32> {
        match self {
            Self::Few { len: 1, workers } => Some(workers[0]),
            Self::Many(map) if map.len == 1 => {
                let word = map.bits.iter().position(|&bits| bits != 0)?;
                Some(word as u32 * 64 + map.bits[word].trailing_zeros())
            }
            _ => None,
        }
    }
}

/// Holders are kept plus one, so that no block's word is 0.
fn word(tag: u64, holder: u32) -> u64 {
    tag << HOLDER_BITS | if holder & IS_SET == 0 { u64::from(holder + 1) } else { u64::from(holder) }
}

fn holder_of(slot: u64) -> u32 {
    let holder = (slot & HOLDER_MASK) as u32;
    if holder & IS_SET == 0 { holder - 1 } else { holder }
}

fn set_of(holder: u32) -> Option<usize> {
    (holder & IS_SET != 0).then_some((holder & !IS_SET) as usize)
}
