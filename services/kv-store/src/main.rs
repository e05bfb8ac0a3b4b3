//! The `kv-store` service.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let service = kvasir_runtime::Service {
        name: "kv-store",
        about: "Keeps KV blocks for the workers of a Kvasir cluster.",
        version: env!("CARGO_PKG_VERSION"),
    };
    kvasir_runtime::main(service, kvasir_kv_store::run_with_etcd)
}
