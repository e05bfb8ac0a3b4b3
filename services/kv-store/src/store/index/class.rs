//! A class: blocks of one size that count against one quota, and who of them goes next from each tier.

use kvasir_kv_cache::{Evict, Facts, HitDensity, Lru, S3Fifo};
use kvasir_types::BlockId;
use serde::{Deserialize, Serialize};

use crate::store::{
    entry::{Keep, Level},
    quota::ShareId,
    slab::{BlockBytes, Use},
};

/// Most classes: sizes in use times quotas in use.
pub(super) const MAX_CLASSES: usize = 250;
/// What learns takes megabytes for what it has learned: so many classes do, those beyond are in order of use.
const MAX_LEARNING: usize = 16;

/// Who goes first: see docs/eviction.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Who promises the fewest hits for the time its place is taken, learned from the traffic.
    HitDensity,
    /// Who has not been asked for the longest.
    Lru,
    /// New blocks in a queue of their own: for comparison.
    S3Fifo,
}

/// The policies of the tiers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policies {
    pub(crate) memory: Policy,
    pub(crate) disk: Policy,
}

impl Policy {
    fn order(self) -> Box<dyn Evict<BlockId>> {
        match self {
            Self::HitDensity => Box::new(HitDensity::default()),
            Self::Lru => Box::new(Lru::default()),
            Self::S3Fifo => Box::new(S3Fifo::default()),
        }
    }
}

/// Blocks of one size that count against one quota.
pub(super) struct Class {
    pub(super) size: BlockBytes,
    pub(super) share: ShareId,
    pub(super) blocks: u64,
    /// Those that each tier may give up, in the order in which they go.
    pub(super) idle: [Box<dyn Evict<BlockId>>; 2],
    /// Those of them that somebody wants kept: they go last.
    soft: [Lru; 2],
    /// When what last went from each tier had last been used, or since when there is this class: how old its oldest are,
    /// more or less.
    pub(super) tail: [Use; 2],
    /// So many blocks of this size are given up before the slabs of other sizes are looked at again.
    pub(super) look_after: [u64; 2],
}

impl Class {
    /// The n-th class of a store.
    pub(super) fn new(size: BlockBytes, share: ShareId, policies: &Policies, n: usize, now: Use) -> Self {
        let order = |policy: Policy| if n < MAX_LEARNING { policy.order() } else { Policy::Lru.order() };
        Self {
            size,
            share,
            blocks: 0,
            idle: [order(policies.memory), order(policies.disk)],
            soft: Default::default(),
            tail: [now; 2],
            look_after: [0; 2],
        }
    }

    pub(super) fn describe(&mut self, level: Level, key: BlockId, facts: Facts<BlockId>) {
        self.idle[level as usize].describe(key, facts);
    }

    pub(super) fn touch(&mut self, level: Level, key: BlockId) {
        self.idle[level as usize].touch(&key);
        self.soft[level as usize].touch(&key);
    }

    pub(super) fn insert(&mut self, level: Level, keep: Keep, key: BlockId) {
        match keep {
            Keep::Cached => self.idle[level as usize].insert(key),
            // Of a hard pin only the copies that are not the last.
            Keep::Soft | Keep::Hard => self.soft[level as usize].insert(key),
        }
    }

    pub(super) fn remove(&mut self, level: Level, keep: Keep, key: BlockId) {
        match keep {
            Keep::Cached => self.idle[level as usize].remove(&key),
            Keep::Soft | Keep::Hard => self.soft[level as usize].remove(&key),
        };
    }

    /// The block is not in that tier any more.
    pub(super) fn gone(&mut self, level: Level, key: BlockId) {
        self.idle[level as usize].gone(&key);
        self.soft[level as usize].remove(&key);
    }

    pub(super) fn pop(&mut self, level: Level, soft: bool) -> Option<BlockId> {
        if soft { self.soft[level as usize].pop() } else { self.idle[level as usize].pop() }
    }

    /// Blocks that the tier may give up.
    #[cfg(test)]
    pub(super) fn idle(&self, level: Level) -> [usize; 2] {
        [self.idle[level as usize].len(), self.soft[level as usize].len()]
    }
}
