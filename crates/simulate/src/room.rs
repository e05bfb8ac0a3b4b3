//! A worker's memory for KV blocks: what is held, what is kept for later, who goes.
//!
//! Counted in tokens, as a trace's last block of a prompt is rarely full:
//!
//! ```text
//!   capacity = free + idle (found again by name; the least recently used goes first) + pinned by somebody + reserved
//! ```
//!
//! The order of eviction is the worker's own ([`kvasir_kv_cache::Lru`], tails before heads). Blocks of prompts have names;
//! answers have none, as a trace does not tell them: their tokens are only reserved.

use std::collections::HashMap;

use kvasir_kv_cache::{Evict, Lru};
use kvasir_types::BlockId;

use crate::workload::Blocks;

/// A block came, or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its number in the workload.
    pub block: u32,
    /// Whether it can be found from now on.
    pub stored: bool,
}

/// What a request holds: the first blocks of its prompt, and room for the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// Blocks that are pinned.
    pub blocks: u32,
    /// Tokens that are reserved beside them.
    reserved: u64,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    block: u32,
    tokens: u32,
    users: u32,
}

/// See the module's page.
#[derive(Debug)]
pub struct Room {
    capacity: u64,
    /// Tokens of all blocks, and those reserved.
    used: u64,
    /// Of those: blocks that nobody uses.
    idle: u64,
    at: HashMap<u32, u32>,
    slots: Vec<Slot>,
    vacant: Vec<u32>,
    order: Lru,
    /// What came and went, for the router.
    pub changes: Vec<Change>,
}

impl Room {
    /// An empty one for so many tokens.
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            used: 0,
            idle: 0,
            at: HashMap::new(),
            slots: Vec::new(),
            vacant: Vec::new(),
            order: Lru::default(),
            changes: Vec::new(),
        }
    }

    /// Tokens that there is room for, those included that would have to go.
    pub fn available(&self) -> u64 {
        self.capacity - self.used + self.idle
    }

    /// Tokens in it that nobody uses.
    pub fn idle(&self) -> u64 {
        self.idle
    }

    /// How many of these blocks are here, from the first on.
    pub fn found(&self, blocks: Blocks<'_>) -> u32 {
        blocks.iter().take_while(|(block, _)| self.at.contains_key(block)).count() as u32
    }

    /// Pins what is here of a prompt, and makes room for the rest of it and `more` tokens; `None` if others hold too much.
    pub fn hold(&mut self, blocks: Blocks<'_>, more: u64) -> Option<Hold> {
        let mut hold = Hold::default();
        for (block, _) in blocks.iter() {
            let Some(&slot) = self.at.get(&block) else { break };
            self.pin(slot);
            hold.blocks += 1;
        }
        let missing = blocks.tokens() - blocks.tokens_of(hold.blocks) + more;
        if missing > self.available() {
            self.unpin(blocks, hold.blocks);
            return None;
        }
        self.reserve(missing);
        hold.reserved = missing;
        Some(hold)
    }

    /// Pins what has come since of the prompt's next blocks.
    pub fn extend(&mut self, hold: &mut Hold, blocks: Blocks<'_>) {
        for (block, tokens) in blocks.iter().skip(hold.blocks as usize) {
            let Some(&slot) = self.at.get(&block) else { break };
            self.pin(slot);
            hold.blocks += 1;
            hold.reserved -= u64::from(tokens);
            self.used -= u64::from(tokens);
        }
    }

    /// All of the prompt is here now, and can be found.
    pub fn fill(&mut self, hold: &mut Hold, blocks: Blocks<'_>) {
        for (block, tokens) in blocks.iter().skip(hold.blocks as usize) {
            hold.blocks += 1;
            hold.reserved -= u64::from(tokens);
            if let Some(&slot) = self.at.get(&block) {
                // Somebody else's came first: one is enough.
                self.used -= u64::from(tokens);
                self.pin(slot);
                continue;
            }
            let new = Slot { block, tokens, users: 1 };
            let slot = match self.vacant.pop() {
                Some(slot) => {
                    self.slots[slot as usize] = new;
                    slot
                }
                None => {
                    self.slots.push(new);
                    self.slots.len() as u32 - 1
                }
            };
            self.at.insert(block, slot);
            self.changes.push(Change { block, stored: true });
        }
    }

    /// Nothing is held any more; what can be found is kept until its place is needed.
    pub fn release(&mut self, hold: Hold, blocks: Blocks<'_>) {
        self.used -= hold.reserved;
        self.unpin(blocks, hold.blocks);
    }

    fn pin(&mut self, slot: u32) {
        let Slot { tokens, users, .. } = &mut self.slots[slot as usize];
        if *users == 0 {
            self.order.remove(&BlockId(slot));
            self.idle -= u64::from(*tokens);
        }
        *users += 1;
    }

    /// The tail first, so that it goes before what it hangs on.
    fn unpin(&mut self, blocks: Blocks<'_>, count: u32) {
        for at in (0..count).rev() {
            let slot = self.at[&blocks.get(at)];
            let Slot { tokens, users, .. } = &mut self.slots[slot as usize];
            *users -= 1;
            if *users == 0 {
                self.idle += u64::from(*tokens);
                self.order.insert(BlockId(slot));
            }
        }
    }

    /// There is room, but perhaps somebody must go for it.
    fn reserve(&mut self, tokens: u64) {
        self.used += tokens;
        while self.used > self.capacity {
            let slot = self.order.pop().expect("what is missing was found to be idle");
            let Slot { block, tokens, .. } = self.slots[slot.0 as usize];
            self.used -= u64::from(tokens);
            self.idle -= u64::from(tokens);
            self.at.remove(&block);
            self.vacant.push(slot.0);
            self.changes.push(Change { block, stored: false });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(ids: &[u32]) -> Blocks<'_> {
        Blocks::new(ids, 0, false, 10, ids.len() as u32 * 10 - 3)
    }

    #[test]
    fn what_was_used_last_stays_and_heads_outlive_tails() {
        let mut room = Room::new(50);
        let pass = |ids: &[u32], room: &mut Room| {
            let mut hold = room.hold(blocks(ids), 0).unwrap();
            let found = hold.blocks;
            room.fill(&mut hold, blocks(ids));
            room.release(hold, blocks(ids));
            found
        };
        assert_eq!(pass(&[1, 2, 3], &mut room), 0);
        assert_eq!(pass(&[1, 2, 4], &mut room), 2);
        assert_eq!(pass(&[7, 8], &mut room), 0);
        // 3 was used longest ago.
        assert_eq!([room.found(blocks(&[1, 2, 3])), room.found(blocks(&[1, 2, 4]))], [2, 3]);
        assert_eq!(pass(&[9, 10], &mut room), 0);
        assert_eq!(room.found(blocks(&[1, 2, 4])), 1);
    }

    #[test]
    fn what_is_held_is_not_given_away() {
        let mut room = Room::new(40);
        let hold = room.hold(blocks(&[1, 2]), 10).unwrap();
        assert_eq!(room.available(), 13);
        assert_eq!(room.hold(blocks(&[3, 4]), 0), None);
        room.release(hold, blocks(&[1, 2]));
        assert!(room.hold(blocks(&[3, 4]), 0).is_some());
    }

    proptest! {
        #[test]
        fn nothing_leaks(requests in prop::collection::vec((prop::collection::vec(0u32..12, 1..5), 0u64..20, any::<bool>()), 1..60)) {
            let mut room = Room::new(100);
            let mut known = std::collections::HashSet::new();
            let mut open: Vec<(Vec<u32>, Hold)> = Vec::new();
            for (mut ids, more, finish) in requests {
                ids.dedup();
                let mut seen = std::collections::HashSet::new();
                ids.retain(|id| seen.insert(*id));
                if let Some(mut hold) = room.hold(blocks(&ids), more) {
                    room.extend(&mut hold, blocks(&ids));
                    if finish {
                        room.fill(&mut hold, blocks(&ids));
                    }
                    open.push((ids, hold));
                }
                if open.len() > 2 {
                    let (ids, hold) = open.remove(0);
                    room.release(hold, blocks(&ids));
                }
                for Change { block, stored } in room.changes.drain(..) {
                    let changed = if stored { known.insert(block) } else { known.remove(&block) };
                    prop_assert!(changed, "{} twice", block);
                }
                prop_assert!(known.iter().all(|block| room.at.contains_key(block)) && known.len() == room.at.len());
                prop_assert!(room.used <= 100 && room.idle <= room.used);
            }
            for (ids, hold) in open {
                room.release(hold, blocks(&ids));
            }
            prop_assert_eq!(room.available(), 100);
        }
    }
}
