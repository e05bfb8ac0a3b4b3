//! Least recently used first: the yardstick, and what a worker's own pool uses.

use kvasir_types::BlockId;

use super::Evict;

/// No neighbour on this side.
const END: u32 = u32::MAX;
/// Stands in `before` of a block that is not in the list.
const OUT: u32 = u32::MAX - 1;

#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

/// Least recently used first. Every operation is O(1), and a block costs 8 bytes.
///
/// Block ids are small numbers without gaps, so the list's links lie in an array indexed by them: no allocation, no
/// hashing, and one cache line for each neighbour touched. (A map from key to age and one from age to key, which this was
/// before, took more than 100 bytes a block.)
#[derive(Debug)]
pub struct Lru {
    /// By block id; as long as the greatest id seen needs.
    links: Vec<Link>,
    first: u32,
    last: u32,
    len: usize,
}

impl Default for Lru {
    fn default() -> Self {
        Self { links: Vec::new(), first: END, last: END, len: 0 }
    }
}

impl Lru {
    /// An empty order with room for the blocks below `capacity`.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { links: vec![Link { before: OUT, after: END }; capacity], ..Self::default() }
    }

    /// Whether the block is in the order.
    pub fn contains(&self, id: BlockId) -> bool {
        self.links.get(id.0 as usize).is_some_and(|link| link.before != OUT)
    }

    /// Like [`insert`](Evict::insert), but at the other end: the block is the next to go.
    pub fn insert_first(&mut self, id: BlockId) {
        self.unlink(id);
        let link = Link { before: END, after: self.first };
        match self.first {
            END => self.last = id.0,
            first => self.link(first).before = id.0,
        }
        self.first = id.0;
        *self.link(id.0) = link;
        self.len += 1;
    }

    fn link(&mut self, id: u32) -> &mut Link {
        &mut self.links[id as usize]
    }

    /// Takes the block out, if it is in; afterwards there is a place for its link.
    fn unlink(&mut self, id: BlockId) -> bool {
        assert!(id.0 < OUT, "{id} is no block");
        if self.links.len() <= id.0 as usize {
            // By an eighth, not by half: of ten million blocks a doubled array would be mostly air.
            let more = (id.0 as usize + 1 - self.links.len()).max(self.links.len() / 8);
            if self.links.capacity() <= id.0 as usize {
                self.links.reserve_exact(more);
            }
            self.links.resize(id.0 as usize + 1, Link { before: OUT, after: END });
        }
        let Link { before, after } = *self.link(id.0);
        if before == OUT {
            return false;
        }
        match before {
            END => self.first = after,
            before => self.link(before).after = after,
        }
        match after {
            END => self.last = before,
            after => self.link(after).before = before,
        }
        *self.link(id.0) = Link { before: OUT, after: END };
        self.len -= 1;
        true
    }
}

impl Evict<BlockId> for Lru {
    fn insert(&mut self, id: BlockId) {
        self.unlink(id);
        let link = Link { before: self.last, after: END };
        match self.last {
            END => self.first = id.0,
            last => self.link(last).after = id.0,
        }
        self.last = id.0;
        *self.link(id.0) = link;
        self.len += 1;
    }

    fn touch(&mut self, id: &BlockId) {
        if self.contains(*id) {
            self.insert(*id);
        }
    }

    fn remove(&mut self, id: &BlockId) -> bool {
        self.contains(*id) && self.unlink(*id)
    }

    fn pop(&mut self) -> Option<BlockId> {
        let id = BlockId(self.first);
        (self.first != END).then(|| {
            self.unlink(id);
            id
        })
    }

    fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_block_goes_first() {
        let mut lru = Lru::default();
        (0..4).for_each(|id| lru.insert(BlockId(id)));
        lru.touch(&BlockId(0));
        assert!(lru.remove(&BlockId(2)));
        lru.insert(BlockId(1));
        lru.insert_first(BlockId(7));
        assert_eq!(std::iter::from_fn(|| lru.pop()).map(|id| id.0).collect::<Vec<_>>(), [7, 3, 0, 1]);
    }
}
