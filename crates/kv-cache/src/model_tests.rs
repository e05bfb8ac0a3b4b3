//! Random operations against oracles of a few lines: the pool's states, and the eviction order's keys.

use std::collections::{BTreeSet, HashMap};

use kvasir_types::BlockHash;
use proptest::prelude::*;

use crate::{BlockPool, Evict, Filling, Lru, Sealed};

#[derive(Clone, Debug)]
enum Op {
    Take,
    GiveBack(usize),
    Seal(usize, u8),
    Pin(u8),
    PinRun(Vec<u8>),
    Release(usize),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    // Few names, so that twins, hits and evictions of the same name happen all the time.
    let name = 0u8..5;
    prop_oneof![
        4 => Just(Op::Take),
        1 => any::<usize>().prop_map(Op::GiveBack),
        4 => (any::<usize>(), name.clone()).prop_map(|(at, name)| Op::Seal(at, name)),
        2 => name.clone().prop_map(Op::Pin),
        2 => prop::collection::vec(name, 0..4).prop_map(Op::PinRun),
        5 => any::<usize>().prop_map(Op::Release),
        1 => Just(Op::Clear),
    ]
}

/// What the test holds; the pool must agree with it.
#[derive(Default)]
struct Held {
    filling: Vec<Filling>,
    sealed: Vec<(u8, Sealed)>,
    /// What was written into a block: whoever finds it by that name must get that name's content.
    content: HashMap<u32, u8>,
}

impl Held {
    fn ids(&self) -> BTreeSet<u32> {
        let filling = self.filling.iter().map(|block| block.id().0);
        filling.chain(self.sealed.iter().map(|(_, share)| share.id().0)).collect()
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 1000 }))]

    #[test]
    fn the_pool_agrees_with_its_holders(capacity in 1usize..9, ops in prop::collection::vec(op(), 1..120)) {
        let mut pool = BlockPool::new(capacity);
        let mut held = Held::default();
        for op in ops {
            match op {
                Op::Take => {
                    let available = pool.available();
                    held.take(pool.take(), available);
                }
                Op::GiveBack(at) if !held.filling.is_empty() => {
                    let block = held.filling.swap_remove(at % held.filling.len());
                    pool.give_back(block);
                }
                Op::Seal(at, name) if !held.filling.is_empty() => {
                    let block = held.filling.swap_remove(at % held.filling.len());
                    held.content.insert(block.id().0, name);
                    held.sealed.push((name, pool.seal(block, hash(name))));
                    prop_assert_eq!(pool.lookup(&[hash(name)]).blocks, 1, "sealed, yet not found");
                }
                Op::Pin(name) => {
                    if let Some(share) = pool.pin(&hash(name)) {
                        held.pinned(name, share);
                    }
                }
                Op::PinRun(names) => {
                    let chain: Vec<_> = names.iter().copied().map(hash).collect();
                    let (run, before) = (pool.lookup(&chain), pool.available());
                    let shares = pool.pin_run(&chain);
                    prop_assert_eq!(shares.len(), run.blocks);
                    let distinct: BTreeSet<_> = names.iter().take(run.blocks).collect();
                    if distinct.len() == run.blocks {
                        prop_assert_eq!(before - pool.available(), run.idle);
                    }
                    names.into_iter().zip(shares).for_each(|(name, share)| held.pinned(name, share));
                }
                Op::Release(at) if !held.sealed.is_empty() => {
                    let (_, share) = held.sealed.swap_remove(at % held.sealed.len());
                    pool.release(share);
                }
                Op::Clear => pool.clear_cached(),
                Op::GiveBack(_) | Op::Seal(..) | Op::Release(_) => {}
            }
            let counts = pool.counts();
            prop_assert_eq!(counts.free + counts.cached + counts.in_use, counts.total);
            prop_assert_eq!(counts.in_use, held.ids().len());
        }
        held.filling.into_iter().for_each(|block| pool.give_back(block));
        held.sealed.into_iter().for_each(|(_, share)| pool.release(share));
        prop_assert_eq!(pool.available(), capacity);
        pool.clear_cached();
        prop_assert_eq!(pool.counts().free, capacity);
    }

    #[test]
    fn lru_is_a_list_whose_used_key_moves_to_the_end(ops in prop::collection::vec((0u8..4, 0u8..6), 0..200)) {
        let mut lru = Lru::default();
        let mut oracle: Vec<u8> = Vec::new();
        for (op, key) in ops {
            let known = oracle.iter().position(|&k| k == key);
            match op {
                0 => {
                    known.map(|at| oracle.remove(at));
                    oracle.push(key);
                    lru.insert(key);
                }
                1 => {
                    if let Some(at) = known {
                        oracle.remove(at);
                        oracle.push(key);
                    }
                    lru.touch(&key);
                }
                2 => prop_assert_eq!(lru.remove(&key), known.map(|at| oracle.remove(at)).is_some()),
                _ => prop_assert_eq!(lru.pop(), (!oracle.is_empty()).then(|| oracle.remove(0))),
            }
            prop_assert_eq!(lru.len(), oracle.len());
        }
    }
}
