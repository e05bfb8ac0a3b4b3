//! What a pool's prefix index gained and lost, in order, for whoever keeps a picture of it elsewhere (the router).
//!
//! ```text
//!   pool ──Stored, Removed──▶ EventLog (bounded) ──drain──▶ Batch { first: 17, gap: false, events } ──▶ follower
//!   pool ──snapshot──▶ Snapshot { next: 21, blocks } : everything that events below 21 say
//! ```
//!
//! Events are numbered from 0 without holes. A follower that knows a snapshot of number `n` applies the events from `n`
//! on. If nobody drains, the log does not grow: beyond its limit it forgets **all** it holds (whoever lost one event
//! needs a snapshot anyway, and then the older ones are of no use) and the next batch bears the gap.

use kvasir_types::BlockHash;

/// A block by its names: what can be found, and where it hangs in its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stored {
    /// The block's name in its group ([`crate::in_group`]).
    pub hash: BlockHash,
    /// Name of the block before it, in the same group; the chain's root (in that group) for the first one.
    pub parent: BlockHash,
    /// Index of its group.
    pub group: u16,
}

/// One change of what can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// The block can be found from here on.
    Stored(Stored),
    /// No block of this name can be found any more.
    Removed(BlockHash),
}

/// Some events that follow one another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Number of the first event; the others follow without holes. Without events: the number the next one will have.
    pub first: u64,
    /// Events right before `first` were lost: take a snapshot.
    pub gap: bool,
    /// The events.
    pub events: Vec<CacheEvent>,
}

/// All that can be found at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Holds what the events below this number say; go on with this one.
    pub next: u64,
    /// Every block that can be found, in no order.
    pub blocks: Vec<Stored>,
}

/// Events that nobody has taken yet.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    first: u64,
    gap: bool,
    events: Vec<CacheEvent>,
    limit: usize,
}

impl EventLog {
    /// A log of at most `limit` events; 0 keeps none (and numbers them all the same).
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    pub(crate) fn push(&mut self, event: CacheEvent) {
        if self.events.len() >= self.limit {
            self.first += self.events.len() as u64 + u64::from(self.limit == 0);
            self.events.clear();
            self.gap = true;
        }
        if self.limit > 0 {
            self.events.push(event);
        }
    }

    pub(crate) fn next(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    pub(crate) fn drain(&mut self) -> Batch {
        let next = self.next();
        let batch = Batch { first: self.first, gap: self.gap, events: std::mem::take(&mut self.events) };
        (self.first, self.gap) = (next, false);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn removed(name: u8) -> CacheEvent {
        CacheEvent::Removed(BlockHash([name; 16]))
    }

    #[test]
    fn batches_follow_one_another_without_holes() {
        let mut log = EventLog::new(4);
        (0..3).for_each(|name| log.push(removed(name)));
        assert_eq!(log.drain(), Batch { first: 0, gap: false, events: (0..3).map(removed).collect() });
        log.push(removed(3));
        assert_eq!(log.drain(), Batch { first: 3, gap: false, events: vec![removed(3)] });
        assert_eq!(log.drain(), Batch { first: 4, gap: false, events: vec![] });
    }

    #[test]
    fn what_nobody_takes_is_forgotten_and_the_gap_is_told_once() {
        let mut log = EventLog::new(2);
        (0..5).for_each(|name| log.push(removed(name)));
        assert_eq!(log.next(), 5);
        assert_eq!(log.drain(), Batch { first: 4, gap: true, events: vec![removed(4)] });
        log.push(removed(5));
        assert_eq!(log.drain(), Batch { first: 5, gap: false, events: vec![removed(5)] });
    }

    #[test]
    fn a_log_of_no_events_still_numbers_them() {
        let mut log = EventLog::new(0);
        (0..3).for_each(|name| log.push(removed(name)));
        assert_eq!(log.drain(), Batch { first: 3, gap: true, events: vec![] });
    }
}
