//! Traces against what runs: requests go out one after the other or as the trace's clock says, until its end or ctrl-C.
//!
//! ```text
//!   trace ─▶ turns: who is next, and when ─▶ lanes, one request at a time each ─▶ tally ─▶ progress, report
//!                                              │
//!                                              ├─ store:  look up, read, compare, write
//!                                              └─ router: a prompt made of the ids, an answer token by token
//! ```
//!
//! `drive` knows nothing of what a lane does; [`store`] and [`router`] know nothing of pace, progress and stopping. What both
//! tell is made of `stats`, beside the `bound`: what a cache without limit would have had.

mod args;
mod bound;
mod drive;
mod names;
mod pass;
pub mod router;
mod stats;
pub mod store;

use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};

pub use args::LiveArgs;
pub use drive::Pace;
pub use names::Names;
pub use pass::Header;

use crate::trace::Trace;

/// What a replay came to.
#[derive(Debug, Serialize)]
#[serde(tag = "mode", rename_all = "lowercase")]
pub enum Row {
    /// Against store nodes.
    Store(store::Report),
    /// Against a router.
    Router(router::Report),
}

/// What is the same for every trace of one run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// When requests go out.
    pub pace: Pace,
    /// Most of them at a time.
    pub lanes: usize,
    /// Most of each trace.
    pub limit: usize,
    /// How often each trace is replayed.
    pub repeat: u32,
    /// What makes blocks of this run other blocks than those of another.
    pub namespace: String,
}

/// Replays every trace as the arguments say; each row is shown once it is there. Ends early, with the rows so far, when asked
/// to stop (ctrl-C, SIGTERM); asked twice, it waits for nothing that is under way.
///
/// # Errors
/// If there is nothing to replay against, or nothing could be replayed.
pub fn run(args: &LiveArgs, block_bytes: Option<u64>, traces: &[(String, Arc<Trace>)]) -> anyhow::Result<Vec<Row>> {
    let plan = args.plan()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no threads to run on")?;
    runtime.block_on(async {
        let mut stops = stops()?;
        match &args.router {
            Some(url) => router::replay(args.router_settings(url)?, &plan, traces, &mut stops.told).await,
            None => {
                let settings = args.store_settings(block_bytes)?;
                store::replay(&settings, &plan, traces, &mut stops.told).await
            }
        }
    })
}

/// Whether anything came back that should not have.
///
/// # Errors
/// Names it: wrong bytes, or a router that answered nothing at all.
pub fn verdict(rows: &[Row]) -> anyhow::Result<()> {
    for row in rows {
        match row {
            Row::Store(report) => {
                let (wrong, trace) = (report.blocks.wrong, &report.header.trace);
                ensure!(wrong == 0, "{wrong} blocks of {trace} came back with wrong bytes");
            }
            Row::Router(report) if report.answered == 0 && report.requests > 0 => {
                bail!("no request of {} was answered", report.header.trace)
            }
            Row::Router(_) => {}
        }
    }
    Ok(())
}

/// Requests to stop: the first to end in order, the second at once.
struct Stops {
    told: mpsc::Receiver<()>,
    _listening: JoinSet<()>,
}

fn stops() -> anyhow::Result<Stops> {
    let (tell, told) = mpsc::channel(2);
    let mut listening = JoinSet::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let (mut signals, tell) = (signal(kind).context("signals can't be heard")?, tell.clone());
        listening.spawn(async move {
            while signals.recv().await.is_some() {
                // One that finds the channel full was not needed.
                let _ = tell.try_send(());
            }
        });
    }
    Ok(Stops { told, _listening: listening })
}
