//! Groups that have more copies than others, as their homes tell.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use kvasir_cluster::StoreInfo;
use kvasir_proto::v1;
use kvasir_types::BlockHash;

/// How long a hint is believed. Who follows it to a copy does not hear from the home meanwhile.
const BELIEVED: Duration = Duration::from_secs(2);
/// Most groups that are remembered.
const MAX_GROUPS: usize = 4096;

/// How many copies a hot group has, and until when that is believed.
type Hints = HashMap<u64, (usize, Instant)>;

/// What is known of hot groups. Written and read by whatever task makes a request, for a map look-up.
#[derive(Default)]
pub(crate) struct Hot(Mutex<Hints>);

impl Hot {
    /// A node named hot groups.
    pub(crate) fn told(&self, hints: &[v1::HotGroup], now: Instant) {
        if hints.is_empty() {
            return;
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() + hints.len() > MAX_GROUPS {
            known.retain(|_, &mut (_, until)| now < until);
        }
        for hint in hints.iter().take(MAX_GROUPS.saturating_sub(known.len())) {
            known.insert(hint.group, (hint.copies.min(StoreInfo::MAX_REPLICAS) as usize, now + BELIEVED));
        }
    }

    /// How many copies of the group there are, if it is one of them.
    pub(crate) fn copies(&self, key: BlockHash, now: Instant) -> usize {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&group(key)).filter(|&&(_, until)| now < until).map_or(1, |&(copies, _)| copies)
    }
}

/// A group's short name: the first eight bytes of the hash of its first block, which are what it is placed by.
pub(crate) fn group(key: BlockHash) -> u64 {
    crate::rendezvous::first_eight(&key.0)
}

/// A key that is placed as the group of that short name.
pub(crate) fn key(group: u64) -> BlockHash {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&group.to_le_bytes());
    BlockHash(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_believed_for_a_while_and_there_is_a_bound_on_how_many() {
        let (hot, now) = (Hot::default(), Instant::now());
        hot.told(&[v1::HotGroup { group: 7, copies: 3 }, v1::HotGroup { group: 8, copies: u32::MAX }], now);
        assert_eq!((hot.copies(key(7), now), hot.copies(key(8), now), hot.copies(key(9), now)), (3, 8, 1));
        assert_eq!(hot.copies(key(7), now + BELIEVED), 1);
        let flood: Vec<_> = (0..100_000).map(|group| v1::HotGroup { group, copies: 2 }).collect();
        hot.told(&flood, now + BELIEVED);
        assert_eq!(hot.0.lock().unwrap().len(), MAX_GROUPS);
    }
}
