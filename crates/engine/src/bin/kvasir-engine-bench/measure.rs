//! From instants to figures.

use std::{fs, time::Duration};

use serde::Serialize;

/// What a share of the figures does not exceed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Percentiles {
    /// Of durations, in milliseconds; all zero if there are none.
    pub fn of_ms(durations: &[Duration]) -> Self {
        let mut sorted: Vec<f64> = durations.iter().map(|duration| duration.as_secs_f64() * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |share: f64| (sorted.len() as f64 * share).ceil().max(1.0) as usize - 1;
        let at = |share| sorted.get(rank(share)).copied().unwrap_or_default();
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

/// The middle one; of an even number the lower of two.
pub fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations.get((durations.len().max(1) - 1) / 2).copied().unwrap_or_default()
}

/// Forgets the peak so far, where the system allows that: what one scenario took is not another's.
pub fn forget_peak_rss() {
    let _ = fs::write("/proc/self/clear_refs", "5"); // proc(5): 5 resets VmHWM to the present size
}

/// Most memory this process has had since its start or the last [`forget_peak_rss`], mapped weights included; 0 where the
/// system does not say.
pub fn peak_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(0, |kib: u64| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_figures_that_occurred() {
        let all: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(Percentiles::of_ms(&all), Percentiles { p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 });
        assert_eq!(Percentiles::of_ms(&all[..1]), Percentiles { p50: 100.0, p90: 100.0, p99: 100.0, max: 100.0 });
        assert_eq!(Percentiles::of_ms(&[]), Percentiles::default());
        assert_eq!(median(all), Duration::from_millis(50));
    }

    #[test]
    fn peak_memory_is_that_of_what_was_touched_since_it_was_forgotten() {
        let before = peak_rss_bytes();
        let touched = std::hint::black_box(vec![1u8; 64 << 20]);
        let peak = peak_rss_bytes();
        assert!(peak >= before + (32 << 20), "{before} {}", touched.len());
        drop(touched);
        forget_peak_rss();
        assert!(peak_rss_bytes() + (32 << 20) <= peak, "{peak}");
    }
}
