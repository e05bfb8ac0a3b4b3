//! What is measured, in which order, and what the numbers say: plain arithmetic.

use std::time::Duration;

use kvasir_proto::v1;
use kvasir_transfer::Op;

/// Largest transfer.
pub(crate) const MAX_SIZE: u64 = 16 << 20;
/// Longest measurement.
pub(crate) const MAX_TIME: Duration = Duration::from_secs(60);
/// Most sizes.
const MAX_SIZES: usize = 8;
/// Unless others are asked for: layers of blocks, blocks, several of them.
const SIZES: [u64; 3] = [64 << 10, 1 << 20, 4 << 20];
const TIME: Duration = Duration::from_secs(5);
const MAX_BYTES: u64 = 16 << 30;
/// Times of transfers that are kept of a step: a percentile of more says no more.
const MOST_TIMES: usize = 1 << 16;

/// One size, one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) op: Op,
    pub(crate) size: u64,
}

/// What is asked for, found in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// For each step: half of it one transfer at a time, half of it several.
    pub(crate) step_time: Duration,
    pub(crate) time: Duration,
    /// For each step: an equal share, so that fast ways are measured with all sizes, too.
    pub(crate) step_bytes: u64,
}

impl Plan {
    /// What of it can't be done, in words.
    pub(crate) fn new(asked: &v1::MeasureRequest) -> Result<Self, String> {
        if asked.sizes.len() > MAX_SIZES {
            return Err(format!("{} sizes: expected up to {MAX_SIZES}", asked.sizes.len()));
        }
        if let Some(size) = asked.sizes.iter().find(|size| !(1..=MAX_SIZE).contains(*size)) {
            return Err(format!("a size of {size} bytes: expected 1 to {MAX_SIZE}"));
        }
        let sizes = if asked.sizes.is_empty() { &SIZES[..] } else { &asked.sizes[..] };
        let both = !asked.read && !asked.write;
        let ways = [(Op::Read, asked.read || both), (Op::Write, asked.write || both)];
        let ways = ways.into_iter().filter(|(_, wanted)| *wanted);
        let steps: Vec<Step> = ways.flat_map(|(op, _)| sizes.iter().map(move |&size| Step { op, size })).collect();
        let time = if asked.time_ms == 0 { TIME } else { Duration::from_millis(asked.time_ms) };
        if !(Duration::from_millis(100)..=MAX_TIME).contains(&time) {
            return Err(format!("{} ms: expected 100 to {}", time.as_millis(), MAX_TIME.as_millis()));
        }
        let max_bytes = if asked.max_bytes == 0 { MAX_BYTES } else { asked.max_bytes.min(MAX_BYTES) };
        let step_bytes = max_bytes / steps.len() as u64;
        Ok(Self { step_time: time / steps.len() as u32, steps, time, step_bytes })
    }

    /// Scratch memory that it needs, for so many transfers at a time.
    pub(crate) fn scratch(&self, at_a_time: usize) -> u64 {
        self.steps.iter().map(|step| step.size).max().unwrap_or(1) * at_a_time as u64
    }
}

/// How long transfers took.
#[derive(Default)]
pub(crate) struct Times(Vec<Duration>);

impl Times {
    pub(crate) fn add(&mut self, time: Duration) {
        if self.0.len() < MOST_TIMES {
            self.0.push(time);
        }
    }

    /// So many of a thousand took no longer, in microseconds; 0 of none.
    pub(crate) fn quantile_us(&mut self, of_1000: usize) -> f64 {
        self.0.sort_unstable();
        let at = (self.0.len() * of_1000).div_ceil(1000).saturating_sub(1);
        self.0.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_has_each_size_each_way_within_its_bounds() {
        let asked = v1::MeasureRequest::default();
        let plan = Plan::new(&asked).unwrap();
        assert_eq!(plan.steps.len(), 2 * SIZES.len());
        assert_eq!((plan.time, plan.step_bytes, plan.scratch(4)), (TIME, MAX_BYTES / 6, 16 << 20));
        let one = v1::MeasureRequest { write: true, sizes: vec![7], time_ms: 100, max_bytes: 9, ..asked.clone() };
        let plan = Plan::new(&one).unwrap();
        assert_eq!(plan.steps, [Step { op: Op::Write, size: 7 }]);
        assert_eq!((plan.step_time, plan.step_bytes), (Duration::from_millis(100), 9));
        for (wrong, told) in [
            (v1::MeasureRequest { sizes: vec![0], ..asked.clone() }, "a size of 0 bytes"),
            (v1::MeasureRequest { sizes: vec![MAX_SIZE + 1], ..asked.clone() }, "expected 1 to 16777216"),
            (v1::MeasureRequest { sizes: vec![1; 9], ..asked.clone() }, "9 sizes"),
            (v1::MeasureRequest { time_ms: 60_001, ..asked.clone() }, "expected 100 to 60000"),
            (v1::MeasureRequest { time_ms: 99, ..asked.clone() }, "99 ms"),
        ] {
            let error = Plan::new(&wrong).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
        let most = v1::MeasureRequest { max_bytes: u64::MAX, sizes: vec![MAX_SIZE], ..asked };
        let plan = Plan::new(&most).unwrap();
        assert_eq!((plan.step_bytes, plan.scratch(4)), (MAX_BYTES / 2, crate::SCRATCH));
    }

    #[test]
    fn quantiles_are_times_that_occurred() {
        let mut times = Times::default();
        assert_eq!(times.quantile_us(500), 0.0);
        (1..=200).rev().for_each(|ms| times.add(Duration::from_millis(ms)));
        assert_eq!((times.quantile_us(500), times.quantile_us(990), times.quantile_us(1000)), (1e5, 1.98e5, 2e5));
    }
}
