//! The breaker: a node that did not answer is left alone for a while, then tried by one request at a time.
//!
//! ```text
//!            failed                    the wait is over: one caller passes, the wait starts anew
//!   closed ────────▶ open (waiting) ◀────────────────────┐
//!      ▲                  │ └────────────────────────────┘
//!      └──────────────────┘ answered
//! ```

use std::time::{Duration, Instant};

/// What is known about one node's health.
#[derive(Debug)]
pub(crate) struct Breaker {
    wait: Duration,
    open_until: Option<Instant>,
}

impl Breaker {
    pub(crate) fn new(wait: Duration) -> Self {
        Self { wait, open_until: None }
    }

    /// Whether the node may be asked now. The caller who is let through while it is open is its trial, and says how it went.
    pub(crate) fn passes(&mut self, now: Instant) -> bool {
        match self.open_until {
            None => true,
            Some(until) if now < until => false,
            Some(_) => {
                self.open_until = Some(now + self.wait);
                true
            }
        }
    }

    /// The node answered.
    pub(crate) fn answered(&mut self) {
        self.open_until = None;
    }

    /// The node did not answer.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.open_until = Some(now + self.wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(1);

    #[test]
    fn a_failed_node_is_tried_by_one_caller_for_each_wait() {
        let (mut breaker, start) = (Breaker::new(WAIT), Instant::now());
        assert!(breaker.passes(start) && breaker.passes(start));
        breaker.failed(start);
        assert!(!breaker.passes(start + WAIT / 2));
        assert!(breaker.passes(start + WAIT));
        assert!(!breaker.passes(start + WAIT), "the trial is under way");
        assert!(breaker.passes(start + WAIT * 2), "a trial that was given up does not keep others out for ever");
    }

    #[test]
    fn an_answer_opens_the_way_for_all() {
        let (mut breaker, start) = (Breaker::new(WAIT), Instant::now());
        breaker.failed(start);
        assert!(breaker.passes(start + WAIT));
        breaker.answered();
        assert!(breaker.passes(start + WAIT) && breaker.passes(start + WAIT));
    }
}
