//! So many a minute: requests, and tokens. Pure: the caller says what time it is.
//!
//! A budget refills steadily and holds a minute's worth, so that a client which was silent may send that much at once.
//! Answers are paid for when they have been written: what they overdraw, later requests wait for.

use std::time::{Duration, Instant};

use super::Left;

/// Too many; after which time it may be tried again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Over {
    /// `requests` or `tokens`.
    pub(crate) what: &'static str,
    /// How many a minute.
    pub(crate) limit: u64,
    /// When there will be room.
    pub(crate) after: Duration,
}

/// What of a minute's worth is left.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    limit: u64,
    left: f64,
    filled: Instant,
}

impl Bucket {
    fn new(limit: u64, now: Instant) -> Self {
        Self { limit, left: limit as f64, filled: now }
    }

    fn per_second(&self) -> f64 {
        self.limit as f64 / 60.0
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        self.left = (self.left + passed * self.per_second()).min(self.limit as f64);
    }

    /// Takes `count`, if there is so much, or all there can be.
    fn take(&mut self, count: u64, now: Instant, what: &'static str) -> Result<(), Over> {
        self.fill(now);
        let needed = (count as f64).min(self.limit as f64);
        if self.left < needed {
            let after = Duration::from_secs_f64((needed - self.left) / self.per_second());
            return Err(Over { what, limit: self.limit, after });
        }
        self.left -= count as f64;
        Ok(())
    }

    fn left(&mut self, now: Instant) -> (u64, u64, Duration) {
        self.fill(now);
        let missing = self.limit as f64 - self.left;
        (self.limit, self.left.max(0.0) as u64, Duration::from_secs_f64(missing / self.per_second()))
    }
}

/// Requests and tokens of a minute; without a limit, as many as there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

impl Budget {
    /// A full one.
    pub(crate) fn new(requests: Option<u64>, tokens: Option<u64>, now: Instant) -> Self {
        let bucket = |limit: Option<u64>| limit.map(|limit| Bucket::new(limit, now));
        Self { requests: bucket(requests), tokens: bucket(tokens) }
    }

    /// The same limits with what was left of them before.
    pub(crate) fn after(mut self, before: &Self) -> Self {
        for (new, old) in [(&mut self.requests, &before.requests), (&mut self.tokens, &before.tokens)] {
            if let (Some(new), Some(old)) = (new, old) {
                new.left = old.left.min(new.limit as f64);
                new.filled = old.filled;
            }
        }
        self
    }

    /// A request.
    pub(crate) fn request(&mut self, now: Instant) -> Result<(), Over> {
        self.requests.as_mut().map_or(Ok(()), |bucket| bucket.take(1, now, "requests"))
    }

    /// A prompt. One of more tokens than a minute has is let in when the budget is full.
    pub(crate) fn prompt(&mut self, tokens: u64, now: Instant) -> Result<(), Over> {
        self.tokens.as_mut().map_or(Ok(()), |bucket| bucket.take(tokens, now, "tokens"))
    }

    /// An answer.
    pub(crate) fn answer(&mut self, tokens: u64, now: Instant) {
        if let Some(bucket) = &mut self.tokens {
            bucket.fill(now);
            bucket.left -= tokens as f64;
        }
    }

    /// What is left.
    pub(crate) fn left(&mut self, now: Instant) -> Left {
        let left = |bucket: &mut Option<Bucket>| bucket.as_mut().map(|bucket| bucket.left(now));
        Left { requests: left(&mut self.requests), tokens: left(&mut self.tokens) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_minutes_worth_at_once_and_then_as_it_refills() {
        let start = Instant::now();
        let mut budget = Budget::new(Some(60), None, start);
        for _ in 0..60 {
            budget.request(start).unwrap();
        }
        assert_eq!(budget.request(start), Err(Over { what: "requests", limit: 60, after: SECOND }));
        assert_eq!(budget.request(start + SECOND), Ok(()));
        assert!(budget.request(start + SECOND).is_err());
        assert_eq!(budget.left(start + 31 * SECOND).requests, Some((60, 30, 30 * SECOND)));
        budget.prompt(u64::MAX, start).unwrap();
    }

    #[test]
    fn answers_overdraw_and_are_waited_for() {
        let start = Instant::now();
        let mut budget = Budget::new(None, Some(600), start);
        budget.prompt(500, start).unwrap();
        budget.answer(700, start);
        assert_eq!(budget.prompt(1, start).unwrap_err().after, Duration::from_secs_f64(60.1));
        // What no minute holds is let in by a full budget, and overdraws it.
        budget.prompt(6_000, start + 120 * SECOND).unwrap();
        assert!(budget.prompt(1, start + 400 * SECOND).is_err());
        budget.prompt(1, start + 661 * SECOND).unwrap();
    }

    #[test]
    fn a_changed_limit_does_not_refill_it() {
        let start = Instant::now();
        let mut old = Budget::new(Some(10), None, start);
        (0..10).for_each(|_| old.request(start).unwrap());
        let mut new = Budget::new(Some(100), None, start).after(&old);
        assert!(new.request(start).is_err());
    }

    proptest! {
        #[test]
        fn never_more_than_the_limits_of_the_minutes_that_passed(limit in 1u64..100, gaps in prop::collection::vec(0u64..5_000, 1..200)) {
            let start = Instant::now();
            let (mut budget, mut at, mut let_in) = (Budget::new(Some(limit), None, start), start, 0u64);
            for gap in gaps {
                at += Duration::from_millis(gap);
                match budget.request(at) {
                    Ok(()) => let_in += 1,
                    Err(over) => {
                        let mut then = budget;
                        prop_assert!(then.request(at + over.after + Duration::from_millis(1)).is_ok());
                    }
                }
            }
            let most = limit as f64 * (1.0 + (at - start).as_secs_f64() / 60.0);
            prop_assert!(let_in as f64 <= most + 1e-6, "{let_in} of {most}");
        }
    }
}
