//! `kvasirctl bench`: load against a router, or any server that speaks OpenAI's HTTP, and what its clients would feel.
//!
//! ```text
//!   work (prompts) ─▶ drive (when) ─▶ client (HTTP, events) ─▶ tally (histograms) ─▶ show
//! ```
//!
//! All of it runs on one thread, and holds thousands of streams there: a request costs a task, a connection and the few
//! kilobytes of what is being read; figures are counted into histograms as they come. How much later than due requests were
//! sent is told with the figures: if that is much, it is this program that was measured.

mod args;
mod arrivals;
mod client;
mod drive;
mod events;
mod http;
mod show;
mod tally;
#[cfg(test)]
mod tests;
mod work;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, bail, ensure};
use kvasir_types::Role;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;

pub(crate) use self::args::BenchArgs;
use self::{
    args::Api,
    arrivals::Arrivals,
    client::Target,
    drive::{Course, Loop, drive},
    tally::{Slo, Tally},
    work::Work,
};
use crate::{output::Answer, session::Session};

/// Requests at a time unless something else is said.
const CONCURRENCY: usize = 16;
/// Requests are sent for so long unless something else is said.
const DURATION: Duration = Duration::from_secs(30);
/// Files that are open besides connections.
const OTHER_FILES: u64 = 64;

/// Measures, and says what was found. Unwell if nothing was answered.
pub(crate) async fn run(args: BenchArgs, session: &Session) -> anyhow::Result<Answer> {
    let url = match &args.url {
        Some(url) => url.clone(),
        None => router(session).await?,
    };
    let target = Target::find(&url, key(&args, session)?).await?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&target.get("/v1/models", session.limit()).await?)?,
    };
    let work = Work::open(&args, &model)?;
    let course = course(&args);
    let most = match course.pace {
        Loop::Closed(lanes) => lanes,
        Loop::Open(_) | Loop::Recorded => course.most_open,
    };
    let files = more_files();
    if most as u64 + OTHER_FILES > files {
        eprintln!("warning: {most} requests at a time may need more files than the {files} allowed (ulimit -n)");
    }
    let slo = Slo { ttft: args.slo_ttft.map(ms), tpot: args.slo_tpot.map(ms) };
    let stop = async {
        // Where signals can't be had, nobody stops it but time.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let (done, work) = drive(course, work, target, Tally { slo, ..Tally::default() }, stop).await?;
    let found = show::found(&args, &url, &model, &done, work.rounds());
    let text = session.output().show(&found, || show::table(&found));
    Ok(Answer { text, unwell: done.tally.answered == 0 })
}

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

fn course(args: &BenchArgs) -> Course {
    let pace = match (args.rate, args.concurrency, &args.trace) {
        (Some(rate), ..) => Loop::Open(Arrivals::new(args.arrivals, rate, args.seed)),
        (None, Some(lanes), _) => Loop::Closed(lanes as usize),
        (None, None, Some(_)) => Loop::Recorded,
        (None, None, None) => Loop::Closed(CONCURRENCY),
    };
    let bounded = args.requests.is_some() || args.trace.is_some();
    Course {
        pace,
        duration: args.duration.or(if bounded { None } else { Some(DURATION) }),
        requests: args.requests,
        warmup: args.warmup,
        most_open: args.most_open as usize,
        patience: args.patience,
        stream: !args.no_stream,
        path: match args.api {
            Api::Chat => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
        },
    }
}

/// The context's router, else the first of the cluster's.
async fn router(session: &Session) -> anyhow::Result<String> {
    if let Some(router) = session.context()?.0.and_then(|context| context.router) {
        return Ok(router);
    }
    let view = session.view().await.context("no URL was given, and no router is known")?;
    let address = view.role(Role::Router).map(|router| &router.http).find(|http| !http.is_empty());
    Ok(format!("http://{}", address.context("no router is running: which URL?")?))
}

fn key(args: &BenchArgs, session: &Session) -> anyhow::Result<Option<String>> {
    let key = match &args.api_key_file {
        Some(path) => Some(read_key(path)?),
        None => session.variable("KVASIR_API_KEY"),
    };
    let key = key.map(|key| key.trim().to_owned());
    let plain = |key: &String| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
    ensure!(key.as_ref().is_none_or(plain), "the API key is not one word of letters, digits and signs");
    Ok(key)
}

fn read_key(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("the API key's file {}", path.display()))
}

fn first_model(answer: &Value) -> anyhow::Result<String> {
    match answer["data"][0]["id"].as_str() {
        Some(name) => Ok(name.to_owned()),
        None => bail!("the server has no models: name one with --model"),
    }
}

/// As many files as this process may have open: each connection is one.
fn more_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    if raised.is_ok() { most } else { limit.current.unwrap_or(most) }
}
