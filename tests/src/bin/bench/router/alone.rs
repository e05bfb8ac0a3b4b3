//! Two parts of our router by themselves, in programs of their own (`services/router/examples`): choosing workers in a large
//! cluster, and tokenizing the next turn of a conversation.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

use crate::report::Row;

/// A decision in a cluster of a thousand workers, at the 99th percentile.
const DECISION_US: f64 = 50.0;
/// Tokenizing a turn, beside tokenizing the conversation.
const TURN: f64 = 1.0 / 3.0;

/// All rows.
pub fn rows() -> Result<Vec<Row>> {
    let decisions = answer("route-scale")?;
    let of = |run: usize, what: &str| {
        decisions["runs"][run][what].as_f64().with_context(|| format!("route-scale says no {what}: {decisions}"))
    };
    let what = |run: &str, which: &str| format!("routing decision, 1,000 workers, 10 million blocks, {run}: {which}");
    let turns = answer("conversation-turns")?;
    let turn = |what: &str| turns[what].as_f64().with_context(|| format!("conversation-turns says no {what}: {turns}"));
    Ok(vec![
        Row::new(what("index at rest", "p99"), of(0, "p99_us")?, "µs").under(DECISION_US),
        Row::new(what("100,000 changes a second", "p99"), of(1, "p99_us")?, "µs").under(DECISION_US),
        Row::new(what("100,000 changes a second", "p50"), of(1, "p50_us")?, "µs"),
        // What the machine adds to whatever takes so long.
        Row::new(what("index at rest", "p99, beside what arithmetic that takes as long has"), of(0, "p99_us")?, "µs")
            .beside("arithmetic alone", of(0, "arithmetic_p99_us")?),
        Row::new(
            "index of 10 million blocks: memory",
            decisions["bytes_per_block"].as_f64().unwrap_or(f64::NAN),
            "B/block",
        ),
        Row::new(
            format!("next turn of a conversation of {} tokens: tokenizing", turn("tokens")?),
            turn("next_us")?,
            "µs",
        )
        .beside("the library, whole", turn("whole_us")?)
        .at_most((TURN * 1000.0).round() / 1000.0),
    ])
}

/// The JSON in a program's last line.
fn answer(example: &str) -> Result<Value> {
    let program = workspace::profile_dir().join("examples").join(example);
    let output = Command::new(&program).output().with_context(|| format!("{} is not built", program.display()))?;
    ensure!(output.status.success(), "{example}: {}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.trim_end().lines().next_back().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("{example} ended with: {last}"))
}
