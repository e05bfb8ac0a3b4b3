//! The router's process.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use kvasir_router::{Config, run_with_etcd};
use kvasir_runtime::Service;

fn main() -> ExitCode {
    let service = Service {
        name: "router",
        about: "Speaks OpenAI's HTTP API in front of Kvasir's prefill and decode workers.",
        version: env!("CARGO_PKG_VERSION"),
    };
    kvasir_runtime::main(service, |config: Config, context| run_with_etcd(config, context))
}
