//! What a run took: latencies, bytes, processor time.

use std::{mem::MaybeUninit, time::Duration};

use serde::Serialize;

/// Steps into which each power of two is divided: a percentile is at most this much (0.8 %) off.
const STEPS: u64 = 128;
/// Powers of two above the first [`STEPS`] values.
const POWERS: u64 = 57;

/// Latencies in nanoseconds, in fixed memory however many there are.
pub struct Histogram {
    counts: Vec<u64>,
    taken: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; (STEPS * (POWERS + 1)) as usize], taken: 0, max: 0 }
    }
}

impl Histogram {
    /// Takes one in.
    pub fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[slot(nanos)] += 1;
        self.taken += 1;
        self.max = self.max.max(nanos);
    }

    /// Takes all of another in.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(ours, theirs)| *ours += theirs);
        self.taken += other.taken;
        self.max = self.max.max(other.max);
    }

    /// How many were taken in.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// What a share of all (0 to 1) does not exceed, in microseconds; 0 if nothing was taken in.
    fn percentile(&self, share: f64) -> f64 {
        let rank = (self.taken as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        let slot = self.counts.iter().position(|&count| {
            seen += count;
            seen >= rank
        });
        slot.map_or(0.0, |slot| highest(slot).min(self.max) as f64 / 1e3)
    }

    /// The figures that one reads.
    pub fn latency(&self) -> Latency {
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|share| self.percentile(share));
        Latency { p50, p90, p99, max: self.max as f64 / 1e3 }
    }
}

fn slot(nanos: u64) -> usize {
    if nanos < STEPS {
        return nanos as usize;
    }
    let power = u64::from(nanos.ilog2() - STEPS.ilog2());
    ((power + 1) * STEPS + (nanos >> power) - STEPS) as usize
}

/// The highest value that falls into a slot.
fn highest(slot: usize) -> u64 {
    let (power, step) = (slot as u64 / STEPS, slot as u64 % STEPS);
    if power == 0 { step } else { (((STEPS + step + 1) as u128) << (power - 1)).saturating_sub(1) as u64 }
}

/// Percentiles, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Processor time of this process so far, all threads, user and kernel, in seconds.
pub fn cpu_seconds() -> f64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage writes one rusage to the address given, which is that of one.
    let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    assert_eq!(status, 0, "getrusage of oneself does not fail");
    // SAFETY: zeroed before, which is a valid rusage, and filled in just now.
    let usage = unsafe { usage.assume_init() };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_falls_into_the_slot_that_says_so() {
        let mut before = None;
        for nanos in (0..100_000).chain((17..64).flat_map(|power| [(1 << power) - 1, 1 << power, (1 << power) + 1])) {
            let slot = slot(nanos);
            assert!(nanos <= highest(slot), "{nanos} above its slot");
            assert!(slot == 0 || nanos > highest(slot - 1), "{nanos} below its slot");
            assert!(highest(slot) - nanos <= nanos / STEPS, "{nanos} is called {}", highest(slot));
            assert!(before.is_none_or(|before| slot >= before));
            before = Some(slot);
        }
        assert!(slot(u64::MAX) < Histogram::default().counts.len());
    }

    #[test]
    fn percentiles_of_the_first_hundred_microseconds_are_themselves() {
        let mut low = Histogram::default();
        let mut high = Histogram::default();
        (1..=50).for_each(|us| low.record(Duration::from_micros(us)));
        (51..=100).for_each(|us| high.record(Duration::from_micros(us)));
        low.merge(&high);
        let latency = low.latency();
        for (found, right) in [(latency.p50, 50.0), (latency.p90, 90.0), (latency.p99, 99.0), (latency.max, 100.0)] {
            assert!((found / right - 1.0).abs() < 0.01, "{found} for {right}");
        }
        assert_eq!(low.taken(), 100);
    }

    #[test]
    fn processor_time_is_what_was_computed() {
        let before = cpu_seconds();
        let mut x = 0u64;
        while cpu_seconds() - before < 0.01 {
            x = std::hint::black_box(x.wrapping_add(1));
        }
        assert!(x > 0);
    }
}
