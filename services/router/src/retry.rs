//! How many second tries the router allows itself.
//!
//! A worker that dies takes many answers with it at once, and all of them should go on elsewhere. A cluster that fails as a
//! whole must not get every request several times over. So tries beyond the first are paid from a purse: every request
//! puts in a fraction of a try, time puts in a few a second, and what it holds is bounded.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How requests are tried again and answers moved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryConfig {
    /// Other workers asked to begin an answer after the first did not, for one request. Default 2.
    pub begin: u32,
    /// Times that an answer under way may go on elsewhere after its worker failed; then the client gets the error. 0 for
    /// never. Default 4.
    pub moves: u32,
    /// How long an answer waits for a worker that can go on with it, in milliseconds. Default 30000.
    pub move_wait_ms: u64,
    /// Second tries that every request pays for, all requests together. Default 0.2.
    pub per_request: f64,
    /// Second tries in a second, whatever the load. Default 10.
    pub per_second: f64,
    /// Most second tries at once: as many answers as a worker may take with it. Default 1024.
    pub burst: u32,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { begin: 2, moves: 4, move_wait_ms: 30_000, per_request: 0.2, per_second: 10.0, burst: 1024 }
    }
}

impl RetryConfig {
    pub(crate) fn move_wait(&self) -> Duration {
        Duration::from_millis(self.move_wait_ms)
    }
}

/// What may still be tried.
#[derive(Debug)]
pub(crate) struct Purse {
    per_request: f64,
    per_second: f64,
    burst: f64,
    tries: f64,
    filled: Instant,
}

impl Purse {
    /// A full one.
    pub(crate) fn new(config: &RetryConfig, now: Instant) -> Self {
        let RetryConfig { per_request, per_second, burst, .. } = *config;
        let burst = f64::from(burst);
        Self { per_request, per_second, burst, tries: burst, filled: now }
    }

    /// Fills otherwise from now on; what it holds stays, as far as it fits.
    pub(crate) fn set(&mut self, config: &RetryConfig) {
        let RetryConfig { per_request, per_second, burst, .. } = *config;
        (self.per_request, self.per_second, self.burst) = (per_request, per_second, f64::from(burst));
        self.tries = self.tries.min(self.burst);
    }

    /// A request pays its part.
    pub(crate) fn request(&mut self) {
        self.tries = (self.tries + self.per_request).min(self.burst);
    }

    /// Takes out a try, if there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        self.tries = (self.tries + passed * self.per_second).min(self.burst);
        if self.tries < 1.0 {
            return false;
        }
        self.tries -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_multiplies_requests_by_little() {
        let start = Instant::now();
        let config = RetryConfig { per_request: 0.2, per_second: 10.0, burst: 50, ..RetryConfig::default() };
        let mut purse = Purse::new(&config, start);
        // 1,000 requests a second, all of which fail and want to be tried three times.
        let tried = (0..10_000u64).map(|request| {
            purse.request();
            let now = start + Duration::from_millis(request);
            (0..3).filter(|_| purse.take(now)).count()
        });
        let tried: usize = tried.sum();
        // The burst, a fifth of the requests, and ten a second.
        assert!((2_140..=2_150).contains(&tried), "{tried}");
    }

    #[test]
    fn another_purse_takes_over_what_the_first_one_held() {
        let now = Instant::now();
        let config = |burst| RetryConfig { per_request: 0.0, per_second: 0.0, burst, ..RetryConfig::default() };
        let mut purse = Purse::new(&config(10), now);
        assert!(purse.take(now));
        purse.set(&config(3));
        assert_eq!((0..20).filter(|_| purse.take(now)).count(), 3);
        purse.set(&RetryConfig { per_request: 1.0, ..config(9) });
        purse.request();
        assert!(purse.take(now) && !purse.take(now));
    }

    #[test]
    fn a_quiet_router_may_move_all_answers_of_a_worker_at_once() {
        let now = Instant::now();
        let mut purse = Purse::new(&RetryConfig::default(), now);
        assert_eq!((0..2_000).filter(|_| purse.take(now)).count(), 1024);
        assert!(!purse.take(now));
        assert!(purse.take(now + Duration::from_millis(150)));
    }
}
