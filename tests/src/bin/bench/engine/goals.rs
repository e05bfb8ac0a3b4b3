//! The rows of the report: which figure stands beside which, and what we set out to reach.

use super::plan::{Found, Load, Operation, Pairs, Who};
use crate::report::Row;

/// All rows.
pub fn rows(found: &Found) -> Vec<Row> {
    let (one, four, many, most) = (Load::Decode(1), Load::Decode(4), Load::Decode(16), Load::Decode(64));
    let mut rows = Vec::new();
    rows.extend(beside(found, one, Who::Ours, Who::Llama).map(|row| row.at_least(1.0)));
    rows.extend(
        pairs("decode, batch 1: weights read", "GB/s", found.reads.get(&(Who::Ours, one)), "memory reads")
            .map(|row| row.at_least(0.75)),
    );
    rows.extend(beside(found, many, Who::Ours, Who::Llama).map(|row| row.at_least(1.3)));
    rows.extend(beside(found, Load::Prefill, Who::Ours, Who::Llama).map(|row| row.at_least(1.0)));
    let peak = "the processor's peak";
    let products = found.products.get(&(Who::Ours, Load::Prefill));
    rows.extend(pairs("prefill: products", "GFLOP/s", products, peak).map(|row| row.at_least(0.7)));
    let gap = "longest gap of 8 writers, 4,096-token prompt in chunks";
    rows.extend(pairs(gap, "ms", Some(&found.gaps), "in one piece").map(|row| row.at_most(0.25)));
    let ttft = "TTFT, 2,000 tokens shared";
    rows.extend(pairs(ttft, "ms", Some(&found.prefix), "the first request's").map(|row| row.at_most(0.1)));
    let memory = "memory at its peak, 16 writers";
    rows.extend(pairs(memory, "MiB", Some(&found.memory), "weights + cache").map(|row| row.at_most(1.15)));

    // No goals: what else one wants to know.
    for load in [four, most] {
        rows.extend(beside(found, load, Who::Ours, Who::Llama));
    }
    for load in [one, many, Load::Prefill] {
        rows.extend(beside(found, load, Who::Ours, Who::Transformers));
    }
    for load in [one, many, Load::Prefill] {
        rows.extend(beside(found, load, Who::OursExact, Who::Llama));
    }
    for load in [one, many, Load::Prefill] {
        rows.extend(beside(found, load, Who::OursInt8, Who::LlamaQ8));
    }
    let reads = found.reads.get(&(Who::OursInt8, one));
    rows.extend(pairs("decode, batch 1, int8 weights: read", "GB/s", reads, "memory reads"));
    let products = found.products.get(&(Who::Ours, many));
    rows.extend(pairs("decode, batch 16: products", "GFLOP/s", products, peak));
    match &found.cache {
        Some(Ok(operations)) => {
            let row = |operation: &Operation| {
                let what = format!("cache, {}, 1 million blocks", operation.name);
                Row::new(what, operation.many_ns, "ns").beside("1 thousand blocks", operation.few_ns)
            };
            rows.extend(operations.iter().map(row));
        }
        Some(Err(reason)) => println!("operations of the cache are left out: {reason}"),
        None => {}
    }
    rows
}

/// Somebody's figures beside a rival's, or why there are none. No row if nobody was measured.
fn beside(found: &Found, load: Load, ours: Who, rival: Who) -> Option<Row> {
    let what = format!("{}, {}", load.name(), ours.name());
    match (found.get(ours, load), found.get(rival, load)) {
        (Ok(ours), Ok(theirs)) => Some(Row::repeated(what, "tok/s", ours, rival.name(), theirs)),
        (Ok(ours), Err(reason)) => Some(Row::alone(what, "tok/s", ours).without(rival.name(), reason)),
        (Err(reason), _) => {
            println!("no figure for {what}: {reason}");
            None
        }
    }
}

/// A figure of ours beside a limit, or beside another figure of ours. No row if it was not measured.
fn pairs(what: &str, unit: &'static str, pairs: Option<&Pairs>, rival: &str) -> Option<Row> {
    let pairs = pairs.filter(|pairs| !pairs.ours.is_empty())?;
    Some(Row::repeated(what, unit, &pairs.ours, rival, &pairs.theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rival_that_could_not_be_started_has_a_row_that_says_why_and_meets_nothing() {
        let mut found = Found::default();
        found.add(Who::Ours, Load::Decode(1), 20.0);
        found.miss(Who::Llama, "no compiler");
        let rows = rows(&found);
        let row = rows.iter().find(|row| row.what == "decode, batch 1, fast products").unwrap();
        assert_eq!((row.ours, row.theirs, row.met), (20.0, None, None));
        assert_eq!(row.rival, "llama.cpp bf16: no compiler");
        assert!(rows.iter().all(|row| row.met.is_none()));
    }

    #[test]
    fn goals_are_held_against_the_median_of_the_ratios() {
        let mut found = Found::default();
        for (ours, theirs) in [(20.0, 10.0), (11.0, 10.0), (13.1, 10.0)] {
            found.add(Who::Ours, Load::Decode(16), ours);
            found.add(Who::Llama, Load::Decode(16), theirs);
        }
        found.gaps.add(30.0, 100.0);
        let rows = rows(&found);
        let met = |what: &str| rows.iter().find(|row| row.what.starts_with(what)).unwrap().met;
        assert_eq!((met("decode, batch 16"), met("longest gap")), (Some(true), Some(false)));
    }
}
