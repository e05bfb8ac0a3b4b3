//! Wishes of callers who show no operator's token: so few of them go into the cluster's history that they can't wash
//! everything else out of it. The log has them all; the history a few each ten minutes, then how many there were.

use std::time::{Duration, Instant};

/// So many are told …
const TOLD: u32 = 20;
/// … in so long.
const WINDOW: Duration = Duration::from_secs(600);

/// What this process has refused lately.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// Since when, and how many were told in it.
    window: Option<(Instant, u32)>,
    untold: u64,
}

impl Refusals {
    /// One more. `None`: it is only counted; else it is to be told, with how many were only counted before it.
    pub(super) fn one(&mut self, now: Instant) -> Option<u64> {
        match &mut self.window {
            Some((since, told)) if now.saturating_duration_since(*since) < WINDOW => {
                if *told >= TOLD {
                    self.untold += 1;
                    return None;
                }
                *told += 1;
            }
            window => *window = Some((now, 1)),
        }
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_a_few_times_and_then_as_a_number() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let told: Vec<_> = (0..10_000).filter_map(|at| refusals.one(start + Duration::from_millis(at))).collect();
        assert_eq!(told, vec![0; TOLD as usize]);
        assert_eq!(refusals.one(start + WINDOW), Some(10_000 - u64::from(TOLD)), "a new window tells what was not");
        assert_eq!(refusals.one(start + WINDOW), Some(0));
    }
}
