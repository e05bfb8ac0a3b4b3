//! What a run tells: how long requests took, how many were good, what was found, how even the load was.

use serde::Serialize;

use crate::{
    plan::{Outcome, Plan},
    steer::Move,
    workload::{Ns, Workload, seconds},
};

/// Points of a curve over time, and of a distribution.
const POINTS: usize = 120;

/// What a request must keep to be a good one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Slo {
    /// Milliseconds to the first token.
    pub ttft_ms: f64,
    /// Milliseconds from one token to the next, in the mean over the answer.
    pub tpot_ms: f64,
}

/// A mean and some percentiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// Half are below.
    pub p50: f64,
    /// 90 of 100.
    pub p90: f64,
    /// 95.
    pub p95: f64,
    /// 99.
    pub p99: f64,
}

impl Spread {
    /// Of these values, in order.
    fn of(sorted: &[f64]) -> Self {
        let at = |share: f64| {
            let rank = (sorted.len() as f64 * share).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        let mean = sorted.iter().sum::<f64>() / sorted.len().max(1) as f64;
        Self { mean, p50: at(0.5), p90: at(0.9), p95: at(0.95), p99: at(0.99) }
    }
}

/// How even some workers' shares are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Balance {
    /// The greatest share, in mean ones.
    pub max_over_mean: f64,
    /// Standard deviation, in means.
    pub variation: f64,
    /// Share of the time that they computed, from the first request to the last answer.
    pub busy: f64,
}

impl Balance {
    fn of(shares: &[f64], busy: impl Iterator<Item = Ns>, end: Ns) -> Self {
        let count = shares.len().max(1) as f64;
        let mean = shares.iter().sum::<f64>() / count;
        let busy = busy.map(seconds).sum::<f64>() / count / seconds(end).max(1e-9);
        if mean <= 0.0 {
            return Self { busy, ..Self::default() };
        }
        let square = shares.iter().map(|share| (share / mean - 1.0).powi(2)).sum::<f64>() / count;
        let max = shares.iter().copied().fold(0.0, f64::max);
        Self { max_over_mean: max / mean, variation: square.sqrt(), busy }
    }
}

/// What a policy did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Its name.
    pub policy: String,
    /// Requests answered.
    pub answered: usize,
    /// Those that no worker has room for.
    pub refused: usize,
    /// Milliseconds to the first token.
    pub ttft_ms: Spread,
    /// Milliseconds from one token to the next, of answers with two or more.
    pub tpot_ms: Spread,
    /// Milliseconds to the last token.
    pub e2e_ms: Spread,
    /// Share of all requests that kept the objectives.
    pub good: f64,
    /// And how many in a second.
    pub good_per_second: f64,
    /// Share of prompt tokens that workers had.
    pub hit_rate: f64,
    /// Share of prompt tokens that a single cache without limit would have had.
    pub bound: f64,
    /// The one divided by the other; 1 if there was nothing to be had.
    pub of_bound: f64,
    /// Share of prompt tokens that were read from the KV store.
    pub stored_rate: f64,
    /// Prompt tokens computed, over the prefill workers (those that began as such).
    pub prefill: Balance,
    /// Tokens of answers, over the decode workers.
    pub decode: Balance,
    /// When the last answer ended.
    pub end_seconds: f64,
    /// Simulated events.
    pub events: u64,
    /// Workers that changed between prefill and decode.
    pub moves: Vec<Move>,
    /// For the plot.
    #[serde(skip)]
    pub curves: Curves,
}

/// For the plot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    /// Seconds to the first token: that of each hundredth request, and some beyond.
    pub ttft: Vec<(f64, f64)>,
    /// Over time in seconds: requests that wait for their first token, in the mean …
    pub waiting: Vec<(f64, f64)>,
    /// … and those that are being answered.
    pub answering: Vec<(f64, f64)>,
}

impl Figures {
    /// Of a run.
    pub fn of(policy: &str, workload: &Workload, plan: &Plan, slo: Slo, outcome: &Outcome) -> Self {
        let (mut ttft, mut tpot, mut e2e) = (Vec::new(), Vec::new(), Vec::new());
        let (mut found, mut stored, mut prompts, mut good) = (0u64, 0u64, 0u64, 0usize);
        for (at, fate) in outcome.fates.iter().enumerate() {
            if fate.end == 0 {
                continue;
            }
            let came = workload.at(at);
            let first = seconds(fate.first - came) * 1e3;
            ttft.push(first);
            e2e.push(seconds(fate.end - came) * 1e3);
            let rest = workload.answer(at) - 1;
            let each = seconds(fate.end.saturating_sub(fate.first)) * 1e3 / f64::from(rest.max(1));
            if rest > 0 {
                tpot.push(each);
            }
            good += usize::from(first <= slo.ttft_ms && (rest == 0 || each <= slo.tpot_ms));
            found += u64::from(fate.found);
            stored += u64::from(fate.stored);
            prompts += u64::from(workload.prompt(at));
        }
        for values in [&mut ttft, &mut tpot, &mut e2e] {
            values.sort_unstable_by(f64::total_cmp);
        }
        let answered = ttft.len();
        let share = |tokens: u64| tokens as f64 / prompts.max(1) as f64;
        let (prefill, decode) = outcome.totals.split_at(plan.prefill);
        let shares = |of: &[crate::worker::Totals], pick: fn(&crate::worker::Totals) -> u64| -> Vec<f64> {
            of.iter().map(|totals| pick(totals) as f64).collect()
        };
        let end = outcome.end;
        Self {
            policy: policy.to_owned(),
            answered,
            refused: outcome.fates.len() - answered,
            ttft_ms: Spread::of(&ttft),
            tpot_ms: Spread::of(&tpot),
            e2e_ms: Spread::of(&e2e),
            good: good as f64 / outcome.fates.len().max(1) as f64,
            good_per_second: good as f64 / seconds(end).max(1e-9),
            hit_rate: share(found),
            bound: share(workload.bound_tokens),
            of_bound: if workload.bound_tokens > 0 { found as f64 / workload.bound_tokens as f64 } else { 1.0 },
            stored_rate: share(stored),
            prefill: Balance::of(&shares(prefill, |all| all.prompt_tokens), prefill.iter().map(|all| all.busy), end),
            decode: Balance::of(&shares(decode, |all| all.answer_tokens), decode.iter().map(|all| all.busy), end),
            end_seconds: seconds(end),
            events: outcome.events,
            moves: outcome.moves.clone(),
            curves: Curves::of(&ttft, workload, outcome),
        }
    }
}

impl Curves {
    fn of(ttft_ms: &[f64], workload: &Workload, outcome: &Outcome) -> Self {
        let at =
            |share: f64| ttft_ms.get(((ttft_ms.len() as f64 * share) as usize).min(ttft_ms.len().saturating_sub(1)));
        let shares = (0..=POINTS).map(|point| point as f64 / POINTS as f64).chain([0.995, 0.999]);
        let mut ttft: Vec<(f64, f64)> = shares.filter_map(|share| Some((at(share)? / 1e3, share))).collect();
        ttft.sort_unstable_by(|a, b| a.1.total_cmp(&b.1));
        let (mut waiting, mut answering) = (Timeline::new(outcome.end), Timeline::new(outcome.end));
        for (at, fate) in outcome.fates.iter().enumerate().filter(|(_, fate)| fate.end > 0) {
            waiting.add(workload.at(at), fate.first);
            answering.add(fate.first, fate.end);
        }
        Self { ttft, waiting: waiting.curve(), answering: answering.curve() }
    }
}

/// How many there are at a time, in the mean over each of some equal parts of it.
struct Timeline {
    part: f64,
    sums: Vec<f64>,
}

impl Timeline {
    fn new(end: Ns) -> Self {
        Self { part: (seconds(end) / POINTS as f64).max(1e-9), sums: vec![0.0; POINTS] }
    }

    fn add(&mut self, from: Ns, to: Ns) {
        let (from, to) = (seconds(from), seconds(to));
        let last = POINTS - 1;
        let parts = ((from / self.part) as usize).min(last)..=((to / self.part) as usize).min(last);
        for part in parts {
            let begins = part as f64 * self.part;
            self.sums[part] += (to.min(begins + self.part) - from.max(begins)).max(0.0);
        }
    }

    fn curve(self) -> Vec<(f64, f64)> {
        let part = self.part;
        self.sums.into_iter().enumerate().map(|(at, sum)| ((at as f64 + 0.5) * part, sum / part)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        let spread = Spread::of(&values);
        assert_eq!((spread.mean, spread.p50, spread.p90, spread.p99), (50.5, 50.0, 90.0, 99.0));
        assert_eq!(Spread::of(&[7.0]).p99, 7.0);
        assert_eq!(Spread::of(&[]), Spread::default());
    }

    #[test]
    fn an_even_load_has_no_variation() {
        let even = Balance::of(&[5.0, 5.0], [2_000_000_000, 0].into_iter(), 4_000_000_000);
        assert_eq!((even.max_over_mean, even.variation, even.busy), (1.0, 0.0, 0.25));
        let one = Balance::of(&[10.0, 0.0], [0, 0].into_iter(), 1);
        assert_eq!((one.max_over_mean, one.variation), (2.0, 1.0));
        assert_eq!(Balance::of(&[], std::iter::empty(), 1), Balance::default());
    }

    #[test]
    fn a_timeline_counts_who_is_there() {
        let second = 1_000_000_000;
        let mut line = Timeline::new(POINTS as u64 * second);
        line.add(0, 2 * second);
        line.add(second / 2, second);
        line.add(POINTS as u64 * second, POINTS as u64 * second);
        let curve = line.curve();
        assert_eq!((curve[0], curve[1], curve[2].1), ((0.5, 1.5), (1.5, 1.0), 0.0));
    }
}
