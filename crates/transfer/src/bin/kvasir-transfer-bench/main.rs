//! `kvasir-transfer-bench`: how fast the transfer engine moves bytes between two processes, and whether all arrive.
//!
//! ```text
//!   initiator ── control: one JSON line each way ──▶ target        descriptor, key, CPU time, fill, check
//!       └────── batches of blocks, read or write ──────▶ │          what is measured
//! ```
//!
//! Beside it what bounds it on the same machine: `local` (a memcpy, and the engine within one process) and `socket` (a
//! plain loop over one connection, with no protocol). `scripts/bench transfer` runs all of them against other transfer
//! engines.

#![expect(unsafe_code, reason = "asks the kernel for processor time and huge pages, sets a variable for UCX")]

mod cli;
mod control;
mod engine;
mod initiator;
mod local;
mod measure;
mod output;
mod pattern;
mod socket;
mod target;
mod topology;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    if std::env::var_os("UCX_LOG_FILE").is_none() {
        // UCX warns on standard output, which here is for what was found.
        #[expect(clippy::disallowed_methods, reason = "for a C library, which reads it from the environment only")]
        // SAFETY: no other thread runs yet that could read the environment meanwhile.
        unsafe {
            std::env::set_var("UCX_LOG_FILE", "stderr");
        }
    }
    let done = match cli::Cli::parse().command {
        cli::Command::Target(options) => target::run(&options),
        cli::Command::Initiator(options) => initiator::run(&options),
        cli::Command::Local(options) => local::run(&options),
        cli::Command::Topology(options) => topology::run(&options),
        cli::Command::Socket(cli::Socket::Server(options)) => socket::serve(&options),
        cli::Command::Socket(cli::Socket::Client(options)) => socket::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvasir-transfer-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
