//! Tables of several groups against a memory in which every block remembers what was written into it.
//!
//! A token's KV in a group is its whole history and the group's number. Whatever a sequence may read must be there as it
//! wrote it (or somebody with the same history), block by block and group by group; what it may write is in no other
//! table.

use std::collections::{HashMap, HashSet};

use kvasir_types::{BlockHash, BlockId, GroupKind, KvGroups, TokenId, chain};
use proptest::prelude::*;

use crate::{Geometry, Hit, KvCache, Table, in_group};

const BLOCK: usize = 4;
const CHUNK: usize = 8;
const ROOT: BlockHash = BlockHash([9; 16]);

#[derive(Clone, Debug)]
enum Op {
    Start { family: u8, len: usize, landing: bool },
    Land { who: usize, tokens: usize },
    Compute { who: usize, tokens: usize },
    Adopt { who: usize, copying: bool },
    Fork { who: usize },
    End { who: usize },
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let who = any::<usize>;
    prop_oneof![
        5 => (0u8..3, 1usize..40, any::<bool>()).prop_map(|(family, len, landing)| Op::Start { family, len, landing }),
        2 => (who(), 0usize..45).prop_map(|(who, tokens)| Op::Land { who, tokens }),
        12 => (who(), 1usize..=CHUNK).prop_map(|(who, tokens)| Op::Compute { who, tokens }),
        2 => (who(), any::<bool>()).prop_map(|(who, copying)| Op::Adopt { who, copying }),
        2 => who().prop_map(|who| Op::Fork { who }),
        3 => who().prop_map(|who| Op::End { who }),
        1 => Just(Op::Clear),
    ]
}

fn groups() -> impl Strategy<Value = (Vec<GroupKind>, usize)> {
    let sliding = |window| GroupKind::Sliding { window };
    let kinds = prop_oneof![
        Just(vec![GroupKind::Full]),
        Just(vec![sliding(6)]),
        Just(vec![sliding(1)]),
        Just(vec![GroupKind::Full, sliding(9)]),
        Just(vec![GroupKind::Full, sliding(5), sliding(5), sliding(12)]),
        Just(vec![GroupKind::Full, GroupKind::Recurrent]),
    ];
    (kinds, 6usize..60)
}

/// What a slot holds: hash of the history up to its token, mixed with the group.
type Content = (BlockHash, usize);

struct Sequence {
    tokens: Vec<TokenId>,
    table: Table,
    /// A peer may be writing.
    landing: bool,
}

struct World {
    cache: KvCache,
    memory: HashMap<(BlockId, usize), Content>,
    sequences: Vec<Sequence>,
}

fn tokens(family: u8, len: usize) -> Vec<TokenId> {
    // Families share a beginning.
    (0..len).map(|i| TokenId(if i < 9 { 1 } else { u32::from(family) + 2 })).collect()
}

fn history(tokens: &[TokenId], position: usize) -> BlockHash {
    ROOT.extend(&tokens[..=position])
}

impl World {
    fn geometry(&self) -> Geometry {
        self.cache.geometry().clone()
    }

    /// Writes KV of positions `from..to`, as a runner or a peer does: where the table has room.
    fn write(&mut self, who: usize, from: usize, to: usize) {
        let Sequence { tokens, table, .. } = &self.sequences[who];
        for (group, ids) in table.ids().iter().enumerate() {
            for position in from..to {
                let index =
                    if self.cache.geometry().kinds()[group] == GroupKind::Recurrent { 0 } else { position / BLOCK };
                match ids.get(index) {
                    Some(&id) if id != BlockId::GONE => {
                        self.memory.insert((id, position % BLOCK), (history(tokens, position), group));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Everything that the next token will look at is what belongs there.
    fn read(&self, who: usize) {
        let Sequence { tokens, table, .. } = &self.sequences[who];
        let geometry = self.cache.geometry();
        for (group, (&kind, ids)) in geometry.kinds().iter().zip(table.ids()).enumerate() {
            let first = match kind {
                GroupKind::Recurrent => continue,
                kind => geometry.first_needed(kind, table.computed) * BLOCK,
            };
            for position in first..table.computed {
                let held = self.memory.get(&(ids[position / BLOCK], position % BLOCK));
                assert_eq!(held, Some(&(history(tokens, position), group)), "position {position} of group {group}");
            }
        }
    }

    fn seal(&mut self, who: usize, tokens: usize) {
        let sequence = &mut self.sequences[who];
        let hashes = chain(ROOT, &sequence.tokens[..tokens], BLOCK);
        self.cache.seal(&mut sequence.table, ROOT, &hashes);
    }

    /// What `lookup` must say, by trying every cut.
    fn best_cut(&self, hashes: &[BlockHash], have: usize) -> usize {
        let known: HashSet<_> = self.cache.snapshot().blocks.into_iter().map(|stored| stored.hash).collect();
        let geometry = self.geometry();
        let fits = |cut: &usize| {
            geometry.kinds().iter().enumerate().all(|(group, &kind)| {
                let first = geometry.first_needed(kind, cut * BLOCK).max(have);
                (first..*cut).all(|index| known.contains(&in_group(hashes[index], group)))
            })
        };
        if geometry.has_prefixes() { (have..=hashes.len()).rev().find(fits).unwrap_or(have) } else { have }
    }

    fn check(&self) {
        let mut uses: HashMap<BlockId, usize> = HashMap::new();
        for Sequence { table, .. } in &self.sequences {
            let ids: HashSet<_> = table.sealed_ids().map(|(.., id)| id).chain(table.open_ids()).collect();
            assert_eq!(ids.len(), table.len(), "a block is in one table twice");
            ids.into_iter().for_each(|id| *uses.entry(id).or_default() += 1);
        }
        for id in self.sequences.iter().flat_map(|sequence| sequence.table.open_ids()) {
            assert_eq!(uses[&id], 1, "{id} may be written and is in {} tables", uses[&id]);
        }
        let counts = self.cache.counts();
        assert_eq!(counts.in_use, uses.len());
        assert_eq!(counts.free + counts.cached + counts.in_use, counts.total);
    }

    fn start(&mut self, family: u8, len: usize, landing: bool) {
        let tokens = tokens(family, len);
        let geometry = self.geometry();
        if geometry.needed(len, CHUNK) > self.cache.counts().total {
            return;
        }
        let hashes = chain(ROOT, &tokens[..len - 1], BLOCK);
        let hit = self.cache.lookup(&hashes);
        assert_eq!(hit.blocks, self.best_cut(&hashes, 0));
        let (hit, fresh) = self.cache.plan(&hashes, len, CHUNK);
        let before = self.cache.available();
        match self.cache.reserve(&hashes, len, CHUNK) {
            None => {
                assert!(before < fresh + hit.idle, "refused although there were enough");
                assert_eq!(self.cache.available(), before, "all or none");
            }
            Some(mut table) => {
                assert_eq!((before - self.cache.available(), table.computed), (fresh + hit.idle, hit.blocks * BLOCK));
                if landing {
                    self.cache.open(&mut table, len);
                }
                self.sequences.push(Sequence { tokens, table, landing });
                self.read(self.sequences.len() - 1);
            }
        }
    }

    /// Peers wrote the first `wanted` tokens, and cannot write any more.
    fn land(&mut self, who: usize, wanted: usize) {
        let sequence = &mut self.sequences[who];
        let len = sequence.tokens.len();
        let landed = if wanted >= len { len } else { wanted / BLOCK * BLOCK };
        if !sequence.landing || landed <= sequence.table.computed || !self.cache.covers(&sequence.table, landed) {
            return;
        }
        let from = sequence.table.computed;
        self.cache.fence(&mut sequence.table, landed.div_ceil(BLOCK));
        self.write(who, from, landed);
        self.sequences[who].table.computed = landed;
        self.seal(who, landed.min(len - 1));
        self.read(who);
    }

    fn compute(&mut self, who: usize, tokens: usize) {
        let sequence = &mut self.sequences[who];
        if std::mem::take(&mut sequence.landing) {
            self.cache.fence(&mut sequence.table, usize::MAX);
            self.cache.rewind(&mut sequence.table);
        }
        let from = sequence.table.computed;
        let to = from + tokens;
        if !self.cache.grow(&mut sequence.table, to) {
            assert!(self.cache.available() < self.cache.geometry().kinds().len() * (tokens.div_ceil(BLOCK) + 1));
            return;
        }
        while sequence.tokens.len() < to {
            sequence.tokens.push(TokenId(who as u32 + 50));
        }
        self.write(who, from, to);
        self.sequences[who].table.computed = to;
        self.seal(who, to);
        self.read(who);
    }

    fn adopt(&mut self, who: usize, copying: bool) {
        let sequence = &mut self.sequences[who];
        if sequence.landing || !sequence.table.computed.is_multiple_of(BLOCK) {
            return;
        }
        let have = sequence.table.computed / BLOCK;
        let hashes = chain(ROOT, &sequence.tokens[..sequence.tokens.len() - 1], BLOCK);
        let hit: Hit = self.cache.lookup_from(have, &hashes);
        let best = self.best_cut(&hashes, have);
        assert_eq!(hit.blocks, best);
        if hit.blocks <= have {
            return;
        }
        let table = &mut self.sequences[who].table;
        if copying {
            if let Some(copies) = self.cache.adopt_copies(table, hit, &hashes) {
                self.copy(&copies);
                self.seal(who, hit.blocks * BLOCK);
            }
        } else {
            self.cache.adopt(table, hit, &hashes);
        }
        self.read(who);
    }

    fn copy(&mut self, copies: &[(BlockId, BlockId)]) {
        for &(from, to) in copies {
            for slot in 0..BLOCK {
                match self.memory.get(&(from, slot)).copied() {
                    Some(content) => self.memory.insert((to, slot), content),
                    None => self.memory.remove(&(to, slot)),
                };
            }
        }
    }

    fn fork(&mut self, who: usize) {
        let sequence = &mut self.sequences[who];
        if sequence.landing || sequence.table.computed == 0 || self.sequences.len() > 8 {
            return;
        }
        let sequence = &mut self.sequences[who];
        let computed = sequence.table.computed;
        let before = self.cache.available();
        match self.cache.fork(&mut sequence.table, computed) {
            Some((table, copies)) => {
                let tokens = sequence.tokens[..computed].to_vec();
                self.copy(&copies);
                self.sequences.push(Sequence { tokens, table, landing: false });
                self.read(self.sequences.len() - 1);
            }
            None => assert_eq!(self.cache.available(), before, "all or none"),
        }
    }

    fn apply(&mut self, op: &Op) {
        let count = self.sequences.len();
        match *op {
            Op::Start { family, len, landing } => self.start(family, len, landing),
            Op::Clear => self.cache.clear_cached(),
            _ if count == 0 => {}
            Op::Land { who, tokens } => self.land(who % count, tokens),
            Op::Compute { who, tokens } => self.compute(who % count, tokens),
            Op::Adopt { who, copying } => self.adopt(who % count, copying),
            Op::Fork { who } => self.fork(who % count),
            Op::End { who } => {
                let sequence = self.sequences.swap_remove(who % count);
                self.cache.give_back(sequence.table);
            }
        }
        self.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 1500 }))]

    #[test]
    fn every_table_reads_what_belongs_to_it(
        (kinds, blocks) in groups(), ops in prop::collection::vec(op(), 1..120),
    ) {
        let geometry = Geometry::new(BLOCK, &KvGroups::of_layers(&kinds));
        let mut world = World { cache: KvCache::new(geometry, blocks, 16), memory: HashMap::new(), sequences: Vec::new() };
        for op in &ops {
            world.apply(op);
            (0..world.sequences.len()).for_each(|who| world.read(who));
        }
        for sequence in world.sequences.drain(..) {
            world.cache.give_back(sequence.table);
        }
        prop_assert_eq!(world.cache.available(), blocks);
    }
}

#[test]
fn a_window_holds_a_prompt_that_full_attention_could_not() {
    let geometry = |kind| Geometry::new(BLOCK, &KvGroups::of_layers(&[kind]));
    assert_eq!(geometry(GroupKind::Full).needed(1000, CHUNK), 250);
    let sliding = geometry(GroupKind::Sliding { window: 9 });
    assert_eq!(sliding.needed(1000, CHUNK), 5);
    let mut cache = KvCache::new(sliding, 5, 0);
    let mut table = cache.reserve(&[], 1000, CHUNK).unwrap();
    for end in (CHUNK..=1000).step_by(CHUNK) {
        assert!(cache.grow(&mut table, end));
        table.computed = end;
        assert!(table.len() <= 5);
    }
    assert_eq!(table.ids()[0].iter().filter(|&&id| id != BlockId::GONE).count(), 4);
    cache.give_back(table);
    assert_eq!(cache.counts().free, 5);
}

#[test]
fn a_prefix_needs_every_full_block_and_the_window_of_the_sliding_ones() {
    let kinds = [GroupKind::Full, GroupKind::Sliding { window: 6 }];
    let mut cache = KvCache::new(Geometry::new(BLOCK, &KvGroups::of_layers(&kinds)), 40, 0);
    let prompt = tokens(1, 32);
    let hashes = chain(ROOT, &prompt, BLOCK);
    let mut table = cache.reserve(&[], 32, CHUNK).unwrap();
    for end in (CHUNK..=32).step_by(CHUNK) {
        assert!(cache.grow(&mut table, end));
        table.computed = end;
        cache.seal(&mut table, ROOT, &hashes[..end / BLOCK]);
    }
    cache.give_back(table);
    assert_eq!(cache.lookup(&hashes[..7]), Hit { blocks: 7, pinned: 9, idle: 9 });
    // Without any sliding block in its window a cut is none, however long the full group's run is.
    cache.clear_cached();
    assert_eq!(cache.lookup(&hashes[..7]), Hit::default());
}
