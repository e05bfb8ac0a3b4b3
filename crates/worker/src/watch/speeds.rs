//! How fast this worker has been lately. Pure: totals and durations come in.

use std::time::Duration;

use kvasir_engine::Stats;

/// Busy seconds after which what was measured before counts half.
const HALF_LIFE_SECONDS: f64 = 2.0;
/// A share of the measured time below this tells nothing.
const LEAST_SECONDS: f64 = 1e-4;

/// So much in so much time, where what was measured lately counts more.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Rate {
    amount: f64,
    seconds: f64,
}

impl Rate {
    /// So much more was done, in so much time.
    pub(crate) fn add(&mut self, amount: f64, took: Duration) {
        let seconds = took.as_secs_f64();
        let fade = (-seconds / HALF_LIFE_SECONDS).exp2();
        self.amount = self.amount * fade + amount;
        self.seconds = self.seconds * fade + seconds;
    }

    /// Per second; 0: not known.
    pub(crate) fn per_second(&self) -> f64 {
        if self.seconds < LEAST_SECONDS { 0.0 } else { self.amount / self.seconds }
    }

    /// Seconds for one; 0: not known.
    pub(crate) fn seconds_each(&self) -> f64 {
        if self.seconds < LEAST_SECONDS || self.amount <= 0.0 { 0.0 } else { self.seconds / self.amount }
    }
}

/// What the engine's totals tell about its speed.
#[derive(Debug, Default)]
pub(crate) struct Speeds {
    seen: Stats,
    /// Prompt tokens.
    pub(crate) prefill: Rate,
    /// Steps of answers.
    pub(crate) steps: Rate,
}

impl Speeds {
    /// The engine's totals as they are now.
    pub(crate) fn observe(&mut self, now: Stats) {
        let tokens = now.prefill.tokens.saturating_sub(self.seen.prefill.tokens);
        if tokens > 0 {
            self.prefill.add(tokens as f64, now.prefill.time.saturating_sub(self.seen.prefill.time));
        }
        let steps = now.decode.steps.saturating_sub(self.seen.decode.steps);
        if steps > 0 {
            self.steps.add(steps as f64, now.decode.time.saturating_sub(self.seen.decode.time));
        }
        self.seen = now;
    }
}

#[cfg(test)]
mod tests {
    use kvasir_engine::{DecodeTimes, PrefillTimes};

    use super::*;

    #[test]
    fn what_was_lately_counts_more() {
        let mut rate = Rate::default();
        assert_eq!((rate.per_second(), rate.seconds_each()), (0.0, 0.0), "nothing is known");
        (0..20).for_each(|_| rate.add(1000.0, Duration::from_secs(1)));
        assert!((rate.per_second() - 1000.0).abs() < 1.0);
        (0..20).for_each(|_| rate.add(3000.0, Duration::from_secs(1)));
        assert!((rate.per_second() - 3000.0).abs() < 10.0, "{}", rate.per_second());
        assert!((rate.seconds_each() - 1.0 / 3000.0).abs() < 1e-5);
    }

    #[test]
    fn speeds_come_from_the_differences_of_totals() {
        let mut speeds = Speeds::default();
        let mut total = Stats::default();
        for _ in 0..10 {
            total.prefill.tokens += 512;
            total.prefill.time += Duration::from_millis(100);
            total.decode.steps += 10;
            total.decode.time += Duration::from_millis(50);
            speeds.observe(total);
            speeds.observe(total); // nothing happened
        }
        assert!((speeds.prefill.per_second() - 5120.0).abs() < 1.0);
        assert!((speeds.steps.seconds_each() - 0.005).abs() < 1e-6);
        // Another life of the engine would begin at nothing: never negative.
        speeds.observe(Stats { prefill: PrefillTimes::default(), decode: DecodeTimes::default(), ..total });
        assert!(speeds.prefill.per_second() > 0.0);
    }
}
