//! What a worker's messages mean: the order they must have, and what they may be. No I/O.
//!
//! ```text
//!   Begin ──part(first)──▶ Snapshot(next) ──part(last)──▶ Changes(next) ──changes(first = next)──▶ Changes(next + count)
//!                              ▲                               │
//!                              └────────── part(first) ────────┘       anything else: an error, and the stream is opened anew
//! ```

use kvasir_proto::{
    convert,
    v1::{self, watch_event::Event},
};
use kvasir_types::BlockHash;

/// Most blocks named in one message, as the protocol has it.
const MAX_BLOCKS: usize = 4096;

/// A message that can't be.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum Error {
    /// Not in order.
    #[error("{what} where it can't be")]
    Order {
        /// What was said.
        what: &'static str,
    },
    /// Changes were left out.
    #[error("changes from {got} on, expected those from {expected} on")]
    Gap {
        /// The number it should have had.
        expected: u64,
        /// The number it had.
        got: u64,
    },
    /// Malformed.
    #[error(transparent)]
    Message(#[from] kvasir_proto::Error),
}

/// What to do.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    /// Forget all that this worker holds; then it holds these, and more to come.
    Anew(Vec<BlockHash>),
    /// It holds these, too, and not those any more.
    Change(Vec<BlockHash>, Vec<BlockHash>),
    /// This is what it does.
    Load(v1::WorkerLoad),
}

/// Where the stream is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum Follow {
    /// Nothing was said.
    #[default]
    Begin,
    /// In the middle of a snapshot as of this number.
    Snapshot(u64),
    /// Up to date, as of this number.
    Changes(u64),
}

impl Follow {
    /// The next message.
    pub(crate) fn hear(&mut self, message: v1::WatchEvent) -> Result<Step, Error> {
        match message.event.ok_or(kvasir_proto::Error::Missing("event"))? {
            Event::Load(load) => Ok(Step::Load(load)),
            Event::Part(part) => {
                let hashes = convert::block_hashes(&part.hashes, MAX_BLOCKS)?;
                match *self {
                    Self::Snapshot(next) if !part.first && next == part.next => {}
                    _ if part.first => {}
                    _ => return Err(Error::Order { what: "part of a snapshot" }),
                }
                *self = if part.last { Self::Changes(part.next) } else { Self::Snapshot(part.next) };
                Ok(if part.first { Step::Anew(hashes) } else { Step::Change(hashes, Vec::new()) })
            }
            Event::Changes(changes) => {
                let Self::Changes(next) = *self else { return Err(Error::Order { what: "changes" }) };
                if changes.first != next {
                    return Err(Error::Gap { expected: next, got: changes.first });
                }
                let stored = convert::block_hashes(&changes.stored, MAX_BLOCKS)?;
                let removed = convert::block_hashes(&changes.removed, MAX_BLOCKS)?;
                *self = Self::Changes(next.wrapping_add(changes.count.into()));
                Ok(Step::Change(stored, removed))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hashes(numbers: &[u8]) -> tonic::codegen::Bytes {
        convert::pack16(numbers.iter().map(|&number| [number; 16]).collect::<Vec<_>>().iter())
    }

    fn part(first: bool, last: bool, next: u64, numbers: &[u8]) -> v1::WatchEvent {
        let part = v1::CachePart { first, last, next, hashes: hashes(numbers) };
        v1::WatchEvent { event: Some(Event::Part(part)) }
    }

    fn changes(first: u64, count: u32, stored: &[u8], removed: &[u8]) -> v1::WatchEvent {
        let changes = v1::CacheChanges { first, count, stored: hashes(stored), removed: hashes(removed) };
        v1::WatchEvent { event: Some(Event::Changes(changes)) }
    }

    fn names(numbers: &[u8]) -> Vec<BlockHash> {
        numbers.iter().map(|&number| BlockHash([number; 16])).collect()
    }

    #[test]
    fn a_snapshot_then_changes_then_another_snapshot() {
        let mut follow = Follow::default();
        assert_eq!(follow.hear(part(true, false, 7, &[1, 2])), Ok(Step::Anew(names(&[1, 2]))));
        assert_eq!(follow.hear(part(false, true, 7, &[3])), Ok(Step::Change(names(&[3]), vec![])));
        assert_eq!(follow.hear(changes(7, 2, &[4], &[1])), Ok(Step::Change(names(&[4]), names(&[1]))));
        assert_eq!(follow.hear(changes(9, 1, &[], &[2])), Ok(Step::Change(vec![], names(&[2]))));
        assert_eq!(follow.hear(part(true, true, 30, &[])), Ok(Step::Anew(vec![])));
        assert_eq!(follow, Follow::Changes(30));
    }

    #[test]
    fn what_is_out_of_order_is_an_error() {
        assert_eq!(Follow::Begin.hear(changes(0, 1, &[1], &[])), Err(Error::Order { what: "changes" }));
        assert!(Follow::Begin.hear(part(false, true, 0, &[])).is_err());
        assert!(Follow::Snapshot(7).hear(part(false, true, 8, &[])).is_err());
        assert!(Follow::Snapshot(7).hear(changes(7, 1, &[], &[])).is_err());
        assert_eq!(Follow::Changes(7).hear(changes(8, 1, &[], &[])), Err(Error::Gap { expected: 7, got: 8 }));
        assert!(Follow::Begin.hear(v1::WatchEvent { event: None }).is_err());
    }

    #[test]
    fn no_message_is_longer_than_the_protocol_has_it() {
        let long = vec![1; MAX_BLOCKS + 1];
        assert!(matches!(Follow::Begin.hear(part(true, true, 0, &long)), Err(Error::Message(_))));
        assert!(matches!(Follow::Changes(0).hear(changes(0, 1, &long, &[])), Err(Error::Message(_))));
    }

    proptest! {
        #[test]
        fn nothing_that_a_worker_says_panics(first: bool, last: bool, next: u64, count: u32, bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            for mut follow in [Follow::Begin, Follow::Snapshot(next), Follow::Changes(next)] {
                let part = v1::CachePart { first, last, next, hashes: bytes.clone().into() };
                let _any = follow.hear(v1::WatchEvent { event: Some(Event::Part(part)) });
                let changes = v1::CacheChanges { first: next, count, stored: bytes.clone().into(), removed: Default::default() };
                let _any = follow.hear(v1::WatchEvent { event: Some(Event::Changes(changes)) });
            }
        }
    }
}
