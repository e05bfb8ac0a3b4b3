//! Holds: for how long somebody outside may touch blocks, and what has to happen before they are free again.
//!
//! ```text
//!            open                    close: given back, committed, or expired            finish
//!   (none) ────────▶ Open{until} ─────────────────────────────────────────▶ Closing ───────────────▶ (none)
//!                                    the caller now revokes the grant and waits    its blocks are free of it
//! ```
//!
//! A lease holds blocks for a reader, a reservation for a writer; both live the same life, so both are this table. The
//! rule guarded here: **blocks leave a hold only through `finish`, and `finish` only follows `close`.** What lies
//! between them is the caller's wait until no remote operation can land any more. A hold is closed exactly once, however
//! many ends come together (released while it expires while it commits): only one of them is told so.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Debug,
    hash::Hash,
    time::Instant,
};

use kvasir_types::BlockId;

/// Names a reader's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// Names a writer's reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReservationId(pub u64);

/// What names a hold.
pub(crate) trait HoldId: Copy + Debug + Eq + Hash + Ord {
    fn new(number: u64) -> Self;
}

impl HoldId for LeaseId {
    fn new(number: u64) -> Self {
        Self(number)
    }
}

impl HoldId for ReservationId {
    fn new(number: u64) -> Self {
        Self(number)
    }
}

#[derive(Debug)]
struct Hold {
    blocks: Vec<BlockId>,
    /// When it ends by itself; `None` once it is closing.
    until: Option<Instant>,
}

/// All leases, or all reservations.
#[derive(Debug)]
pub(crate) struct Holds<Id> {
    limit: usize,
    seed: u64,
    holds: HashMap<Id, Hold>,
    by_end: BTreeSet<(Instant, Id)>,
}

impl<Id: HoldId> Holds<Id> {
    /// At most `limit` at a time. Ids follow from `seed`: with a random one, nobody gets to end a hold by guessing, and
    /// an id of an earlier life of the node means nothing in this one.
    pub(crate) fn new(limit: usize, seed: u64) -> Self {
        Self { limit, seed, holds: HashMap::new(), by_end: BTreeSet::new() }
    }

    /// Whether one more would be refused.
    pub(crate) fn is_full(&self) -> bool {
        self.holds.len() >= self.limit
    }

    /// Opens a hold over `blocks`.
    pub(crate) fn open(&mut self, blocks: Vec<BlockId>, until: Instant) -> Id {
        assert!(!self.is_full(), "the caller asks before it opens");
        let id = self.fresh_id();
        self.by_end.insert((until, id));
        self.holds.insert(id, Hold { blocks, until: Some(until) });
        id
    }

    /// An id that names nothing at present and is never zero, which on the wire means "none".
    fn fresh_id(&mut self) -> Id {
        loop {
            self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let number = mix(self.seed);
            let id = Id::new(number);
            if number != 0 && !self.holds.contains_key(&id) {
                return id;
            }
        }
    }

    /// Closes a hold; `None` if there is none by that name or another end came first.
    pub(crate) fn close(&mut self, id: Id) -> Option<&[BlockId]> {
        let hold = self.holds.get_mut(&id)?;
        let until = hold.until.take()?;
        self.by_end.remove(&(until, id));
        Some(&hold.blocks)
    }

    /// An open hold ends now, unless it ends earlier.
    pub(crate) fn hasten(&mut self, id: Id, now: Instant) {
        if let Some(Hold { until: Some(until), .. }) = self.holds.get_mut(&id)
            && *until > now
        {
            self.by_end.remove(&(*until, id));
            self.by_end.insert((now, id));
            *until = now;
        }
    }

    /// Closes all holds whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Id> {
        let mut expired = Vec::new();
        while let Some(&(until, id)) = self.by_end.first()
            && until <= now
        {
            self.close(id).expect("what has an end is open");
            expired.push(id);
        }
        expired
    }

    /// A closed hold is over; these blocks it held.
    ///
    /// # Panics
    /// If it is not closing: its grant may still be in use, and what is freed now would be written to later.
    pub(crate) fn finish(&mut self, id: Id) -> Vec<BlockId> {
        let hold = self.holds.remove(&id).expect("a hold is finished once");
        assert!(hold.until.is_none(), "a hold is closed before it is finished");
        hold.blocks
    }

    /// When the first one ends by itself.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.by_end.first().map(|&(until, _)| until)
    }
}

/// SplitMix64's output function (Steele, Lea, Flood 2014): one to one, so distinct seeds give distinct ids.
pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn holds() -> (Holds<LeaseId>, LeaseId, Instant) {
        let mut holds = Holds::new(2, 7);
        let now = Instant::now();
        let id = holds.open(vec![BlockId(1), BlockId(2)], now + Duration::from_secs(5));
        (holds, id, now)
    }

    #[test]
    fn only_one_of_many_ends_closes_a_hold() {
        let (mut holds, id, now) = holds();
        assert!(holds.close(id).is_some());
        assert!(holds.close(id).is_none());
        assert!(holds.expire(now + Duration::from_secs(60)).is_empty());
        assert_eq!(holds.finish(id), [BlockId(1), BlockId(2)]);
        assert!(holds.close(id).is_none());
    }

    #[test]
    fn a_hold_expires_at_its_end_and_not_before() {
        let (mut holds, id, now) = holds();
        assert!(holds.expire(now + Duration::from_millis(4999)).is_empty());
        assert_eq!(holds.expire(holds.next_end().unwrap()), [id]);
        assert_eq!(holds.next_end(), None);
    }

    #[test]
    #[should_panic(expected = "closed before it is finished")]
    fn an_open_hold_cannot_be_finished() {
        let (mut holds, id, _) = holds();
        holds.finish(id);
    }

    #[test]
    fn ids_are_neither_zero_nor_repeated() {
        let mut holds = Holds::<ReservationId>::new(1, u64::MAX);
        let ids: BTreeSet<_> = (0..10_000).map(|_| holds.fresh_id()).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(!ids.contains(&ReservationId(0)));
    }
}
