//! Events of the prefix cache on their way to those who watch: numbered, in pieces, and summed up.
//!
//! Watchers know prompts by their chains of hashes, which are the names of blocks in group 0. Of a model with several groups
//! of layers, one that keeps whole prompts stands for all: its names are turned back into the chain's.

use std::collections::HashMap;

use kvasir_engine::{CacheBatch, CacheEvent, CacheSnapshot};
use kvasir_kv_cache::in_group;
use kvasir_proto::{convert, v1};
use kvasir_types::{BlockHash, GroupKind, KvGroups};

/// Most blocks named in one message: 64 KiB.
pub(crate) const MAX_BLOCKS: usize = 4096;

/// The group whose blocks stand for a prompt's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group(usize);

impl Group {
    /// The first one that keeps whole prompts.
    pub(crate) fn of(groups: &KvGroups) -> Self {
        Self(groups.iter().position(|group| group.kind == GroupKind::Full).unwrap_or(0))
    }

    /// The chain's name for a block of this group. (Of another group: a name that nobody has.)
    fn plain(self, name: BlockHash) -> BlockHash {
        in_group(name, self.0) // the difference between two names is the same both ways
    }
}

/// Some events that follow one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Number of the first one.
    first: u64,
    events: Vec<CacheEvent>,
}

impl Changes {
    /// A batch in pieces of at most [`MAX_BLOCKS`] events. What was lost before it shows in its number.
    pub(crate) fn of(batch: CacheBatch) -> impl Iterator<Item = Self> {
        let CacheBatch { first, events, .. } = batch;
        let mut events = events.into_iter();
        let mut at = first;
        std::iter::from_fn(move || {
            let piece: Vec<CacheEvent> = events.by_ref().take(MAX_BLOCKS).collect();
            let first = at;
            at += piece.len() as u64;
            (!piece.is_empty()).then_some(Self { first, events: piece })
        })
    }

    /// For a watcher that knows all before `next`: the rest of these, summed up. `Ok(None)`: it knows them all; `Err`: events
    /// between `next` and these are lost.
    pub(crate) fn since(&self, next: u64, group: Group) -> Result<Option<v1::CacheChanges>, Gap> {
        let end = self.first + self.events.len() as u64;
        if self.first > next {
            return Err(Gap);
        }
        if end <= next {
            return Ok(None);
        }
        let mut last: HashMap<BlockHash, bool> = HashMap::new();
        for event in &self.events[(next - self.first) as usize..] {
            match event {
                CacheEvent::Stored(stored) if usize::from(stored.group) == group.0 => {
                    last.insert(group.plain(stored.hash), true);
                }
                CacheEvent::Stored(_) => {}
                CacheEvent::Removed(name) => {
                    last.insert(group.plain(*name), false);
                }
            }
        }
        let named = |kept: bool| {
            let names: Vec<&[u8; 16]> = last.iter().filter(|(_, is)| **is == kept).map(|(name, _)| &name.0).collect();
            convert::pack16(names.into_iter())
        };
        let (stored, removed) = (named(true), named(false));
        Ok(Some(v1::CacheChanges { first: next, count: (end - next) as u32, stored, removed }))
    }
}

/// Events were lost: only a snapshot helps.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gap;

/// A snapshot in messages; at least one.
pub(crate) fn parts(snapshot: &CacheSnapshot, group: Group) -> Vec<v1::CachePart> {
    let stored = snapshot.blocks.iter().filter(|stored| usize::from(stored.group) == group.0);
    let names: Vec<BlockHash> = stored.map(|stored| group.plain(stored.hash)).collect();
    let count = names.len().div_ceil(MAX_BLOCKS).max(1);
    let part = |at: usize| {
        let names = names.iter().skip(at * MAX_BLOCKS).take(MAX_BLOCKS).map(|name| &name.0);
        let names: Vec<&[u8; 16]> = names.collect();
        let hashes = convert::pack16(names.into_iter());
        v1::CachePart { first: at == 0, last: at + 1 == count, next: snapshot.next, hashes }
    };
    (0..count).map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use kvasir_engine::Stored;
    use proptest::prelude::*;

    use super::*;

    fn name(number: u8) -> BlockHash {
        BlockHash([number; 16])
    }

    fn stored(hash: BlockHash, group: u16) -> Stored {
        Stored { hash, parent: name(0), group }
    }

    fn named(bytes: &[u8]) -> Vec<BlockHash> {
        convert::block_hashes(bytes, MAX_BLOCKS).unwrap()
    }

    #[test]
    fn a_big_batch_comes_in_pieces_without_holes() {
        let events: Vec<CacheEvent> = (0..10_000u32)
            .map(|number| {
                let mut hash = [0; 16];
                hash[..4].copy_from_slice(&number.to_le_bytes());
                CacheEvent::Stored(stored(BlockHash(hash), 0))
            })
            .collect();
        let batch = CacheBatch { first: 7, gap: false, events };
        let mut next = 7;
        let mut seen = HashSet::new();
        for piece in Changes::of(batch) {
            let wire = piece.since(next, Group(0)).unwrap().unwrap();
            assert!(wire.first == next && wire.stored.len() <= MAX_BLOCKS * 16);
            next += u64::from(wire.count);
            seen.extend(named(&wire.stored));
            assert_eq!(piece.since(next, Group(0)), Ok(None), "known already");
        }
        assert_eq!((next, seen.len()), (10_007, 10_000));
        assert_eq!(Changes { first: 5, events: vec![CacheEvent::Removed(name(1))] }.since(4, Group(0)), Err(Gap));
    }

    proptest! {
        #[test]
        fn whoever_joins_anywhere_knows_what_is_there(
            events in prop::collection::vec((0u8..6, any::<bool>()), 1..60),
            join in 0usize..60,
            piece in 1usize..9,
        ) {
            let join = join.min(events.len());
            let apply = |known: &mut HashSet<BlockHash>, event: &CacheEvent| match event {
                CacheEvent::Stored(stored) => known.insert(stored.hash),
                CacheEvent::Removed(name) => known.remove(name),
            };
            let events: Vec<CacheEvent> = events
                .into_iter()
                .map(|(number, add)| match add {
                    true => CacheEvent::Stored(stored(name(number), 0)),
                    false => CacheEvent::Removed(name(number)),
                })
                .collect();
            let mut all = HashSet::new();
            for event in &events {
                apply(&mut all, event);
            }
            // The snapshot is as of event `join`, which may lie in the middle of a piece.
            let mut known = HashSet::new();
            for event in &events[..join] {
                apply(&mut known, event);
            }
            let mut next = join as u64;
            for (at, events) in events.chunks(piece).enumerate() {
                let changes = Changes { first: (at * piece) as u64, events: events.to_vec() };
                let Some(wire) = changes.since(next, Group(0)).unwrap() else { continue };
                next += u64::from(wire.count);
                known.extend(named(&wire.stored));
                for name in named(&wire.removed) {
                    known.remove(&name);
                }
            }
            prop_assert_eq!(known, all);
            prop_assert_eq!(next, events.len() as u64);
        }
    }

    #[test]
    fn of_several_groups_one_stands_for_the_prompt_by_the_chains_names() {
        let group = Group(1);
        let blocks = vec![stored(name(1), 0), stored(in_group(name(1), 1), 1), stored(in_group(name(2), 1), 1)];
        let parts = parts(&CacheSnapshot { next: 3, blocks }, group);
        assert_eq!(named(&parts[0].hashes), [name(1), name(2)]);
        let events = vec![CacheEvent::Stored(stored(name(3), 0)), CacheEvent::Removed(in_group(name(2), 1))];
        let wire = Changes { first: 3, events }.since(3, group).unwrap().unwrap();
        assert_eq!((named(&wire.stored), named(&wire.removed), wire.count), (vec![], vec![name(2)], 2));
    }

    #[test]
    fn an_empty_cache_is_one_empty_part() {
        let parts = parts(&CacheSnapshot { next: 9, blocks: vec![] }, Group(0));
        assert_eq!(parts, [v1::CachePart { first: true, last: true, next: 9, hashes: Default::default() }]);
    }
}
