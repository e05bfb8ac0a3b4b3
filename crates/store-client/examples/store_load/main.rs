//! One client of the KV store, as `scripts/bench kv-store` needs it: told what to do by JSON lines on standard input,
//! answers by JSON lines. It has an arena of its own, whose values it puts into the store and gets back, and tells how long
//! each call took.
//!
//! A value is a block. Single values are prompts of one block; a batch is one prompt of so many.

mod load;

use std::{
    io::{BufRead, Write},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use kvasir_cluster::{EtcdConfig, Registry};
use kvasir_store_client::{Config, StoreClient};
use kvasir_transfer::{LocalNet, TransferEngine};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use load::Load;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How long the store nodes may take to be seen.
const SEEN: Duration = Duration::from_secs(10);

/// The single argument: `{"etcd": "127.0.0.1:2379", "transports": "auto", "arena": bytes, "nodes": how many to wait for}`.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let settings = std::env::args().nth(1).and_then(|text| serde_json::from_str(&text).ok());
    let Some(settings) = settings else {
        eprintln!("usage: store_load SETTINGS (JSON)");
        return ExitCode::FAILURE;
    };
    match serve(&settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("store_load: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(settings: &Value) -> Result<(), Failure> {
    let etcd = settings["etcd"].as_str().ok_or("etcd is missing")?.to_owned();
    let config = EtcdConfig { endpoints: vec![etcd], ..EtcdConfig::default() };
    let (registry, watching) = kvasir_cluster::connect_etcd(config).await?;
    // Aborted when this returns.
    let mut tasks = JoinSet::new();
    tasks.spawn(watching);
    let engine = engine(settings)?;
    let client = StoreClient::new(Config::default(), registry.view(), engine.clone());
    nodes(&*registry, &client, settings["nodes"].as_u64().unwrap_or(1) as usize).await?;
    let load = Arc::new(Load::new(client, engine, registry));
    // Lines come from a pipe: a thread of its own may wait for them.
    let (sender, mut lines) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        std::io::stdin().lock().lines().map_while(Result::ok).try_for_each(|line| sender.blocking_send(line))
    });
    while let Some(line) = lines.recv().await {
        let answer = match serde_json::from_str(&line) {
            Ok(ask) => load.clone().answer(&ask).await.unwrap_or_else(|error| json!({"error": error.to_string()})),
            Err(error) => json!({"error": error.to_string()}),
        };
        let mut output = std::io::stdout().lock();
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

fn engine(settings: &Value) -> Result<TransferEngine, Failure> {
    let transports = serde_json::from_value(settings["transports"].clone())?;
    let config = kvasir_transfer::Config { transports, ..Default::default() };
    let arena = settings["arena"].as_u64().ok_or("arena is missing")?;
    Ok(TransferEngine::new(config, LocalNet::new(), usize::try_from(arena)?)?)
}

async fn nodes(registry: &dyn Registry, client: &StoreClient, wanted: usize) -> Result<(), Failure> {
    let mut view = registry.view();
    let seen = async {
        while client.nodes() < wanted {
            view.changed().await?;
        }
        Ok(())
    };
    tokio::time::timeout(SEEN, seen).await.map_err(|_| "the nodes are not seen")?
}
