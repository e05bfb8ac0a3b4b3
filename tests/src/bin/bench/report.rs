//! What a benchmark found: a table for people, JSON for programs.

use std::{borrow::Cow, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use kvasir_tests::workspace;
use serde::{Deserialize, Serialize};

/// All rows of one benchmark.
#[derive(Serialize, Deserialize)]
pub struct Report {
    /// The benchmark's.
    pub name: String,
    /// What was measured.
    pub commit: String,
    /// Where.
    pub machine: String,
    /// The figures.
    pub rows: Vec<Row>,
}

/// One figure beside its rival's.
#[derive(Serialize, Deserialize, Default)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Our figure.
    pub ours: f64,
    /// Unit of both figures.
    pub unit: Cow<'static, str>,
    /// The program or the limit beside us; if it could not be started, why. Empty: there is none.
    pub rival: String,
    /// The rival's figure.
    pub theirs: Option<f64>,
    /// Ours divided by theirs.
    pub ratio: Option<f64>,
    /// What we set out to reach.
    pub goal: Option<String>,
    /// Whether we did.
    pub met: Option<bool>,
    /// Lowest and highest of our repetitions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ours_range: Option<[f64; 2]>,
    /// Lowest and highest of the rival's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub theirs_range: Option<[f64; 2]>,
}

impl Row {
    /// A figure of ours alone.
    pub fn new(what: impl Into<String>, ours: f64, unit: &'static str) -> Self {
        Self { what: what.into(), ours, unit: unit.into(), ..Self::default() }
    }

    /// Puts a rival's figure beside it.
    pub fn beside(mut self, rival: &str, theirs: f64) -> Self {
        self.rival = rival.to_owned();
        self.theirs = Some(theirs);
        self.ratio = Some(self.ours / theirs);
        self
    }

    /// The repetitions of ours beside the rival's, measured in turn. The ratio is the median of those within one
    /// repetition: the machine's moods cancel out.
    pub fn repeated(what: impl Into<String>, unit: &'static str, ours: &[f64], rival: &str, theirs: &[f64]) -> Self {
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        Self {
            rival: rival.to_owned(),
            theirs: Some(median(theirs.to_vec())),
            ratio: Some(median(ratios)),
            theirs_range: Some(range(theirs)),
            ..Self::alone(what, unit, ours)
        }
    }

    /// The repetitions of ours, without a rival.
    pub fn alone(what: impl Into<String>, unit: &'static str, ours: &[f64]) -> Self {
        Self { ours_range: Some(range(ours)), ..Self::new(what, median(ours.to_vec()), unit) }
    }

    /// A rival that should stand beside it could not be measured; why.
    pub fn without(mut self, rival: &str, reason: &str) -> Self {
        self.rival = format!("{rival}: {reason}");
        self
    }

    /// The goal: at least so many times the rival's.
    pub fn at_least(mut self, times: f64) -> Self {
        self.goal = Some(format!("≥ {times} ×"));
        self.met = self.ratio.map(|ratio| ratio >= times);
        self
    }

    /// The goal: at most so many times the rival's.
    pub fn at_most(mut self, times: f64) -> Self {
        self.goal = Some(format!("≤ {times} ×"));
        self.met = self.ratio.map(|ratio| ratio <= times);
        self
    }

    /// The goal: to stay under so much.
    pub fn under(mut self, goal: f64) -> Self {
        self.goal = Some(format!("< {goal} {}", self.unit));
        self.met = Some(self.ours < goal);
        self
    }
}

impl Report {
    /// An empty report of a benchmark.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), commit: commit(), machine: machine(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Prints the table and writes the JSON file.
    pub fn finish(self) -> Result<()> {
        println!("\n{} at {} on {}\n", self.name, self.commit, self.machine);
        print!("{}", self.table());
        let goals = self.rows.iter().filter(|row| row.goal.is_some()).count();
        let met = self.rows.iter().filter(|row| row.met == Some(true)).count();
        println!("\n{met} of {goals} goals met");
        let path = path(&self.name);
        fs::create_dir_all(path.parent().expect("joined above"))?;
        fs::write(&path, serde_json::to_string_pretty(&self)? + "\n")?;
        println!("\nalso in {}", path.display());
        Ok(())
    }

    /// What the last run of a benchmark found.
    pub fn read(name: &str) -> Result<Self> {
        let path = path(name);
        let text = fs::read_to_string(&path).with_context(|| format!("{}: run it first", path.display()))?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    fn table(&self) -> String {
        let header = ["what", "ours", "unit", "theirs", "rival", "ratio", "goal", "met"].map(str::to_owned);
        let cells = self.rows.iter().map(|row| {
            [
                row.what.clone(),
                with_range(row.ours, row.ours_range),
                row.unit.to_string(),
                row.theirs.map(|theirs| with_range(theirs, row.theirs_range)).unwrap_or_default(),
                row.rival.clone(),
                row.ratio.map(number).unwrap_or_default(),
                row.goal.clone().unwrap_or_default(),
                row.met.map(|met| if met { "yes" } else { "NO" }.to_owned()).unwrap_or_default(),
            ]
        });
        let rows: Vec<_> = std::iter::once(header).chain(cells).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..8).map(width).collect();
        let line = |row: &[String; 8]| {
            let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            format!("{}\n", cells.join("  ").trim_end())
        };
        rows.iter().map(line).collect()
    }
}

/// The file of a benchmark's results.
fn path(name: &str) -> PathBuf {
    workspace::target_dir().join("bench").join(format!("{name}.json"))
}

/// A figure, and its lowest and highest.
pub fn with_range(value: f64, range: Option<[f64; 2]>) -> String {
    let range = range.map(|[low, high]| format!(" ({}–{})", number(low), number(high)));
    number(value) + &range.unwrap_or_default()
}

/// The lowest and the highest of the figures.
fn range(figures: &[f64]) -> [f64; 2] {
    [figures.iter().copied().fold(f64::INFINITY, f64::min), figures.iter().copied().fold(f64::NEG_INFINITY, f64::max)]
}

/// Three digits that mean something.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The middle of the figures.
pub fn median(mut figures: Vec<f64>) -> f64 {
    assert!(!figures.is_empty(), "a benchmark measures at least once");
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 { figures[middle] } else { (figures[middle - 1] + figures[middle]) / 2.0 }
}

fn commit() -> String {
    let git = Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(workspace::root()).output();
    match git {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

/// Processor and number of cores.
fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{}, {cores} cores", model.map_or("unknown processor", |(_, name)| name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_row_says_its_ratio_and_whether_the_goal_is_met() {
        let mut report = Report::new("test");
        report.push(Row::new("latency", 2.0, "ms").beside("memcpy", 1.0).under(3.0));
        report.push(Row::new("memory", 60.0, "MiB").under(50.0));
        let table = report.table();
        assert!(table.contains("latency  2.00  ms    1.00    memcpy  2.00   < 3 ms    yes"), "{table}");
        assert!(table.contains("NO"), "{table}");
    }

    #[test]
    fn ratios_are_taken_within_a_repetition_and_a_missing_rival_meets_nothing() {
        // The machine slowed down by half in the second of three repetitions: we were twice as fast all along.
        let row = Row::repeated("copy", "GB/s", &[4.0, 2.0, 4.4], "cp", &[2.0, 1.0, 2.2]).at_least(2.0);
        assert_eq!((row.ours, row.theirs, row.ratio, row.met), (4.0, Some(2.0), Some(2.0), Some(true)));
        assert_eq!(row.ours_range, Some([2.0, 4.4]));
        assert_eq!(Row::repeated("copy", "GB/s", &[1.0], "cp", &[2.0]).at_most(0.4).met, Some(false));
        let row = Row::alone("copy", "GB/s", &[4.0]).without("cp", "not installed").at_least(2.0);
        assert_eq!((row.theirs, row.met, row.rival.as_str()), (None, None, "cp: not installed"));
    }
}
