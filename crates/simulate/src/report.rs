//! Runs as a table for people and as JSON for programs.

use serde::Serialize;

use crate::{
    figures::{Figures, Slo},
    plan::Plan,
    steer::Steering,
    workload::{Shape, Workload, seconds},
};

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The trace's name.
    pub trace: String,
    /// How it was used.
    pub shape: Shape,
    /// What was sent.
    pub sent: Sent,
    /// The cluster.
    pub plan: Plan,
    /// What requests had to keep.
    pub slo: Slo,
    /// How the planner was told to move workers, in those rows that have it.
    pub steering: Option<Steering>,
    /// One for each policy, and one with the planner.
    pub rows: Vec<Figures>,
    /// How long that took in reality: not the same from run to run, unlike everything else here.
    pub real: Vec<Real>,
}

/// What was sent.
#[derive(Debug, Serialize)]
pub struct Sent {
    /// Requests.
    pub requests: usize,
    /// From the first to the last one.
    pub seconds: f64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub answer_tokens: u64,
    /// Share of prompt tokens that a single cache without limit would have had.
    pub bound: f64,
}

/// How long a run took in reality.
#[derive(Clone, Debug, Serialize)]
pub struct Real {
    /// Which one.
    pub policy: String,
    /// The whole run.
    pub seconds: f64,
    /// Decisions in a second of the time that they took: looking up, laying out, choosing.
    pub decisions_per_second: f64,
    /// Simulated seconds in a real one.
    pub speed: f64,
}

impl Sent {
    /// Of a workload.
    pub fn of(workload: &Workload) -> Self {
        Self {
            requests: workload.len(),
            seconds: seconds(workload.last()),
            prompt_tokens: workload.prompt_tokens,
            answer_tokens: workload.answer_tokens,
            bound: workload.bound_tokens as f64 / workload.prompt_tokens.max(1) as f64,
        }
    }
}

impl Report {
    /// What is simulated, in a few lines.
    pub fn head(&self) -> String {
        let Sent { requests, seconds, prompt_tokens, answer_tokens, bound } = self.sent;
        let each = |tokens: u64| tokens as f64 / requests.max(1) as f64;
        let Plan { prefill, decode, profile, store_tokens, .. } = &self.plan;
        let store = match store_tokens {
            0 => String::new(),
            tokens => format!(", a KV store of {} tokens", millions(*tokens)),
        };
        format!(
            "{}: {requests} requests in {seconds:.0} s, prompts of {:.0} tokens, answers of {:.0}; a single cache without limit hits {:.1} %\n\
             {prefill} prefill and {decode} decode workers with room for {} tokens each{store}; good: TTFT within {} ms, TPOT within {} ms\n",
            self.trace,
            each(prompt_tokens),
            each(answer_tokens),
            bound * 100.0,
            millions(profile.kv.room_tokens),
            self.slo.ttft_ms,
            self.slo.tpot_ms,
        )
    }

    /// A line for each policy.
    pub fn table(&self) -> String {
        let header = [
            "policy",
            "TTFT mean",
            "p50",
            "p90",
            "p95",
            "p99",
            "TPOT mean",
            "p50",
            "p99",
            "E2E p50",
            "good",
            "good/s",
            "hits",
            "of bound",
            "store",
            "prefill max/mean",
            "cv",
            "busy",
            "decode max/mean",
            "cv",
            "busy",
            "decisions/s",
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for (row, real) in self.rows.iter().zip(&self.real) {
            let percent = |share: f64| format!("{:.1}%", share * 100.0);
            let ms = |ms: f64| if ms >= 9999.5 { format!("{:.1}s", ms / 1e3) } else { format!("{ms:.0}ms") };
            let fine = |ms: f64| format!("{ms:.1}ms");
            rows.push(vec![
                row.policy.clone(),
                ms(row.ttft_ms.mean),
                ms(row.ttft_ms.p50),
                ms(row.ttft_ms.p90),
                ms(row.ttft_ms.p95),
                ms(row.ttft_ms.p99),
                fine(row.tpot_ms.mean),
                fine(row.tpot_ms.p50),
                fine(row.tpot_ms.p99),
                ms(row.e2e_ms.p50),
                percent(row.good),
                format!("{:.2}", row.good_per_second),
                percent(row.hit_rate),
                percent(row.of_bound),
                percent(row.stored_rate),
                format!("{:.2}", row.prefill.max_over_mean),
                format!("{:.2}", row.prefill.variation),
                percent(row.prefill.busy),
                format!("{:.2}", row.decode.max_over_mean),
                format!("{:.2}", row.decode.variation),
                percent(row.decode.busy),
                format!("{:.0}", real.decisions_per_second),
            ]);
        }
        align(&rows)
    }

    /// What is not in the table.
    pub fn foot(&self) -> String {
        let mut text = String::new();
        for (row, real) in self.rows.iter().zip(&self.real) {
            if row.refused > 0 {
                text += &format!(
                    "{}: {} requests are longer than a worker's room and were refused\n",
                    row.policy, row.refused
                );
            }
            if let Some(first) = row.moves.first() {
                let count = row.moves.len();
                text += &format!(
                    "{}: {count} moves, the first after {:.0} s: {}\n",
                    row.policy, first.at_seconds, first.why
                );
            }
            text += &format!(
                "{}: {:.0} s simulated in {:.1} s ({:.0} times as fast), {} events\n",
                row.policy, row.end_seconds, real.seconds, real.speed, row.events
            );
        }
        text
    }
}

/// The first column to the left, numbers to the right.
fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            text += &if at == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
        }
        text.push('\n');
    }
    text
}

fn millions(tokens: u64) -> String {
    if tokens < 1_000_000 { tokens.to_string() } else { format!("{:.2} million", tokens as f64 / 1e6) }
}
