//! The block pool: every block of an arena, what it holds, and who may touch it.
//!
//! ```text
//!          take                 seal(hash)                  release (last user)
//!   free ────────▶ Filling ───────────────▶ Sealed, shared ────────────────────▶ cached
//!    ▲                │                        ▲    │                              │ │
//!    └────────────────┘                        └────┼───────── pin_run ────────────┘ │
//!    │     give_back                                │ release, and the hash          │
//!    └──────────────────────────────────────────────┘ belongs to another block       │
//!    └───────────────────────────────────────────────────────────────────────────────┘ evicted by take
//! ```
//!
//! The states of a block that somebody holds are types. [`Filling`]: one owner, who may write it (or let a peer write
//! it). [`Sealed`]: complete, never written again, perhaps one of many holders, findable by its hash. Neither can be
//! copied, so a block cannot be given back twice or written after it was sealed; that would not compile. They can be
//! lost (a pool that took them back on `Drop` would need a lock around every operation); then the block stays in use for
//! ever, which the law "free + cached = all when nothing runs" shows in every test.
//!
//! **Two blocks with one hash.** Two sequences may compute the same block at the same time. The first to seal it is the
//! one the index finds. The second keeps its own block, sealed but not findable (a *twin*): its id is in a block table
//! already, and a peer may be reading it, so it must not be exchanged under them. When its last holder leaves, a twin
//! takes the place in the index if that has become vacant, else it is free at once.

use std::collections::HashMap;

use kvasir_types::{BlockHash, BlockId};

use crate::{Evict, Lru};

/// How many blocks are in which state. `free + cached + in_use == total`, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All blocks of the pool.
    pub total: usize,
    /// Hold nothing.
    pub free: usize,
    /// Held by nobody, kept for reuse, evictable.
    pub cached: usize,
    /// Held by somebody: being written, or being read.
    pub in_use: usize,
}

/// A block with one owner, who may write it. Give it back with [`BlockPool::seal`] or [`BlockPool::give_back`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is dropped instead of given back is lost to the pool"]
pub struct Filling(BlockId);

impl Filling {
    /// Which block it is.
    pub fn id(&self) -> BlockId {
        self.0
    }
}

/// One holder's share in a complete block that nobody writes any more. Give it back with [`BlockPool::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a share that is dropped instead of released keeps its block for ever"]
pub struct Sealed(BlockId);

impl Sealed {
    /// Which block it is.
    pub fn id(&self) -> BlockId {
        self.0
    }
}

/// The longest run of known blocks at the start of a chain; see [`BlockPool::lookup`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Blocks in the run.
    pub blocks: usize,
    /// Of those, blocks that nobody holds now: pinning the run makes so many fewer [`BlockPool::available`].
    pub idle: usize,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Free,
    Filling,
    /// `holders == 0` is the cached state: then the index points here and the eviction order knows it.
    Sealed {
        hash: BlockHash,
        holders: u32,
    },
}

/// Hands out the blocks `0..capacity` of an arena and remembers what the sealed ones hold.
///
/// Owned by one thread (the engine's); taking, sealing, pinning and releasing cost O(log n) a block at most.
#[derive(Debug)]
pub struct BlockPool<E = Lru<BlockId>> {
    states: Vec<State>,
    free: Vec<BlockId>,
    /// Every hash that can be found, and the one block it is found in.
    index: HashMap<BlockHash, BlockId>,
    idle: E,
}

impl BlockPool {
    /// A pool of `capacity` free blocks that evicts the least recently used one.
    pub fn new(capacity: usize) -> Self {
        Self::with_evict(capacity, Lru::default())
    }
}

impl<E: Evict<BlockId>> BlockPool<E> {
    /// A pool of `capacity` free blocks with an eviction order of the caller's choice, which must be empty.
    ///
    /// # Panics
    /// If `capacity` does not fit a [`BlockId`].
    pub fn with_evict(capacity: usize, evict: E) -> Self {
        let last = u32::try_from(capacity).expect("a pool has at most u32::MAX blocks");
        Self {
            states: vec![State::Free; capacity],
            // Taken from the end: the first block to go out is b0, which makes tables in tests and logs readable.
            free: (0..last).rev().map(BlockId).collect(),
            index: HashMap::new(),
            idle: evict,
        }
    }

    /// How many blocks are in which state.
    pub fn counts(&self) -> Counts {
        let (total, free, cached) = (self.states.len(), self.free.len(), self.idle.len());
        Counts { total, free, cached, in_use: total - free - cached }
    }

    /// How many blocks [`take`](Self::take) could hand out now, by evicting cached ones if need be.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A block to write: a free one, else the cached one that is first to go. `None`: every block is held.
    pub fn take(&mut self) -> Option<Filling> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.evict()?,
        };
        self.states[id.0 as usize] = State::Filling;
        Some(Filling(id))
    }

    /// `count` blocks to write, or none at all.
    pub fn take_many(&mut self, count: usize) -> Option<Vec<Filling>> {
        (count <= self.available()).then(|| (0..count).map_while(|_| self.take()).collect())
    }

    /// A block comes back before it was complete: what was written is forgotten.
    pub fn give_back(&mut self, block: Filling) {
        self.vacate(block.0);
    }

    /// The block is complete and named `hash`: from here on nobody writes it. Findable, unless another block of that name
    /// is already (see the module's page on twins).
    pub fn seal(&mut self, block: Filling, hash: BlockHash) -> Sealed {
        self.states[block.0.0 as usize] = State::Sealed { hash, holders: 1 };
        self.index.entry(hash).or_insert(block.0);
        Sealed(block.0)
    }

    /// The longest run from the chain's start whose blocks are all here. Changes nothing, not even recency.
    pub fn lookup(&self, chain: &[BlockHash]) -> Run {
        let mut run = Run::default();
        for id in chain.iter().map_while(|hash| self.index.get(hash)) {
            run.blocks += 1;
            run.idle += usize::from(matches!(self.states[id.0 as usize], State::Sealed { holders: 0, .. }));
        }
        run
    }

    /// A share in each block of the longest run from the chain's start, in order.
    pub fn pin_run(&mut self, chain: &[BlockHash]) -> Vec<Sealed> {
        chain.iter().map_while(|hash| self.pin(hash)).collect()
    }

    /// A share in the block of that name.
    pub fn pin(&mut self, hash: &BlockHash) -> Option<Sealed> {
        let id = *self.index.get(hash)?;
        let State::Sealed { holders, .. } = &mut self.states[id.0 as usize] else {
            unreachable!("the index names sealed blocks only");
        };
        if *holders == 0 {
            self.idle.remove(&id);
        }
        *holders += 1;
        Some(Sealed(id))
    }

    /// One holder leaves. The last one's leaving makes the block evictable (or free, if it is a twin).
    ///
    /// Whoever gives back a whole table gives back its **tail first**: a block is of use only together with all before
    /// it, so the tail must be the first to be evicted.
    pub fn release(&mut self, share: Sealed) {
        let id = share.0;
        let State::Sealed { hash, holders } = &mut self.states[id.0 as usize] else {
            unreachable!("a share exists only of a sealed block");
        };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        if *self.index.entry(*hash).or_insert(id) == id {
            self.idle.insert(id);
        } else {
            self.vacate(id);
        }
    }

    /// Forgets every cached block.
    pub fn clear_cached(&mut self) {
        while let Some(id) = self.evict() {
            self.vacate(id);
        }
    }

    /// Takes the first cached block out of the eviction order and out of the index.
    fn evict(&mut self) -> Option<BlockId> {
        let id = self.idle.pop()?;
        let State::Sealed { hash, holders: 0 } = self.states[id.0 as usize] else {
            unreachable!("only sealed blocks without holders are in the eviction order");
        };
        self.index.remove(&hash);
        Some(id)
    }

    fn vacate(&mut self, id: BlockId) {
        self.states[id.0 as usize] = State::Free;
        self.free.push(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(name: u8) -> BlockHash {
        BlockHash([name; 16])
    }

    /// Seals fresh blocks under the names, and gives them back tail first.
    fn cache(pool: &mut BlockPool, names: &[u8]) {
        let sealed: Vec<_> = names
            .iter()
            .map(|&name| {
                let block = pool.take().unwrap();
                pool.seal(block, hash(name))
            })
            .collect();
        sealed.into_iter().rev().for_each(|share| pool.release(share));
    }

    #[test]
    fn a_block_being_written_is_not_found() {
        let mut pool = BlockPool::new(2);
        let block = pool.take().unwrap();
        assert_eq!(pool.lookup(&[hash(1)]), Run::default());
        pool.give_back(block);
        assert_eq!(pool.counts(), Counts { total: 2, free: 2, cached: 0, in_use: 0 });
    }

    #[test]
    fn a_run_ends_at_the_first_block_that_is_missing() {
        let mut pool = BlockPool::new(4);
        cache(&mut pool, &[1, 2, 4]);
        assert_eq!(pool.lookup(&[1, 2, 3, 4].map(hash)), Run { blocks: 2, idle: 2 });
        let run = pool.pin_run(&[1, 2, 3, 4].map(hash));
        assert_eq!(pool.lookup(&[1, 2, 3, 4].map(hash)), Run { blocks: 2, idle: 0 });
        assert_eq!(pool.counts(), Counts { total: 4, free: 1, cached: 1, in_use: 2 });
        run.into_iter().rev().for_each(|share| pool.release(share));
    }

    #[test]
    fn the_tail_of_a_chain_is_evicted_before_its_head() {
        let mut pool = BlockPool::new(3);
        cache(&mut pool, &[1, 2, 3]);
        for left in [2, 1, 0] {
            let _taken = pool.take().unwrap();
            assert_eq!(pool.lookup(&[1, 2, 3].map(hash)).blocks, left);
        }
    }

    #[test]
    fn a_pinned_block_is_never_evicted() {
        let mut pool = BlockPool::new(2);
        cache(&mut pool, &[1]);
        let pinned = pool.pin(&hash(1)).unwrap();
        let taken = pool.take().unwrap();
        assert_ne!(taken.id(), pinned.id());
        assert_eq!(pool.take(), None);
        assert_eq!(pool.take_many(1), None);
        pool.release(pinned);
        assert!(pool.take().is_some());
    }

    #[test]
    fn a_twin_keeps_its_block_and_frees_it_when_released() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        let (a, b) = (pool.seal(a, hash(1)), pool.seal(b, hash(1)));
        assert_ne!(a.id(), b.id());
        assert_eq!(pool.pin(&hash(1)).map(|share| (share.id(), pool.release(share)).0), Some(a.id()));
        pool.release(b);
        assert_eq!(pool.counts(), Counts { total: 2, free: 1, cached: 0, in_use: 1 });
        pool.release(a);
        assert_eq!(pool.counts(), Counts { total: 2, free: 1, cached: 1, in_use: 0 });
    }

    #[test]
    fn a_twin_takes_the_place_of_an_evicted_block() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        let (a, b) = (pool.seal(a, hash(1)), pool.seal(b, hash(1)));
        let twin = b.id();
        pool.release(a);
        let evicting = pool.take().unwrap();
        assert_eq!(pool.pin(&hash(1)), None);
        pool.release(b);
        assert_eq!(pool.pin(&hash(1)).map(|share| (share.id(), pool.release(share)).0), Some(twin));
        pool.give_back(evicting);
    }

    #[test]
    fn clearing_forgets_what_nobody_holds_and_nothing_else() {
        let mut pool = BlockPool::new(3);
        cache(&mut pool, &[1, 2]);
        let held = pool.pin(&hash(1)).unwrap();
        pool.clear_cached();
        assert_eq!(pool.counts(), Counts { total: 3, free: 2, cached: 0, in_use: 1 });
        assert_eq!(pool.lookup(&[1, 2].map(hash)).blocks, 1);
        pool.release(held);
    }
}
