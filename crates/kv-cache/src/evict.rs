//! Who has to go: the order in which idle things are given up.
//!
//! A policy hands out only blocks that nobody uses: one is inserted when its last user leaves, removed when somebody
//! takes it up again, and popped when its place is needed. The owner (block pool, store tier) keeps the contents; so one
//! policy serves any of them. A policy may not invent, lose or double blocks: `crate::evict::tests` and
//! `crate::model_tests` hold for every implementation.
//!
//! What may make a policy better than recency is told to it beside that: [`ask`](Evict::ask) says that a request begins
//! (policies know no other clock than the one told there), [`describe`](Evict::describe) what a new block is and what it hangs on,
//! [`touch`](Evict::touch) that it was asked for, held or not, and [`gone`](Evict::gone) that its contents are no more.
//! An owner that says none of it gets the same laws and a poorer order.
//!
//! A policy that learns from what it sees can tell others what it has counted ([`learned`](Evict::learned)), and count what
//! they have seen with its own ([`hear`](Evict::hear)): parts of one prompt that lie on several nodes go together only if
//! all nodes think alike.
//!
//! | policy | bytes a block | for |
//! | --- | --- | --- |
//! | [`Lru`] | 8 | a worker's pool, whose chains the pool itself keeps in order; disks |
//! | [`S3Fifo`] | 20 to 40 | comparison: what page caches do |
//! | [`HitDensity`] | 36 to 44, and up to 6 MB a policy | a store's memory |
//!
//! docs/eviction.md has the measurements.

use kvasir_types::{BlockHash, BlockId};

mod hit_density;
mod lru;
mod s3_fifo;

pub use hit_density::{HitDensity, Learned, NotLearned};
pub use lru::Lru;
pub use s3_fifo::S3Fifo;

/// When: sixteenths of a second since whenever the owner began. Only differences count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tick(pub u32);

/// How far a request got: the same for all of its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    /// One past the last block of the prompt that was there, or is [remembered](Evict::remembers), as far as known: all
    /// before it were there once, too. [`Ask::UNKNOWN`] to who is asked for a part of the prompt only.
    pub found: u32,
    /// Blocks of the prompt, as far as known.
    pub blocks: u32,
}

impl Ask {
    /// How much of the prompt was there is for others to say.
    pub const UNKNOWN: u32 = u32::MAX;
}

/// What is known of a block when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts<K> {
    /// What it is called, before and after it was evicted.
    pub hash: BlockHash,
    /// The block it hangs on, if that is described here too: it is not popped before this one.
    pub parent: Option<K>,
    /// Blocks of its prompt before it.
    pub position: u32,
    /// The request it is written for. Describe a prompt's blocks from its start.
    pub ask: Ask,
}

/// An order of eviction over keys that nobody uses at present.
pub trait Evict<K>: Send {
    /// A request begins: it is that late now, and touches from here on are its.
    fn ask(&mut self, _now: Tick, _ask: Ask) {}

    /// `key` stands for a new block now: whatever was known under it is [`gone`](Evict::gone). The block is held until
    /// it is [inserted](Evict::insert).
    fn describe(&mut self, key: K, _facts: Facts<K>) {
        self.gone(&key);
    }

    /// `key` is not used by anybody any more and may be evicted. Inserting a key that is there counts as [`touch`].
    ///
    /// [`touch`]: Evict::touch
    fn insert(&mut self, key: K);

    /// `key` was asked for. If nobody holds it, it stays in the order; if somebody does, it is remembered by policies
    /// that have a memory.
    fn touch(&mut self, key: &K);

    /// `key` is in use, or being moved: it can't be popped until it is inserted again. Whether it was there.
    fn remove(&mut self, key: &K) -> bool;

    /// `key` does not stand for its block any more, held or not. Whether it could have been popped.
    fn gone(&mut self, key: &K) -> bool {
        self.remove(key)
    }

    /// Takes out the key that should go first, which is then gone; `None` if there is none.
    fn pop(&mut self) -> Option<K>;

    /// How many keys could be popped.
    fn len(&self) -> usize;

    /// Whether a block of that name was here and was popped, not too long ago; one in a thousand others is taken for one.
    fn remembers(&self, _hash: BlockHash) -> bool {
        false
    }

    /// What it has counted itself, for others to [hear](Evict::hear).
    fn learned(&self) -> Option<Learned> {
        None
    }

    /// What all others have counted, in sum; what was heard before is out of date.
    fn hear(&mut self, _others: Learned) {}

    /// Whether none could.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Part of a hash that stands for the block where a mistake costs no more than a poorer order.
fn short(hash: BlockHash) -> u32 {
    let [.., a, b, c, d] = hash.0;
    u32::from_le_bytes([a, b, c, d])
}

/// The policy of that name, for `capacity` blocks; `None` if there is none. For tools that compare them.
pub fn policy(name: &str, capacity: usize) -> Option<Box<dyn Evict<BlockId>>> {
    Some(match name {
        "lru" => Box::new(Lru::with_capacity(capacity)),
        "s3-fifo" => Box::new(S3Fifo::with_capacity(capacity)),
        "hit-density" => Box::new(HitDensity::with_capacity(capacity)),
        _ => return None,
    })
}

/// What [`policy`] knows.
pub const POLICIES: [&str; 3] = ["lru", "s3-fifo", "hit-density"];

#[cfg(test)]
mod tests;
