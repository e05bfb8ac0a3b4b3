//! The rows of the report: which figure stands beside which, and what we set out to reach.

use super::plan::{CALLERS, Figure, Found, Load, NODES, SIZES, SPREAD, Side, Way, batches};
use crate::report::{Row, median};

const GB_PER_S: fn(&Figure) -> f64 = |figure| figure.gb_per_s;
const PER_S: fn(&Figure) -> f64 = |figure| figure.calls_per_s;
const P99: fn(&Figure) -> f64 = |figure| figure.p99_us;
const P50: fn(&Figure) -> f64 = |figure| figure.p50_us;

/// What is asked of `auto`; `tcp` stands beside Mooncake without a goal.
pub fn rows(found: &Found) -> Vec<Row> {
    let mut rows = Vec::new();
    for side in [Side::Auto, Side::Tcp] {
        let goal = |row: Row, goal: fn(Row) -> Row| if side == Side::Auto { goal(row) } else { row };
        for load in values() {
            let what = format!("{}, {}", side.name(), load.name());
            rows.extend(
                compare(found, side, what, "GB/s", load, GB_PER_S).map(|row| goal(row, |row| row.at_least(2.0))),
            );
        }
        for load in values().filter(is_single) {
            let what = |which| format!("{}, {} {which}", side.name(), load.name());
            let is_get = matches!(load, Load::Values { way: Way::Get, .. });
            let worst = compare(found, side, what("p99"), "µs", load, P99);
            rows.extend(worst.map(|row| if is_get { goal(row, |row| row.at_most(1.0)) } else { row }));
            rows.extend(compare(found, side, what("p50"), "µs", load, P50));
        }
    }
    for callers in CALLERS {
        let load = Load::Lookups { callers };
        rows.extend(compare(found, Side::Auto, load.name(), "/s", load, PER_S).map(|row| row.at_least(3.0)));
        rows.extend(compare(found, Side::Auto, format!("{} p99", load.name()), "µs", load, P99));
    }
    spread(found, &mut rows);
    rows
}

/// All loads of values.
pub fn values() -> impl Iterator<Item = Load> {
    SIZES.into_iter().flat_map(|block| {
        batches(block)
            .into_iter()
            .flat_map(move |batch| [Way::Get, Way::Put].map(|way| Load::Values { way, block, batch }))
    })
}

fn is_single(load: &Load) -> bool {
    matches!(load, Load::Values { batch: 1, .. })
}

/// What a prompt costs in processor time on more nodes, beside what it costs on one. The goal is for prompts of one group,
/// which ask one node each however many there are.
fn spread(found: &Found, rows: &mut Vec<Row>) {
    for blocks in SPREAD {
        let Some(one) = found.spread.get(&(blocks, 1)) else { continue };
        for nodes in NODES.into_iter().filter(|&nodes| nodes > 1) {
            let Some(more) = found.spread.get(&(blocks, nodes)) else { continue };
            let what = format!("processor time of get {blocks} x 64 KiB, {nodes} nodes");
            let row = Row::repeated(what, "µs", more, "1 node", one);
            rows.push(if blocks == SPREAD[0] { row.at_most(1.15) } else { row });
        }
    }
}

/// Ours beside the rival's; alone if the rival is missing, and nothing if we are.
fn compare(
    found: &Found,
    ours: Side,
    what: String,
    unit: &'static str,
    load: Load,
    pick: fn(&Figure) -> f64,
) -> Option<Row> {
    let ours = found.get(ours, load, pick).ok()?;
    let rival = Side::Mooncake.name();
    Some(match found.get(Side::Mooncake, load, pick) {
        Ok(theirs) => Row::repeated(what, unit, &ours, rival, &theirs),
        Err(reason) => Row::alone(what, unit, &ours).without(rival, reason),
    })
}

/// For the line that says how far a run is.
pub fn middle(found: &Found, side: Side, load: Load) -> String {
    let pick = if matches!(load, Load::Lookups { .. }) { PER_S } else { GB_PER_S };
    match found.get(side, load, pick) {
        Ok(figures) => format!("{} {}", side.name(), crate::report::number(median(figures))),
        Err(_) => format!("{} missing", side.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(speed: f64) -> Figure {
        Figure { gb_per_s: speed, calls_per_s: speed, p99_us: 1.0 / speed, p50_us: 1.0 / speed }
    }

    fn found(sides: &[(Side, f64)]) -> Found {
        let mut found = Found::default();
        for load in values().chain(CALLERS.map(|callers| Load::Lookups { callers })) {
            sides.iter().for_each(|&(side, speed)| found.add(side, load, figure(speed)));
        }
        found
    }

    #[test]
    fn goals_are_for_auto_and_are_met_by_what_is_fast_enough() {
        let mut found = found(&[(Side::Auto, 2.5), (Side::Tcp, 0.5), (Side::Mooncake, 1.0)]);
        found.spread = NODES.map(|nodes| ((32, nodes), vec![100.0 + nodes as f64 * 5.0])).into();
        let rows = rows(&found);
        let met = |what: &str| rows.iter().find(|row| row.what == what).unwrap_or_else(|| panic!("no {what}")).met;
        assert_eq!(met("auto, get 64 KiB"), Some(true));
        assert_eq!(met("auto, batch put 8 x 4 MiB"), Some(true));
        assert_eq!(met("auto, get 1 MiB p99"), Some(true));
        assert_eq!(met("auto, put 1 MiB p99"), None);
        assert_eq!(met("tcp, get 64 KiB"), None);
        assert_eq!(met("lookups, 100 blocks, 4 callers"), Some(false), "two and a half times are not three");
        assert_eq!(met("processor time of get 32 x 64 KiB, 2 nodes"), Some(true));
        assert_eq!(met("processor time of get 32 x 64 KiB, 4 nodes"), Some(true));
        // Speed of three sizes, put and get, single and batch; p99 of three gets; lookups; spread.
        assert_eq!(rows.iter().filter(|row| row.goal.is_some()).count(), 12 + 3 + CALLERS.len() + 2);
    }

    #[test]
    fn a_missing_rival_has_rows_that_say_why() {
        let mut found = found(&[(Side::Auto, 2.0), (Side::Tcp, 1.0)]);
        found.miss(Side::Mooncake, "no network");
        let rows = rows(&found);
        assert!(!rows.is_empty());
        for row in rows {
            assert_eq!(
                (row.rival.as_str(), row.theirs, row.met),
                ("Mooncake Store: no network", None, None),
                "{}",
                row.what
            );
        }
    }
}
