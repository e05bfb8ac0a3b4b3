//! `prefill-worker`: the prefill role as a process of its own.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use kvasir_runtime::Service;
use kvasir_worker::{Config, Role};

const ABOUT: &str = "Computes prompts for decode workers and writes their KV blocks into the decode workers' memory.

Needs a model folder (model.path) and etcd (registry.etcd.endpoints). Example:
  prefill-worker --set model.path=models/demo --set registry.etcd.endpoints=[127.0.0.1:2379]";

fn main() -> ExitCode {
    let service = Service { name: "prefill-worker", about: ABOUT, version: env!("CARGO_PKG_VERSION") };
    kvasir_runtime::main(service, |config: Config, context| {
        kvasir_worker::run_with_etcd(Role::Prefill, config, context)
    })
}
