//! The index: which block lies where, in which tier, and who goes when room is needed.
//!
//! ```text
//!               reserve                 publish (after the writer was fenced off)
//!   (not there) ───────▶ Reserved ─────────────────────────────▶ Present in memory ◀──┐
//!        ▲                  │ undo                 start_write, end_write │   ▲       │ start_read, end_read
//!        ├──────────────────┘                                             ▼   │       │
//!        │                                               in memory and on disk ───────┤ memory's slot given up
//!        └──────── the only copy given up, or found to be torn ◀───────── on disk ────┘
//! ```
//!
//! The rule guarded here: **bytes that somebody may be reading or writing are never given up**, and a block can be found
//! only while it is `Present`. All changes of an entry go through [`Index::change`], which compares what may be given up
//! before and after, so that orders and holds can't miss one. Blocks are named by hash within their size.

use kvasir_kv_cache::{Ask, Tick};
use kvasir_types::{BlockHash, BlockId};

mod ahead;
mod class;
mod counts;
mod learned;
mod room;
mod table;

#[cfg(test)]
mod check;

use class::{Class, MAX_CLASSES};
use table::Table;

pub(crate) use class::Policies;
pub use class::Policy;
pub(crate) use counts::{Blocks, Evicted};

use super::{
    Checksum,
    entry::{ClassId, Entry, Facts, Keep, Level, Moving, State},
    quota::Quotas,
    slab::{BlockBytes, Slabs, Slot, Use},
};

/// Entries are allocated in pieces of so many: a vector that doubles would copy a gigabyte with the lock held.
const PIECE: usize = 4096;

/// Where a block's bytes are, in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) hash: BlockHash,
    pub(crate) offset: u64,
    pub(crate) size: BlockBytes,
}

/// How reading a block from disk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadEnd {
    /// Its bytes are in memory and right.
    Good,
    /// The disk did not answer; its copy may be good.
    Failed,
    /// The disk's bytes are not those that were stored.
    Torn,
}

/// Hears which blocks readers can be told of in memory.
pub(crate) trait Publish: Send {
    /// The block is readable there, with these bytes.
    fn put(&mut self, place: &Place, checksum: &Checksum);
    /// It is not any more; its slot is given to nobody else before this returns.
    fn take(&mut self, hash: &BlockHash, size: BlockBytes);
}

/// Every block of the node.
pub(crate) struct Index {
    slabs: [Slabs; 2],
    entries: Vec<Box<[Entry]>>,
    vacant: Vec<BlockId>,
    table: Table,
    policies: Policies,
    classes: Vec<Class>,
    /// What is asked for now.
    ask: Ask,
    quotas: Quotas,
    blocks: Blocks,
    evicted: [Evicted; 2],
    published: Option<Box<dyn Publish>>,
}

impl Index {
    pub(crate) fn new(memory: Slabs, disk: Slabs, quotas: Quotas, policies: Policies, seed: u64) -> Self {
        Self {
            slabs: [memory, disk],
            entries: Vec::new(),
            vacant: Vec::new(),
            table: Table::new(seed),
            policies,
            classes: Vec::new(),
            ask: Ask::default(),
            quotas,
            blocks: Blocks::default(),
            evicted: [Evicted::default(); 2],
            published: None,
        }
    }

    /// From now on it is told what is in memory, which is nothing yet.
    pub(crate) fn publish_to(&mut self, published: Box<dyn Publish>) {
        assert_eq!(self.blocks.good[Level::Memory as usize], 0, "blocks came before their index");
        self.published = Some(published);
    }

    pub(crate) fn slabs(&self, level: Level) -> &Slabs {
        &self.slabs[level as usize]
    }

    pub(crate) fn slabs_mut(&mut self, level: Level) -> &mut Slabs {
        &mut self.slabs[level as usize]
    }

    pub(crate) fn quotas(&mut self) -> &mut Quotas {
        &mut self.quotas
    }

    pub(crate) fn blocks(&self) -> Blocks {
        self.blocks
    }

    /// Blocks given up for room by a tier, ever.
    pub(crate) fn evicted(&self, level: Level) -> Evicted {
        self.evicted[level as usize]
    }

    /// The block of that hash and size, in whichever state.
    pub(crate) fn find(&self, size: BlockBytes, hash: BlockHash) -> Option<BlockId> {
        self.table.find(hash, |id| {
            let entry = self.entry(id);
            entry.hash == hash && self.class(entry.class).size == size
        })
    }

    /// Whether a block of any size is there under this hash with these bytes.
    pub(crate) fn holds(&self, hash: BlockHash, sum: Checksum) -> bool {
        let found = self.table.find(hash, |id| {
            let entry = self.entry(id);
            entry.hash == hash && entry.state() == State::Present && entry.checksum == sum
        });
        found.is_some()
    }

    /// A block's entry, to look at.
    pub(crate) fn entry(&self, id: BlockId) -> &Entry {
        &self.entries[id.0 as usize / PIECE][id.0 as usize % PIECE]
    }

    pub(crate) fn size(&self, id: BlockId) -> BlockBytes {
        self.class(self.entry(id).class).size
    }

    /// Where the block's slot of that tier is.
    ///
    /// # Panics
    /// If it has none there.
    pub(crate) fn place(&self, id: BlockId, level: Level) -> Place {
        let entry = self.entry(id);
        assert!(entry.has_slot(level), "{id} has no place in {level:?}");
        let offset = self.slabs[level as usize].offset(entry.slots[level as usize]);
        Place { hash: entry.hash, offset, size: self.size(id) }
    }

    /// The ids of entries from `from` on, at most `limit` of them; those that name a present block are given to `each`.
    /// Where to go on; `None` at the end. For work on all blocks that must not hold the lock for long.
    pub(crate) fn scan(&self, from: u32, limit: u32, mut each: impl FnMut(BlockId, &Entry)) -> Option<u32> {
        let end = from.saturating_add(limit).min(self.capacity());
        for id in from..end {
            let entry = self.entry(BlockId(id));
            if entry.state() == State::Present {
                each(BlockId(id), entry);
            }
        }
        (end < self.capacity()).then_some(end)
    }

    /// A request asks for blocks of this size: what it finds and touches from here on is its.
    pub(crate) fn ask(&mut self, size: BlockBytes, now: Use, ask: Ask) {
        self.ask = ask;
        for class in self.classes.iter_mut().filter(|class| class.size == size && class.blocks > 0) {
            class.idle.iter_mut().for_each(|order| order.ask(Tick(now.0), ask));
        }
    }

    /// Blocks are written of a prompt of which so much was there.
    pub(crate) fn writing(&mut self, ask: Ask) {
        self.ask = ask;
    }

    /// Room in memory for a block that is not there, giving up idle ones if need be. `after` is the block before it in its
    /// prompt, if that is here. `None`: all that could be given up is
    /// in use, or the block is larger than a slab.
    ///
    /// # Panics
    /// If something is known under that hash and size.
    pub(crate) fn reserve(
        &mut self,
        size: BlockBytes,
        hash: BlockHash,
        facts: Facts,
        after: Option<BlockId>,
        now: Use,
    ) -> Option<BlockId> {
        let id = self.reserve_ahead(size, hash, facts, now)?;
        self.describe(id, Level::Memory, after);
        Some(id)
    }

    /// The writer is done and fenced off, the bytes are right: readers may find the block.
    pub(crate) fn publish(&mut self, id: BlockId, checksum: Checksum) {
        self.change(id, |entry| {
            assert_eq!(entry.state(), State::Reserved, "a block is published once");
            entry.checksum = checksum;
            entry.set_state(State::Present);
        });
    }

    /// The writer is fenced off, the bytes are not to be used: the slot is empty again.
    pub(crate) fn undo(&mut self, id: BlockId) {
        assert_eq!(self.entry(id).state(), State::Reserved, "only a reservation is undone");
        self.remove(id);
    }

    /// A block that the disk held when the process started. Whether there was room for it where it says it is.
    pub(crate) fn recover(&mut self, place: Place, checksum: Checksum, facts: Facts, last_use: Use) -> bool {
        if self.find(place.size, place.hash).is_some() {
            return false;
        }
        let Some(class) = self.class_for(place.size, facts, last_use) else { return false };
        let Some(id) = self.enter(class, place.hash, facts, last_use) else { return false };
        let Some(slot) = self.slabs[Level::Disk as usize].claim(place.size, place.offset, id) else {
            self.leave(id);
            return false;
        };
        self.give_slot(id, Level::Disk, slot, None);
        self.change(id, |entry| {
            entry.checksum = checksum;
            entry.set_state(State::Present);
        });
        self.touch(id, last_use);
        true
    }

    /// Nobody gives up memory's bytes of these until [`Index::let_go`]; those of them that could be held.
    pub(crate) fn hold(&mut self, ids: &[BlockId]) -> Vec<BlockId> {
        ids.iter().copied().filter(|&id| self.entry(id).good_in(Level::Memory) && self.lease(id)).collect()
    }

    /// The end first, as readers do: it is the first to go again.
    pub(crate) fn let_go(&mut self, ids: &[BlockId]) {
        ids.iter().rev().for_each(|&id| self.end_lease(id));
    }

    /// A reader holds the block's bytes in memory. Whether one more could be counted.
    pub(crate) fn lease(&mut self, id: BlockId) -> bool {
        assert!(self.entry(id).good_in(Level::Memory), "only what is in memory is leased");
        self.change(id, |entry| match entry.leases.checked_add(1) {
            Some(leases) => {
                entry.leases = leases;
                true
            }
            None => false,
        })
    }

    /// A reader holds it no longer, and can't reach it any more.
    pub(crate) fn end_lease(&mut self, id: BlockId) {
        self.change(id, |entry| {
            entry.leases = entry.leases.checked_sub(1).expect("a lease ends once");
        });
    }

    /// How strongly the block is wanted from now on.
    pub(crate) fn keep(&mut self, id: BlockId, keep: Keep) {
        self.change(id, |entry| entry.set_keep(keep));
    }

    /// The block was asked for.
    pub(crate) fn touch(&mut self, id: BlockId, now: Use) {
        let entry = self.entry_mut(id);
        entry.last_use = now;
        let entry = *entry;
        for level in Level::ALL {
            if entry.has_slot(level) {
                self.slabs[level as usize].touch(entry.slots[level as usize], now);
                let key = self.order_key(id, &entry, level);
                self.class_mut(entry.class).touch(level, key);
            }
        }
    }

    /// Room on disk for a copy of a block in memory; the offset to write it to, which nobody reads until
    /// [`Index::end_write`]. `None`: it can't be written now, or there is no room.
    pub(crate) fn start_write(&mut self, id: BlockId) -> Option<u64> {
        let entry = *self.entry(id);
        if !entry.good_in(Level::Memory) || entry.has_slot(Level::Disk) || entry.moving() != Moving::No {
            return None;
        }
        // First it is under way, then room is made: else it might be the one to give up its place.
        self.change(id, |entry| entry.set_moving(Moving::Down));
        let Some(slot) = self.room(Level::Disk, entry.class, id) else {
            self.change(id, |entry| entry.set_moving(Moving::No));
            return None;
        };
        self.give_slot(id, Level::Disk, slot, None);
        Some(self.slabs[Level::Disk as usize].offset(slot))
    }

    /// The copy on disk is complete, or there is none.
    pub(crate) fn end_write(&mut self, id: BlockId, good: bool) {
        assert_eq!(self.entry(id).moving(), Moving::Down, "{id} is not being written");
        if !good {
            self.take_slot(id, Level::Disk);
        }
        self.change(id, |entry| entry.set_moving(Moving::No));
    }

    /// Room in memory for a block that is on disk only; the offset to read it to. `None`: it can't be read now, or there is
    /// no room.
    pub(crate) fn start_read(&mut self, id: BlockId, after: Option<BlockId>) -> Option<u64> {
        let entry = *self.entry(id);
        if !entry.good_in(Level::Disk) || entry.has_slot(Level::Memory) || entry.moving() != Moving::No {
            return None;
        }
        self.change(id, |entry| entry.set_moving(Moving::Up));
        let Some(slot) = self.room(Level::Memory, entry.class, id) else {
            self.change(id, |entry| entry.set_moving(Moving::No));
            return None;
        };
        self.give_slot(id, Level::Memory, slot, after);
        Some(self.slabs[Level::Memory as usize].offset(slot))
    }

    /// Reading the block into memory is over.
    pub(crate) fn end_read(&mut self, id: BlockId, end: ReadEnd) {
        assert_eq!(self.entry(id).moving(), Moving::Up, "{id} is not being read");
        if end != ReadEnd::Good {
            self.take_slot(id, Level::Memory);
        }
        self.change(id, |entry| entry.set_moving(Moving::No));
        if end == ReadEnd::Torn {
            self.remove(id);
        }
    }

    /// Gives a block up, pinned or not, unless it is on disk or in use.
    pub(crate) fn give_up(&mut self, id: BlockId) -> bool {
        let entry = *self.entry(id);
        let may_go = entry.state() == State::Present && entry.leases == 0 && entry.moving() == Moving::No;
        let gone = may_go && !entry.has_slot(Level::Disk);
        if gone {
            self.remove(id);
        }
        gone
    }

    /// The disk is to forget its copy of a block: it can't be used from there any more, and its slot is not free until
    /// [`Index::end_write`] says that there is no copy. `None`: there is none, or it is in use.
    pub(crate) fn start_forget(&mut self, id: BlockId) -> Option<Place> {
        let entry = *self.entry(id);
        let may_go = entry.state() == State::Present && entry.leases == 0 && entry.moving() == Moving::No;
        if !may_go || !entry.has_slot(Level::Disk) {
            return None;
        }
        self.change(id, |entry| entry.set_moving(Moving::Down));
        Some(self.place(id, Level::Disk))
    }

    /// The disk has forgotten its copy; the block is gone if nobody has begun to use memory's.
    pub(crate) fn end_forget(&mut self, id: BlockId) -> bool {
        assert_eq!(self.entry(id).moving(), Moving::Down, "{id} is not being forgotten");
        self.take_slot(id, Level::Disk);
        self.change(id, |entry| entry.set_moving(Moving::No));
        let entry = *self.entry(id);
        let gone = entry.leases == 0;
        if gone {
            self.remove(id);
        }
        gone
    }

    /// The block is gone, with all its slots.
    fn remove(&mut self, id: BlockId) {
        for level in Level::ALL {
            if self.entry(id).has_slot(level) {
                self.take_slot(id, level);
            }
        }
        self.change(id, |entry| entry.set_state(State::Vacant));
        self.leave(id);
    }

    /// An entry for a block without a slot; `None` if ids or memory for them have run out.
    fn enter(&mut self, class: ClassId, hash: BlockHash, facts: Facts, last_use: Use) -> Option<BlockId> {
        if self.vacant.is_empty() {
            let from = self.capacity();
            let until = from.checked_add(PIECE as u32).filter(|&until| until < u32::MAX - PIECE as u32)?;
            self.entries.push(vec![Entry::VACANT; PIECE].into_boxed_slice());
            self.vacant.extend((from..until).rev().map(BlockId));
        }
        let id = self.vacant.pop()?;
        let origin = facts.origin;
        *self.entry_mut(id) = Entry::new(hash, class, facts, last_use);
        let entries = &self.entries;
        self.table.insert(hash, id, |id| entries[id.0 as usize / PIECE][id.0 as usize % PIECE].hash);
        self.classes[class.0 as usize].blocks += 1;
        self.quotas.entered(origin);
        Some(id)
    }

    /// The opposite of [`Index::enter`].
    fn leave(&mut self, id: BlockId) {
        let Entry { hash, class, origin, .. } = *self.entry(id);
        self.table.remove(hash, id);
        *self.entry_mut(id) = Entry::VACANT;
        self.vacant.push(id);
        self.classes[class.0 as usize].blocks -= 1;
        self.quotas.left(origin);
    }

    fn give_slot(&mut self, id: BlockId, level: Level, slot: Slot, after: Option<BlockId>) {
        self.fill_slot(id, level, slot);
        self.describe(id, level, after);
    }

    fn fill_slot(&mut self, id: BlockId, level: Level, slot: Slot) {
        self.slabs[level as usize].hold(slot);
        let class = self.class(self.entry(id).class);
        self.quotas.took(class.share, level, class.size);
        self.change(id, |entry| entry.slots[level as usize] = slot);
        let entry = *self.entry(id);
        self.slabs[level as usize].touch(slot, entry.last_use);
    }

    /// Tells the tier's policy of a block that has a slot there.
    fn describe(&mut self, id: BlockId, level: Level, after: Option<BlockId>) {
        let entry = *self.entry(id);
        let key = self.order_key(id, &entry, level);
        // Only what the same order knows can be named to it.
        let before = after.filter(|&before| {
            let before = self.entry(before);
            before.class == entry.class && before.has_slot(level)
        });
        let parent = before.map(|before| self.order_key(before, self.entry(before), level));
        let (position, ask) = (u32::from(entry.position), self.ask);
        let facts = kvasir_kv_cache::Facts { hash: entry.hash, parent, position, ask };
        self.class_mut(entry.class).describe(level, key, facts);
    }

    /// The block's slot in that tier is empty again.
    fn take_slot(&mut self, id: BlockId, level: Level) {
        let entry = *self.entry(id);
        let (slot, key) = (entry.slots[level as usize], self.order_key(id, &entry, level));
        self.change(id, |entry| entry.slots[level as usize] = Slot::NONE);
        let class = self.class_mut(entry.class);
        class.gone(level, key);
        let (share, size) = (class.share, class.size);
        self.quotas.gave(share, level, size);
        self.slabs[level as usize].let_go(slot);
        self.slabs[level as usize].put(slot);
    }

    /// What orders of eviction call a block: small numbers without gaps. Most blocks of a large store are on disk only, so
    /// those in memory are numbered by their slots.
    fn order_key(&self, id: BlockId, entry: &Entry, level: Level) -> BlockId {
        match level {
            Level::Memory => {
                let size = self.class(entry.class).size;
                BlockId(self.slabs[level as usize].number(size, entry.slots[level as usize]))
            }
            Level::Disk => id,
        }
    }

    /// The opposite of [`Index::order_key`].
    fn block_at(&self, size: BlockBytes, level: Level, key: BlockId) -> BlockId {
        match level {
            Level::Memory => self.slabs[level as usize].owner(size, key.0),
            Level::Disk => key,
        }
    }

    /// Changes an entry and everything that follows from it: counters, eviction orders, and which slots are held.
    fn change<R>(&mut self, id: BlockId, change: impl FnOnce(&mut Entry) -> R) -> R {
        let before = *self.entry(id);
        let result = change(self.entry_mut(id));
        let after = *self.entry(id);
        self.blocks.leave(&before);
        self.blocks.enter(&after);
        for level in Level::ALL {
            let was = before.idle_in(level).then_some(before.keep());
            let is = after.idle_in(level).then_some(after.keep());
            if was == is {
                continue;
            }
            if let Some(keep) = was {
                let key = self.order_key(id, &before, level);
                self.class_mut(before.class).remove(level, keep, key);
            }
            if let Some(keep) = is {
                let key = self.order_key(id, &after, level);
                self.class_mut(after.class).insert(level, keep, key);
            }
            // A slot that is given away counts as held: see `take_slot`.
            match (was.is_some(), is.is_some()) {
                (false, true) => self.slabs[level as usize].let_go(after.slots[level as usize]),
                (true, false) => self.slabs[level as usize].hold(before.slots[level as usize]),
                _ => {}
            }
        }
        self.publish_change(id, &before, &after);
        result
    }

    fn publish_change(&mut self, id: BlockId, before: &Entry, after: &Entry) {
        let (was, is) = (before.good_in(Level::Memory), after.good_in(Level::Memory));
        if was == is || self.published.is_none() {
            return;
        }
        let news = is.then(|| self.place(id, Level::Memory));
        let size = self.class(before.class).size;
        match (&mut self.published, news) {
            (Some(published), Some(place)) => published.put(&place, &after.checksum),
            (Some(published), None) => published.take(&before.hash, size),
            (None, _) => {}
        }
    }

    fn class(&self, id: ClassId) -> &Class {
        &self.classes[id.0 as usize]
    }

    fn class_mut(&mut self, id: ClassId) -> &mut Class {
        &mut self.classes[id.0 as usize]
    }

    /// The class of blocks of that size and origin; `None` if a slab can't hold such a block or there are too many classes.
    fn class_for(&mut self, size: BlockBytes, facts: Facts, now: Use) -> Option<ClassId> {
        if self.slabs[Level::Memory as usize].slots_per_slab(size) == 0 {
            return None;
        }
        let share = self.quotas.share(facts.origin);
        let found = self.classes.iter().position(|class| class.size == size && class.share == share);
        let at = match found.or_else(|| self.classes.iter().position(|class| class.blocks == 0)) {
            Some(at) => at,
            None if self.classes.len() < MAX_CLASSES => {
                self.classes.push(Class::new(size, share, &self.policies, self.classes.len(), now));
                self.classes.len() - 1
            }
            None => return None,
        };
        if (self.classes[at].size, self.classes[at].share) != (size, share) {
            self.classes[at] = Class::new(size, share, &self.policies, at, now);
        }
        Some(ClassId(u8::try_from(at).expect("below MAX_CLASSES")))
    }

    fn capacity(&self) -> u32 {
        u32::try_from(self.entries.len() * PIECE).expect("ids are 32 bits")
    }

    fn entry_mut(&mut self, id: BlockId) -> &mut Entry {
        &mut self.entries[id.0 as usize / PIECE][id.0 as usize % PIECE]
    }
}
