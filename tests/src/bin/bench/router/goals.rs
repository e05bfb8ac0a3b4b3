//! The rows: what was found, beside whom, and what we set out to reach (`issue 6, "Speed"`).

use super::plan::{CLIENTS, Figure, Found, Load, PROMPT_TOKENS, Side};
use crate::report::Row;

/// Our processor time for a chat beyond the tokenizer library's, in µs.
const OVERHEAD_US: f64 = 100.0;

/// All rows of what routers did in turn.
pub fn rows(found: &Found) -> Vec<Row> {
    let mut rows = Vec::new();
    let busy = Load::Ids { clients: CLIENTS };
    for side in Side::PASS {
        rows.push(rate(found, busy, "requests", side).at_least(1.5));
    }
    rows.push(rate(found, Load::Chat, "requests", Side::Dynamo).at_least(1.5));
    rows.push(overhead(found));
    for side in Side::PASS {
        rows.push(rate(found, Load::Stream, "tokens", side).at_least(1.0));
    }
    rows.push(rate(found, Load::Stream, "tokens", Side::Dynamo).at_least(1.5));
    for load in [Load::Ids { clients: 1 }, busy] {
        for side in Side::PASS {
            rows.push(latency(found, load, "p50", |figure| figure.p50_us, side).at_most(1.0));
            rows.push(latency(found, load, "p99", |figure| figure.p99_us, side).at_most(1.0));
        }
    }
    rows.push(rate(found, busy, "requests", Side::Dynamo));
    for side in Side::PASS {
        rows.push(rate(found, Load::Burst, "tokens", side));
    }
    rows
}

fn rate(found: &Found, load: Load, of: &str, rival: Side) -> Row {
    beside(found, load, format!("{}: {of} per CPU second", load.name()), "/s", |figure| figure.per_cpu_second, rival)
}

fn latency(found: &Found, load: Load, which: &str, pick: fn(&Figure) -> f64, rival: Side) -> Row {
    beside(found, load, format!("{}: {which}", load.name()), "µs", pick, rival)
}

fn beside(found: &Found, load: Load, what: String, unit: &'static str, pick: fn(&Figure) -> f64, rival: Side) -> Row {
    let ours = found.of(Side::Ours, load, pick);
    match found.missing(rival) {
        Some(why) => Row::alone(what, unit, &ours).without(rival.name(), why),
        None => Row::repeated(what, unit, &ours, rival.name(), &found.of(rival, load, pick)),
    }
}

/// What a chat costs us beyond turning its text into tokens.
fn overhead(found: &Found) -> Row {
    let chats = found.of(Side::Ours, Load::Chat, |figure| 1e6 / figure.per_cpu_second);
    let ours: Vec<_> = chats.iter().zip(&found.tokenizer_us).map(|(chat, tokenizer)| chat - tokenizer).collect();
    let what = format!("chat of {PROMPT_TOKENS} tokens: CPU beyond the tokenizer library's");
    let tokenizer = crate::report::median(found.tokenizer_us.clone());
    let mut row = Row::alone(what, "µs", &ours).under(OVERHEAD_US);
    row.rival = format!("the library alone takes {tokenizer:.0} µs");
    row
}
