//! What the store's eviction keeps and how its placement spreads, by simulation: its own policy beside LRU, on a recorded
//! trace and on made-up ones. No clock is in it, so every run on every machine finds the same.

use anyhow::Result;
use kvasir_replay::{
    CONVERSATION, generate,
    simulate::{Outcome, Plan, simulate},
    trace::Trace,
};

use crate::report::Row;

/// What memory is managed by unless configured otherwise, and what stands beside it.
const OURS: &str = "hit-density";
const LRU: &str = "LRU";
/// Room for so many of a hundred distinct blocks, and how many times LRU's hits are to be hit on conversations then.
const ROOM: [(usize, f64); 3] = [(5, 1.2), (10, 1.1), (30, 1.0)];
/// Nodes that share the room, and how much in percent.
const NODES: [usize; 4] = [4, 16, 64, 256];
const SHARED_ROOM: usize = 5;
/// As nodes do unless configured otherwise.
const EXCHANGE_MS: u64 = 15_000;
/// What made-up traces are made from.
const SEED: u64 = 1;

/// All rows; in a smoke run of few nodes only.
pub fn rows(smoke: bool) -> Result<Vec<Row>> {
    let conversation = Trace::read(CONVERSATION.as_bytes())?;
    let mut rows = Vec::new();
    for (percent, times) in ROOM {
        let what = format!("conversation trace, hits, {percent} % of its blocks");
        rows.push(beside_lru(what, &conversation, percent)?.at_least(times));
    }
    for name in generate::NAMES {
        let trace = generate::generate(name, SEED).expect("it is one of those that can be made");
        rows.push(worst(name, &trace)?);
    }
    let all = hits(&run(&conversation, OURS, 100, 1)?);
    let what = "conversation trace, hits, room for all";
    rows.push(Row::new(what, all, "%").beside("the upper bound", conversation.bound() * 100.0).at_least(0.99));
    for nodes in NODES.into_iter().take(if smoke { 1 } else { NODES.len() }) {
        rows.extend(shared(&conversation, nodes)?);
    }
    Ok(rows)
}

/// Ours with so much room, beside LRU with as much.
fn beside_lru(what: String, trace: &Trace, percent: usize) -> Result<Row> {
    let [ours, lru] = [OURS, "lru"].map(|policy| run(trace, policy, percent, 1));
    Ok(Row::new(what, hits(&ours?), "%").beside(LRU, hits(&lru?)))
}

/// A made-up trace with the room at which ours is least good beside LRU, which it is never to be below.
fn worst(name: &str, trace: &Trace) -> Result<Row> {
    let what = |percent| format!("{name} trace, hits, where they are fewest beside LRU's ({percent} %)");
    let rows = ROOM.map(|(percent, _)| beside_lru(what(percent), trace, percent));
    let rows = rows.into_iter().collect::<Result<Vec<_>>>()?;
    let worst = rows.into_iter().min_by(|a, b| a.ratio.unwrap_or(0.0).total_cmp(&b.ratio.unwrap_or(0.0)));
    Ok(worst.expect("there is room of some size").at_least(1.0))
}

/// The same room on so many nodes: hits, and how even the load is.
fn shared(trace: &Trace, nodes: usize) -> Result<[Row; 2]> {
    let [ours, lru] = [OURS, "lru"].map(|policy| run(trace, policy, SHARED_ROOM, nodes));
    let ours = ours?;
    let what = |what: &str| format!("conversation trace, {what}, {nodes} nodes, {SHARED_ROOM} % of its blocks");
    Ok([
        Row::new(what("hits"), hits(&ours), "%").beside(LRU, hits(&lru?)),
        Row::new(what("the busiest node's load"), ours.imbalance(), "× the mean"),
    ])
}

fn run(trace: &Trace, policy: &str, percent: usize, nodes: usize) -> Result<Outcome> {
    let plan = Plan {
        policy: policy.to_owned(),
        disk_policy: "lru".to_owned(),
        nodes,
        group_blocks: 1,
        memory_blocks: (f64::from(trace.distinct) * percent as f64 / 100.0).round() as usize,
        disk_blocks: 0,
        exchange_ms: EXCHANGE_MS,
    };
    Ok(simulate(trace, &plan, |_| {})?)
}

/// Blocks hit of a hundred asked for.
fn hits(outcome: &Outcome) -> f64 {
    outcome.hit_rate() * 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_up_trace_is_shown_where_it_is_worst() {
        let trace = generate::generate("documents", SEED).unwrap();
        let row = worst("documents", &trace).unwrap();
        let ratios = ROOM.map(|(percent, _)| beside_lru(String::new(), &trace, percent).unwrap().ratio.unwrap());
        assert_eq!(row.ratio.unwrap(), ratios.into_iter().fold(f64::INFINITY, f64::min));
        assert_eq!(row.met, Some(row.ratio.unwrap() >= 1.0));
    }

    #[test]
    fn hits_and_load_are_shown_for_every_number_of_nodes() {
        let trace = generate::generate("chat", SEED).unwrap();
        let [hits, load] = shared(&trace, 4).unwrap();
        assert!(hits.goal.is_none() && load.goal.is_none());
        assert!(hits.ours > 0.0 && hits.ours < trace.bound() * 100.0 && hits.theirs.is_some());
        assert!((1.0..4.0).contains(&load.ours), "{}", load.ours);
    }
}
