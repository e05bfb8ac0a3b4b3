//! Least expected hits first: what a place in the cache would be given up for is how many hits it can still bring, per
//! block and time that it stays occupied. (Beckmann, Chen and Cidon, "LHD: improving cache hit rate by maximizing hit
//! density", NSDI 2018, with classes and a history that fit KV blocks.)
//!
//! Every block is in one **cell**: a class and an age. The class says what is known of it: how often it was asked for,
//! also before it was evicted and written again; whether another block hangs on it; how much of the last prompt it was
//! asked for in was there already, and how long the rest was. The age is the time since, in steps that grow with it. From a sample of blocks, watched on after they were evicted, [`learn`] keeps how often a block of each
//! class comes back at each age, and turns that into one number for each cell: the most hits per block and time that
//! keeping such a block for some time longer brings. The cell with the least gives up its oldest block.
//!
//! So the policy has nothing to be set. Where old blocks don't come back it is LRU; where people take a minute to read an
//! answer, blocks of that age stay and the last one of a prompt goes at once; a batch job's blocks go before those of
//! conversations as soon as it has been seen that nobody asks for them; popular documents stay by their count of uses.
//!
//! **Several nodes.** A prompt's blocks lie on many nodes, and are of use only up to the first that is missing. So what a
//! node thinks of a block may depend only on what the others know as well: on when it was asked for, by the clock rather than
//! by the node's own requests; on how much of its whole prompt was there; and on counts of all nodes together ([`Learned`]).
//!
//! **Leaves first.** A block that others hang on is passed over and put back when the last of them is gone; only where
//! nothing else can be popped (what hangs on it is held) it goes before them.
//!
//! **Cost.** O(1) an operation, but for `pop`, which looks through a bitmap of 2 KiB; a new order of the cells after
//! every thousand sampled blocks or more. 28 bytes a block and 8 to 16 for its history; for each policy 0.4 MB of cells
//! and, once it has seen that many blocks, up to 6 MB of samples.

use kvasir_types::{BlockHash, BlockId};

use super::{Ask, Evict, Facts, Tick, short};

mod cells;
mod class;
mod history;
mod learn;
mod learned;

pub use learned::{Learned, NotLearned};

use cells::{Cells, PASSED};
use class::{Class, age_step, cell};
use history::History;
use learn::Learner;

/// No block.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Block {
    /// Neighbours in the list of its cell.
    before: u32,
    after: u32,
    /// The list it is in; [`cells::OUT`] if it is held.
    list: u16,
    class: Class,
    /// When it was last asked for.
    last: u32,
    /// Part of its hash; meaningful if it was described.
    name: u32,
    parent: u32,
    /// Blocks here that name this place as their parent. When a block goes before what hangs on it, the next one in its
    /// place inherits the count, and is passed over until they are gone: nothing is lost but a little order.
    kids: u32,
}

impl Block {
    const EMPTY: Self = Self {
        before: NONE,
        after: NONE,
        list: cells::OUT,
        class: Class::UNKNOWN,
        last: 0,
        name: 0,
        parent: NONE,
        kids: 0,
    };
}

/// Least hits per block and time first; learns what that is. See the module's page.
#[derive(Debug)]
pub struct HitDensity {
    blocks: Vec<Block>,
    cells: Cells,
    learner: Learner,
    history: History,
    len: usize,
    /// The time, and the present request.
    now: u32,
    ask: Ask,
    /// When the lists were last sorted by age.
    sorted: u32,
    /// The request whose blocks are being described, and how many of its blocks have been here before.
    writing: (Ask, u32),
}

impl Default for HitDensity {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl HitDensity {
    /// An empty order with room for the blocks below `capacity`.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            blocks: vec![Block::EMPTY; capacity],
            cells: Cells::new(),
            learner: Learner::new(capacity),
            history: History::new(capacity),
            len: 0,
            now: 0,
            ask: Ask::default(),
            sorted: 0,
            writing: (Ask::default(), 0),
        }
    }

    /// Whether the block could be popped.
    pub fn contains(&self, id: BlockId) -> bool {
        self.blocks.get(id.0 as usize).is_some_and(|block| block.list != cells::OUT)
    }

    fn block(&mut self, id: u32) -> &mut Block {
        let at = id as usize;
        if self.blocks.len() <= at {
            assert!(id < NONE, "b{id} is no block");
            let grown = (at + 1).max(self.blocks.len() * 2).min(NONE as usize);
            self.blocks.resize(grown, Block::EMPTY);
            self.learner.grow(grown);
            self.history.grow(grown);
        }
        &mut self.blocks[at]
    }

    /// Puts a block that is in no list at the end of the one it belongs to.
    fn link(&mut self, id: u32) {
        let Block { class, last, .. } = self.blocks[id as usize];
        self.cells.push(&mut self.blocks, id, cell(class, age_step(self.now.wrapping_sub(last))));
        self.len += 1;
    }

    fn unlink(&mut self, id: u32) -> bool {
        let was = self.cells.unlink(&mut self.blocks, id);
        self.len -= usize::from(was);
        was
    }

    fn set_class(&mut self, id: u32, class: Class) {
        let was = self.unlink(id);
        self.block(id).class = class;
        if was {
            self.link(id);
        }
    }

    /// The block is no more: what it hangs on may be a leaf now.
    fn forget(&mut self, id: u32) {
        let kids = self.blocks[id as usize].kids;
        let Block { parent, .. } = std::mem::replace(&mut self.blocks[id as usize], Block { kids, ..Block::EMPTY });
        let Some(above) = self.blocks.get_mut(parent as usize) else { return };
        above.kids -= 1;
        if above.kids == 0 && above.list == PASSED {
            let (class, last) = (above.class, above.last);
            self.cells.unlink(&mut self.blocks, parent);
            // Older than all that were not passed over in its cell.
            let at = cell(class, age_step(self.now.wrapping_sub(last)));
            self.cells.push_front(&mut self.blocks, parent, at);
        }
    }

    /// Moves blocks on into the cells of their present age.
    fn sort(&mut self) {
        if std::mem::replace(&mut self.sorted, self.now) == self.now {
            return;
        }
        let now = self.now;
        self.cells.each_filled(|cells, at| {
            while let Some(id) = cells.first(at) {
                let Block { class, last, .. } = self.blocks[id as usize];
                let due = cell(class, age_step(now.wrapping_sub(last)));
                if due <= at {
                    break;
                }
                cells.unlink(&mut self.blocks, id);
                cells.push(&mut self.blocks, id, due);
            }
        });
    }
}

impl Evict<BlockId> for HitDensity {
    fn ask(&mut self, Tick(now): Tick, ask: Ask) {
        self.now = now;
        self.ask = ask;
        self.learner.advance(self.now);
        if let Some(density) = self.learner.learn() {
            self.cells.rank(&density);
        }
    }

    fn describe(&mut self, BlockId(id): BlockId, facts: Facts<BlockId>) {
        self.gone(&BlockId(id));
        let Facts { hash, parent, position, ask } = facts;
        let name = short(hash);
        let before = self.history.uses(name);
        if self.writing.0 != ask || position < self.writing.1 {
            self.writing = (ask, ask.found);
        }
        if before.is_some() {
            // Names are chained: if this one was here before, so were all before it.
            self.writing.1 = self.writing.1.max(position.saturating_add(1));
        }
        // A block among known ones was here too, though that is forgotten: the parts of a prompt that are on several nodes
        // are of use together only, so they must not be told apart by what each happens to remember.
        let uses = before.map_or_else(|| u8::from(position < ask.found), |uses| uses + 1);
        let last_of_prompt = position.saturating_add(1) >= ask.blocks;
        let class = Class::of(uses, !last_of_prompt, Ask { found: self.writing.1, ..ask });
        let now = self.now;
        let parent = parent.filter(|parent| parent.0 != id);
        let block = self.block(id);
        *block = Block { class, name, last: now, kids: block.kids, ..Block::EMPTY };
        self.learner.seen(name, class, now, ask);
        if let Some(BlockId(parent)) = parent {
            self.block(id).parent = parent;
            let above = self.block(parent);
            above.kids += 1;
            let (class, name) = (above.class, above.name);
            if class != Class::UNKNOWN && !class.has_child() {
                self.set_class(parent, class.with_child());
                self.learner.reclass(name, class.with_child());
            }
        }
    }

    fn insert(&mut self, id: BlockId) {
        if self.contains(id) {
            return self.touch(&id);
        }
        let now = self.now;
        let block = self.block(id.0);
        if block.class == Class::UNKNOWN {
            // Nobody described it.
            (block.class, block.last) = (Class::of(0, false, Ask::default()), now);
        }
        self.link(id.0);
    }

    fn touch(&mut self, &BlockId(id): &BlockId) {
        let Some(&Block { class, last, name, .. }) = self.blocks.get(id as usize) else { return };
        if class == Class::UNKNOWN {
            return;
        }
        let was = self.unlink(id);
        // A request asks once for a block, however often its owner says so; and several at the same moment say no more
        // about its return than one does.
        if last != self.now {
            let class = Class::of(class.uses() + 1, class.has_child(), self.ask);
            (self.blocks[id as usize].class, self.blocks[id as usize].last) = (class, self.now);
            self.learner.seen(name, class, self.now, self.ask);
        }
        if was {
            self.link(id);
        }
    }

    fn remove(&mut self, &BlockId(id): &BlockId) -> bool {
        (id as usize) < self.blocks.len() && self.unlink(id)
    }

    fn gone(&mut self, id: &BlockId) -> bool {
        let was = self.remove(id);
        if (id.0 as usize) < self.blocks.len() {
            self.forget(id.0);
        }
        was
    }

    fn pop(&mut self) -> Option<BlockId> {
        self.sort();
        loop {
            // If all that is left was passed over, the first of those goes.
            let id = self.cells.poorest().or_else(|| self.cells.first(PASSED))?;
            let Block { kids, list, name, class, .. } = self.blocks[id as usize];
            self.cells.unlink(&mut self.blocks, id);
            if kids > 0 && list != PASSED {
                self.cells.push(&mut self.blocks, id, PASSED);
                continue;
            }
            self.len -= 1;
            self.history.put(name, class.uses());
            self.forget(id);
            return Some(BlockId(id));
        }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn remembers(&self, hash: BlockHash) -> bool {
        self.history.uses(short(hash)).is_some()
    }

    fn learned(&self) -> Option<Learned> {
        Some(self.learner.own().clone())
    }

    fn hear(&mut self, others: Learned) {
        self.learner.hear(others);
    }
}

#[cfg(test)]
mod tests;
