//! Our side: etcd, store nodes, and `store_load` as their client, processes of their own.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use kvasir_tests::{Cluster, Service, workspace};
use serde_json::{Value, json};

use crate::child::Child;

/// A running store and one client of it.
pub struct Ours {
    pub client: Child,
    cluster: Cluster,
}

impl Ours {
    /// Starts `nodes` nodes, each with room for half as much again as the client's arena holds.
    pub async fn start(name: &str, transports: Value, nodes: usize, arena: u64, dir: &Path) -> Result<Self> {
        let builder = Cluster::builder().prefill(0).decode(0).routers(0).kv_store(nodes);
        let builder = builder.set(Service::KvStore, "capacity_bytes", arena * 3 / 2);
        let mut cluster = builder.set(Service::KvStore, "transfer.transports", transports.clone()).start().await?;
        let program = workspace::profile_dir().join("examples/store_load");
        let mut command = Command::new(program);
        let etcd = cluster.etcd().endpoint().to_owned();
        command.arg(json!({"etcd": etcd, "transports": transports, "arena": arena, "nodes": nodes}).to_string());
        let mut client = Child::start(&format!("store-load-{name}"), command, dir)?;
        client.ask(&json!({"do": "hello"})).context("our client of the store")?;
        Ok(Self { client, cluster })
    }

    /// Takes all values out. What the store would give up by itself is another question than how fast it is: it keeps what was
    /// read before, and lets new values go instead.
    pub fn clear(&mut self) -> Result<()> {
        self.client.ask(&json!({"do": "clear"})).map(drop)
    }

    /// Processor seconds of client and nodes so far.
    pub fn cpu_seconds(&self) -> f64 {
        let nodes: f64 = self.cluster.nodes().iter().map(|node| node.process.cpu_seconds()).sum();
        nodes + self.client.cpu_seconds()
    }
}
