//! Whether a worker may be chosen: what its failures say, and how it is let in again.
//!
//! ```text
//!        failed (3 × where it answered)      its rest is over, somebody asks it
//! well ─────────────────────────────▶ rests ───────────────────────────────▶ on trial ─┐
//!   ▲                                   ▲   twice as long, up to 30 s                   │
//!   │                                   └────────────────────────── failed ─────────────┤
//!   └────────────────────────────────────────────────────────────── answered ───────────┘
//! ```
//!
//! Busy is not dead, and a request that it refuses is the client's mistake: neither counts. One on trial is asked by one
//! request at a time. Pure: the caller says what time it is.

use std::time::{Duration, Instant};

use crate::upstream::Error;

/// A worker that fails on and on is asked this often all the same.
const LONGEST_REST: Duration = Duration::from_secs(30);
/// Failures in a row of a worker that answers: a request that it can't stand may come twice.
const ANSWERED_FAILURES: u32 = 3;
/// How long one on trial is left to the request that tries it.
const TRIAL: Duration = Duration::from_secs(5);

/// What is known of a worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Health {
    state: State,
    /// Failures in a row.
    failures: u32,
    /// Rests in a row: how long the next one is.
    rests: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Well,
    Rests {
        until: Instant,
    },
    /// Left to the request that tries it until then.
    OnTrial {
        until: Instant,
    },
}

/// What a failure says of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing.
    None,
    /// It could not do this, and said so.
    Answered,
    /// It is not there, or not in its right mind.
    Gone,
}

fn fault(error: &Error) -> Fault {
    match error {
        Error::Busy { .. } | Error::Refused { .. } | Error::Deadline { .. } => Fault::None,
        Error::Failed { .. } => Fault::Answered,
        Error::Leaving { .. }
        | Error::Unavailable { .. }
        | Error::Broken { .. }
        | Error::Protocol { .. }
        | Error::Stalled { .. } => Fault::Gone,
    }
}

impl Health {
    /// Whether others are preferred to it.
    pub(crate) fn rests(&self, now: Instant) -> bool {
        self.rests_until().is_some_and(|until| now < until)
    }

    /// Until when others are preferred to it, if they are.
    pub(crate) fn rests_until(&self) -> Option<Instant> {
        match self.state {
            State::Well => None,
            State::Rests { until } | State::OnTrial { until } => Some(until),
        }
    }

    /// A request is sent to it.
    pub(crate) fn asked(&mut self, now: Instant) {
        if self.state != State::Well && !self.rests(now) {
            self.state = State::OnTrial { until: now + TRIAL };
        }
    }

    /// It answered.
    pub(crate) fn answered(&mut self) {
        *self = Self::default();
    }

    /// It failed; `rest`: how long the first rest is, zero for none.
    pub(crate) fn failed(&mut self, error: &Error, rest: Duration, now: Instant) {
        let fault = fault(error);
        if fault == Fault::None {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let enough = fault == Fault::Gone || self.failures >= ANSWERED_FAILURES;
        // Answers that break off together are one failure of the worker.
        let rests_already = matches!(self.state, State::Rests { until } if now < until);
        if rest.is_zero() || !enough || rests_already {
            return;
        }
        let rest = rest.saturating_mul(1 << self.rests.min(16)).min(LONGEST_REST.max(rest));
        self.rests = self.rests.saturating_add(1);
        self.state = State::Rests { until: now + rest };
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const REST: Duration = Duration::from_secs(1);

    fn unavailable() -> Error {
        Error::Unavailable { worker: "decode-0".parse().unwrap(), message: String::new() }
    }

    fn failed() -> Error {
        Error::Failed { worker: "decode-0".parse().unwrap(), code: Code::Internal, message: String::new() }
    }

    fn busy() -> Error {
        Error::Busy { worker: "decode-0".parse().unwrap(), message: String::new() }
    }

    #[test]
    fn one_that_fails_on_and_on_is_asked_ever_more_rarely_and_by_one_request_at_a_time() {
        let (mut health, mut now) = (Health::default(), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            // Two answers break off together.
            health.failed(&unavailable(), REST, now);
            health.failed(&unavailable(), REST, now);
            assert!(health.rests(now + Duration::from_millis(seconds * 1000 - 1)), "{seconds}");
            now += Duration::from_secs(seconds);
            assert!(!health.rests(now), "{seconds}");
            health.asked(now);
            assert!(health.rests(now), "others wait for what the trial says");
        }
        assert!(!health.rests(now + TRIAL), "a trial that nobody ended does not keep it out for ever");
        health.answered();
        assert!(!health.rests(now));
        health.failed(&unavailable(), REST, now);
        assert!(!health.rests(now + REST), "it begins anew");
    }

    #[test]
    fn busy_is_not_dead_and_what_it_says_counts_from_the_third_time_in_a_row() {
        let (mut health, now) = (Health::default(), Instant::now());
        (0..100).for_each(|_| health.failed(&busy(), REST, now));
        assert!(!health.rests(now));
        for _ in 0..2 {
            health.failed(&failed(), REST, now);
            health.failed(&failed(), REST, now);
            assert!(!health.rests(now));
            health.answered();
        }
        (0..3).for_each(|_| health.failed(&failed(), REST, now));
        assert!(health.rests(now));
        assert!(!{
            let mut never = Health::default();
            never.failed(&unavailable(), Duration::ZERO, now);
            never.rests(now)
        });
    }
}
