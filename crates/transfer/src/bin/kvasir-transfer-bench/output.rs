//! What was found, as a table for people or as JSON for programs.

use serde::Serialize;

use crate::{
    cli::{Direction, size_name},
    measure::Latency,
};

/// One measurement.
#[derive(Debug, Serialize)]
pub struct Found {
    /// What moved the bytes: a transport, `memcpy`, `socket`.
    pub over: String,
    /// Which way.
    pub op: Direction,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Blocks in a batch.
    pub batch_blocks: u32,
    /// Threads that submitted.
    pub threads: u32,
    /// Batches each of them kept in progress.
    pub outstanding: u32,
    /// Bytes walked through on either side.
    pub working_set_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// What was moved in that time.
    pub bytes: u64,
    /// Batches moved in that time.
    pub batches: u64,
    /// 10⁹ bytes a second.
    pub gb_per_s: f64,
    /// Latency of a batch.
    pub latency_us: Latency,
    /// Processor seconds per GiB moved, on this side.
    pub cpu_s_per_gib: f64,
    /// The same on the far side; none where there is no other process.
    pub far_cpu_s_per_gib: Option<f64>,
    /// Bytes found right, if they were looked at.
    pub verified_bytes: Option<u64>,
}

/// How a run is told.
pub struct Output {
    json: bool,
    head_shown: bool,
}

const WIDTHS: [usize; 13] = [9, 5, 8, 6, 7, 6, 7, 9, 9, 9, 9, 15, 9];

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json, head_shown: false }
    }

    /// Tells one measurement as soon as it is there.
    pub fn show(&mut self, found: &Found) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string(found)?);
            return Ok(());
        }
        if !std::mem::replace(&mut self.head_shown, true) {
            let head =
                ["over", "op", "block", "batch", "threads", "outst.", "GB/s", "p50 µs", "p90 µs", "p99 µs", "max µs"];
            let head: Vec<_> = head.into_iter().chain(["CPU s/GiB", "verified"]).map(str::to_owned).collect();
            println!("{}", line(&head));
        }
        println!("{}", line(&cells(found)));
        Ok(())
    }
}

fn cells(found: &Found) -> Vec<String> {
    let Latency { p50, p90, p99, max } = found.latency_us;
    let far = found.far_cpu_s_per_gib.map(|far| format!(" + {far:.2}")).unwrap_or_default();
    let mut cells = vec![
        found.over.clone(),
        found.op.name().to_owned(),
        size_name(found.block_bytes),
        found.batch_blocks.to_string(),
        found.threads.to_string(),
        found.outstanding.to_string(),
        format!("{:.2}", found.gb_per_s),
    ];
    cells.extend(
        [p50, p90, p99, max].map(|micros| if micros < 100.0 { format!("{micros:.2}") } else { format!("{micros:.0}") }),
    );
    cells.push(format!("{:.2}{far}", found.cpu_s_per_gib));
    cells.push(found.verified_bytes.map_or_else(|| "-".to_owned(), size_name));
    cells
}

fn line(cells: &[String]) -> String {
    let padded: Vec<_> = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:>width$}")).collect();
    padded.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_column_for_each_figure_and_json_has_their_names() {
        let latency_us = Latency { p50: 1.5, p90: 2.0, p99: 3.0, max: 1234.0 };
        let found = Found {
            over: "tcp".into(),
            op: Direction::Write,
            block_bytes: 65536,
            batch_blocks: 4,
            threads: 2,
            outstanding: 8,
            working_set_bytes: 1 << 28,
            seconds: 1.0,
            bytes: 1 << 30,
            batches: 4096,
            gb_per_s: 1.07,
            latency_us,
            cpu_s_per_gib: 0.25,
            far_cpu_s_per_gib: Some(0.5),
            verified_bytes: Some(1 << 28),
        };
        let cells = cells(&found);
        assert_eq!(cells.len(), WIDTHS.len());
        assert_eq!(cells[2..4].join(" "), "64 KiB 4");
        assert_eq!(cells[10..].join(" "), "1234 0.25 + 0.50 256 MiB");
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!((&json["op"], &json["latency_us"]["p99"]), (&"write".into(), &3.0.into()));
    }
}
