//! Ten thousand streams on one router: all begin, are open at the same time, get a token each second, and end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{
    load::{self, Plan, Until},
    plan::{self, Side},
    sides::Router,
    worker::Pace,
};
use crate::report::Row;

/// Streams, and streams where it is only to be seen that it works.
const STREAMS: [usize; 2] = [10_000, 200];
/// From one token of a stream to the next.
const EVERY_MS: u32 = 1000;
/// They begin over this time …
const SPREAD: Duration = Duration::from_secs(10);
/// … and last so many tokens.
const TOKENS: u32 = 25;
/// What a process needs besides: files, other connections.
const OTHER_FILES: u64 = 500;
/// Memory the router may take, in MiB.
const GOAL_MIB: f64 = 1024.0;

/// Lets this process, and those it starts, have as many files open as they may.
pub fn raise_limit() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// Holds them all.
pub async fn run(router: &Router, smoke: bool) -> Result<Vec<Row>> {
    let streams = STREAMS[usize::from(smoke)];
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    ensure!(
        files >= streams as u64 + OTHER_FILES,
        "{streams} streams take more files than the {files} allowed (ulimit -n)"
    );
    let request = |at: usize| {
        let pace = Pace { every_ms: EVERY_MS, phase_ms: at as u32 * 7 % EVERY_MS };
        let (path, body) = plan::ids(Side::Ours, at, pace, TOKENS, true);
        load::request(path, &body)
    };
    // A thousand requests of all phases; each stream has another, or the same as one far away.
    let requests = Arc::new((0..1000).map(request).collect::<Vec<_>>());
    let (before, began) = (router.cpu_seconds(), Instant::now());
    let holding =
        load::run(&router.address, &requests, Plan { clients: streams, until: Until::Answers(1), spread: SPREAD });
    let (mut most, mut looks) = (0, tokio::time::interval(Duration::from_millis(200)));
    tokio::pin!(holding);
    let outcome = loop {
        tokio::select! {
            outcome = &mut holding => break outcome,
            _ = looks.tick() => most = most.max(router.resident_bytes()),
        }
    };
    if let Some(failure) = &outcome.failure {
        println!("{} of {streams} streams failed: {failure}", outcome.failed);
    }
    let cpu = (router.cpu_seconds() - before) / began.elapsed().as_secs_f64();
    let complete = if outcome.events >= outcome.answers * TOKENS as usize { outcome.answers } else { 0 };
    let asked = streams as f64;
    let open = outcome.most_open as f64;
    Ok(vec![
        Row::new("streams held: complete", complete as f64, "streams").beside("asked for", asked).at_least(1.0),
        Row::new("streams held: open at the same time", open, "streams").beside("asked for", asked).at_least(1.0),
        Row::new(format!("memory of the router, {streams} streams"), most as f64 / f64::from(1 << 20), "MiB")
            .under(GOAL_MIB),
        Row::new(
            format!("longest gap, {streams} streams, a token each second"),
            outcome.longest_gap.as_secs_f64() * 1e3,
            "ms",
        ),
        Row::new(format!("processor of the router, {streams} streams, a token each second"), cpu * 100.0, "%"),
    ])
}
