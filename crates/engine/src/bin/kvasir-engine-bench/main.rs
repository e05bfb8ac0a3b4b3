//! `kvasir-engine-bench`: how fast the engine computes, in one process, with no network and no tokenizer.
//!
//! ```text
//!   scenario ──requests──▶ Engine::step() in a loop on this thread ──▶ when each token came
//!                               └ scheduler, cache, sampler, CPU backend: all that a worker runs
//! ```
//!
//! Figures stand beside what the machine can do at most (multiply-adds from registers, bytes read from memory), measured
//! in the same run: a share of a data sheet's number says little on a machine that others use, too. `scripts/bench engine`
//! runs the scenarios beside other programs on the same weights.

#![forbid(unsafe_code)]

mod accuracy;
mod cli;
mod decode;
mod limits;
mod measure;
mod mixed;
mod output;
mod prefill;
mod prefix;
mod rig;
mod source;
mod throughput;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let done = match cli::Cli::parse().command {
        cli::Command::Throughput(options) => throughput::run(&options),
        cli::Command::Prefill(options) => prefill::run(&options),
        cli::Command::Decode(options) => decode::run(&options),
        cli::Command::Mixed(options) => mixed::run(&options),
        cli::Command::Prefix(options) => prefix::run(&options),
        cli::Command::Accuracy(options) => accuracy::run(&options),
        cli::Command::Limits(options) => limits::run(&options),
        cli::Command::Shape(options) => source::write(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvasir-engine-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
