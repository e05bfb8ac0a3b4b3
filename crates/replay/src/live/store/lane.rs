//! One request at a time: look up, read, compare, write.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_store_client::{Error, Origin, Source};
use kvasir_types::{BlockHash, Deadline, RequestId};

use super::Ground;
use crate::live::drive::{Lane, Turn};

/// Whose blocks they are, in the store's eyes: `kvasirctl kv evict --tenant kvasir-replay` takes them all out.
const TENANT: &str = "kvasir-replay";

/// What became of a request.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) asked: usize,
    /// Read, complete and right.
    pub(super) hit: usize,
    /// Whose the blocks read were, and where they had been.
    pub(super) sources: Vec<Source>,
    /// Read with other bytes than were written.
    pub(super) wrong: usize,
    /// There, and not to be had.
    pub(super) lost: usize,
    pub(super) written: usize,
    pub(super) present: usize,
    pub(super) skipped: usize,
    pub(super) errors: Vec<&'static str>,
    pub(super) lookup: Option<Duration>,
    pub(super) read: Option<Duration>,
    pub(super) write: Option<Duration>,
    /// From when it was due, without the time it took to make and compare bytes.
    pub(super) whole: Duration,
}

pub(super) struct StoreLane {
    ground: Arc<Ground>,
    /// Where its part of the arena begins.
    base: u64,
    origin: Origin,
    /// A block as it must be, and one as it is.
    expected: Vec<u8>,
    found: Vec<u8>,
}

impl StoreLane {
    pub(super) fn new(ground: Arc<Ground>, base: u64) -> Self {
        let bytes = ground.block_bytes as usize;
        let origin = Origin { model: None, tenant: TENANT.to_owned() };
        Self { ground, base, origin, expected: vec![0; bytes], found: vec![0; bytes] }
    }

    /// How many of these blocks of the arena are not what they must be.
    fn compare(&mut self, numbers: &[u64], places: &[(BlockHash, u64)]) -> usize {
        let mut wrong = 0;
        for (&number, &(_, offset)) in numbers.iter().zip(places) {
            self.ground.names.fill(number, &mut self.expected);
            let read = self.ground.engine.read_bytes(offset, &mut self.found);
            wrong += usize::from(read.is_err() || self.found != self.expected);
        }
        wrong
    }

    /// Puts into the arena what these blocks are to be.
    fn fill(&mut self, numbers: &[u64], places: &[(BlockHash, u64)]) {
        for (&number, &(_, offset)) in numbers.iter().zip(places) {
            self.ground.names.fill(number, &mut self.expected);
            self.ground.engine.write_bytes(offset, &self.expected).expect("the lane's part of the arena is its own");
        }
    }

    async fn request(&mut self, turn: &Turn<'_>) -> Outcome {
        let Ground { client, names, block_bytes, split, patience, .. } = &*self.ground.clone();
        let parts = |&block: &u32| u64::from(block) * split..(u64::from(block) + 1) * split;
        let numbers: Vec<u64> = turn.request.blocks.iter().flat_map(parts).collect();
        let mut outcome = Outcome { asked: numbers.len(), ..Outcome::default() };
        if numbers.is_empty() {
            return outcome;
        }
        let id: RequestId = format!("replay-{}", turn.number).parse().expect("a short word is an id");
        let offsets = (self.base..).step_by(*block_bytes as usize);
        let places: Vec<_> = numbers.iter().map(|&number| names.hash(number)).zip(offsets).collect();

        let begun = Instant::now();
        let deadline = Deadline::after(*patience);
        let mut found = client.find(&id, places.clone(), 0, *block_bytes, deadline).await;
        outcome.lookup = Some(begun.elapsed());
        outcome.errors.extend(found.take_error().as_ref().map(kind));

        let there = found.blocks();
        if there > 0 {
            let begun = Instant::now();
            let report = client.fetch(&found, deadline, |_| {}).await;
            outcome.read = Some(begun.elapsed());
            outcome.errors.extend(report.error.as_ref().map(kind));
            found.truncate(report.blocks);
            outcome.wrong = self.compare(&numbers[..report.blocks], &places);
            outcome.hit = report.blocks - outcome.wrong;
            outcome.lost = there - report.blocks;
            outcome.sources = found.sources();
        }
        let have = found.blocks();
        client.release(found);

        if have < places.len() {
            self.fill(&numbers[have..], &places[have..]);
            let begun = Instant::now();
            let deadline = Deadline::after(*patience);
            let report = client.write_on(&id, &self.origin, &places, have, *block_bytes, deadline).await;
            outcome.write = Some(begun.elapsed());
            outcome.errors.extend(report.error.as_ref().map(kind));
            (outcome.written, outcome.present, outcome.skipped) = (report.written, report.present, report.skipped);
        }
        outcome
    }
}

impl Lane for StoreLane {
    type Outcome = Outcome;

    async fn serve(&mut self, turn: Turn<'_>) -> Outcome {
        let waited = turn.due.elapsed();
        let mut outcome = Box::pin(self.request(&turn)).await;
        let parts = [outcome.lookup, outcome.read, outcome.write];
        outcome.whole = waited + parts.into_iter().flatten().sum::<Duration>();
        outcome
    }
}

/// A word for what went wrong.
fn kind(error: &Error) -> &'static str {
    match error {
        Error::Away { .. } => "away",
        Error::Call { .. } => "call",
        Error::Timeout { .. } => "timeout",
        Error::Address { .. } => "address",
        Error::Answer { .. } | Error::Count { .. } => "answer",
        Error::Transfer { .. } => "transfer",
        Error::Checksum { .. } => "checksum",
        Error::NotCommitted { .. } => "not committed",
        Error::Local(_) => "local",
        _ => "other",
    }
}
