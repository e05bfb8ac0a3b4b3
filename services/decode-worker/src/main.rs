//! `decode-worker`: the decode role as a process of its own.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use kvasir_runtime::Service;
use kvasir_worker::{Config, Role};

const ABOUT: &str = "Owns requests: has their prompts computed by prefill workers and writes the answers.

Needs a model folder (model.path) and etcd (registry.etcd.endpoints). Example:
  decode-worker --set model.path=models/demo --set registry.etcd.endpoints=[127.0.0.1:2379]";

fn main() -> ExitCode {
    let service = Service { name: "decode-worker", about: ABOUT, version: env!("CARGO_PKG_VERSION") };
    kvasir_runtime::main(service, |config: Config, context| kvasir_worker::run_with_etcd(Role::Decode, config, context))
}
