//! One configuration for all parts of a standalone cluster.

use std::{net::SocketAddr, path::PathBuf};

use kvasir_runtime::{AdminConfig, LogConfig, ShutdownConfig, TraceConfig};
use kvasir_worker::{DecodeConfig, EngineConfig, KvConfig, ModelConfig, PrefillConfig};
use serde::{Deserialize, Serialize};

/// A cluster in one process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Where the router listens for HTTP. Default 127.0.0.1:8000.
    pub listen: SocketAddr,
    /// File to write the router's actual address to once it serves (JSON).
    pub port_file: Option<PathBuf>,
    /// Threads of the async runtime. Default: one for every core.
    pub threads: Option<usize>,
    /// Health, readiness and metrics of the process as a whole.
    pub admin: AdminConfig,
    /// Logging.
    pub log: LogConfig,
    /// Spans of requests, for OpenTelemetry.
    pub trace: TraceConfig,
    /// Shutdown.
    pub shutdown: ShutdownConfig,
    /// Prefill workers to start. 0: decode workers compute prompts themselves. Default 1.
    pub prefill_workers: usize,
    /// Decode workers to start. Default 1.
    pub decode_workers: usize,
    /// The model served.
    pub model: ModelConfig,
    /// Batching and threads of each worker.
    pub engine: EngineConfig,
    /// KV cache of each worker.
    pub kv: KvConfig,
    /// The decode role.
    pub decode: DecodeConfig,
    /// The prefill role.
    pub prefill: PrefillConfig,
    /// The KV store.
    pub store: StoreConfig,
    /// What a client may ask for, and for how long.
    pub limits: kvasir_router::Limits,
}

/// The KV store.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct StoreConfig {
    /// Whether there is one. Default true.
    pub enabled: bool,
    /// Memory for stored KV blocks, in bytes. Default 268435456 (256 MiB).
    pub capacity_bytes: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { enabled: true, capacity_bytes: 256 << 20 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            port_file: None,
            threads: None,
            admin: AdminConfig::default(),
            log: LogConfig::default(),
            trace: TraceConfig::default(),
            shutdown: ShutdownConfig::default(),
            prefill_workers: 1,
            decode_workers: 1,
            model: ModelConfig::default(),
            engine: EngineConfig::default(),
            kv: KvConfig::default(),
            decode: DecodeConfig::default(),
            prefill: PrefillConfig::default(),
            store: StoreConfig::default(),
            limits: kvasir_router::Limits::default(),
        }
    }
}

impl kvasir_runtime::Config for Config {
    const FLAGS: &'static [(&'static str, &'static str, &'static str)] = kvasir_worker::FLAGS;
}

impl Config {
    /// Checks what the types can't, before any part is started.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.decode_workers > 0, "decode_workers: must be at least 1");
        self.worker("check").check()?;
        self.router().check()?;
        Ok(())
    }

    pub(crate) fn router(&self) -> kvasir_router::Config {
        let ModelConfig { path, .. } = self.model.clone();
        kvasir_router::Config {
            id: Some("router-0".to_owned()),
            listen: self.listen,
            port_file: self.port_file.clone(),
            shutdown: self.shutdown.clone(),
            models: vec![kvasir_router::ModelConfig::new(self.model_name(), path)],
            limits: self.limits.clone(),
            ..kvasir_router::Config::default()
        }
    }

    pub(crate) fn kv_store(&self) -> kvasir_kv_store::Config {
        kvasir_kv_store::Config {
            id: Some("kv-store-0".to_owned()),
            capacity_bytes: self.store.capacity_bytes,
            shutdown: self.shutdown.clone(),
            ..kvasir_kv_store::Config::default()
        }
    }

    pub(crate) fn worker(&self, id: &str) -> kvasir_worker::Config {
        kvasir_worker::Config {
            id: Some(id.to_owned()),
            shutdown: self.shutdown.clone(),
            model: ModelConfig { name: Some(self.model_name()), ..self.model.clone() },
            engine: self.engine.clone(),
            kv: self.kv.clone(),
            decode: self.decode.clone(),
            prefill: self.prefill.clone(),
            store: kvasir_worker::StoreConfig { enabled: self.store.enabled, ..Default::default() },
            ..kvasir_worker::Config::default()
        }
    }

    /// The configured name, else the folder's.
    fn model_name(&self) -> String {
        let folder = || self.model.path.file_name().map(|name| name.to_string_lossy().into_owned());
        self.model.name.clone().or_else(folder).unwrap_or_default()
    }
}
