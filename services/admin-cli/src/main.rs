//! `kvasirctl`: shows an operator what the cluster is doing, and changes it.
//!
//! ```text
//!   arguments ─▶ session ─▶ a verb: a file or a folder each ─▶ table, JSON or YAML, and an exit status
//!                  └─ etcd: who is there; members: how are you (in parallel, each with a time limit), when a verb asks for it
//! ```
//!
//! Exit status: 0 the question was answered (members that could not be reached are shown as such), 1 the cluster's metadata
//! could not be read or what was to be done was not, 2 wrong usage, 3 the answer is that something is wrong, for verbs that
//! are asked for that. `--help` and verbs that need no cluster connect to nobody.
#![forbid(unsafe_code)]

mod bench;
mod bundle;
mod cli;
mod config;
mod context;
mod doctor;
mod engine;
mod events;
mod gather;
mod judge;
mod kv;
mod output;
mod planner;
mod probe;
mod reference;
mod render;
mod report;
mod requests;
mod route;
mod session;
mod stage;
mod status;
mod top;
mod trace;
mod transfer;
mod via;
mod worker;
mod workers;

use std::{io::Write, process::ExitCode};

use clap::Parser;

use crate::{
    cli::{Cli, Command},
    output::{Answer, Usage},
    session::Session,
};

fn main() -> ExitCode {
    let Cli { globals, command } = Cli::parse(); // exits with 2 on wrong usage
    let session = Session::new(globals, |name| std::env::var(name).ok());
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(answer(command, &session)) {
        Ok(Answer { text, unwell }) => {
            // A reader that has seen enough (`| head`) closes the pipe; that is no failure of ours.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::from(if unwell { 3 } else { 0 })
        }
        Err(error) => {
            eprintln!("error: {}", kvasir_runtime::chain(error.as_ref()));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// The verb's answer. Each opens of the session what it needs.
async fn answer(command: Command, session: &Session) -> anyhow::Result<Answer> {
    match command {
        Command::Status(args) => status::run(args, session).await,
        Command::Top(args) => top::run(args, session).await,
        Command::Workers(args) => workers::run(args, session).await,
        Command::Models => {
            let report = gather::gather(session).await?;
            Ok(session.output().show(&report.models, || render::models(&report)).into())
        }
        Command::Transfers => {
            let report = gather::gather(session).await?;
            Ok(session.output().show(&report.transfers(), || render::transfers(&report)).into())
        }
        Command::Transfer(command) => transfer::run(command, session).await,
        Command::Kv(command) => kv::run(command, session).await,
        Command::Worker(command) => worker::run(command, session).await,
        Command::Engine(command) => engine::run(command, session).await,
        Command::Planner => planner::run(session).await,
        Command::Requests(command) => requests::run(command, session).await,
        Command::Trace(args) => trace::run(args, session).await,
        Command::Events(args) => events::run(args, session).await,
        Command::Config(command) => config::run(command, session).await,
        Command::Route(command) => route::run(command, session).await,
        Command::Bench(args) => bench::run(*args, session).await,
        Command::Doctor(args) => doctor::run(args, session).await,
        Command::SupportBundle(args) => bundle::run(args, session).await,
        Command::Context(command) => context::run(command, session),
        Command::Completion(args) => Ok(reference::completion(&args)),
        Command::Man(args) => reference::man(&args, session),
        Command::Docs(args) => reference::docs(&args),
    }
}
