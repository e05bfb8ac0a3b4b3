//! Two tiers against a model: any order of calls, and moves that end late, badly, or not at all for a while.
//!
//! The model is the bytes of both tiers, a tag for each slot. A move copies tags when it ends; if a slot were given away
//! while one is under way, a reader would see a tag that is not his block's.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kvasir_types::BlockHash;
use proptest::prelude::*;

use super::*;

const SLAB: u64 = 16 << 10;
/// A page each, so that both tiers cut slabs alike.
const SIZES: [BlockBytes; 2] = [BlockBytes(4096), BlockBytes(8192)];

#[derive(Clone, Debug)]
enum Op {
    /// Reserve, write and commit at once, for the n-th tenant.
    Put {
        size: usize,
        first: u8,
        len: u8,
        tenant: usize,
    },
    Lookup {
        size: usize,
        first: u8,
        len: u8,
    },
    Release {
        reader: usize,
    },
    Fetch {
        size: usize,
        first: u8,
        len: u8,
    },
    Write,
    /// The n-th move ends.
    End {
        nth: usize,
        good: bool,
    },
    /// The disk's bytes of a block change.
    Rot {
        nth: usize,
    },
    Keep {
        size: usize,
        first: u8,
        keep: usize,
    },
    Evict {
        which: usize,
    },
    /// The n-th copy that the disk is to forget is forgotten.
    Forgotten {
        nth: usize,
    },
    Full {
        full: bool,
    },
    Wait {
        ms: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let run = || (0..SIZES.len(), 0u8..24, 1u8..6);
    prop_oneof![
        6 => (run(), 0usize..3).prop_map(|((size, first, len), tenant)| Op::Put { size, first, len, tenant }),
        4 => run().prop_map(|(size, first, len)| Op::Lookup { size, first, len }),
        3 => (0usize..4).prop_map(|reader| Op::Release { reader }),
        4 => run().prop_map(|(size, first, len)| Op::Fetch { size, first, len }),
        4 => Just(Op::Write),
        8 => (0usize..4, prop::bool::weighted(0.9)).prop_map(|(nth, good)| Op::End { nth, good }),
        1 => (0usize..40).prop_map(|nth| Op::Rot { nth }),
        1 => (0..SIZES.len(), 0u8..24, 0usize..3).prop_map(|(size, first, keep)| Op::Keep { size, first, keep }),
        1 => (0usize..4).prop_map(|which| Op::Evict { which }),
        2 => (0usize..4).prop_map(|nth| Op::Forgotten { nth }),
        1 => any::<bool>().prop_map(|full| Op::Full { full }),
        1 => (0u64..7000).prop_map(|ms| Op::Wait { ms }),
    ]
}

fn hash(n: u8) -> BlockHash {
    BlockHash([n; 16])
}

type Tag = (BlockBytes, BlockHash, u64);

fn sum((size, hash, writing): Tag) -> Checksum {
    let mut sum = hash.0;
    sum[..8].copy_from_slice(&writing.to_le_bytes());
    sum[15] ^= (size.0 >> 12) as u8;
    sum
}

enum Under {
    Up(Move),
    Down(Move),
}

/// Blocks, and where each is with which bytes.
type Readable = HashMap<(BlockBytes, BlockHash), (u64, Checksum)>;

/// What readers who look for themselves are told.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Readable>>);

impl Publish for Told {
    fn put(&mut self, place: &Place, checksum: &Checksum) {
        let before = self.0.lock().unwrap().insert((place.size, place.hash), (place.offset, *checksum));
        assert_eq!(before, None, "told twice");
    }

    fn take(&mut self, hash: &BlockHash, size: BlockBytes) {
        assert!(self.0.lock().unwrap().remove(&(size, *hash)).is_some(), "taken back, never told");
    }
}

struct World {
    store: Store,
    told: Told,
    now: Instant,
    memory: HashMap<u64, Tag>,
    disk: HashMap<u64, Option<Tag>>,
    moves: Vec<Under>,
    forgets: Vec<Forget>,
    readers: Vec<(LeaseId, Vec<(u64, Tag)>)>,
    /// What was committed last under each name.
    put: HashMap<(BlockBytes, BlockHash), Tag>,
    writings: u64,
}

fn settings(policies: Policies) -> Settings {
    Settings {
        capacity_bytes: 3 * SLAB,
        slab_bytes: SLAB,
        disk_bytes: 5 * SLAB,
        lease: Duration::from_secs(5),
        reservation: Duration::from_secs(5),
        max_leases: 6,
        max_reservations: 6,
        max_moves: 3,
        max_pinned_percent: 50,
        published_bytes: 0,
        policies,
        quotas: Limits { tenants: HashMap::from([("small".to_owned(), 34)]), others: None },
        seed: 1,
    }
}

impl World {
    fn new() -> Self {
        Self::with(Policies { memory: Policy::Lru, disk: Policy::Lru })
    }

    fn with(policies: Policies) -> Self {
        let (now, told) = (Instant::now(), Told::default());
        let mut store = Store::new(settings(policies), now);
        store.publish_to(Box::new(told.clone()));
        Self {
            store,
            told,
            now,
            memory: HashMap::new(),
            disk: HashMap::new(),
            moves: Vec::new(),
            forgets: Vec::new(),
            readers: Vec::new(),
            put: HashMap::new(),
            writings: 0,
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Put { size, first, len, tenant } => {
                let tenant = ["", "small", "large"][tenant].to_owned();
                self.put(SIZES[size], &run(first, len), &Origin { model: [1; 16], tenant });
            }
            Op::Lookup { size, first, len } => self.lookup(SIZES[size], &run(first, len)),
            Op::Release { reader } => {
                if reader < self.readers.len() {
                    let (lease, _) = self.readers.remove(reader);
                    assert!(self.store.close_lease(lease));
                    self.store.finish_lease(lease);
                }
            }
            Op::Fetch { size, first, len } => self.fetch(SIZES[size], &run(first, len)),
            Op::Write => self.moves.extend(self.store.writes().into_iter().map(Under::Down)),
            Op::End { nth, good } => self.end(nth, good),
            Op::Rot { nth } => {
                if let Some(slot) = self.disk.values_mut().nth(nth) {
                    *slot = None;
                }
            }
            Op::Keep { size, first, keep } => {
                let keep = [Keep::Cached, Keep::Soft, Keep::Hard][keep];
                let until = self.now + Duration::from_secs(3);
                self.store.keep(SIZES[size], &run(first, 4), keep, until);
            }
            Op::Evict { which } => {
                let which = match which {
                    0 => Which::All,
                    1 => Which::Of { model: Some([1; 16]), tenant: Some("small".into()) },
                    2 => Which::Of { model: Some([2; 16]), tenant: None },
                    _ => Which::After([tag(hash(3))].into()),
                };
                let sift = self.store.evict(0, &which, |_| {});
                assert_eq!(sift.next, None, "a small store is one piece");
                self.forgets.extend(sift.forget);
            }
            Op::Forgotten { nth } => {
                if nth < self.forgets.len() {
                    let Forget { block, place } = self.forgets.remove(nth);
                    self.disk.remove(&place.offset);
                    self.store.forgotten(block);
                }
            }
            Op::Full { full } => self.store.disk_is_full(full),
            Op::Wait { ms } => {
                self.now += Duration::from_millis(ms);
                let expired = self.store.expire(self.now);
                for lease in expired.leases {
                    self.store.finish_lease(lease);
                    self.readers.retain(|(open, _)| *open != lease);
                }
            }
        }
        self.store.index.check();
        assert_eq!(*self.told.0.lock().unwrap(), self.store.index.readable(), "told is what is there");
        for (_, blocks) in &self.readers {
            assert!(blocks.iter().all(|(offset, tag)| self.memory.get(offset) == Some(tag)), "under a lease");
        }
        let blocks = self.store.index.blocks();
        assert!(blocks.hard * SIZES[0].0 <= 3 * SLAB / 2, "hard pins take no more than they may");
    }

    fn put(&mut self, size: BlockBytes, hashes: &[BlockHash], origin: &Origin) {
        let origin = self.store.origin(origin);
        let facts = |n: usize| {
            let parent = if n == 0 { 0 } else { tag(hashes[n - 1]) };
            Facts { position: n as u16, parent, group: 7, origin }
        };
        let Ok(reserved) = self.store.reserve(self.now, size, hashes, Ask::default(), facts) else {
            return;
        };
        let Some(id) = reserved.reservation else { return };
        let mut good = HashMap::new();
        for written in self.store.begin_commit(id).expect("it is open") {
            self.writings += 1;
            let tag = (size, written.place.hash, self.writings);
            self.memory.insert(written.place.offset, tag);
            self.put.insert((size, written.place.hash), tag);
            good.insert(written.block, sum(tag));
        }
        self.store.finish_reservation(id, &good);
    }

    fn lookup(&mut self, size: BlockBytes, hashes: &[BlockHash]) {
        let there = self.store.exists(size, hashes).into_iter().take_while(|tiers| tiers[0]).count();
        let Ok(found) = self.store.lookup(self.now, size, hashes, 0) else { return };
        assert_eq!(found.as_ref().map_or(0, |found| found.blocks.len()), there);
        let Some(found) = found else { return };
        let blocks = hashes.iter().zip(&found.blocks).map(|(&hash, stored)| {
            let tag = self.put[&(size, hash)];
            assert_eq!(stored.checksum, sum(tag), "found with the checksum it was committed with");
            assert_eq!(self.memory.get(&stored.offset), Some(&tag), "found where its bytes are");
            (stored.offset, tag)
        });
        self.readers.push((found.lease, blocks.collect()));
    }

    fn fetch(&mut self, size: BlockBytes, hashes: &[BlockHash]) {
        let there = self.store.exists(size, hashes).into_iter().take_while(|[memory, disk]| *memory || *disk).count();
        let fetch = self.store.fetch(size, hashes);
        assert!(fetch.ready + fetch.coming <= there && fetch.reads.len() <= fetch.coming);
        self.moves.extend(fetch.reads.into_iter().map(Under::Up));
    }

    fn end(&mut self, nth: usize, good: bool) {
        if nth >= self.moves.len() {
            return;
        }
        match self.moves.remove(nth) {
            Under::Down(write) => {
                let tag = self.memory[&write.memory_offset];
                assert_eq!(sum(tag), write.checksum, "what is written is the block");
                self.disk.insert(write.disk_offset, good.then_some(tag));
                self.store.written(write.block, good);
            }
            Under::Up(read) => {
                let bytes = self.disk.get(&read.disk_offset).copied().flatten();
                let right = bytes.is_some_and(|tag| sum(tag) == read.checksum);
                if let (Some(tag), true) = (bytes, good) {
                    self.memory.insert(read.memory_offset, tag);
                }
                let end = match (good, right) {
                    (false, _) => ReadEnd::Failed,
                    (true, false) => ReadEnd::Torn,
                    (true, true) => ReadEnd::Good,
                };
                self.store.fetched(read.block, end);
            }
        }
    }

    fn settle(&mut self) {
        self.apply(&Op::Wait { ms: 10_000 });
        while !self.moves.is_empty() {
            self.apply(&Op::End { nth: 0, good: true });
        }
        while !self.forgets.is_empty() {
            self.apply(&Op::Forgotten { nth: 0 });
        }
    }

    /// Writes everything down, so that memory gives blocks up for nothing.
    fn write_all(&mut self) {
        loop {
            self.apply(&Op::Write);
            if self.moves.is_empty() {
                return;
            }
            self.settle();
        }
    }
}

fn policies() -> impl Strategy<Value = Policy> {
    prop_oneof![Just(Policy::HitDensity), Just(Policy::Lru), Just(Policy::S3Fifo)]
}

fn run(first: u8, len: u8) -> Vec<BlockHash> {
    (first..first + len).map(hash).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 768, ..ProptestConfig::default() })]

    #[test]
    fn whatever_moves_what_is_found_is_what_was_put(
        ops in prop::collection::vec(op(), 1..150),
        (memory, disk) in (policies(), policies()),
    ) {
        let mut world = World::with(Policies { memory, disk });
        ops.iter().for_each(|op| world.apply(op));
        world.settle();
        let usage = world.store.usage();
        prop_assert_eq!((usage.pinned, usage.reserved, usage.kept), (0, 0, 0), "nothing leaks");
        for n in 0..30 {
            world.apply(&Op::Lookup { size: usize::from(n % 2 == 0), first: n, len: 1 });
        }
        // Nothing is held any more, so all of it can go.
        world.settle();
        world.apply(&Op::Evict { which: 0 });
        world.settle();
        let usage = world.store.usage();
        prop_assert_eq!((usage.blocks, usage.used_bytes, usage.disk_used_bytes), (0, 0, 0));
    }
}

#[test]
fn what_memory_gives_up_is_on_disk_and_comes_back() {
    let (mut world, size) = (World::new(), SIZES[0]);
    // Memory has room for twelve.
    for first in [0, 12] {
        world.put(size, &run(first, 12), &Origin::default());
        world.write_all();
    }
    let usage = world.store.usage();
    assert_eq!((usage.memory_blocks, usage.disk_blocks, usage.blocks), (12, 20, 20), "the disk has room for twenty");
    // The disk's four oldest are in memory no more: the end of the first run.
    assert_eq!(world.store.exists(size, &run(0, 12)).iter().filter(|tiers| tiers[1]).count(), 8);
    let fetch = world.store.fetch(size, &run(0, 3));
    assert_eq!((fetch.ready, fetch.coming, fetch.reads.len()), (0, 3, 3));
    world.moves.extend(fetch.reads.into_iter().map(Under::Up));
    assert!(world.store.lookup(world.now, size, &run(0, 3), 0).unwrap().is_none(), "not there yet");
    world.settle();
    world.apply(&Op::Lookup { size: 0, first: 0, len: 3 });
    assert_eq!(world.readers[0].1.len(), 3);
}

#[test]
fn a_block_that_rotted_on_disk_is_a_miss_for_good() {
    let (mut world, size) = (World::new(), SIZES[0]);
    world.put(size, &run(0, 12), &Origin::default());
    world.write_all();
    world.put(size, &run(20, 12), &Origin::default());
    world.disk.values_mut().for_each(|slot| *slot = None);
    world.apply(&Op::Fetch { size: 0, first: 0, len: 1 });
    world.settle();
    assert_eq!(world.store.exists(size, &run(0, 1)), [[false, false]]);
    assert_eq!(world.store.totals().torn_on_disk_blocks, 1);
}

#[test]
fn a_full_disk_keeps_what_it_has() {
    let (mut world, size) = (World::new(), SIZES[0]);
    world.put(size, &run(0, 4), &Origin::default());
    world.write_all();
    world.store.disk_is_full(true);
    world.put(size, &run(4, 4), &Origin::default());
    world.write_all();
    let usage = world.store.usage();
    assert_eq!((usage.disk_blocks, usage.disk_used_bytes), (4, SLAB), "in the one slab it has");
    world.store.disk_is_full(false);
    world.put(size, &run(8, 4), &Origin::default());
    world.write_all();
    assert_eq!(world.store.usage().disk_blocks, 8);
}

#[test]
fn what_a_disk_did_not_take_is_written_once_it_takes_more() {
    let (mut world, size) = (World::new(), SIZES[0]);
    world.put(size, &run(0, 4), &Origin::default());
    for write in world.store.writes() {
        world.store.refused(write.block);
    }
    // As many as may be under way at a time have been tried, and the rest is written.
    world.write_all();
    assert_eq!((world.store.usage().disk_blocks, world.store.usage().dirty), (1, 0));
    world.store.try_again();
    world.write_all();
    assert_eq!(world.store.usage().disk_blocks, 4);
    // What is gone or written by then is passed over.
    world.store.try_again();
    world.write_all();
    assert_eq!(world.store.usage().disk_blocks, 4);
}

#[test]
fn a_tenant_past_its_quota_displaces_its_own() {
    let (mut world, size) = (World::new(), SIZES[0]);
    world.put(size, &run(100, 6), &Origin::default());
    let small = Origin { model: [1; 16], tenant: "small".into() };
    // A third of twelve.
    world.put(size, &run(0, 4), &small);
    world.put(size, &run(10, 4), &small);
    assert!(world.store.exists(size, &run(100, 6)).iter().all(|tiers| tiers[0]), "the others' are where they were");
    assert!(world.store.exists(size, &run(10, 4)).iter().all(|tiers| tiers[0]));
    assert!(world.store.exists(size, &run(0, 4)).iter().all(|tiers| !tiers[0]), "there were two free places left");
    let usage = world.store.usage();
    assert_eq!(usage.memory_blocks, 10);
}

#[test]
fn hard_pins_stay_soft_ones_go_last_and_both_end() {
    let (mut world, size) = (World::new(), SIZES[0]);
    world.put(size, &run(0, 12), &Origin::default());
    let until = world.now + Duration::from_secs(10);
    assert_eq!(world.store.keep(size, &run(0, 2), Keep::Hard, until), 2);
    assert_eq!(world.store.keep(size, &run(2, 2), Keep::Soft, until), 2);
    assert_eq!(world.store.keep(size, &run(40, 2), Keep::Hard, until), 0, "not there");
    world.put(size, &run(20, 8), &Origin::default());
    let there =
        |world: &World, first, len| world.store.exists(size, &run(first, len)).iter().filter(|tiers| tiers[0]).count();
    assert_eq!((there(&world, 0, 4), there(&world, 4, 8), there(&world, 20, 8)), (4, 0, 8));
    world.put(size, &run(30, 12), &Origin::default());
    assert_eq!((there(&world, 0, 2), there(&world, 2, 2)), (2, 0), "soft ones went when nothing else was left");
    world.apply(&Op::Wait { ms: 10_000 });
    world.put(size, &run(50, 12), &Origin::default());
    assert_eq!(there(&world, 0, 2), 0);
    assert_eq!(world.store.keep(size, &run(50, 12), Keep::Hard, until + Duration::from_secs(9)), 6, "half of memory");
}

#[test]
fn what_a_disk_held_is_found_again_where_it_can_be() {
    let (mut world, size) = (World::new(), SIZES[0]);
    let recovered = |n: u8, offset: u64| Recovered {
        place: Place { hash: hash(n), offset, size },
        checksum: [n; 16],
        position: 3,
        parent: 9,
        group: 5,
        origin: Origin { model: [4; 16], tenant: "small".into() },
    };
    let blocks = [
        recovered(1, 4096),
        recovered(1, 8192),
        recovered(2, 4096),
        recovered(3, 100),
        recovered(4, 5 * SLAB),
        recovered(5, 0),
    ];
    assert_eq!(world.store.recover(blocks), 2);
    world.store.index.check();
    assert_eq!(world.store.exists(size, &[hash(1), hash(5), hash(2)]), [[false, true], [false, true], [false, false]]);
    assert_eq!(
        world.store.origins().iter().map(|(origin, blocks)| (&*origin.tenant, *blocks)).collect::<Vec<_>>(),
        [("small", 2)]
    );
}

#[test]
fn blocks_of_a_size_that_nobody_uses_make_room_for_another_at_once() {
    let (mut world, [small, large]) = (World::new(), SIZES);
    world.put(small, &run(0, 12), &Origin::default());
    world.apply(&Op::Wait { ms: 1000 });
    for first in (100..106).step_by(2) {
        world.put(large, &run(first, 2), &Origin::default());
    }
    let there = world.store.exists(large, &run(100, 6));
    assert!(
        there.iter().all(|tiers| tiers[0]),
        "no block of a size in use went while there were older slabs: {there:?}"
    );
    assert_eq!(world.store.usage().memory_blocks, 6);
    world.apply(&Op::Wait { ms: 1000 });
    // Now both are in use, and a slab is taken back only from what is older than one's own.
    world.put(small, &run(50, 4), &Origin::default());
    assert_eq!(world.store.usage().memory_blocks, 4 + 4, "one slab changed hands");
}
