//! One service process of the cluster under test.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use kvasir_proto::v1::{
    StatusRequest, StatusResponse, StoreStatusRequest, StoreStatusResponse, store_client::StoreClient,
    worker_client::WorkerClient,
};
use kvasir_rpc::Rpc;
use serde::Deserialize;
use serde_json::Value;

use crate::{Process, logs, metrics::Metrics, wait, workspace};

/// How long one service may take from start to ready on a busy machine, its model read included.
const START: Duration = Duration::from_secs(40);

/// How long one question to a service may take.
const ASK: Duration = Duration::from_secs(5);

/// A kind of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Speaks HTTP.
    Router,
    /// Computes prompts.
    Prefill,
    /// Writes answers.
    Decode,
    /// Keeps KV blocks.
    KvStore,
}

impl Service {
    /// The program's name.
    pub fn binary(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Prefill => "prefill-worker",
            Self::Decode => "decode-worker",
            Self::KvStore => "kv-store",
        }
    }

    /// The id of the `index`th process of that kind.
    pub fn id(self, index: usize) -> String {
        let name = match self {
            Self::Router => "router",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::KvStore => "kv-store",
        };
        format!("{name}-{index}")
    }

    /// Whether it has KV blocks of its own.
    pub fn is_worker(self) -> bool {
        matches!(self, Self::Prefill | Self::Decode)
    }
}

/// A process and where it listens.
pub struct Node {
    /// What it is.
    pub service: Service,
    /// The process, for signals and logs.
    pub process: Process,
    port_file: PathBuf,
    addresses: Addresses,
    rpc: Rpc,
    calls: kvasir_rpc::Config,
}

/// Where a service listens, as it says itself in its port file. What it does not offer is empty.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Addresses {
    /// `host:port` of its gRPC server.
    pub grpc: String,
    /// `host:port` of its HTTP API (routers, standalone).
    pub http: String,
    /// `host:port` of its health, readiness and metrics pages.
    pub admin: String,
}

impl Addresses {
    /// Waits for the port file of a process that was just started; if it exits instead, the error shows its last words.
    pub async fn of(process: &mut Process, port_file: &Path) -> Result<Self> {
        let what = format!("{} writes its port file", process.name());
        let found = wait::until(&what, START, async || {
            if let Some(status) = process.ended() {
                return Some(Err(status));
            }
            let text = std::fs::read_to_string(port_file).ok()?;
            serde_json::from_str(&text).ok().map(Ok)
        });
        let found = found.await?;
        found.map_err(|status| {
            anyhow!("{} exited with {status}:\n{}", process.name(), logs::tail(&process.log(), 5, "  "))
        })
    }

    /// Waits until the service says that it is ready.
    pub async fn ready(&self) -> Result<()> {
        let http = reqwest::Client::builder().timeout(ASK).build()?;
        let url = format!("http://{}/ready", self.admin);
        wait::until(&format!("{url} says so"), START, async || {
            http.get(&url).send().await.is_ok_and(|reply| reply.status().is_success()).then_some(())
        })
        .await
    }
}

impl Node {
    /// Starts a service with that configuration, its files in `dir`, behind what is to come before its command. It is not
    /// ready yet.
    pub fn spawn(service: Service, id: &str, mut config: Value, dir: &Path, enter: &[String]) -> Result<Self> {
        let calls = config.get("rpc").map(|rpc| serde_json::from_value(rpc.clone())).transpose()?.unwrap_or_default();
        let (rpc, _) = Rpc::open(&calls)?;
        let port_file = dir.join(format!("{id}.ports.json"));
        let _ = std::fs::remove_file(&port_file); // a former life's
        config["port_file"] = port_file.to_string_lossy().into();
        let path = dir.join(format!("{id}.yaml"));
        std::fs::write(&path, serde_json::to_string_pretty(&config)?)?;
        let binary = workspace::binary(service.binary())?;
        let mut command = match enter {
            [] => Command::new(binary),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(binary);
                command
            }
        };
        command.arg("--config").arg(&path);
        let process = Process::spawn(id, command, dir)?;
        Ok(Self { service, process, port_file, addresses: Addresses::default(), rpc, calls })
    }

    /// Waits until it says that it is ready; if it exits instead, the error shows its last words.
    pub async fn ready(&mut self) -> Result<()> {
        self.addresses = Addresses::of(&mut self.process, &self.port_file).await?;
        self.addresses.ready().await.with_context(|| self.process.name().to_owned())
    }

    /// Reads the certificates that it is asked with again.
    pub(crate) fn renew(&mut self) -> Result<()> {
        self.rpc = Rpc::open(&self.calls)?.0;
        Ok(())
    }

    /// Its name in the cluster.
    pub fn id(&self) -> &str {
        self.process.name()
    }

    /// `host:port` of its gRPC server.
    pub fn grpc(&self) -> &str {
        &self.addresses.grpc
    }

    /// `host:port` of its HTTP API (routers).
    pub fn http(&self) -> &str {
        &self.addresses.http
    }

    /// `host:port` of its health, readiness and metrics pages.
    pub fn admin(&self) -> &str {
        &self.addresses.admin
    }

    /// A page of its admin server: status and text.
    pub async fn admin_page(&self, path: &str) -> Result<(u16, String)> {
        let http = reqwest::Client::builder().timeout(ASK).build()?;
        let reply = http.get(format!("http://{}{path}", self.addresses.admin)).send().await?;
        Ok((reply.status().as_u16(), reply.text().await?))
    }

    /// Its metrics, now.
    pub async fn metrics(&self) -> Result<Metrics> {
        let (status, text) = self.admin_page("/metrics").await?;
        if status != 200 {
            bail!("/metrics of {}: HTTP {status}", self.id());
        }
        Ok(Metrics::parse(&text))
    }

    /// A worker's own account of itself.
    pub async fn status(&self) -> Result<StatusResponse> {
        let ask = async {
            let mut client = WorkerClient::new(self.rpc.connect(&kvasir_rpc::endpoint(self.grpc())?).await?);
            anyhow::Ok(client.status(StatusRequest {}).await?.into_inner())
        };
        tokio::time::timeout(ASK, ask).await?.with_context(|| format!("status of {}", self.id()))
    }

    /// A store node's own account of itself.
    pub async fn store_status(&self) -> Result<StoreStatusResponse> {
        let ask = async {
            let mut client = StoreClient::new(self.rpc.connect(&kvasir_rpc::endpoint(self.grpc())?).await?);
            anyhow::Ok(client.store_status(StoreStatusRequest {}).await?.into_inner())
        };
        tokio::time::timeout(ASK, ask).await?.with_context(|| format!("status of {}", self.id()))
    }
}
