//! `kvasirctl`: shows an operator what the cluster is doing.
//!
//! ```text
//!   arguments ─▶ etcd: who is there ─▶ every member: how are you (in parallel, each with a time limit) ─▶ table or JSON
//! ```
//!
//! It only reads, but for `engine`, `kv pin`, `kv unpin`, `kv evict`, `kv drain`, `route policy NAME` and `worker`. Exit status: 0 the question was answered (members that could
//! not be reached are shown as such), 1 the cluster's metadata could not be read or what was to be done was not, 2 wrong
//! usage.
#![forbid(unsafe_code)]

mod cli;
mod engine;
mod gather;
mod judge;
mod kv;
mod planner;
mod probe;
mod render;
mod report;
mod route;
mod worker;

use std::{io::Write, process::ExitCode};

use clap::Parser;

use crate::cli::{Cli, Command, Output};

fn main() -> ExitCode {
    let cli = Cli::parse(); // exits with 2 on wrong usage
    let etcd = match cli.etcd(std::env::var("KVASIR_ETCD").ok()) {
        Ok(etcd) => etcd,
        Err(line) => {
            eprintln!("error: {line}");
            return ExitCode::from(2);
        }
    };
    let rpc = match kvasir_rpc::Config::from_variables(|name| std::env::var(name).ok()) {
        Ok(rpc) => rpc,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    match answer(&cli, etcd, &rpc) {
        Ok(text) => {
            // A reader that has seen enough (`| head`) closes the pipe; that is no failure of ours.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}", kvasir_runtime::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn answer(cli: &Cli, etcd: kvasir_cluster::EtcdConfig, rpc: &kvasir_rpc::Config) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // It is done before certificates change.
    let (rpc, _) = kvasir_rpc::Rpc::open(rpc)?;
    let way = probe::Way { rpc, limit: cli.timeout() };
    if let Command::Kv(command) = &cli.command {
        return runtime.block_on(async {
            let view = gather::view(etcd).await?;
            kv::run(command, &view, way, cli.output).await
        });
    }
    if let Command::Route(command) = &cli.command {
        return runtime.block_on(async {
            let view = gather::view(etcd).await?;
            route::run(command, &view, cli.timeout(), cli.output).await
        });
    }
    if let Command::Planner = &cli.command {
        return runtime.block_on(async {
            let view = gather::view(etcd).await?;
            planner::run(&view, cli.timeout(), cli.output).await
        });
    }
    if let Command::Worker(command) = &cli.command {
        return runtime.block_on(async {
            let view = gather::view(etcd).await?;
            worker::run(command, &view, &way, cli.output).await
        });
    }
    if let Command::Engine(command) = &cli.command {
        return runtime.block_on(engine::run(command, etcd, cli.output));
    }
    let report = runtime.block_on(gather::gather(etcd, &way))?;
    Ok(match (&cli.output, &cli.command) {
        (Output::Table, Command::Status) => render::status(&report),
        (Output::Table, Command::Workers) => render::workers(&report),
        (Output::Table, Command::Models) => render::models(&report),
        (Output::Table, Command::Transfers) => render::transfers(&report),
        (Output::Json, Command::Transfers) => render::json(&report.transfers()),
        (Output::Json, Command::Status) => render::json(&report),
        (Output::Json, Command::Workers) => render::json(&report.workers()),
        (Output::Json, Command::Models) => render::json(&report.models),
        (_, Command::Kv(_) | Command::Engine(_) | Command::Route(_) | Command::Worker(_) | Command::Planner) => {
            unreachable!("answered above")
        }
    })
}
