//! Laws of every policy, under random operations of an owner that holds, moves and forgets blocks as it likes.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

#[test]
fn a_block_that_is_not_there_is_neither_touched_nor_removed() {
    for name in POLICIES {
        let mut policy = policy(name, 0).unwrap();
        policy.touch(&BlockId(1));
        assert!(!policy.remove(&BlockId(1)) && !policy.gone(&BlockId(2)), "{name}");
        assert_eq!(policy.pop(), None, "{name}");
        assert!(policy.is_empty(), "{name}");
    }
}

#[test]
fn only_the_known_names_are_policies() {
    assert!(policy("fashion", 1).is_none());
}

fn hash(name: u32) -> BlockHash {
    let mut hash = [0; 16];
    hash[12..].copy_from_slice(&name.to_le_bytes());
    BlockHash(hash)
}

/// What a policy must agree with: who could be popped; and, of those described, who hangs on whom.
#[derive(Default)]
struct Oracle {
    idle: BTreeSet<u32>,
    parent: BTreeMap<u32, u32>,
}

impl Oracle {
    fn forget(&mut self, id: u32) -> bool {
        self.parent.remove(&id);
        self.parent.retain(|_, parent| *parent != id);
        self.idle.remove(&id)
    }

    fn has_child(&self, id: u32) -> bool {
        self.parent.values().any(|&parent| parent == id)
    }
}

proptest! {
    #[test]
    fn no_policy_invents_loses_doubles_or_pops_a_held_block(
        ops in prop::collection::vec((0u8..9, 0u32..24, 0u32..24, 0u32..64), 0..400)
    ) {
        for name in POLICIES {
            let mut policy = policy(name, 4).unwrap();
            let (mut oracle, mut now) = (Oracle::default(), 0);
            for &(op, id, other, number) in &ops {
                match op {
                    0 => {
                        now += other;
                        policy.ask(Tick(now), Ask { found: number / 2, blocks: number });
                    }
                    1 | 2 => {
                        let ask = Ask { found: number / 2, blocks: number };
                        let parent = (other != id).then_some(BlockId(other));
                        policy.describe(BlockId(id), Facts { hash: hash(number), parent, position: other, ask });
                        oracle.forget(id);
                    }
                    3 | 4 => {
                        policy.insert(BlockId(id));
                        oracle.idle.insert(id);
                    }
                    5 => policy.touch(&BlockId(id)),
                    6 => prop_assert_eq!(policy.remove(&BlockId(id)), oracle.idle.remove(&id), "{}", name),
                    7 => prop_assert_eq!(policy.gone(&BlockId(id)), oracle.forget(id), "{}", name),
                    _ => match policy.pop() {
                        Some(BlockId(popped)) => prop_assert!(oracle.forget(popped), "{} popped b{}", name, popped),
                        None => prop_assert!(oracle.idle.is_empty(), "{} pops nothing", name),
                    },
                }
                prop_assert_eq!(policy.len(), oracle.idle.len(), "{}", name);
            }
            let rest: Vec<u32> = std::iter::from_fn(|| policy.pop()).map(|id| id.0).collect();
            prop_assert_eq!(rest.len(), oracle.idle.len(), "{}", name);
            prop_assert_eq!(rest.into_iter().collect::<BTreeSet<_>>(), oracle.idle, "{}", name);
        }
    }

    #[test]
    fn hit_density_pops_no_block_that_an_idle_one_hangs_on(
        ops in prop::collection::vec((0u8..4, 0u32..24, 0u32..24), 0..400)
    ) {
        let mut policy = HitDensity::default();
        let mut oracle = Oracle::default();
        let mut vacant: Vec<u32> = (0..24).rev().collect();
        let mut held: Vec<u32> = Vec::new();
        for (now, (op, one, other)) in (0..).zip(ops) {
            match op {
                // A new block, which hangs on some block that is there, or on none.
                0 | 1 => {
                    let Some(id) = vacant.pop() else { continue };
                    let there = |id: &u32| *id != one && !vacant.contains(id);
                    let parent = Some(other).filter(there).filter(|&parent| parent != id);
                    let ask = Ask { found: other, blocks: one };
                    policy.ask(Tick(now), ask);
                    let facts = Facts { hash: hash(one), parent: parent.map(BlockId), position: other, ask };
                    policy.describe(BlockId(id), facts);
                    parent.map(|parent| oracle.parent.insert(id, parent));
                    if op == 0 {
                        policy.insert(BlockId(id));
                        oracle.idle.insert(id);
                    } else {
                        held.push(id);
                    }
                }
                2 => {
                    if let Some(id) = held.pop() {
                        policy.insert(BlockId(id));
                        oracle.idle.insert(id);
                    }
                }
                _ => {
                    let Some(BlockId(id)) = policy.pop() else { continue };
                    let only_parents = oracle.idle.iter().all(|&id| oracle.has_child(id));
                    prop_assert!(only_parents || !oracle.has_child(id), "b{} is no leaf", id);
                    if oracle.has_child(id) {
                        break; // Its place is passed over until those are gone, whatever is in it: see `Block::kids`.
                    }
                    prop_assert!(oracle.forget(id));
                    vacant.push(id);
                }
            }
        }
    }
}
