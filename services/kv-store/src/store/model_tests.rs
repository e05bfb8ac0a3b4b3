//! The store against a model: any order of calls, late writers and slow readers included.
//!
//! The model is the memory itself, a tag for each line of 64 bytes. Writers write whenever they still may, that is until
//! their reservation is finished; readers look whenever they still may. If a slot were handed out too early, one of
//! them would see the other's tag.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use kvasir_types::BlockHash;
use proptest::prelude::*;

use super::{entry::OriginId, *};

const SLAB: u64 = 1024;
const SLABS: u64 = 4;
/// Three sizes: many to a slab, few to a slab (with a tail), one to a slab.
const SIZES: [BlockBytes; 3] = [BlockBytes(128), BlockBytes(300), BlockBytes(1024)];
const HOLD: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
enum Op {
    Lookup {
        size: usize,
        first: u8,
        len: u8,
    },
    Reserve {
        size: usize,
        first: u8,
        len: u8,
    },
    /// Room for a block that is named when it is committed.
    Ahead {
        size: usize,
        name: u8,
    },
    /// The n-th writer that still may writes all of its blocks, right or torn.
    Write {
        writer: usize,
        torn: bool,
    },
    Commit {
        writer: usize,
    },
    Release {
        reader: usize,
    },
    /// The revocation of the n-th closed hold is through.
    Revoked {
        which: usize,
    },
    Wait {
        ms: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let run = || (0..SIZES.len(), 0u8..12, 1u8..6);
    prop_oneof![
        4 => run().prop_map(|(size, first, len)| Op::Lookup { size, first, len }),
        4 => run().prop_map(|(size, first, len)| Op::Reserve { size, first, len }),
        3 => (0..SIZES.len(), 0u8..12).prop_map(|(size, name)| Op::Ahead { size, name }),
        4 => (0usize..4, prop::bool::weighted(0.1)).prop_map(|(writer, torn)| Op::Write { writer, torn }),
        4 => (0usize..4).prop_map(|writer| Op::Commit { writer }),
        2 => (0usize..4).prop_map(|reader| Op::Release { reader }),
        5 => (0usize..4).prop_map(|which| Op::Revoked { which }),
        1 => (0u64..7000).prop_map(|ms| Op::Wait { ms }),
    ]
}

fn hash(n: u8) -> BlockHash {
    BlockHash([n; 16])
}

/// What is where: the name of a block, and which of its writings (a number for each reservation).
type Tag = (BlockBytes, BlockHash, u64);

fn sum(tag: Tag) -> Checksum {
    blake3_of(tag)
}

/// Stands for the bytes' checksum: different for every writing.
fn blake3_of((size, hash, writing): Tag) -> Checksum {
    let mut sum = hash.0;
    sum[..8].copy_from_slice(&writing.to_le_bytes());
    sum[15] ^= size.0 as u8;
    sum
}

struct Writer {
    writing: u64,
    slots: Vec<(BlockHash, u64)>,
    size: BlockBytes,
    /// Its slot has no name before it is committed.
    ahead: bool,
    /// Closed: what is to become visible when it is finished.
    closing: Option<Vec<Written>>,
}

struct Reader {
    blocks: Vec<(u64, Tag)>,
    closing: bool,
}

struct World {
    store: Store,
    now: Instant,
    memory: Vec<Option<Tag>>,
    writings: u64,
    /// The latest visible writing of each block.
    visible: HashMap<(BlockBytes, BlockHash), Tag>,
    writers: BTreeMap<ReservationId, Writer>,
    readers: BTreeMap<LeaseId, Reader>,
}

impl World {
    fn new() -> Self {
        let settings = Settings {
            capacity_bytes: SLAB * SLABS,
            slab_bytes: SLAB,
            disk_bytes: 0,
            max_moves: 8,
            max_pinned_percent: 50,
            published_bytes: 0,
            quotas: Limits::default(),
            policies: Policies { memory: Policy::Lru, disk: Policy::Lru },
            lease: HOLD,
            reservation: HOLD,
            max_leases: 6,
            max_reservations: 6,
            seed: 1,
        };
        let now = Instant::now();
        Self {
            store: Store::new(settings, now),
            now,
            memory: vec![None; (SLAB * SLABS / 64) as usize],
            writings: 0,
            visible: HashMap::new(),
            writers: BTreeMap::new(),
            readers: BTreeMap::new(),
        }
    }

    fn lines(offset: u64, size: BlockBytes) -> std::ops::Range<usize> {
        (offset / 64) as usize..(offset + size.0).div_ceil(64) as usize
    }

    fn see(&self, offset: u64, tag: Tag) -> bool {
        self.memory[Self::lines(offset, tag.0)].iter().all(|line| *line == Some(tag))
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Lookup { size, first, len } => self.lookup(SIZES[size], first..first + len),
            Op::Reserve { size, first, len } => self.reserve(SIZES[size], first..first + len),
            Op::Ahead { size, name } => self.ahead(SIZES[size], hash(name)),
            Op::Write { writer, torn } => self.write(writer, torn),
            Op::Commit { writer } => {
                let open = self.writers.iter_mut().filter(|(_, writer)| writer.closing.is_none());
                if let Some((&id, writer)) = open.into_iter().nth(writer) {
                    let as_named = writer.slots[0].0;
                    let was = self.store.index.find(writer.size, as_named);
                    let of = |store: &mut Store, size| {
                        store.begin_commit_of(id, size, as_named, Ask::default(), Facts::default())
                    };
                    assert_eq!(of(&mut self.store, BlockBytes(7)), None, "of another size");
                    writer.closing = match of(&mut self.store, writer.size) {
                        Some((state, written)) => {
                            assert!(writer.ahead, "what has a name gets no other");
                            assert_eq!(matches!(state, SlotState::Reserved { .. }), was.is_none());
                            Some(if was.is_none() { written } else { Vec::new() })
                        }
                        None => {
                            assert!(!writer.ahead, "it is open");
                            Some(self.store.begin_commit(id).expect("it is open"))
                        }
                    };
                    assert!(self.store.begin_commit(id).is_none(), "a reservation is closed once");
                }
            }
            Op::Release { reader } => {
                if let Some((&id, reader)) = self.readers.iter_mut().filter(|(_, r)| !r.closing).nth(reader) {
                    assert!(self.store.close_lease(id));
                    assert!(!self.store.close_lease(id), "a lease is closed once");
                    reader.closing = true;
                }
            }
            Op::Revoked { which } => self.revoked(which),
            Op::Wait { ms } => {
                self.now += Duration::from_millis(ms);
                let expired = self.store.expire(self.now);
                for id in expired.leases {
                    self.readers.get_mut(&id).expect("an expired lease was open").closing = true;
                }
                for id in expired.reservations {
                    self.writers.get_mut(&id).expect("an expired reservation was open").closing = Some(Vec::new());
                }
                assert!(self.store.next_end().is_none_or(|end| end > self.now));
            }
        }
        self.store.index.check();
        assert!(self.readers.values().flat_map(|r| &r.blocks).all(|&(offset, tag)| self.see(offset, tag)));
    }

    fn lookup(&mut self, size: BlockBytes, run: std::ops::Range<u8>) {
        let hashes: Vec<_> = run.map(hash).collect();
        let Ok(Some(found)) = self.store.lookup(self.now, size, &hashes, 0) else { return };
        let mut blocks = Vec::new();
        for (&hash, stored) in hashes.iter().zip(&found.blocks) {
            let tag = self.visible[&(size, hash)];
            assert_eq!(stored.checksum, sum(tag), "found with the checksum it was committed with");
            assert!(self.see(stored.offset, tag), "found where its bytes are");
            blocks.push((stored.offset, tag));
        }
        self.readers.insert(found.lease, Reader { blocks, closing: false });
    }

    fn reserve(&mut self, size: BlockBytes, run: std::ops::Range<u8>) {
        let hashes: Vec<_> = run.map(hash).collect();
        let Ok(reserved) = self.store.reserve(self.now, size, &hashes, Ask::default(), |_| Facts::default()) else {
            return;
        };
        let slots: Vec<_> = hashes
            .iter()
            .zip(&reserved.slots)
            .filter_map(|(&hash, slot)| match slot {
                SlotState::Reserved { offset } => Some((hash, *offset)),
                _ => None,
            })
            .collect();
        assert_eq!(reserved.reservation.is_some(), !slots.is_empty());
        if let Some(id) = reserved.reservation {
            self.writings += 1;
            let writer = Writer { writing: self.writings, slots, size, ahead: false, closing: None };
            self.writers.insert(id, writer);
        }
    }

    fn ahead(&mut self, size: BlockBytes, name: BlockHash) {
        let Some(ahead) = self.store.reserve_ahead(self.now, size, OriginId::default()) else { return };
        self.writings += 1;
        let slots = vec![(name, ahead.offset)];
        let writer = Writer { writing: self.writings, slots, size, ahead: true, closing: None };
        self.writers.insert(ahead.reservation, writer);
        let open: u64 = self.writers.values().filter(|w| w.ahead && w.closing.is_none()).map(|w| w.size.0).sum();
        assert!(open <= SLAB * SLABS / 8, "few of them");
    }

    /// Closed writers write too: until the revocation is through, theirs is a late write.
    fn write(&mut self, nth: usize, torn: bool) {
        let Some(writer) = self.writers.values().nth(nth) else { return };
        for &(hash, offset) in &writer.slots {
            let lines = Self::lines(offset, writer.size);
            let torn_from = if torn { lines.end - 1 } else { lines.end };
            for line in lines {
                self.memory[line] = (line < torn_from).then_some((writer.size, hash, writer.writing));
            }
        }
    }

    fn revoked(&mut self, nth: usize) {
        let closing = self.readers.iter().filter(|(_, reader)| reader.closing).map(|(&id, _)| id).nth(nth);
        if let Some(id) = closing {
            self.readers.remove(&id);
            self.store.finish_lease(id);
        }
        let closing = self.writers.iter().filter(|(_, writer)| writer.closing.is_some()).map(|(&id, _)| id).nth(nth);
        if let Some(id) = closing {
            let writer = self.writers.remove(&id).unwrap();
            let written = writer.closing.unwrap();
            // As the service does it: verified now, when nobody can write any more.
            let good: HashMap<_, _> = written
                .iter()
                .map(|written| (written, (writer.size, written.place.hash, writer.writing)))
                .filter(|(written, tag)| self.see(written.place.offset, *tag))
                .map(|(written, tag)| (written.block, sum(tag)))
                .collect();
            for written in written.iter().filter(|written| good.contains_key(&written.block)) {
                let tag = (writer.size, written.place.hash, writer.writing);
                self.visible.insert((writer.size, written.place.hash), tag);
            }
            self.store.finish_reservation(id, &good);
        }
    }

    fn end_all(&mut self) {
        self.apply(&Op::Wait { ms: HOLD.as_millis() as u64 });
        for _ in 0..12 {
            self.revoked(0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn what_is_found_is_what_was_committed_and_nobodys_slot_is_given_away(ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new();
        ops.iter().for_each(|op| world.apply(op));
        world.end_all();
        let usage = world.store.usage();
        prop_assert_eq!((usage.pinned, usage.reserved), (0, 0), "nothing leaks");
        prop_assert!(world.readers.is_empty() && world.writers.is_empty());
        world.store.index.check();
    }
}

/// Reserves, writes and commits; the slots' states.
fn put(store: &mut Store, now: Instant, size: BlockBytes, hashes: &[BlockHash]) -> Vec<SlotState> {
    let reserved = store.reserve(now, size, hashes, Ask::default(), |_| Facts::default()).unwrap();
    if let Some(id) = reserved.reservation {
        let written = store.begin_commit(id).unwrap();
        store.finish_reservation(id, &written.iter().map(|written| (written.block, [9; 16])).collect());
    }
    reserved.slots
}

fn found(store: &mut Store, now: Instant, size: BlockBytes, hashes: &[BlockHash]) -> usize {
    let Some(found) = store.lookup(now, size, hashes, 0).unwrap() else { return 0 };
    assert!(store.close_lease(found.lease));
    store.finish_lease(found.lease);
    found.blocks.len()
}

#[test]
fn a_run_loses_its_end_before_its_beginning() {
    let (mut world, size) = (World::new(), SIZES[2]);
    let run: Vec<_> = (0..4).map(hash).collect();
    put(&mut world.store, world.now, size, &run);
    for (n, left) in [(100, 3), (101, 2), (102, 1)] {
        put(&mut world.store, world.now, size, &[hash(n)]);
        let present: Vec<_> = run.iter().filter(|&&h| world.store.index.find(size, h).is_some()).copied().collect();
        assert_eq!(present, run[..left]);
    }
}

#[test]
fn reserving_a_prompts_end_keeps_its_beginning() {
    let (mut world, size) = (World::new(), SIZES[2]);
    put(&mut world.store, world.now, size, &[hash(0), hash(1)]);
    put(&mut world.store, world.now, size, &[hash(50), hash(51)]);
    let slots = put(&mut world.store, world.now, size, &[hash(0), hash(1), hash(2), hash(3)]);
    assert_eq!(slots[..2], [SlotState::Present, SlotState::Present]);
    assert_eq!(found(&mut world.store, world.now, size, &[hash(0), hash(1), hash(2), hash(3)]), 4);
}

#[test]
fn nothing_in_use_is_given_up_for_room() {
    let (mut world, size) = (World::new(), SIZES[2]);
    let (now, store) = (world.now, &mut world.store);
    put(store, now, size, &[hash(0), hash(1)]);
    let held = store.lookup(now, size, &[hash(0), hash(1)], 0).unwrap().unwrap();
    let reserve = |store: &mut Store, hashes: &[BlockHash]| {
        store.reserve(now, size, hashes, Ask::default(), |_| Facts::default()).unwrap()
    };
    reserve(store, &[hash(2), hash(3)]);
    let refused = reserve(store, &[hash(4)]);
    assert_eq!((refused.slots, refused.reservation), (vec![SlotState::Full], None));
    assert!(store.close_lease(held.lease));
    assert_eq!(reserve(store, &[hash(4)]).slots, [SlotState::Full], "closed is not yet finished");
    store.finish_lease(held.lease);
    assert!(matches!(reserve(store, &[hash(4)]).slots[..], [SlotState::Reserved { .. }]));
}

#[test]
fn a_size_that_nobody_uses_any_more_gives_its_slabs_up() {
    let mut world = World::new();
    let (mut now, store) = (world.now, &mut world.store);
    put(store, now, SIZES[0], &(0..16).map(hash).collect::<Vec<_>>()); // two slabs of eight
    put(store, now, SIZES[1], &(0..6).map(hash).collect::<Vec<_>>()); // two slabs of three
    for round in 0..4u8 {
        now += Duration::from_secs(1);
        put(store, now, SIZES[1], &(10 + round * 6..16 + round * 6).map(hash).collect::<Vec<_>>());
    }
    assert_eq!(found(store, now, SIZES[0], &[hash(0)]), 0);
    let live: HashSet<_> = (0..40).filter(|&n| found(store, now, SIZES[1], &[hash(n)]) == 1).collect();
    assert_eq!(live.len(), 12, "all four slabs serve the size in use");
}

#[test]
fn past_the_limit_of_open_leases_lookups_are_refused() {
    let mut world = World::new();
    let (now, store) = (world.now, &mut world.store);
    put(store, now, SIZES[0], &[hash(0)]);
    let leases: Vec<_> = (0..6).map(|_| store.lookup(now, SIZES[0], &[hash(0)], 0).unwrap().unwrap().lease).collect();
    assert_eq!(store.lookup(now, SIZES[0], &[hash(0)], 0), Err(Refused::Leases(6)));
    assert!(store.close_lease(leases[0]));
    store.finish_lease(leases[0]);
    assert!(store.lookup(now, SIZES[0], &[hash(0)], 0).is_ok());
}

#[test]
fn a_block_of_another_size_is_a_miss() {
    let mut world = World::new();
    put(&mut world.store, world.now, SIZES[0], &[hash(0)]);
    assert_eq!(found(&mut world.store, world.now, SIZES[1], &[hash(0)]), 0);
    assert_eq!(found(&mut world.store, world.now, SIZES[0], &[hash(0)]), 1);
}

#[test]
fn room_made_ahead_is_taken_back_when_a_block_with_a_name_finds_none() {
    let mut world = World::new();
    let (now, store, size) = (world.now, &mut world.store, SIZES[1]);
    let ahead = store.reserve_ahead(now, size, OriginId::default()).unwrap();
    assert!(store.reserve_ahead(now, size, OriginId::default()).is_none(), "an eighth of the memory is enough");
    let reserve = |store: &mut Store, hashes: &[BlockHash]| {
        store.reserve(now, size, hashes, Ask::default(), |_| Facts::default()).unwrap().slots
    };
    reserve(store, &(0..11).map(hash).collect::<Vec<_>>());
    assert!(store.expire(now).reservations.is_empty());
    assert_eq!(reserve(store, &[hash(11)]), [SlotState::Full]);
    assert_eq!(store.expire(now).reservations, [ahead.reservation]);
    store.finish_reservation(ahead.reservation, &HashMap::new());
    assert_eq!(store.totals().expired_reservations, 0, "no writer has failed");
    assert!(matches!(reserve(store, &[hash(11)])[..], [SlotState::Reserved { .. }]));
}
