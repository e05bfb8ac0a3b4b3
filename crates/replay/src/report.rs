//! What simulations came to, as a table for people and as JSON for programs.

use std::fmt::Write;

use serde::Serialize;

use crate::simulate::Outcome;

/// One simulation and what it came to.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The trace's name.
    pub trace: String,
    /// The policy's name.
    pub policy: String,
    /// How many nodes.
    pub nodes: usize,
    /// Room in memory, as it was given, and in blocks.
    pub memory: String,
    /// See `memory`.
    pub memory_blocks: usize,
    /// Room on disk, in blocks.
    pub disk_blocks: usize,
    /// Blocks hit of all blocks asked for.
    pub hit_rate: f64,
    /// Of all blocks asked for, those that were in memory.
    pub memory_hit_rate: f64,
    /// What a store without limit hits.
    pub bound: f64,
    /// Blocks asked of the busiest node beside the mean.
    pub imbalance: f64,
    /// All counts.
    pub counts: Outcome,
}

/// The rows, one under the other. `than_lru` compares with the row that differs in nothing but the policy.
pub fn table(rows: &[Row]) -> String {
    let mut table = format!(
        "{:<14} {:>5} {:>9} {:>9}  {:<12} {:>7} {:>7} {:>8} {:>7} {:>8}\n",
        "trace", "nodes", "memory", "disk", "policy", "hit", "in mem", "of bound", "x lru", "max/mean"
    );
    for row in rows {
        let alike = |other: &&Row| {
            let key = |row: &Row| (row.trace.clone(), row.nodes, row.memory_blocks, row.disk_blocks);
            other.policy == "lru" && key(other) == key(row)
        };
        let lru = rows.iter().find(alike).map(|lru| row.hit_rate / lru.hit_rate.max(f64::MIN_POSITIVE));
        let lru = lru.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        let Row { trace, policy, nodes, memory, disk_blocks, hit_rate, memory_hit_rate, bound, imbalance, .. } = row;
        let of_bound = hit_rate / bound.max(f64::MIN_POSITIVE);
        writeln!(
            table,
            "{trace:<14} {nodes:>5} {memory:>9} {disk_blocks:>9}  {policy:<12} {hit_rate:>7.4} {memory_hit_rate:>7.4} \
             {of_bound:>8.3} {lru:>7} {imbalance:>8.2}"
        )
        .expect("a string takes all");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_beside_its_own_lru() {
        let row = |policy: &str, memory: usize, hit_rate| Row {
            trace: "t".to_owned(),
            policy: policy.to_owned(),
            nodes: 1,
            memory: memory.to_string(),
            memory_blocks: memory,
            disk_blocks: 0,
            hit_rate,
            memory_hit_rate: hit_rate,
            bound: 0.5,
            imbalance: 1.0,
            counts: Outcome::default(),
        };
        let rows = [row("lru", 1, 0.2), row("lru", 2, 0.4), row("other", 1, 0.3), row("other", 3, 0.5)];
        let table = table(&rows);
        let ratios: Vec<&str> =
            table.lines().skip(1).map(|line| line.split_whitespace().rev().nth(1).unwrap()).collect();
        assert_eq!(ratios, ["1.000", "1.000", "1.500", "-"]);
    }
}
