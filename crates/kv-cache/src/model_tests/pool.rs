//! The pool against its holders, and against whoever follows its events.

use std::collections::{BTreeSet, HashMap, HashSet};

use kvasir_types::{BlockHash, BlockId};
use proptest::prelude::*;

use crate::{BlockPool, CacheEvent, Evict, Filling, Landing, Lru, Name, Sealed, Snapshot, Stored};

#[derive(Clone, Debug)]
enum Op {
    Take,
    GiveBack(usize),
    Open(usize),
    Fence(usize),
    Seal(usize, u8),
    SealNameless(usize),
    Pin(u8),
    Share(usize),
    Release(usize),
    Clear,
    Drain,
}

/// Few names, so that twins, hits and evictions of the same name happen all the time.
const NAMES: u8 = 7;

fn op() -> impl Strategy<Value = Op> {
    let at = any::<usize>;
    prop_oneof![
        6 => Just(Op::Take),
        1 => at().prop_map(Op::GiveBack),
        2 => at().prop_map(Op::Open),
        2 => at().prop_map(Op::Fence),
        5 => (at(), 1..NAMES).prop_map(|(at, name)| Op::Seal(at, name)),
        1 => at().prop_map(Op::SealNameless),
        4 => (1..NAMES).prop_map(Op::Pin),
        1 => at().prop_map(Op::Share),
        8 => at().prop_map(Op::Release),
        1 => Just(Op::Clear),
        2 => Just(Op::Drain),
    ]
}

/// What the test holds; the pool must agree with it.
#[derive(Default)]
struct Held {
    filling: Vec<Filling>,
    landing: Vec<Landing>,
    sealed: Vec<(u8, Sealed)>,
    /// What was written into a block: whoever finds it by that name must get that name's content.
    content: HashMap<u32, u8>,
}

impl Held {
    fn ids(&self) -> BTreeSet<u32> {
        let open = self.filling.iter().map(|block| block.id().0).chain(self.landing.iter().map(|block| block.id().0));
        open.chain(self.sealed.iter().map(|(_, share)| share.id().0)).collect()
    }

    fn take(&mut self, block: Option<Filling>, available: usize) {
        match block {
            Some(block) => {
                assert!(!self.ids().contains(&block.id().0), "{} was handed out twice", block.id());
                self.content.remove(&block.id().0);
                self.filling.push(block);
            }
            None => assert_eq!(available, 0, "refused although blocks were there"),
        }
    }

    fn pinned(&mut self, name: u8, share: Sealed) {
        assert_eq!(self.content.get(&share.id().0), Some(&name), "{} holds something else", share.id());
        self.sealed.push((name, share));
    }
}

fn hash(name: u8) -> BlockHash {
    BlockHash([name; 16])
}

/// The chains are those of a binary heap: 1 ← 2, 3; 2 ← 4, 5; 3 ← 6.
fn name(name: u8) -> Name {
    Name { stored: Stored { hash: hash(name), parent: hash(name / 2), group: 0 }, chained: true, first: name < 2 }
}

/// What a follower knows by snapshot and events.
#[derive(Default)]
struct Follower {
    next: u64,
    known: HashSet<Stored>,
}

impl Follower {
    fn follow(&mut self, pool: &mut BlockPool) {
        let batch = pool.drain_events();
        if batch.gap {
            let Snapshot { next, blocks } = pool.snapshot();
            assert_eq!(next, batch.first + batch.events.len() as u64);
            (self.next, self.known) = (next, blocks.into_iter().collect());
            return;
        }
        assert_eq!(batch.first, self.next, "events are missing");
        self.next += batch.events.len() as u64;
        for event in batch.events {
            match event {
                CacheEvent::Stored(stored) => assert!(self.known.insert(stored), "stored twice"),
                CacheEvent::Removed(hash) => {
                    let before = self.known.len();
                    self.known.retain(|stored| stored.hash != hash);
                    assert_eq!(self.known.len() + 1, before, "removed what was not there");
                }
            }
        }
        let snapshot = pool.snapshot();
        assert_eq!(
            (snapshot.next, snapshot.blocks.into_iter().collect::<HashSet<_>>()),
            (self.next, self.known.clone())
        );
    }
}

fn pick<T>(from: &mut Vec<T>, at: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.swap_remove(at % from.len()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 1000 }))]

    #[test]
    fn the_pool_agrees_with_its_holders(
        capacity in 1usize..9, events in 0usize..12, ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut pool = BlockPool::new(capacity, events);
        let (mut held, mut follower) = (Held::default(), Follower::default());
        for op in ops {
            match op {
                Op::Take => {
                    let (available, before) = (pool.available(), pool.snapshot().blocks);
                    held.take(pool.take(), available);
                    // Who went was no parent of anybody evictable, unless that one lost sight of it while held.
                    let gone: Vec<_> = before.iter().filter(|s| pool.find(&s.hash).is_none()).collect();
                    prop_assert!(gone.len() <= 1);
                }
                Op::GiveBack(at) => pick(&mut held.filling, at).into_iter().for_each(|block| pool.give_back(block)),
                Op::Open(at) => held.landing.extend(pick(&mut held.filling, at).map(|block| pool.open(block))),
                Op::Fence(at) => held.filling.extend(pick(&mut held.landing, at).map(|block| pool.fence(block))),
                Op::Seal(at, n) => {
                    if let Some(block) = pick(&mut held.filling, at) {
                        held.content.insert(block.id().0, n);
                        held.sealed.push((n, pool.seal(block, name(n))));
                        prop_assert!(pool.find(&hash(n)).is_some(), "sealed, yet not found");
                    }
                }
                Op::SealNameless(at) => {
                    held.sealed.extend(pick(&mut held.filling, at).map(|block| (0, pool.seal_nameless(block))));
                }
                Op::Pin(n) => {
                    let (idle, before) = (pool.find(&hash(n)), pool.available());
                    let share = pool.pin(&hash(n));
                    prop_assert_eq!(share.is_some(), idle.is_some());
                    prop_assert_eq!(before - pool.available(), usize::from(idle == Some(true)));
                    share.into_iter().for_each(|share| held.pinned(n, share));
                }
                Op::Share(at) => {
                    if !held.sealed.is_empty() {
                        let (n, share) = &held.sealed[at % held.sealed.len()];
                        let second = (*n, pool.share(share));
                        held.sealed.push(second);
                    }
                }
                Op::Release(at) => pick(&mut held.sealed, at).into_iter().for_each(|(_, share)| pool.release(share)),
                Op::Clear => pool.clear_cached(),
                Op::Drain => follower.follow(&mut pool),
            }
            let counts = pool.counts();
            prop_assert_eq!(counts.free + counts.cached + counts.in_use, counts.total);
            prop_assert_eq!(counts.in_use, held.ids().len());
            prop_assert_eq!((counts.reserved, counts.landing), (held.filling.len(), held.landing.len()));
            let mut holders = HashMap::new();
            held.sealed.iter().for_each(|(_, share)| *holders.entry(share.id()).or_insert(0) += 1);
            prop_assert_eq!(counts.shared, holders.values().filter(|&&n| n > 1).count());
        }
        let fenced: Vec<_> = held.landing.into_iter().map(|block| pool.fence(block)).collect();
        held.filling.into_iter().chain(fenced).for_each(|block| pool.give_back(block));
        held.sealed.into_iter().for_each(|(_, share)| pool.release(share));
        prop_assert_eq!(pool.available(), capacity);
        pool.clear_cached();
        prop_assert_eq!(pool.counts().free, capacity);
        follower.follow(&mut pool);
        prop_assert!(follower.known.is_empty());
    }

    /// Chains that are held and given back whole, tails first, as tables do: the order in which they go is that of an
    /// oracle that searches for the oldest block without evictable children.
    #[test]
    fn leaves_go_before_parents_and_old_ones_before_young_ones(uses in prop::collection::vec((1..64u8, any::<bool>()), 1..60)) {
        let mut pool = BlockPool::new(128, 0);
        // Name → last use, of those that are cached.
        let mut oracle: HashMap<u8, usize> = HashMap::new();
        let mut clock = 0;
        for (leaf, evict) in uses {
            let chain: Vec<u8> = std::iter::successors(Some(leaf), |&n| (n > 1).then_some(n / 2)).collect();
            let shares: Vec<_> = chain.iter().rev().map(|&n| pool.pin(&hash(n)).unwrap_or_else(|| {
                let block = pool.take().expect("128 blocks are enough for 63 names");
                pool.seal(block, name(n))
            })).collect();
            for (share, &n) in shares.into_iter().rev().zip(&chain) {
                clock += 1;
                oracle.insert(n, clock);
                pool.release(share);
            }
            if evict {
                // No free block left: the next one is taken from the cache.
                let spare: Vec<_> = (0..pool.counts().free).map(|_| pool.take().unwrap()).collect();
                let leaf = |n: &u8| !oracle.contains_key(&(n * 2)) && !oracle.contains_key(&(n * 2 + 1));
                let expected = *oracle.iter().filter(|(n, _)| leaf(n)).min_by_key(|(_, at)| **at).unwrap().0;
                let taken = pool.take().unwrap();
                let gone: Vec<u8> = oracle.keys().copied().filter(|&n| pool.find(&hash(n)).is_none()).collect();
                prop_assert_eq!(gone, vec![expected]);
                oracle.remove(&expected);
                spare.into_iter().chain([taken]).for_each(|block| pool.give_back(block));
            }
        }
    }

    #[test]
    fn lru_is_a_list_whose_used_block_moves_to_the_end(ops in prop::collection::vec((0u8..5, 0u32..6), 0..200)) {
        let mut lru = Lru::default();
        let mut oracle: Vec<u32> = Vec::new();
        for (op, key) in ops {
            let (id, known) = (BlockId(key), oracle.iter().position(|&k| k == key));
            match op {
                0 => {
                    known.map(|at| oracle.remove(at));
                    oracle.push(key);
                    lru.insert(id);
                }
                1 => {
                    if let Some(at) = known {
                        oracle.remove(at);
                        oracle.push(key);
                    }
                    lru.touch(&id);
                }
                2 => prop_assert_eq!(lru.remove(&id), known.map(|at| oracle.remove(at)).is_some()),
                3 => {
                    known.map(|at| oracle.remove(at));
                    oracle.insert(0, key);
                    lru.insert_first(id);
                }
                _ => prop_assert_eq!(lru.pop(), (!oracle.is_empty()).then(|| BlockId(oracle.remove(0)))),
            }
            prop_assert_eq!(lru.len(), oracle.len());
            prop_assert_eq!(lru.contains(id), oracle.contains(&key));
        }
    }
}
