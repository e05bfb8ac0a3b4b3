//! Latencies in buckets that double: 1 µs, 2 µs, 4 µs … about 33 s, and what took longer.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// How many buckets there are, the one without an upper bound included.
pub const BUCKETS: usize = 27;

/// How long transfers took, from submit to the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// How many took at most 2^i microseconds, and more than the bucket before; the last one counts all longer ones.
    pub buckets: [u64; BUCKETS],
    /// All of them together, in microseconds.
    pub sum_us: u64,
}

impl Histogram {
    /// The upper bound of a bucket in seconds; `None` for the last one.
    pub fn bound(bucket: usize) -> Option<f64> {
        (bucket + 1 < BUCKETS).then(|| (1u64 << bucket) as f64 / 1e6)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// A bound below which at least the given share (0 to 1) of them lies, in microseconds; `None` if there are none, or it
    /// lies beyond the last bound.
    pub fn quantile_us(&self, share: f64) -> Option<u64> {
        let rank = (self.count() as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|&count| {
            seen += count;
            seen >= rank
        })?;
        (bucket + 1 < BUCKETS).then(|| 1 << bucket)
    }
}

/// A [`Histogram`] that every thread adds to.
#[derive(Debug, Default)]
pub(crate) struct LiveHistogram {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

impl LiveHistogram {
    pub(crate) fn add(&self, elapsed: Duration) {
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let micros = nanos.div_ceil(1000);
        let bucket = (u64::BITS - micros.saturating_sub(1).leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(micros, Relaxed);
    }

    pub(crate) fn get(&self) -> Histogram {
        let mut copy = Histogram { sum_us: self.sum_us.load(Relaxed), ..Histogram::default() };
        for (to, from) in copy.buckets.iter_mut().zip(&self.buckets) {
            *to = from.load(Relaxed);
        }
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_latency_falls_into_the_bucket_with_the_least_bound_above_it() {
        let live = LiveHistogram::default();
        for (nanos, bucket) in [(0, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (1 << 40, 26)] {
            let before = live.get();
            live.add(Duration::from_nanos(nanos));
            let after = live.get();
            let grown = (0..BUCKETS).find(|&i| after.buckets[i] > before.buckets[i]);
            assert_eq!(grown, Some(bucket), "{nanos} ns");
        }
        assert_eq!(live.get().count(), 6);
        assert_eq!(live.get().quantile_us(0.5), Some(2));
        assert_eq!(live.get().quantile_us(1.0), None, "beyond the last bound");
        assert_eq!(Histogram::default().quantile_us(0.5), None);
        assert_eq!((Histogram::bound(0), Histogram::bound(20)), (Some(1e-6), Some(1.048576)));
        assert_eq!(Histogram::bound(26), None);
    }
}
