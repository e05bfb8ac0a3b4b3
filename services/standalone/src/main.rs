//! `standalone`: a whole cluster in one process: router, prefill worker, decode worker, KV store, metadata in memory.
//!
//! For trying Kvasir and for developing against it. The parts are the ones the separate services run, they speak gRPC to
//! one another over loopback, and only the bytes of KV take the short way: memcpy instead of sockets.
#![forbid(unsafe_code)]

mod config;

use std::process::ExitCode;

use anyhow::Context as _;
use config::Config;
use kvasir_cluster::MemoryHub;
use kvasir_runtime::{Context, Kind, Service};
use kvasir_transfer::LocalNet;
use kvasir_worker::Role;

const ABOUT: &str = "A whole cluster in one process: router, prefill and decode workers, KV store, metadata in memory.

Needs a model folder (model.path). Example:
  standalone --set model.path=models/demo --set listen=127.0.0.1:8000";

fn main() -> ExitCode {
    let service = Service { name: "standalone", about: ABOUT, version: env!("CARGO_PKG_VERSION") };
    kvasir_runtime::main(service, run)
}

async fn run(config: Config, context: Context) -> anyhow::Result<()> {
    config.check()?;
    let admin = kvasir_runtime::admin::start(&config.admin, &context).await?;
    let (hub, local) = (MemoryHub::new(), LocalNet::new());

    // Each part has a context of its own: this process is ready once all of them are.
    let router = kvasir_router::run(config.router(), context.child("router"), hub.registry());
    context.tasks.spawn(Kind::Critical, "router", router);
    if config.store.enabled {
        let store = kvasir_kv_store::run(config.kv_store(), context.child("kv-store"), hub.registry(), local.clone());
        context.tasks.spawn(Kind::Critical, "kv-store", store);
    }
    for (role, count) in [(Role::Prefill, config.prefill_workers), (Role::Decode, config.decode_workers)] {
        for index in 0..count {
            let name = format!("{role}-{index}");
            let worker = config.worker(&name);
            let run = kvasir_worker::run(role, worker, context.child(&name), hub.registry(), local.clone());
            context.tasks.spawn(Kind::Critical, "worker", async move { run.await.context(name) });
        }
    }
    tracing::info!(admin = %admin, "starting");

    context.shutdown.wait().await;
    Ok(())
}
