//! S3-FIFO (Yang, Zhang, Qiu, Yue and Vinayak, "FIFO queues are all you need for cache eviction", SOSP 2023): new blocks
//! wait in a small queue; those asked for there, or written again soon after they left it, go on to the main one.
//!
//! Here for comparison. A page cache's reuse comes soon or often; a conversation's first return comes after most of what
//! the small queue holds was written, so on conversations this does worse than [`Lru`].

use std::collections::{HashMap, VecDeque};

use kvasir_types::BlockId;

use super::{Evict, Facts, Lru, short};

/// A tenth of the blocks is the small queue, as in the paper.
const SMALL_PART: usize = 10;
/// Uses are counted up to here.
const MOST_USES: u8 = 3;

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    name: u32,
    uses: u8,
    main: bool,
}

/// Small queue, main queue, and the names of what left the small one. Every operation is O(1), amortised.
#[derive(Debug, Default)]
pub struct S3Fifo {
    blocks: Vec<Block>,
    small: Lru,
    main: Lru,
    /// Names that left the small queue, oldest first, and how many of each are in that list.
    ghosts: VecDeque<u32>,
    ghost: HashMap<u32, u32>,
}

impl S3Fifo {
    /// An empty order with room for the blocks below `capacity`.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            blocks: vec![Block::default(); capacity],
            small: Lru::with_capacity(capacity),
            main: Lru::with_capacity(capacity),
            ..Self::default()
        }
    }

    fn block(&mut self, id: BlockId) -> &mut Block {
        let at = id.0 as usize;
        if self.blocks.len() <= at {
            self.blocks.resize(at + 1, Block::default());
        }
        &mut self.blocks[at]
    }

    fn remember(&mut self, name: u32) {
        self.ghosts.push_back(name);
        *self.ghost.entry(name).or_default() += 1;
        if self.ghosts.len() > self.blocks.len() {
            let oldest = self.ghosts.pop_front().expect("one was just pushed");
            let left = self.ghost.get_mut(&oldest).expect("each in the list is counted");
            *left -= 1;
            if *left == 0 {
                self.ghost.remove(&oldest);
            }
        }
    }
}

impl Evict<BlockId> for S3Fifo {
    fn describe(&mut self, id: BlockId, facts: Facts<BlockId>) {
        self.gone(&id);
        let name = short(facts.hash);
        let main = self.ghost.contains_key(&name);
        *self.block(id) = Block { name, uses: 0, main };
    }

    fn insert(&mut self, id: BlockId) {
        if self.small.contains(id) || self.main.contains(id) {
            return self.touch(&id);
        }
        match self.block(id).main {
            true => self.main.insert(id),
            false => self.small.insert(id),
        }
    }

    fn touch(&mut self, id: &BlockId) {
        let block = self.block(*id);
        block.uses = (block.uses + 1).min(MOST_USES);
    }

    fn remove(&mut self, id: &BlockId) -> bool {
        self.small.remove(id) || self.main.remove(id)
    }

    fn gone(&mut self, id: &BlockId) -> bool {
        let was = self.remove(id);
        *self.block(*id) = Block::default();
        was
    }

    fn pop(&mut self) -> Option<BlockId> {
        loop {
            if self.small.len() * SMALL_PART >= self.len() || self.main.is_empty() {
                let id = self.small.pop()?;
                let Block { name, uses, .. } = *self.block(id);
                if uses == 0 {
                    self.remember(name);
                    *self.block(id) = Block::default();
                    return Some(id);
                }
                *self.block(id) = Block { name, uses: 0, main: true };
                self.main.insert(id);
            } else {
                let id = self.main.pop()?;
                let block = self.block(id);
                if block.uses == 0 {
                    *block = Block::default();
                    return Some(id);
                }
                block.uses -= 1;
                self.main.insert(id);
            }
        }
    }

    fn len(&self) -> usize {
        self.small.len() + self.main.len()
    }
}
