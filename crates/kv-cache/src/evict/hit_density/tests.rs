use kvasir_types::BlockHash;

use super::*;

/// A node with room for so many blocks, and the names of what they hold.
struct Node {
    policy: Box<dyn Evict<BlockId>>,
    now: u32,
    at: std::collections::HashMap<u32, BlockId>,
    holds: Vec<Option<u32>>,
    vacant: Vec<BlockId>,
}

impl Node {
    fn new(policy: &str, capacity: usize) -> Self {
        Self {
            policy: crate::evict::policy(policy, capacity).unwrap(),
            now: 0,
            at: Default::default(),
            holds: vec![None; capacity],
            vacant: (0..capacity as u32).map(BlockId).collect(),
        }
    }

    /// Asks for a prompt and writes what is missing. How many of its blocks were there, from its start.
    fn ask(&mut self, prompt: &[u32]) -> usize {
        let found = prompt.iter().take_while(|name| self.at.contains_key(name)).count();
        let ask = Ask { found: found as u32, blocks: prompt.len() as u32 };
        self.now += 1;
        self.policy.ask(Tick(self.now), ask);
        for (position, &name) in prompt.iter().enumerate() {
            if let Some(id) = self.at.get(&name) {
                self.policy.touch(id);
                self.policy.remove(id);
                continue;
            }
            let id = self.vacant.pop().or_else(|| self.policy.pop()).expect("a prompt is smaller than the node");
            if let Some(old) = self.holds[id.0 as usize].replace(name) {
                self.at.remove(&old);
            }
            let parent = position.checked_sub(1).map(|above| self.at[&prompt[above]]);
            self.policy.describe(id, Facts { hash: hash(name), parent, position: position as u32, ask });
            self.at.insert(name, id);
        }
        prompt.iter().rev().for_each(|name| self.policy.insert(self.at[name]));
        found
    }
}

fn hash(name: u32) -> BlockHash {
    let mut hash = [0; 16];
    hash[12..].copy_from_slice(&name.wrapping_mul(0x9e37_79b1).to_le_bytes());
    BlockHash(hash)
}

/// Of a hundred conversations one block each comes back every hundred requests, while a scan of blocks that never do
/// passes by: LRU keeps the scan.
#[test]
fn what_comes_back_stays_while_a_scan_passes() {
    let hits = |policy| {
        let mut node = Node::new(policy, 150);
        let mut hits = 0;
        for round in 0..200u32 {
            for chat in 0..100 {
                hits += node.ask(&[chat]);
                node.ask(&[1_000 + (round * 100 + chat) * 2, 1_001 + (round * 100 + chat) * 2]);
            }
        }
        hits
    };
    let (lru, ours) = (hits("lru"), hits("hit-density"));
    assert_eq!(lru, 0);
    assert!(ours > 15_000, "{ours} of 19,900");
}

#[test]
fn the_last_block_of_a_prompt_goes_before_those_it_hangs_on() {
    let mut policy = HitDensity::default();
    let ask = Ask { found: 0, blocks: 5 };
    policy.ask(Tick(1), ask);
    for id in 0..5u32 {
        let parent = id.checked_sub(1).map(BlockId);
        policy.describe(BlockId(id), Facts { hash: hash(id), parent, position: id, ask });
    }
    // In the wrong order: the head first.
    (0..5).for_each(|id| policy.insert(BlockId(id)));
    assert_eq!(std::iter::from_fn(|| policy.pop()).map(|id| id.0).collect::<Vec<_>>(), [4, 3, 2, 1, 0]);
}

#[test]
fn what_only_held_blocks_hang_on_goes_if_nothing_else_can() {
    let mut policy = HitDensity::default();
    let ask = Ask { found: 0, blocks: 2 };
    policy.describe(BlockId(0), Facts { hash: hash(0), parent: None, position: 0, ask });
    policy.describe(BlockId(1), Facts { hash: hash(1), parent: Some(BlockId(0)), position: 1, ask });
    policy.insert(BlockId(0));
    assert_eq!(policy.pop(), Some(BlockId(0)));
    policy.insert(BlockId(1));
    assert_eq!(policy.pop(), Some(BlockId(1)));
    assert!(policy.blocks.iter().all(|block| block.kids == 0));
}

#[test]
fn a_block_that_comes_back_is_no_new_one() {
    let mut policy = HitDensity::with_capacity(8);
    let facts = Facts { hash: hash(7), parent: None, position: 0, ask: Ask { found: 0, blocks: 1 } };
    for uses in 0..4 {
        policy.ask(Tick(uses.into()), facts.ask);
        policy.describe(BlockId(3), facts);
        assert_eq!(policy.blocks[3].class.uses(), uses);
        policy.insert(BlockId(3));
        policy.pop();
    }
}
