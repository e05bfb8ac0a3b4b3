//! The block pool: every block of an arena, what it holds, and who may touch it.
//!
//! ```text
//!            take                  seal(name)               share, pin
//!   Free ───────────▶ Reserved ──────────────▶ Committed ◀────────────▶ Shared(n)
//!    ▲  ▲  give_back   │ ▲  │                    │    ▲      release
//!    │  └──────────────┘ │  │ open       release │    │ pin
//!    │             fence │  ▼                    ▼    │
//!    │                  Landing               Evictable ───▶ Reserved   (evicted by take)
//!    └───────────────────────────────────────────┘ clear_cached; or, on the last release, nobody could find it
//! ```
//!
//! | state | who holds it | may be written | may be read |
//! | --- | --- | --- | --- |
//! | free | nobody | no | no |
//! | reserved | one [`Filling`] | by its owner | by its owner, what it wrote |
//! | landing | one [`Landing`] | by a peer | by nobody: half-done writes look like anything |
//! | committed, shared | one, several [`Sealed`] | never again | by every holder |
//! | evictable | nobody | no | no; found by its name, it is pinned first |
//!
//! The states of a block that somebody holds are types. None can be copied, so a block cannot be given back twice, written
//! after it was sealed, or sealed or given back before its peer was fenced off: that would not compile. They can be lost
//! (a pool that took them back on `Drop` would need a lock around every operation); then the block stays in use for
//! ever, which the law "free + cached = all when nothing runs" shows in every test.
//!
//! **Two blocks with one name.** Two sequences may compute the same block at the same time. The first to seal it is the
//! one the index finds. The second keeps its own block, sealed but not findable (a *twin*): its id is in a block table
//! already, and a peer may be reading it, so it must not be exchanged under them. When its last holder leaves, a twin
//! takes the place in the index if that has become vacant, else it is free at once.
//!
//! **Who goes first.** The least recently used block of those that no evictable block hangs on: a block is of use only
//! together with all before it, so chains are eaten up from their leaves. Each evictable block counts the evictable ones
//! behind it. The list of recency holds all evictable blocks; one that is met at its end while blocks still hang on it
//! is passed over and put back, as the oldest, when the last of them goes. Each release makes at most one such detour
//! possible, so eviction is O(1), amortised. Groups whose blocks are of use without the ones before (sliding windows) are
//! not chained.
//!
//! **Memory.** One record of 60 bytes a block, 8 for its place in the list of recency, 4 to 8 for the index (buckets of
//! linked records: names are hashes already), 4 for the list of free blocks. A name's low bits choose its bucket: whoever
//! wanted to crowd one would have to find prompts by trial, 1 in as many as there are buckets for each block.

use kvasir_types::{BlockHash, BlockId};

use crate::{
    Evict, Lru,
    events::{Batch, CacheEvent, EventLog, Snapshot, Stored},
};

/// How many blocks are in which state.
///
/// `free + cached + in_use == total`, always; and `in_use` is `reserved + landing + shared` and the committed ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All blocks of the pool.
    pub total: usize,
    /// Hold nothing.
    pub free: usize,
    /// Held by nobody, kept for reuse: evictable.
    pub cached: usize,
    /// Held by somebody: being written, or being read.
    pub in_use: usize,
    /// Of those in use: may be written by their owner.
    pub reserved: usize,
    /// Of those in use: may be written by a peer.
    pub landing: usize,
    /// Of those in use: complete, with several holders.
    pub shared: usize,
}

/// A block with one owner, who may write it. Give it back with [`BlockPool::seal`], [`BlockPool::open`] or
/// [`BlockPool::give_back`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is dropped instead of given back is lost to the pool"]
pub struct Filling(BlockId);

/// A block that a peer may be writing: it cannot be read, sealed or given back before [`BlockPool::fence`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is dropped instead of fenced is lost to the pool"]
pub struct Landing(BlockId);

/// One holder's share in a complete block that nobody writes any more. Give it back with [`BlockPool::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a share that is dropped instead of released keeps its block for ever"]
pub struct Sealed(BlockId);

impl Filling {
    /// Which block it is.
    pub fn id(&self) -> BlockId {
        self.0
    }
}

impl Landing {
    /// Which block it is.
    pub fn id(&self) -> BlockId {
        self.0
    }
}

impl Sealed {
    /// Which block it is.
    pub fn id(&self) -> BlockId {
        self.0
    }
}

/// What a sealed block is called, and what it hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// How it is found, and what followers of the cache are told.
    pub stored: Stored,
    /// Whether it is of no use without its parent, so that the parent is kept as long as it is.
    pub chained: bool,
    /// Whether it is the first of its chain: its parent is the chain's root and no block.
    pub first: bool,
}

/// Hears of blocks that leave the cache because their place is needed.
pub trait OnEvict: Send + std::fmt::Debug {
    /// A block nobody can find any more. Its bytes are still there, **until this returns**.
    fn evicted(&mut self, leaving: &Leaving<'_>);
}

/// A block that leaves the cache.
#[derive(Debug)]
pub struct Leaving<'a> {
    pool: &'a BlockPool,
    block: BlockId,
}

impl Leaving<'_> {
    /// Where it is.
    pub fn block(&self) -> BlockId {
        self.block
    }

    /// What it was found by.
    pub fn stored(&self) -> Stored {
        self.pool.records[self.block.0 as usize].stored()
    }

    /// Names of the blocks of its chain, from the first to this one. `None`: not all of those before it are here, or it is
    /// of use without them. Takes as long as the chain.
    pub fn chain(&self) -> Option<Vec<BlockHash>> {
        let mut record = self.pool.records[self.block.0 as usize];
        let mut chain = vec![record.hash];
        while !record.first {
            let parent = self.pool.search(&record.parent).filter(|_| record.chained)?;
            record = self.pool.records[parent.0 as usize];
            chain.push(record.hash);
        }
        chain.reverse();
        Some(chain)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Reserved,
    Landing,
    Committed,
    /// Two holders at least.
    Shared(u32),
    Evictable,
}

/// Whether a sealed block has a name, and whether it is found by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fame {
    /// It has none: nobody will ever ask for it.
    Nameless,
    /// A twin: another block is found by this name.
    Hidden,
    /// The index points here.
    Found,
}

/// No block.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Record {
    hash: BlockHash,
    parent: BlockHash,
    state: State,
    /// Evictable blocks that hang on this one.
    leaves: u32,
    /// The evictable block that this evictable one is counted at.
    hangs_on: u32,
    /// The next block of the same bucket of the index.
    next: u32,
    group: u16,
    fame: Fame,
    chained: bool,
    first: bool,
}

impl Record {
    const EMPTY: Self = Self {
        hash: BlockHash([0; 16]),
        parent: BlockHash([0; 16]),
        state: State::Free,
        leaves: 0,
        hangs_on: NONE,
        next: NONE,
        group: 0,
        fame: Fame::Nameless,
        chained: false,
        first: false,
    };

    fn stored(&self) -> Stored {
        Stored { hash: self.hash, parent: self.parent, group: self.group }
    }
}

/// Hands out the blocks `0..capacity` of an arena and remembers what the sealed ones hold.
///
/// Owned by one thread (the engine's). Every operation costs O(1) a block, eviction amortised.
#[derive(Debug)]
pub struct BlockPool {
    records: Vec<Record>,
    free: Vec<BlockId>,
    /// First block of each bucket of the index; a power of two of them.
    buckets: Vec<u32>,
    /// Evictable blocks by recency, those apart that were passed over.
    idle: Lru,
    evictable: usize,
    reserved: usize,
    landing: usize,
    shared: usize,
    log: EventLog,
    on_evict: Option<Box<dyn OnEvict>>,
}

impl BlockPool {
    /// A pool of `capacity` free blocks whose log keeps `event_limit` events for whoever drains it.
    ///
    /// # Panics
    /// If `capacity` does not fit a [`BlockId`] (with room for the numbers that stand for no block).
    pub fn new(capacity: usize, event_limit: usize) -> Self {
        let last = u32::try_from(capacity).ok().filter(|&last| last < NONE - 1).expect("a pool has fewer blocks");
        Self {
            records: vec![Record::EMPTY; capacity],
            // Taken from the end: the first block to go out is b0, which makes tables in tests and logs readable.
            free: (0..last).rev().map(BlockId).collect(),
            buckets: vec![NONE; capacity.next_power_of_two()],
            idle: Lru::with_capacity(capacity),
            evictable: 0,
            reserved: 0,
            landing: 0,
            shared: 0,
            log: EventLog::new(event_limit),
            on_evict: None,
        }
    }

    /// Who hears of blocks that leave the cache because their place is needed.
    pub fn on_evict(&mut self, hears: Option<Box<dyn OnEvict>>) {
        self.on_evict = hears;
    }

    /// How many blocks are in which state.
    pub fn counts(&self) -> Counts {
        let (total, free, cached) = (self.records.len(), self.free.len(), self.evictable);
        let (reserved, landing, shared) = (self.reserved, self.landing, self.shared);
        Counts { total, free, cached, in_use: total - free - cached, reserved, landing, shared }
    }

    /// How many blocks [`take`](Self::take) could hand out now, by evicting cached ones if need be.
    pub fn available(&self) -> usize {
        self.free.len() + self.evictable
    }

    /// A block to write: a free one, else the cached one that is first to go. `None`: every block is held.
    pub fn take(&mut self) -> Option<Filling> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let block = self.evict()?;
                if let Some(mut hears) = self.on_evict.take() {
                    hears.evicted(&Leaving { pool: self, block });
                    self.on_evict = Some(hears);
                }
                block
            }
        };
        self.reserved += 1;
        self.record(id).state = State::Reserved;
        Some(Filling(id))
    }

    /// `count` blocks to write, or none at all.
    pub fn take_many(&mut self, count: usize) -> Option<Vec<Filling>> {
        (count <= self.available()).then(|| (0..count).map_while(|_| self.take()).collect())
    }

    /// From here on a peer may write into the block.
    pub fn open(&mut self, block: Filling) -> Landing {
        self.reserved -= 1;
        self.landing += 1;
        self.record(block.0).state = State::Landing;
        Landing(block.0)
    }

    /// No peer can write into the block any more: the caller has made sure. What landed may be read.
    pub fn fence(&mut self, block: Landing) -> Filling {
        self.landing -= 1;
        self.reserved += 1;
        self.record(block.0).state = State::Reserved;
        Filling(block.0)
    }

    /// A block comes back before it was complete: what was written is forgotten.
    pub fn give_back(&mut self, block: Filling) {
        self.reserved -= 1;
        self.vacate(block.0);
    }

    /// The block is complete and has this name: from here on nobody writes it. Findable, unless another block of that
    /// name is already (see the module's page on twins).
    pub fn seal(&mut self, block: Filling, name: Name) -> Sealed {
        let Name { stored: Stored { hash, parent, group }, chained, first } = name;
        let record = self.record(block.0);
        *record = Record { hash, parent, group, chained, first, fame: Fame::Hidden, ..*record };
        self.publish(block.0);
        self.commit(block)
    }

    /// The block is complete but nobody will ask for it by a name (there is no prefix cache): it can be shared, and is
    /// free when its last holder leaves.
    pub fn seal_nameless(&mut self, block: Filling) -> Sealed {
        self.record(block.0).fame = Fame::Nameless;
        self.commit(block)
    }

    fn commit(&mut self, block: Filling) -> Sealed {
        self.reserved -= 1;
        self.record(block.0).state = State::Committed;
        Sealed(block.0)
    }

    /// One more share in the same block, for a sequence that begins like the first.
    pub fn share(&mut self, share: &Sealed) -> Sealed {
        self.hold(share.0);
        Sealed(share.0)
    }

    /// Whether nobody else holds the block.
    pub fn is_sole(&self, share: &Sealed) -> bool {
        self.records[share.0.0 as usize].state == State::Committed
    }

    /// Whether a block of that name can be found; `Some(true)` if nobody holds it now (so pinning it makes one fewer
    /// [`available`](Self::available)). Changes nothing, not even recency.
    pub fn find(&self, hash: &BlockHash) -> Option<bool> {
        self.search(hash).map(|id| self.records[id.0 as usize].state == State::Evictable)
    }

    /// A share in the block of that name.
    pub fn pin(&mut self, hash: &BlockHash) -> Option<Sealed> {
        let id = self.search(hash)?;
        self.hold(id);
        Some(Sealed(id))
    }

    /// One holder leaves. The last one's leaving makes the block evictable (or free, if nobody could find it).
    ///
    /// Whoever gives back a whole table gives back its **tail first**, so that recency and chains agree.
    pub fn release(&mut self, share: Sealed) {
        let id = share.0;
        let record = self.record(id);
        record.state = match record.state {
            State::Shared(2) => State::Committed,
            State::Shared(holders) => State::Shared(holders - 1),
            State::Committed => State::Evictable,
            state => unreachable!("a share exists only of a sealed block, {id} is {state:?}"),
        };
        match record.state {
            State::Committed => self.shared -= 1,
            State::Evictable => self.retire(id),
            _ => {}
        }
    }

    /// Forgets every cached block.
    pub fn clear_cached(&mut self) {
        while let Some(id) = self.evict() {
            self.vacate(id);
        }
    }

    /// The events since the last time.
    pub fn drain_events(&mut self) -> Batch {
        self.log.drain()
    }

    /// Everything that can be found, and from which event on to follow.
    pub fn snapshot(&self) -> Snapshot {
        let found = self.records.iter().filter(|record| record.fame == Fame::Found);
        Snapshot { next: self.log.next(), blocks: found.map(Record::stored).collect() }
    }

    fn record(&mut self, id: BlockId) -> &mut Record {
        &mut self.records[id.0 as usize]
    }

    /// One more holder.
    fn hold(&mut self, id: BlockId) {
        let record = self.record(id);
        let before = record.state;
        record.state = match before {
            State::Evictable => State::Committed,
            State::Committed => State::Shared(2),
            State::Shared(holders) => State::Shared(holders + 1),
            state => unreachable!("only sealed blocks are held, {id} is {state:?}"),
        };
        match before {
            State::Evictable => {
                self.evictable -= 1;
                self.idle.remove(&id);
                self.let_go_of_parent(id);
            }
            State::Committed => self.shared += 1,
            _ => {}
        }
    }

    /// A sealed block lost its last holder.
    fn retire(&mut self, id: BlockId) {
        self.publish(id);
        if self.records[id.0 as usize].fame != Fame::Found {
            return self.vacate(id);
        }
        self.evictable += 1;
        self.idle.insert(id);
        let Record { chained, parent, .. } = self.records[id.0 as usize];
        // A parent that is held now, or is a twin, gets its turn in the order of recency: it is released after this one.
        if let Some(parent) = self.search(&parent).filter(|&parent| chained && parent != id) {
            self.record(parent).leaves += 1;
            self.record(id).hangs_on = parent.0;
        }
    }

    /// An evictable block is held again, or goes: its parent may be a leaf now.
    fn let_go_of_parent(&mut self, id: BlockId) {
        let parent = BlockId(std::mem::replace(&mut self.record(id).hangs_on, NONE));
        if parent.0 == NONE {
            return;
        }
        let record = self.record(parent);
        record.leaves -= 1;
        if record.leaves == 0 && record.state == State::Evictable && !self.idle.contains(parent) {
            // It was the oldest when it was passed over, and all that are left are younger.
            self.idle.insert_first(parent);
        }
    }

    /// Takes the first cached block out of the eviction order and out of the index.
    fn evict(&mut self) -> Option<BlockId> {
        loop {
            let id = self.idle.pop()?;
            if self.records[id.0 as usize].leaves > 0 {
                continue; // passed over; put back by the last that hangs on it
            }
            debug_assert_eq!(self.records[id.0 as usize].state, State::Evictable);
            self.evictable -= 1;
            self.let_go_of_parent(id);
            self.withdraw(id);
            return Some(id);
        }
    }

    fn vacate(&mut self, id: BlockId) {
        let record = self.record(id);
        (record.state, record.fame) = (State::Free, Fame::Nameless);
        self.free.push(id);
    }

    fn bucket(&self, hash: &BlockHash) -> usize {
        let [low @ .., _, _, _, _, _, _, _, _] = hash.0;
        u64::from_le_bytes(low) as usize & (self.buckets.len() - 1)
    }

    fn search(&self, hash: &BlockHash) -> Option<BlockId> {
        let mut at = self.buckets[self.bucket(hash)];
        while at != NONE {
            let record = &self.records[at as usize];
            if record.hash == *hash {
                return Some(BlockId(at));
            }
            at = record.next;
        }
        None
    }

    /// Makes a named block findable, if no other of its name is.
    fn publish(&mut self, id: BlockId) {
        let Record { hash, fame, .. } = self.records[id.0 as usize];
        if fame != Fame::Hidden || self.search(&hash).is_some() {
            return;
        }
        let bucket = self.bucket(&hash);
        let next = std::mem::replace(&mut self.buckets[bucket], id.0);
        let record = self.record(id);
        (record.next, record.fame) = (next, Fame::Found);
        let stored = record.stored();
        self.log.push(CacheEvent::Stored(stored));
    }

    /// The block is not found any more.
    fn withdraw(&mut self, id: BlockId) {
        let Record { hash, next, .. } = self.records[id.0 as usize];
        let bucket = self.bucket(&hash);
        let mut at = self.buckets[bucket];
        if at == id.0 {
            self.buckets[bucket] = next;
        } else {
            while self.records[at as usize].next != id.0 {
                at = self.records[at as usize].next;
            }
            self.records[at as usize].next = next;
        }
        self.record(id).fame = Fame::Nameless;
        self.log.push(CacheEvent::Removed(hash));
    }
}

#[cfg(test)]
mod tests;
