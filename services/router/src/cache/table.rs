//! Which workers hold which block: one shard of the index. No lock, no clock.
//!
//! ```text
//!   slots   [ tag 40 bits │ holders 24 bits ]   open addressing, one word a block; 0: empty
//!   holders   a worker's number, or two (next bit), or (top bit) which of `sets`
//! ```
//!
//! Most blocks are one worker's, or those of the prefill and the decode worker that had the prompt: they cost their word and the
//! table's air, 11 to 14 bytes, and looking one up waits for memory once. A tag is 40 bits of the block's
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
/// This bit: two workers.
const IS_PAIR: u32 = 1 << (HOLDER_BITS - 2);
/// Bits for each of the two: pairs of workers with greater numbers are sets.
const HALF_BITS: u32 = (HOLDER_BITS - 2) / 2;
/// Workers have numbers below this: one is added where one is kept, so that no word with a block is 0.
pub const MAX_WORKERS: u32 = IS_PAIR - 1;
/// As many sets as have numbers.
const MAX_SETS: usize = IS_SET as usize;
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

/// Those who hold a block, as its word has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    One(u32),
    Two([u32; 2]),
    /// So many that they have a set of their own.
    Set(usize),
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

    /// Has the processor fetch where this block would be; what it says is good for nothing else.
    pub fn touch(&self, tag: u64) -> u64 {
        self.slots.get(self.home(tag)).copied().unwrap_or(0)
    }

    /// Has `tell` look at those who hold a block; false: nobody does.
    pub fn holders<T>(&self, tag: u64, tell: impl FnOnce(Holders<'_>) -> T) -> Option<T> {
        let at = self.find(tag)?;
        Some(match Held::of(self.slots[at]) {
            Held::One(worker) => tell(Holders::Few(&[worker])),
            Held::Two(pair) => tell(Holders::Few(&pair)),
            Held::Set(set) => match &self.sets[set] {
                Set::Few { len, workers } => tell(Holders::Few(&workers[..usize::from(*len)])),
                Set::Many(map) => tell(Holders::Many(&map.bits)),
                Set::Free(_) => unreachable!("a block's set is not free"),
            },
        })
    }

    /// This worker holds this block from now on.
    pub fn insert(&mut self, tag: u64, worker: u32) -> Changed {
        debug_assert!(worker < MAX_WORKERS && tag >> TAG_BITS == 0);
        let Some(at) = self.find(tag) else {
            if (self.len + 1) * 4 > self.slots.len() * 3 {
                self.resize((self.slots.len() + self.slots.len() / 4).max(LEAST));
            }
            self.place(Held::One(worker).word(tag));
            self.len += 1;
            return Changed::Blocks;
        };
        let more = match Held::of(self.slots[at]) {
            Held::One(one) if one == worker => return Changed::No,
            Held::Two(pair) if pair.contains(&worker) => return Changed::No,
            Held::Set(set) => return self.sets[set].add(worker),
            Held::One(one) if is_narrow(one) && is_narrow(worker) => Some(Held::Two([one, worker])),
            Held::One(one) => self.new_set(&[one, worker]),
            Held::Two([one, other]) => self.new_set(&[one, other, worker]),
        };
        // More sets than there are numbers: this block is known to be the first workers' only.
        let Some(more) = more else { return Changed::No };
        self.slots[at] = more.word(tag);
        Changed::Holders
    }

    /// This worker holds this block no more.
    pub fn remove(&mut self, tag: u64, worker: u32) -> Changed {
        let Some(at) = self.find(tag) else { return Changed::No };
        if Held::of(self.slots[at]) != Held::One(worker) {
            return self.leave(at, worker);
        }
        self.take_out(at);
        self.len -= 1;
        Changed::Blocks
    }

    /// This worker is no longer one of the several that hold the block at `at`.
    fn leave(&mut self, at: usize, worker: u32) -> Changed {
        let tag = self.slots[at] >> HOLDER_BITS;
        match Held::of(self.slots[at]) {
            Held::Two([one, other]) if one == worker || other == worker => {
                self.slots[at] = Held::One(if one == worker { other } else { one }).word(tag);
                Changed::Holders
            }
            Held::One(_) | Held::Two(_) => Changed::No,
            Held::Set(set) => {
                let changed = self.sets[set].take(worker);
                if let Some(left) = self.sets[set].in_a_word() {
                    self.free_set(set);
                    self.slots[at] = left.word(tag);
                }
                changed
            }
        }
    }

    /// This worker holds nothing any more: how many blocks less, and how many of them it shared.
    pub fn forget(&mut self, worker: u32) -> (usize, usize) {
        let (mut gone, mut shared) = (0, 0);
        for at in 0..self.slots.len() {
            let slot = self.slots[at];
            if slot == 0 {
                continue;
            }
            if Held::of(slot) == Held::One(worker) {
                self.slots[at] = 0; // put right below
                gone += 1;
            } else if self.leave(at, worker) != Changed::No {
                shared += 1;
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

    /// A set of these, at most [`FEW`]; `None`: there are no more numbers for sets.
    fn new_set(&mut self, members: &[u32]) -> Option<Held> {
        let mut workers = [0; FEW];
        workers[..members.len()].copy_from_slice(members);
        let set = Set::Few { len: members.len() as u8, workers };
        let number = match self.free {
            Some(free) => {
                if let Set::Free(next) = std::mem::replace(&mut self.sets[free as usize], set) {
                    self.free = next;
                }
                free as usize
            }
            None if self.sets.len() < MAX_SETS => {
                if self.sets.len() == self.sets.capacity() {
                    self.sets.reserve_exact(self.sets.len() / 4 + 1);
                }
                self.sets.push(set);
                self.sets.len() - 1
            }
            None => return None,
        };
        Some(Held::Set(number))
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

    /// Those in it, if they are so few that the block's word has room for them.
    fn in_a_word(&self) -> Option<Held> {
        match self {
            Self::Few { len: 1, workers } => Some(Held::One(workers[0])),
            Self::Few { len: 2, workers: [one, other, ..] } if is_narrow(*one) && is_narrow(*other) => {
                Some(Held::Two([*one, *other]))
            }
            Self::Many(map) if map.len == 1 => {
                let word = map.bits.iter().position(|&bits| bits != 0)?;
                Some(Held::One(word as u32 * 64 + map.bits[word].trailing_zeros()))
            }
            _ => None,
        }
    }
}

impl Held {
    fn of(slot: u64) -> Self {
        let bits = (slot & HOLDER_MASK) as u32;
        if bits & IS_SET != 0 {
            Self::Set((bits & !IS_SET) as usize)
        } else if bits & IS_PAIR != 0 {
            Self::Two([(bits & !IS_PAIR) >> HALF_BITS, bits & ((1 << HALF_BITS) - 1)])
        } else {
            Self::One(bits.wrapping_sub(1)) // an empty slot is nobody's
        }
    }

    fn word(self, tag: u64) -> u64 {
        let bits = match self {
            Self::One(worker) => worker + 1,
            Self::Two([one, other]) => IS_PAIR | one << HALF_BITS | other,
            Self::Set(set) => IS_SET | set as u32,
        };
        tag << HOLDER_BITS | u64::from(bits)
    }
}

/// Whether two like this have room in a word.
fn is_narrow(worker: u32) -> bool {
    worker >> HALF_BITS == 0
}
