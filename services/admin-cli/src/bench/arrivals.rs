//! When requests are due. Pure: the same seed gives the same times.

use std::time::Duration;

/// SplitMix64 (Steele, Lea, Flood 2014): enough for loads, and the same everywhere.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// At least `low`, at most `high`.
    pub(super) fn between(&mut self, low: u32, high: u32) -> u32 {
        let width = u64::from(high.saturating_sub(low)) + 1;
        low + (self.next() % width) as u32
    }

    /// Above 0, at most 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// How the requests of an open loop are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Spread {
    /// As independent users would send them
    Poisson,
    /// At equal distances
    Constant,
}

/// Due times of an open loop, without end.
#[derive(Clone, Debug)]
pub(super) struct Arrivals {
    spread: Spread,
    rate: f64,
    random: Random,
    /// Seconds from the start.
    next: f64,
}

impl Arrivals {
    /// So many a second.
    pub(super) fn new(spread: Spread, rate: f64, seed: u64) -> Self {
        Self { spread, rate, random: Random::new(seed ^ 0xa441_7a15), next: 0.0 }
    }

    /// When the next one is due, from the start.
    pub(super) fn next(&mut self) -> Duration {
        let due = self.next;
        let gap = match self.spread {
            Spread::Constant => 1.0,
            Spread::Poisson => -self.random.unit().ln(),
        };
        self.next += gap / self.rate;
        Duration::try_from_secs_f64(due).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(spread: Spread, rate: f64, count: usize) -> Vec<f64> {
        let mut arrivals = Arrivals::new(spread, rate, 7);
        let times: Vec<f64> = (0..=count).map(|_| arrivals.next().as_secs_f64()).collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    #[test]
    fn both_spreads_have_the_rate_and_poissons_gaps_vary_as_they_must() {
        let constant = gaps(Spread::Constant, 50.0, 1000);
        assert!(constant.iter().all(|gap| (gap - 0.02).abs() < 1e-6));
        let poisson = gaps(Spread::Poisson, 50.0, 20_000);
        let mean = poisson.iter().sum::<f64>() / poisson.len() as f64;
        let variance = poisson.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / poisson.len() as f64;
        assert!((mean - 0.02).abs() < 0.001, "{mean}");
        // Of an exponential distribution the standard deviation is the mean.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "{}", variance.sqrt() / mean);
    }

    #[test]
    fn the_same_seed_gives_the_same_times_and_numbers_stay_in_their_bounds() {
        assert_eq!(gaps(Spread::Poisson, 3.0, 10), gaps(Spread::Poisson, 3.0, 10));
        let mut random = Random::new(1);
        let all: Vec<u32> = (0..1000).map(|_| random.between(3, 5)).collect();
        assert_eq!((all.iter().min(), all.iter().max()), (Some(&3), Some(&5)));
        assert_eq!(random.between(9, 9), 9);
    }
}
