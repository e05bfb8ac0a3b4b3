//! Figures of a replay: how long things took, and what went wrong how often.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use serde::Serialize;

/// How long something took, each time: four bytes each, so a trace of ten million requests has room.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latencies(Vec<u32>);

/// Percentiles, in microseconds; zero where nothing was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// How often it was measured.
    pub count: usize,
    /// Half took no longer.
    pub p50: u32,
    /// Nine of ten.
    pub p90: u32,
    /// 99 of a hundred.
    pub p99: u32,
    /// The longest.
    pub max: u32,
}

impl Latencies {
    /// Once more. What takes more than an hour counts as one.
    pub(crate) fn add(&mut self, took: Duration) {
        self.0.push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
    }

    pub(crate) fn summary(&mut self) -> Summary {
        self.0.sort_unstable();
        let count = self.0.len();
        // The nearest rank: so many of a hundred took no longer than that.
        let at = |percent: usize| self.0.get((count * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0);
        Summary { count, p50: at(50), p90: at(90), p99: at(99), max: at(100) }
    }
}

/// Rows of a table of latencies, in milliseconds.
pub(crate) fn table(rows: &[(&str, Summary)]) -> String {
    let mut table = format!("  {:<10} {:>8} {:>10} {:>10} {:>10} {:>10}\n", "ms", "count", "p50", "p90", "p99", "max");
    for (what, Summary { count, p50, p90, p99, max }) in rows {
        let [p50, p90, p99, max] = [p50, p90, p99, max].map(|&micros| f64::from(micros) / 1e3);
        writeln!(table, "  {what:<10} {count:>8} {p50:>10.3} {p90:>10.3} {p99:>10.3} {max:>10.3}")
            .expect("a string takes all");
    }
    table
}

/// What went wrong, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Errors(BTreeMap<String, u64>);

impl Errors {
    /// Once more.
    pub(crate) fn add(&mut self, kind: impl Into<String>) {
        *self.0.entry(kind.into()).or_default() += 1;
    }

    /// How many in all.
    pub fn count(&self) -> u64 {
        self.0.values().sum()
    }

    /// In a line: `none`, or each kind and how often.
    pub(crate) fn line(&self) -> String {
        if self.0.is_empty() {
            return "none".to_owned();
        }
        self.0.iter().map(|(kind, count)| format!("{kind} {count}")).collect::<Vec<_>>().join(", ")
    }
}

/// A part of a whole; nothing of nothing is nothing.
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Bytes as people read them.
pub(crate) fn bytes(count: u64) -> String {
    let (mut number, mut unit) = (count as f64, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if number < 1024.0 {
            break;
        }
        (number, unit) = (number / 1024.0, larger);
    }
    if unit == "B" { format!("{count} B") } else { format!("{number:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.summary(), Summary::default());
        (1..=200u64).rev().for_each(|ms| latencies.add(Duration::from_millis(ms)));
        let expected = Summary { count: 200, p50: 100_000, p90: 180_000, p99: 198_000, max: 200_000 };
        assert_eq!(latencies.summary(), expected);
        let mut one = Latencies::default();
        one.add(Duration::from_secs(1 << 40));
        assert_eq!((one.summary().p50, one.summary().max), (u32::MAX, u32::MAX));
    }

    #[test]
    fn numbers_are_written_as_people_read_them() {
        assert_eq!([0, 1023, 1024, 1 << 20, 3 << 40].map(bytes), ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "3.0 TiB"]);
        let mut errors = Errors::default();
        assert_eq!(errors.line(), "none");
        ["timeout", "call", "timeout"].into_iter().for_each(|kind| errors.add(kind));
        assert_eq!((errors.line().as_str(), errors.count()), ("call 1, timeout 2", 3));
        assert_eq!((share(0, 0), share(1, 4)), (0.0, 0.25));
    }
}
