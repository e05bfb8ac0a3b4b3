//! Sums of what requests became, in the same memory however many there are.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

/// Most kinds of errors that are told apart.
const MAX_KINDS: usize = 32;
/// Buckets for each doubling: a figure is right to a 128th.
const STEPS: u32 = 64;
/// Doublings from a microsecond up to 19 hours.
const DOUBLINGS: u32 = 36;

/// Durations, in buckets that are finer where they are shorter.
#[derive(Clone)]
pub(super) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum_us: f64,
    max_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; (STEPS * (DOUBLINGS + 1)) as usize], count: 0, sum_us: 0.0, max_us: 0 }
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.times())
    }
}

/// What is told of durations, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Times {
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Histogram {
    /// Counts one.
    pub(super) fn add(&mut self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = bucket(us).min(self.buckets.len() - 1);
        self.buckets[bucket] += 1;
        self.count += 1;
        self.sum_us += us as f64;
        self.max_us = self.max_us.max(us);
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The time that so many of a thousand do not exceed, in milliseconds.
    pub(super) fn permille(&self, permille: u64) -> f64 {
        let rank = (self.count * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (at, &count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle_us(at).min(self.max_us as f64) / 1e3;
            }
        }
        0.0
    }

    /// What is told of it; nothing of nothing.
    pub(super) fn times(&self) -> Option<Times> {
        (self.count > 0).then(|| Times {
            mean: self.sum_us / self.count as f64 / 1e3,
            p50: self.permille(500),
            p90: self.permille(900),
            p95: self.permille(950),
            p99: self.permille(990),
            max: self.max_us as f64 / 1e3,
        })
    }
}

/// Below `STEPS` µs a bucket for each; above, `STEPS` for each doubling.
fn bucket(us: u64) -> usize {
    let steps = u64::from(STEPS);
    if us < steps {
        return us as usize;
    }
    let doublings = us.ilog2() - steps.ilog2();
    let within = (us >> doublings) - steps;
    (steps * (u64::from(doublings) + 1) + within) as usize
}

/// The middle of a bucket.
fn middle_us(bucket: usize) -> f64 {
    let (bucket, steps) = (bucket as u64, u64::from(STEPS));
    if bucket < steps {
        return bucket as f64;
    }
    let (doublings, within) = (bucket / steps - 1, bucket % steps);
    let width = 2f64.powi(i32::try_from(doublings).unwrap_or(i32::MAX));
    (steps + within) as f64 * width + (width - 1.0) / 2.0
}

/// What became of a request.
#[derive(Debug)]
pub(super) enum Fate {
    /// An answer, to its end.
    Answered(Answered),
    /// None, and why.
    Failed(String),
    /// Nobody waited for its end.
    CutOff,
}

/// Times of an answer, from when it was due.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answered {
    /// How much later than due it was sent.
    pub(super) late: Duration,
    /// The first token; none where nothing was streamed.
    pub(super) ttft: Option<Duration>,
    /// The last token.
    pub(super) last: Duration,
    pub(super) whole: Duration,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
}

impl Answered {
    /// Mean time between two tokens.
    fn tpot(&self) -> Option<Duration> {
        let gaps = u32::try_from(self.output_tokens.checked_sub(1)?).ok()?;
        Some(self.last.checked_sub(self.ttft?)? / std::num::NonZero::new(gaps)?.get())
    }
}

/// What is promised to clients.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slo {
    pub(super) ttft: Option<Duration>,
    pub(super) tpot: Option<Duration>,
}

/// All that is counted.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) slo: Slo,
    pub(super) answered: u64,
    pub(super) good: u64,
    pub(super) failed: u64,
    pub(super) cut_off: u64,
    pub(super) errors: BTreeMap<String, u64>,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) late: Histogram,
    pub(super) ttft: Histogram,
    pub(super) tpot: Histogram,
    /// Between two events of an answer.
    pub(super) itl: Histogram,
    pub(super) whole: Histogram,
}

impl Tally {
    /// Counts what became of one, and the times between its pieces.
    pub(super) fn add(&mut self, fate: Fate) {
        match fate {
            Fate::Failed(why) => {
                self.failed += 1;
                let room = self.errors.len() < MAX_KINDS || self.errors.contains_key(&why);
                *self.errors.entry(if room { why } else { "others".to_owned() }).or_default() += 1;
            }
            Fate::CutOff => self.cut_off += 1,
            Fate::Answered(answered) => {
                self.answered += 1;
                self.prompt_tokens += answered.prompt_tokens;
                self.cached_tokens += answered.cached_tokens;
                self.output_tokens += answered.output_tokens;
                self.late.add(answered.late);
                self.whole.add(answered.whole);
                let tpot = answered.tpot();
                answered.ttft.into_iter().for_each(|time| self.ttft.add(time));
                tpot.into_iter().for_each(|time| self.tpot.add(time));
                let within = |limit: Option<Duration>, time: Option<Duration>| match (limit, time) {
                    (Some(limit), Some(time)) => time <= limit,
                    _ => true,
                };
                self.good += u64::from(within(self.slo.ttft, answered.ttft) && within(self.slo.tpot, tpot));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn figures_are_right_to_a_hundredth_from_microseconds_to_hours() {
        for us in [0, 1, 63, 64, 65, 1_000, 123_456, 7_000_000, 3_600_000_000, 60_000_000_000] {
            let mut histogram = Histogram::default();
            histogram.add(Duration::from_micros(us));
            histogram.add(Duration::from_micros(us * 2 + 1_000_000));
            let found = histogram.permille(500) * 1e3;
            assert!((found - us as f64).abs() <= us as f64 / 100.0, "{us} µs: {found}");
        }
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|at| histogram.add(ms(at)));
        let times = histogram.times().unwrap();
        for (found, expected) in [(times.p50, 500.0), (times.p90, 900.0), (times.p99, 990.0), (times.mean, 500.5)] {
            assert!((found - expected).abs() < expected / 100.0, "{found} {expected}");
        }
        assert_eq!(times.max, 1000.0);
        histogram.add(Duration::MAX);
        assert_eq!(Histogram::default().times(), None);
    }

    #[test]
    fn an_answer_is_good_if_it_keeps_what_was_promised() {
        let slo = Slo { ttft: Some(ms(100)), tpot: Some(ms(10)) };
        let answer = |ttft, last, tokens| {
            let answered =
                Answered { ttft: Some(ms(ttft)), last: ms(last), output_tokens: tokens, ..Answered::default() };
            Fate::Answered(answered)
        };
        let mut tally = Tally { slo, ..Tally::default() };
        tally.add(answer(100, 200, 11));
        assert_eq!((tally.answered, tally.good), (1, 1));
        tally.add(answer(101, 201, 11));
        tally.add(answer(50, 161, 11));
        assert_eq!((tally.answered, tally.good), (3, 1), "one began late, one went on slowly");
        tally.add(answer(50, 50, 1));
        assert_eq!(tally.good, 2, "one token has no time between tokens");
        assert_eq!(tally.tpot.count(), 3);
    }

    #[test]
    fn kinds_of_errors_are_bounded() {
        let mut tally = Tally::default();
        (0..1000).for_each(|at| tally.add(Fate::Failed(format!("http {at}"))));
        assert_eq!((tally.failed, tally.errors.len()), (1000, MAX_KINDS + 1));
        assert_eq!(tally.errors["others"], 1000 - MAX_KINDS as u64);
    }
}
