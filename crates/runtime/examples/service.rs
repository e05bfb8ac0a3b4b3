//! The smallest service: takes requests that last as long as it is told to. The crate's process tests run it.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode, time::Duration};

use kvasir_runtime::{AdminConfig, Kind, LogConfig, Service, ShutdownConfig};
use serde::{Deserialize, Serialize};

/// What it does.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    /// How long its one request lasts, in milliseconds.
    request_ms: u64,
    /// Whether its background task panics.
    panics: bool,
    threads: Option<usize>,
    port_file: PathBuf,
    admin: AdminConfig,
    log: LogConfig,
    shutdown: ShutdownConfig,
}

impl kvasir_runtime::Config for Config {}

fn main() -> ExitCode {
    let service = Service { name: "service", about: "Does nothing, properly.", version: "0.0.0" };
    kvasir_runtime::main(service, |config: Config, context| async move {
        let admin = kvasir_runtime::admin::start(&config.admin, &context).await?;
        let span = tracing::info_span!("request", request_id = "r-1");
        context.tasks.spawn_in(Kind::Request, "request", span, async move {
            tokio::time::sleep(Duration::from_millis(config.request_ms)).await;
            tracing::info!("request done");
            Ok(())
        });
        if config.panics {
            context.tasks.spawn(Kind::Background, "panics", async { panic!("on purpose") });
        }
        context.health.set_ready();
        kvasir_runtime::write_port_file(&config.port_file, &serde_json::json!({ "admin": admin }))?;
        tracing::info!(%admin, "ready");
        context.shutdown.wait().await;
        Ok(())
    })
}
