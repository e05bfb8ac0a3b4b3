//! One deadline per request, carried through every hop.
//!
//! Inside a process it is an instant; on the wire it is the milliseconds that remain (clocks of different machines
//! differ, durations do not). Each hop therefore loses at most the network's delay.

use std::time::{Duration, Instant};

/// The moment after which nobody waits for the result any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline `timeout` from now.
    pub fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout)
    }

    /// The deadline `remaining_ms` milliseconds from now, at most `limit` away: the wire's form, bounded by us.
    pub fn from_wire(remaining_ms: u64, limit: Duration) -> Self {
        Self::after(Duration::from_millis(remaining_ms).min(limit))
    }

    /// What remains, in the wire's form; zero once it has passed.
    pub fn to_wire(self) -> u64 {
        self.remaining().as_millis().try_into().unwrap_or(u64::MAX)
    }

    /// What remains; zero once it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// The instant itself, for timers.
    pub fn instant(self) -> Instant {
        self.0
    }

    /// The earlier of the two.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self(self.0.min(other.0))
    }
}
