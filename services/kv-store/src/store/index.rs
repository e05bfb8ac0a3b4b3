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

use hashbrown::HashTable;
use kvasir_kv_cache::{Evict, Lru};
use kvasir_types::{BlockHash, BlockId};

use super::{
    Checksum,
    entry::{ClassId, Entry, Facts, Keep, Level, Moving, State},
    quota::{Quotas, ShareId},
    slab::{BlockBytes, SlabId, Slabs, Slot, Use},
};

/// Entries are allocated in pieces of so many: a vector that doubles would copy a gigabyte with the lock held.
const PIECE: usize = 4096;
/// The table from hash to block is cut into so many, for the same reason.
const TABLES: usize = 256;
/// Most classes: sizes in use times quotas in use.
const MAX_CLASSES: usize = 250;

/// Where a block's bytes are, in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) hash: BlockHash,
    pub(crate) offset: u64,
    pub(crate) size: BlockBytes,
}

/// Blocks of one size that count against one quota.
struct Class {
    size: BlockBytes,
    share: ShareId,
    blocks: u64,
    /// Those that each tier may give up, in the order in which they go.
    idle: [Lru; 2],
    /// Those of them that somebody wants kept: they go last.
    soft: [Lru; 2],
    /// When what last went from each tier had last been used: how old this class's oldest are, more or less.
    tail: [Use; 2],
    /// Blocks given up to make room for others of this class.
    evictions: [u64; 2],
}

/// How many blocks there are, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Present, wherever they are.
    pub(crate) present: u64,
    /// Present with good bytes in memory, and on disk.
    pub(crate) good: [u64; 2],
    /// Present and held by at least one lease.
    pub(crate) leased: u64,
    /// Held by a writer.
    pub(crate) reserved: u64,
    /// Soft and hard pins, and the hard ones among them.
    pub(crate) kept: u64,
    pub(crate) hard: u64,
}

/// What a tier gave up, ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// Blocks that are still in the other tier.
    pub(crate) demoted: u64,
    /// Blocks that are gone.
    pub(crate) lost: u64,
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

/// Every block of the node.
pub(crate) struct Index {
    slabs: [Slabs; 2],
    entries: Vec<Box<[Entry]>>,
    vacant: Vec<BlockId>,
    tables: Vec<HashTable<u32>>,
    seed: u64,
    classes: Vec<Class>,
    quotas: Quotas,
    blocks: Blocks,
    evicted: [Evicted; 2],
}

impl Index {
    pub(crate) fn new(memory: Slabs, disk: Slabs, quotas: Quotas, seed: u64) -> Self {
        Self {
            slabs: [memory, disk],
            entries: Vec::new(),
            vacant: Vec::new(),
            tables: (0..TABLES).map(|_| HashTable::new()).collect(),
            seed,
            classes: Vec::new(),
            quotas,
            blocks: Blocks::default(),
            evicted: [Evicted::default(); 2],
        }
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
        let (table, key) = self.key(hash);
        let same = |&id: &u32| {
            let entry = self.entry(BlockId(id));
            entry.hash == hash && self.class(entry.class).size == size
        };
        self.tables[table].find(key, same).map(|&id| BlockId(id))
    }

    /// Whether a block of any size is there under this hash with these bytes.
    pub(crate) fn holds(&self, hash: BlockHash, sum: Checksum) -> bool {
        let (table, key) = self.key(hash);
        let same = |&id: &u32| {
            let entry = self.entry(BlockId(id));
            entry.hash == hash && entry.state() == State::Present && entry.checksum == sum
        };
        self.tables[table].find(key, same).is_some()
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

    /// Room in memory for a block that is not there, giving up idle ones if need be. `None`: all that could be given up is
    /// in use, or the block is larger than a slab.
    ///
    /// # Panics
    /// If something is known under that hash and size.
    pub(crate) fn reserve(&mut self, size: BlockBytes, hash: BlockHash, facts: Facts, now: Use) -> Option<BlockId> {
        let class = self.class_for(size, facts)?;
        let id = self.enter(class, hash, facts, now)?;
        let Some(slot) = self.room(Level::Memory, class, id) else {
            self.leave(id);
            return None;
        };
        self.give_slot(id, Level::Memory, slot);
        self.change(id, |entry| entry.set_state(State::Reserved));
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
        let Some(class) = self.class_for(place.size, facts) else { return false };
        let Some(id) = self.enter(class, place.hash, facts, last_use) else { return false };
        let Some(slot) = self.slabs[Level::Disk as usize].claim(place.size, place.offset, id) else {
            self.leave(id);
            return false;
        };
        self.give_slot(id, Level::Disk, slot);
        self.change(id, |entry| {
            entry.checksum = checksum;
            entry.set_state(State::Present);
        });
        self.touch(id, last_use);
        true
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
                self.order(&entry, level).touch(&id);
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
        self.give_slot(id, Level::Disk, slot);
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
    pub(crate) fn start_read(&mut self, id: BlockId) -> Option<u64> {
        let entry = *self.entry(id);
        if !entry.good_in(Level::Disk) || entry.has_slot(Level::Memory) || entry.moving() != Moving::No {
            return None;
        }
        self.change(id, |entry| entry.set_moving(Moving::Up));
        let Some(slot) = self.room(Level::Memory, entry.class, id) else {
            self.change(id, |entry| entry.set_moving(Moving::No));
            return None;
        };
        self.give_slot(id, Level::Memory, slot);
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

    /// A slot, in this order: an empty one; that of the block of this size which is next to go; one of a slab of another
    /// size whose blocks have gone unused the longest.
    fn room(&mut self, level: Level, class: ClassId, owner: BlockId) -> Option<Slot> {
        let size = self.class(class).size;
        let over =
            self.quotas.is_over(self.class(class).share, level, size, self.slabs[level as usize].capacity_bytes());
        if !over && let Some(slot) = self.slabs[level as usize].take(size, owner) {
            return Some(slot);
        }
        match self.next_victim(level, class, over) {
            Some((victim, look_around)) => {
                let age = self.entry(victim).last_use;
                self.evict(victim, level);
                if look_around
                    && let Some((slab, last_use)) = self.slabs[level as usize].coldest_other(size)
                    && last_use < age
                {
                    self.evict_slab(slab, level);
                }
            }
            None if over => return None,
            None => {
                let (slab, _) = self.slabs[level as usize].coldest_other(size)?;
                self.evict_slab(slab, level);
            }
        }
        self.slabs[level as usize].take(size, owner)
    }

    /// Takes out the block that goes next, and says whether it is time to look at the slabs of other sizes: one that nobody
    /// uses any more would keep its slabs for ever. Looking at all slabs costs, so it is done once for each slab's worth of
    /// evictions. Who is over a quota pays with blocks of his own; else the class of this size whose blocks are oldest does.
    fn next_victim(&mut self, level: Level, class: ClassId, over: bool) -> Option<(BlockId, bool)> {
        let (size, at) = (self.class(class).size, level as usize);
        let per_slab = self.slabs[at].slots_per_slab(size);
        let mut candidates: Vec<usize> = if over {
            vec![class.0 as usize]
        } else {
            (0..self.classes.len()).filter(|&at| self.classes[at].size == size && self.classes[at].blocks > 0).collect()
        };
        candidates.sort_by_key(|&class| self.classes[class].tail[at]);
        let pop = |orders: fn(&mut Class) -> &mut [Lru; 2], classes: &mut [Class]| {
            candidates.iter().find_map(|&class| Some((class, orders(&mut classes[class])[at].pop()?)))
        };
        let (from, victim) = pop(|class| &mut class.idle, &mut self.classes)
            .or_else(|| pop(|class| &mut class.soft, &mut self.classes))?;
        self.classes[from].tail[at] = self.entry(victim).last_use;
        let evictions = &mut self.classes[class.0 as usize].evictions[at];
        *evictions += 1;
        Some((victim, evictions.is_multiple_of(per_slab.max(1))))
    }

    fn evict_slab(&mut self, slab: SlabId, level: Level) {
        for id in self.slabs[level as usize].blocks_in(slab) {
            let entry = *self.entry(id);
            let was_idle = self.order(&entry, level).remove(&id);
            assert!(was_idle, "a slab that nobody holds has idle blocks only");
            self.evict(id, level);
        }
    }

    /// A tier gives up a block that its eviction order has let go of.
    fn evict(&mut self, id: BlockId, level: Level) {
        let entry = *self.entry(id);
        assert!(entry.idle_in(level), "only an idle block is evicted");
        if entry.good_in(level.other()) {
            self.evicted[level as usize].demoted += 1;
            self.take_slot(id, level);
        } else {
            self.evicted[level as usize].lost += 1;
            self.remove(id);
        }
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
        let (table, key) = self.key(hash);
        let (entries, seed) = (&self.entries, self.seed);
        let rehash = |&id: &u32| hash_key(entries[id as usize / PIECE][id as usize % PIECE].hash, seed).1;
        self.tables[table].insert_unique(key, id.0, rehash);
        self.classes[class.0 as usize].blocks += 1;
        self.quotas.entered(origin);
        Some(id)
    }

    /// The opposite of [`Index::enter`].
    fn leave(&mut self, id: BlockId) {
        let Entry { hash, class, origin, .. } = *self.entry(id);
        let (table, key) = self.key(hash);
        let found = self.tables[table].find_entry(key, |&other| other == id.0);
        found.expect("a block that is there is in the table").remove();
        *self.entry_mut(id) = Entry::VACANT;
        self.vacant.push(id);
        self.classes[class.0 as usize].blocks -= 1;
        self.quotas.left(origin);
    }

    fn give_slot(&mut self, id: BlockId, level: Level, slot: Slot) {
        self.slabs[level as usize].hold(slot);
        let class = self.class(self.entry(id).class);
        self.quotas.took(class.share, level, class.size);
        self.change(id, |entry| entry.slots[level as usize] = slot);
    }

    /// The block's slot in that tier is empty again.
    fn take_slot(&mut self, id: BlockId, level: Level) {
        let slot = self.entry(id).slots[level as usize];
        self.change(id, |entry| entry.slots[level as usize] = Slot::NONE);
        let class = self.class(self.entry(id).class);
        let (share, size) = (class.share, class.size);
        self.quotas.gave(share, level, size);
        self.slabs[level as usize].let_go(slot);
        self.slabs[level as usize].put(slot);
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
            if was.is_some() {
                self.order(&before, level).remove(&id);
            }
            if is.is_some() {
                self.order(&after, level).insert(id);
            }
            // A slot that is given away counts as held: see `take_slot`.
            match (was.is_some(), is.is_some()) {
                (false, true) => self.slabs[level as usize].let_go(after.slots[level as usize]),
                (true, false) => self.slabs[level as usize].hold(before.slots[level as usize]),
                _ => {}
            }
        }
        result
    }

    fn order(&mut self, entry: &Entry, level: Level) -> &mut Lru {
        let class = &mut self.classes[entry.class.0 as usize];
        match entry.keep() {
            Keep::Cached => &mut class.idle[level as usize],
            // Of a hard pin only the copies that are not the last.
            Keep::Soft | Keep::Hard => &mut class.soft[level as usize],
        }
    }

    fn class(&self, id: ClassId) -> &Class {
        &self.classes[id.0 as usize]
    }

    /// The class of blocks of that size and origin; `None` if a slab can't hold such a block or there are too many classes.
    fn class_for(&mut self, size: BlockBytes, facts: Facts) -> Option<ClassId> {
        if self.slabs[Level::Memory as usize].slots_per_slab(size) == 0 {
            return None;
        }
        let share = self.quotas.share(facts.origin);
        let found = self.classes.iter().position(|class| class.size == size && class.share == share);
        let at = match found.or_else(|| self.classes.iter().position(|class| class.blocks == 0)) {
            Some(at) => at,
            None if self.classes.len() < MAX_CLASSES => {
                self.classes.push(Class::new(size, share));
                self.classes.len() - 1
            }
            None => return None,
        };
        if (self.classes[at].size, self.classes[at].share) != (size, share) {
            self.classes[at] = Class::new(size, share);
        }
        Some(ClassId(u8::try_from(at).expect("below MAX_CLASSES")))
    }

    fn capacity(&self) -> u32 {
        u32::try_from(self.entries.len() * PIECE).expect("ids are 32 bits")
    }

    fn key(&self, hash: BlockHash) -> (usize, u64) {
        hash_key(hash, self.seed)
    }

    fn entry_mut(&mut self, id: BlockId) -> &mut Entry {
        &mut self.entries[id.0 as usize / PIECE][id.0 as usize % PIECE]
    }
}

impl Class {
    fn new(size: BlockBytes, share: ShareId) -> Self {
        Self {
            size,
            share,
            blocks: 0,
            idle: Default::default(),
            soft: Default::default(),
            tail: Default::default(),
            evictions: [0; 2],
        }
    }
}

impl Blocks {
    fn count(&mut self, entry: &Entry, add: impl Fn(&mut u64)) {
        match entry.state() {
            State::Vacant => return,
            State::Reserved => add(&mut self.reserved),
            State::Present => add(&mut self.present),
        }
        for level in Level::ALL {
            if entry.good_in(level) {
                add(&mut self.good[level as usize]);
            }
        }
        if entry.leases > 0 {
            add(&mut self.leased);
        }
        if entry.keep() != Keep::Cached {
            add(&mut self.kept);
        }
        if entry.keep() == Keep::Hard {
            add(&mut self.hard);
        }
    }

    fn enter(&mut self, entry: &Entry) {
        self.count(entry, |n| *n += 1);
    }

    fn leave(&mut self, entry: &Entry) {
        self.count(entry, |n| *n -= 1);
    }
}

/// Which table, and the key in it. Hashes come from outside, and a writer could choose many that fall together: the seed is
/// the node's own.
fn hash_key(hash: BlockHash, seed: u64) -> (usize, u64) {
    let mut first = [0; 8];
    first.copy_from_slice(&hash.0[..8]);
    let wide = u128::from(u64::from_le_bytes(first) ^ seed) * u128::from(0x9e37_79b9_7f4a_7c15_u64);
    let key = (wide >> 64) as u64 ^ wide as u64;
    // Bits that the table itself uses neither for the bucket nor for the tag.
    ((key >> 48) as usize % TABLES, key)
}

#[cfg(test)]
impl Index {
    /// Compares every counter and every order with the entries.
    pub(crate) fn check(&self) {
        let mut blocks = Blocks::default();
        let mut places: [Vec<(u64, u64)>; 2] = Default::default();
        let (mut live, mut idle, mut by_class) = (0, [0; 2], std::collections::HashMap::new());
        for id in 0..self.capacity() {
            let (id, entry) = (BlockId(id), self.entry(BlockId(id)));
            if entry.state() == State::Vacant {
                continue;
            }
            live += 1;
            blocks.enter(entry);
            *by_class.entry(entry.class.0).or_insert(0) += 1;
            assert_eq!(self.find(self.size(id), entry.hash), Some(id));
            assert!(Level::ALL.iter().any(|&level| entry.has_slot(level)), "{id} is nowhere");
            for level in Level::ALL {
                if entry.has_slot(level) {
                    let place = self.place(id, level);
                    places[level as usize].push((place.offset, place.offset + place.size.0));
                }
                if entry.idle_in(level) {
                    idle[level as usize] += 1;
                    let class = self.class(entry.class);
                    let orders = [&class.idle[level as usize], &class.soft[level as usize]];
                    assert!(orders[usize::from(entry.keep() != Keep::Cached)].contains(id));
                }
            }
        }
        assert_eq!(blocks, self.blocks);
        assert_eq!(live, self.tables.iter().map(HashTable::len).sum::<usize>());
        assert_eq!(live + self.vacant.len(), self.capacity() as usize);
        for (class, at) in self.classes.iter().zip(0u8..) {
            assert_eq!(class.blocks, by_class.get(&at).copied().unwrap_or(0));
        }
        for level in Level::ALL {
            let at = level as usize;
            self.slabs[at].check();
            let listed: usize = self.classes.iter().map(|class| class.idle[at].len() + class.soft[at].len()).sum();
            assert_eq!(listed, idle[at], "{level:?}: listed = what may be given up");
            places[at].sort_unstable();
            assert!(places[at].windows(2).all(|pair| pair[0].1 <= pair[1].0), "two blocks share a byte");
            assert!(places[at].last().is_none_or(|last| last.1 <= self.slabs[at].capacity_bytes()));
        }
    }
}
