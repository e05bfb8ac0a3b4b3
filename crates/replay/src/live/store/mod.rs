//! A trace against the nodes of a running KV store, without a model.
//!
//! Each request does what a worker does: looks its prompt's blocks up, reads the run that is there, and offers the others,
//! which takes reserving, writing one-sided and committing. What a worker does not do: every block read is compared with
//! what must be in it, beside the checksum that the store's client verifies anyway.
//!
//! A block of a recorded trace is some 512 tokens, and of a store 16: so a block of the trace is put into the store in
//! parts, unless told otherwise as many as the nodes place together. (Were it one block, 32 blocks of the trace would be
//! placed by the first of them, which in a service with one system prompt is everybody's.)

mod lane;
mod report;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use kvasir_cluster::{EtcdConfig, Registry};
use kvasir_store_client::{Config, StoreClient};
use kvasir_transfer::{LocalNet, TransferEngine};
use kvasir_types::Role;
use tokio::{sync::mpsc, task::JoinSet};

pub use report::{Blocks, Bytes, NodeShare, Report, Times};

use self::{
    lane::StoreLane,
    report::{Counts, Shape},
};
use super::{
    Names, Plan, Row,
    bound::Bound,
    drive::{Course, drive},
    pass::Pass,
};
use crate::trace::Trace;

/// Bytes of a request may take so many times as long to move as a node may take for an answer.
const PATIENCE: u32 = 10;

/// Whom to replay against, and with what.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the cluster's metadata is.
    pub etcd: EtcdConfig,
    /// Bytes of each block of the trace.
    pub block_bytes: u64,
    /// Blocks of the store that it becomes; `None`: as many as the nodes place together.
    pub split: Option<u64>,
    /// How long a node has for an answer.
    pub timeout: Duration,
    /// How nodes are called.
    pub rpc: kvasir_rpc::Rpc,
}

/// What all lanes of a pass share.
struct Ground {
    client: StoreClient,
    engine: TransferEngine,
    names: Names,
    /// Bytes of a block of the store.
    block_bytes: u64,
    /// Blocks of the store for one of the trace.
    split: u64,
    patience: Duration,
}

pub(super) async fn replay(
    settings: &Settings,
    plan: &Plan,
    traces: &[(String, Arc<Trace>)],
    stops: &mut mpsc::Receiver<()>,
) -> anyhow::Result<Vec<Row>> {
    let (registry, watching) =
        kvasir_cluster::connect_etcd(settings.etcd.clone()).await.context("the cluster's members can't be read")?;
    // Aborted when this returns.
    let mut tasks = JoinSet::new();
    tasks.spawn(watching);
    eprintln!("namespace {}: the same again finds what this run leaves", plan.namespace);
    let mut rows = Vec::new();
    for (name, trace) in traces {
        let (ground, arena) = ground(settings, plan, name, trace, &*registry)?;
        let (ground, mut bound) = (Arc::new(ground), Bound::new(trace));
        for pass in 1..=plan.repeat {
            let lanes = (0..plan.lanes).map(|lane| StoreLane::new(ground.clone(), arena * lane as u64)).collect();
            let course = Course { name: name.clone(), trace: trace.clone(), limit: plan.limit, pace: plan.pace };
            let (counts, ended) = drive(course, lanes, Counts::default(), stops).await;
            let about = Pass { name, trace, pass, plan, ended };
            let shape = Shape { block_bytes: ground.block_bytes, split: ground.split };
            let report = counts.report(&about, shape, nodes(&*registry), &mut bound);
            print!("{}", report.table());
            rows.push(Row::Store(report));
            if ended.stopped {
                ground.engine.shutdown();
                return Ok(rows);
            }
        }
        ground.engine.shutdown();
    }
    Ok(rows)
}

/// The client of a trace's passes, and how many bytes of the arena each lane has: enough for the longest prompt.
fn ground(
    settings: &Settings,
    plan: &Plan,
    name: &str,
    trace: &Trace,
    registry: &dyn Registry,
) -> anyhow::Result<(Ground, u64)> {
    let group = registry.view().borrow().role(Role::KvStore).find_map(|node| Some(node.store.as_ref()?.group_blocks));
    let split = settings.split.unwrap_or_else(|| group.unwrap_or(1).max(1).into());
    let block_bytes = settings.block_bytes / split;
    ensure!(
        block_bytes > 0 && settings.block_bytes.is_multiple_of(split),
        "{} bytes can't be put into {split} blocks of the store (--block-bytes, --split)",
        settings.block_bytes
    );
    let longest = trace.requests.iter().take(plan.limit).map(|request| request.blocks.len()).max().unwrap_or(0);
    let lane = (longest.max(1) as u64).checked_mul(settings.block_bytes);
    let arena = lane.and_then(|lane| usize::try_from(lane.checked_mul(plan.lanes as u64)?).ok());
    let (Some(lane), Some(arena)) = (lane, arena) else {
        bail!(
            "{name}: {} prompts of {longest} blocks of {} bytes are too many bytes",
            plan.lanes,
            settings.block_bytes
        );
    };
    let engine =
        TransferEngine::new(kvasir_transfer::Config::default(), LocalNet::new(), arena).with_context(|| {
            let size = super::stats::bytes(arena as u64);
            format!("no {size} of memory for prompts of {longest} blocks; --concurrency or --block-bytes makes it less")
        })?;
    let ms = settings.timeout.as_millis() as u64;
    let config = Config { timeout_ms: ms, lookup_timeout_ms: ms, rpc: settings.rpc.clone(), ..Config::default() };
    let client = StoreClient::new(config, registry.view(), engine.clone());
    ensure!(client.nodes() > 0, "no store node is running (or --prefix names another cluster)");
    let names = Names::new(&plan.namespace, name, block_bytes);
    let patience = settings.timeout.saturating_mul(PATIENCE);
    Ok((Ground { client, engine, names, block_bytes, split, patience }, lane))
}

/// Names of the store's nodes, as far as they are known now.
fn nodes(registry: &dyn Registry) -> BTreeSet<String> {
    registry.view().borrow().role(Role::KvStore).map(|member| member.id.to_string()).collect()
}
