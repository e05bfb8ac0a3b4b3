//! What is known of a worker's load: what this router does there, and what the worker told.
//!
//! Written by requests as they come and go and by the worker's feed; read by every decision, for every worker: so it lies
//! together, in two lines of the processor's cache, and is read without a lock. Values may be of slightly different moments.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kvasir_proto::v1;

use crate::{
    cache::Number,
    route::{Load, Speed},
};

/// No number in the index.
const NOBODY: u32 = u32::MAX;
/// Room that is not known.
const UNKNOWN: u64 = u64::MAX;
/// More than any worker computes or moves in a second.
const FASTEST: f64 = 1e15;

/// What moments are counted from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// See the module's page.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Pulse {
    /// This router's requests there, and their prompts' tokens.
    requests: AtomicU64,
    tokens: AtomicU64,
    /// Of those tokens, what is to be computed.
    work: AtomicU64,
    /// What of both was sent since the worker last told, and is not over yet.
    since_requests: AtomicU64,
    since_work: AtomicU64,
    /// What the worker told; 0 if it tells nothing.
    told_requests: AtomicU64,
    told_work: AtomicU64,
    room_tokens: AtomicU64,
    /// Until when others are preferred, in milliseconds from the start.
    rests_until: AtomicU64,
    /// How often the worker told; 0: it tells nothing (any more).
    told: AtomicU32,
    local_tokens: AtomicU32,
    prefill_speed: AtomicU32,
    step_seconds: AtomicU32,
    handoff_speed: AtomicU32,
    /// What a step is predicted to take: so much, and so much for each answer.
    step_base: AtomicU32,
    step_each: AtomicU32,
    number: AtomicU32,
    /// What a decision needs to know beside the load, and what never changes.
    block_tokens: u32,
    key: u64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            work: AtomicU64::new(0),
            since_requests: AtomicU64::new(0),
            since_work: AtomicU64::new(0),
            told_requests: AtomicU64::new(0),
            told_work: AtomicU64::new(0),
            room_tokens: AtomicU64::new(UNKNOWN),
            rests_until: AtomicU64::new(0),
            told: AtomicU32::new(0),
            local_tokens: AtomicU32::new(0),
            prefill_speed: AtomicU32::new(0),
            step_seconds: AtomicU32::new(0),
            handoff_speed: AtomicU32::new(0),
            step_base: AtomicU32::new(0),
            step_each: AtomicU32::new(0),
            number: AtomicU32::new(NOBODY),
            block_tokens: 1,
            key: 0,
        }
    }
}

impl Pulse {
    /// Of a worker with this number for its name, whose blocks have so many tokens.
    pub(super) fn of(key: u64, block_tokens: u32) -> Self {
        Self { key, block_tokens, ..Self::default() }
    }

    /// The number for its name.
    pub(super) fn key(&self) -> u64 {
        self.key
    }

    /// Tokens of one of its blocks.
    pub(super) fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// One more request of this router, with so many prompt tokens, `work` of which are to be computed; what it says is for
    /// [`end`](Self::end).
    pub(super) fn begin(&self, tokens: u64, work: u64) -> u32 {
        self.requests.fetch_add(1, Relaxed);
        self.tokens.fetch_add(tokens, Relaxed);
        self.work.fetch_add(work, Relaxed);
        self.since_requests.fetch_add(1, Relaxed);
        self.since_work.fetch_add(work, Relaxed);
        self.told.load(Relaxed)
    }

    /// It is over; `began` is what [`begin`](Self::begin) said.
    pub(super) fn end(&self, tokens: u64, work: u64, began: u32) {
        self.requests.fetch_sub(1, Relaxed);
        self.tokens.fetch_sub(tokens, Relaxed);
        self.work.fetch_sub(work, Relaxed);
        // What the worker told may be a while ago: it is not in that any more, or, if it came later, in what was sent since.
        // The worker may be telling right now: then there is nothing left to take off.
        let counted = match self.told.load(Relaxed) == began {
            true => [(&self.since_requests, 1), (&self.since_work, work)],
            false => [(&self.told_requests, 1), (&self.told_work, work)],
        };
        for (place, amount) in counted {
            let _always = place.fetch_update(Relaxed, Relaxed, |count| Some(count.saturating_sub(amount)));
        }
    }

    /// What the worker says of itself. What was sent before is in it, or on its way there: then it is still in what this
    /// router knows it has there ([`Load::estimate`]).
    pub(crate) fn told(&self, load: &v1::WorkerLoad, block_tokens: u32) {
        self.told.store(self.told.load(Relaxed).wrapping_add(1).max(1), Relaxed);
        self.since_requests.store(0, Relaxed);
        self.since_work.store(0, Relaxed);
        self.told_requests.store(u64::from(load.running) + u64::from(load.waiting), Relaxed);
        self.told_work.store(load.waiting_tokens.min(1 << 40), Relaxed);
        let room = load.free_blocks.saturating_add(load.cached_blocks);
        self.room_tokens.store(room.saturating_mul(block_tokens.into()).min(UNKNOWN - 1), Relaxed);
        self.local_tokens.store(load.local_prefill_tokens, Relaxed);
        for (place, value) in [
            (&self.prefill_speed, load.prefill_tokens_per_second),
            (&self.step_seconds, load.step_seconds),
            (&self.handoff_speed, load.handoff_bytes_per_second),
        ] {
            let value = if value.is_finite() && value > 0.0 { value.min(FASTEST) as f32 } else { 0.0 };
            place.store(value.to_bits(), Relaxed);
        }
    }

    /// How many requests are there, of one that tells no more than that.
    pub(crate) fn told_requests(&self, requests: u64) {
        self.told.store(self.told.load(Relaxed).wrapping_add(1).max(1), Relaxed);
        self.since_requests.store(0, Relaxed);
        self.since_work.store(0, Relaxed);
        self.told_requests.store(requests, Relaxed);
    }

    /// Nothing is told any more: what was told of the load is void; the speeds are the last that are known.
    pub(crate) fn silent(&self) {
        self.told.store(0, Relaxed);
        self.told_requests.store(0, Relaxed);
        self.told_work.store(0, Relaxed);
        self.room_tokens.store(UNKNOWN, Relaxed);
    }

    /// Its number in the index, while it is followed.
    pub(crate) fn set_number(&self, number: Option<Number>) {
        self.number.store(number.map_or(NOBODY, |number| number.0), Relaxed);
    }

    /// The same.
    pub(super) fn number(&self) -> Option<u32> {
        Some(self.number.load(Relaxed)).filter(|&number| number != NOBODY)
    }

    /// The load of a decode worker: the tokens are those of this router's prompts there.
    pub(super) fn decode_load(&self) -> Load {
        self.load(self.tokens.load(Relaxed), 0, 0)
    }

    /// The load of a prefill worker: the tokens are those to compute.
    pub(super) fn prefill_load(&self) -> Load {
        self.load(self.work.load(Relaxed), self.told_work.load(Relaxed), self.since_work.load(Relaxed))
    }

    fn load(&self, own: u64, told: u64, since: u64) -> Load {
        let reported = Load { requests: self.told_requests.load(Relaxed), tokens: told };
        let own = Load { requests: self.requests.load(Relaxed), tokens: own };
        if self.told.load(Relaxed) == 0 {
            return own;
        }
        Load::estimate(reported, Load { requests: self.since_requests.load(Relaxed), tokens: since }, own)
    }

    /// Prompt tokens that it is computing.
    pub(super) fn told_work(&self) -> u64 {
        self.told_work.load(Relaxed)
    }

    /// Tokens that it has blocks for.
    pub(super) fn room_tokens(&self) -> Option<u64> {
        Some(self.room_tokens.load(Relaxed)).filter(|&room| room != UNKNOWN)
    }

    /// Up to so many tokens it computes itself.
    pub(super) fn local_tokens(&self) -> u32 {
        self.local_tokens.load(Relaxed)
    }

    /// How fast it is.
    pub(super) fn speed(&self) -> Speed {
        let read = |place: &AtomicU32| f32::from_bits(place.load(Relaxed));
        Speed {
            prefill_tokens_per_second: read(&self.prefill_speed),
            step_seconds: read(&self.step_seconds),
            handoff_bytes_per_second: read(&self.handoff_speed),
        }
    }

    /// What its steps will take, in seconds: so much, and so much for each answer.
    pub(crate) fn predict(&self, base: f32, each: f32) {
        self.step_base.store(base.to_bits(), Relaxed);
        self.step_each.store(each.to_bits(), Relaxed);
    }

    /// What its steps will take with one answer more, in seconds; 0: not known.
    pub(super) fn next_step(&self) -> f32 {
        let [base, each] = [&self.step_base, &self.step_each].map(|place| f32::from_bits(place.load(Relaxed)));
        if base + each > 0.0 { base + each * (self.decode_load().requests + 1) as f32 } else { 0.0 }
    }

    /// Others are preferred to it until then.
    pub(super) fn rest(&self, until: Option<Instant>) {
        self.rests_until.store(until.map_or(0, since_start), Relaxed);
    }

    /// For how long others are preferred to it.
    pub(crate) fn rests_for(&self, now: Instant) -> Duration {
        Duration::from_millis(self.rests_until.load(Relaxed).saturating_sub(since_start(now)))
    }

    /// This router's requests there.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Whether others are preferred to it.
    pub(super) fn rests(&self, now: Instant) -> bool {
        let until = self.rests_until.load(Relaxed);
        until > 0 && since_start(now) < until
    }
}

fn since_start(moment: Instant) -> u64 {
    moment.saturating_duration_since(*START).as_millis() as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_just_sent_counts_until_the_worker_tells_of_it_and_on_until_it_ends() {
        let pulse = Pulse::default();
        let first = pulse.begin(1000, 600);
        assert_eq!(pulse.prefill_load(), Load { requests: 1, tokens: 600 });
        // It tells of two others' requests, and of ours not yet.
        pulse.told(&v1::WorkerLoad { running: 2, waiting_tokens: 50, ..Default::default() }, 16);
        assert_eq!(pulse.prefill_load(), Load { requests: 2, tokens: 600 });
        let second = pulse.begin(100, 100);
        assert_eq!(pulse.prefill_load(), Load { requests: 3, tokens: 700 });
        pulse.told(&v1::WorkerLoad { running: 3, waiting: 1, waiting_tokens: 750, ..Default::default() }, 16);
        assert_eq!(pulse.prefill_load(), Load { requests: 4, tokens: 750 });
        // One that comes and goes before it tells again leaves nothing behind.
        let third = pulse.begin(10, 10);
        pulse.end(10, 10, third);
        assert_eq!(pulse.prefill_load(), Load { requests: 4, tokens: 750 });
        // Those that the worker told of and that are over are not there any more.
        pulse.end(1000, 600, first);
        pulse.end(100, 100, second);
        assert_eq!(pulse.prefill_load(), Load { requests: 2, tokens: 50 });
        pulse.told(&v1::WorkerLoad::default(), 16);
        assert_eq!(pulse.prefill_load(), Load::default());
    }

    #[test]
    fn of_a_worker_that_tells_nothing_only_what_is_there_counts() {
        let pulse = Pulse::default();
        for _ in 0..3 {
            let began = pulse.begin(100, 100);
            pulse.end(100, 100, began);
        }
        assert_eq!(pulse.prefill_load(), Load::default());
        pulse.told(&v1::WorkerLoad { running: 7, ..Default::default() }, 16);
        pulse.silent();
        pulse.begin(100, 100);
        assert_eq!(pulse.prefill_load(), Load { requests: 1, tokens: 100 });
    }

    #[test]
    fn what_a_worker_tells_may_be_anything() {
        let pulse = Pulse::default();
        let wild = v1::WorkerLoad {
            running: u32::MAX,
            waiting: u32::MAX,
            waiting_tokens: u64::MAX,
            free_blocks: u64::MAX,
            cached_blocks: u64::MAX,
            prefill_tokens_per_second: f64::NAN,
            step_seconds: -1.0,
            handoff_bytes_per_second: f64::INFINITY,
            ..Default::default()
        };
        pulse.told(&wild, u32::MAX);
        pulse.begin(1, 1);
        assert_eq!(pulse.speed(), Speed::default());
        assert!(pulse.room_tokens().is_some() && pulse.prefill_load().tokens > 0);
        pulse.silent();
        assert_eq!((pulse.room_tokens(), pulse.prefill_load().requests), (None, 1));
    }

    #[test]
    fn a_rest_ends() {
        let (pulse, now) = (Pulse::default(), Instant::now());
        assert!(!pulse.rests(now));
        pulse.rest(Some(now + Duration::from_millis(500)));
        assert!(pulse.rests(now + Duration::from_millis(400)) && !pulse.rests(now + Duration::from_millis(600)));
        pulse.rest(None);
        assert!(!pulse.rests(now + Duration::from_millis(400)));
    }
}
