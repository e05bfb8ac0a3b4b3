//! `scripts/bench NAME`: measures ours and theirs in turn, prints a table, writes `target/bench/NAME.json`.
//!
//! A benchmark is a module with one `run(&Options) -> Result<Report>`. It measures ours and the rival in the same run, one
//! after the other and again, so that whatever else the machine does hits both; figures are medians.

#![forbid(unsafe_code)]

mod apart;
mod child;
mod ctl;
mod engine;
mod first_light;
mod kv_store;
mod record;
mod report;
mod rivals;
mod router;
mod shared_prompt;
mod transfer;

use std::process::ExitCode;

use anyhow::{Result, bail};
use report::Report;

/// What all benchmarks understand.
struct Options {
    /// How often each figure is measured.
    repetitions: usize,
    /// Only to see that it works: on a tiny model where there is one.
    smoke: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match Box::pin(run()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (name, repetitions) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [name] => (name, 9),
        [name, "--quick"] => (name, 2),
        [name, "--smoke"] => (name, 1),
        [name, "--record"] => return record::record(name),
        // A process of a benchmark.
        ["ctl", "server"] => return Box::pin(ctl::server::run()).await,
        ["ctl", "members", ref rest @ ..] => return Box::pin(ctl::members(rest)).await,
        ["router-worker", ref rest @ ..] => return Box::pin(router::worker::run(rest)).await,
        _ => bail!("usage: bench NAME [--quick | --smoke | --record]"),
    };
    let options = Options { repetitions, smoke: repetitions == 1 };
    if name == "router" {
        router::install();
        if !apart::entered()? {
            return Ok(());
        }
    }
    let report: Report = match name {
        "ctl" => ctl::run(&options).await?,
        "engine" => engine::run(&options)?,
        "first-light" => first_light::run(&options).await?,
        "kv-store" => kv_store::run(&options).await?,
        "router" => router::run(&options).await?,
        "shared-prompt" => shared_prompt::run(&options).await?,
        "transfer" => transfer::run(&options)?,
        _ => bail!(
            "there is no benchmark '{name}'; there are: ctl, engine, first-light, kv-store, router, shared-prompt, transfer"
        ),
    };
    report.finish()
}
