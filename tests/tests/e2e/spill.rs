//! A decode worker with fewer blocks than its requests need: those that lose theirs get them back from the store, and
//! nobody can tell from the answers.

use anyhow::{Result, ensure};
use futures_util::future;
use kvasir_tests::{
    Builder, Client, Cluster, Process, Service,
    wait::{self, SOON},
};
use serde_json::Value;

use crate::prompts::{chat, long, text};

/// Requests at the same time.
const REQUESTS: usize = 6;
/// Blocks of the decode worker: room for about two of them at their full length.
pub(crate) const BLOCKS: u64 = 48;
/// The demo model's blocks: 16 tokens of 5 layers with a key and a value of 2 heads of 32 numbers, two bytes each.
pub(crate) const BLOCK_BYTES: u64 = 16 * 5 * 2 * 2 * 32 * 2;

fn tight() -> Builder {
    Cluster::builder().set(Service::Decode, "kv.memory_bytes", BLOCKS * BLOCK_BYTES)
}

/// Long answers to prompts that have nothing in common.
fn bodies(cluster: &Cluster, round: usize) -> Vec<Value> {
    (0..REQUESTS)
        .map(|number| {
            let mut body = chat(cluster.model(), &format!("{round}{number}: {}", long(60 + number)));
            body["max_tokens"] = 250.into();
            body["min_tokens"] = 250.into();
            body
        })
        .collect()
}

async fn at_once(client: &Client, bodies: &[Value]) -> Result<Vec<String>> {
    let answers = future::try_join_all(bodies.iter().map(|body| client.chat(body))).await?;
    Ok(answers.iter().map(|answer| text(answer).to_owned()).collect())
}

async fn one_by_one(client: &Client, bodies: &[Value]) -> Result<Vec<String>> {
    let mut answers = Vec::new();
    for body in bodies {
        answers.push(text(&client.chat(body).await?).to_owned());
    }
    Ok(answers)
}

/// A counter of the decode worker.
async fn counted(cluster: &Cluster, name: &str) -> Result<f64> {
    Ok(cluster.node(Service::Decode, 0).metrics().await?.sum(&format!("kvasir_worker_{name}_total")))
}

async fn spilling(cluster: &Cluster) -> Result<()> {
    wait::until("blocks are moved out", SOON, async || {
        (counted(cluster, "spilled_blocks").await.ok()? > 0.0).then_some(())
    })
    .await
}

#[tokio::test]
async fn preempted_answers_go_on_with_blocks_from_the_store() -> Result<()> {
    tight()
        .run(async |cluster| {
            let (client, bodies) = (cluster.client(), bodies(cluster, 0));
            let crowded = at_once(&client, &bodies).await?;
            let [preempted, spilled, recalled] = [
                counted(cluster, "preemptions").await?,
                counted(cluster, "spilled_blocks").await?,
                counted(cluster, "recalled_blocks").await?,
            ];
            ensure!(preempted > 0.0, "there were blocks for all");
            ensure!(spilled > 0.0, "of {preempted} preempted sequences nothing was kept");
            ensure!(recalled > 0.0, "of {spilled} blocks none came back");
            let dropped = counted(cluster, "spill_dropped_blocks").await?;
            ensure!(dropped == 0.0, "{dropped} blocks were not kept, though there was room");
            ensure!(crowded == one_by_one(&client, &bodies).await?, "an answer shows that its blocks were gone");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn what_finds_no_staging_is_computed_again() -> Result<()> {
    tight()
        .set(Service::Decode, "store.spill.staging_bytes", BLOCK_BYTES)
        .run(async |cluster| {
            let (client, bodies) = (cluster.client(), bodies(cluster, 1));
            let crowded = at_once(&client, &bodies).await?;
            ensure!(counted(cluster, "spill_dropped_blocks").await? > 0.0, "one slot was enough for all");
            ensure!(crowded == one_by_one(&client, &bodies).await?, "an answer shows that its blocks were gone");
            Ok(())
        })
        .await
}

/// The store fails when blocks are on their way to it.
async fn without_the_store(fail: fn(&mut Process)) -> Result<()> {
    tight()
        .run(async |cluster| {
            for warning in [
                "blocks of a preempted sequence not kept",
                "blocks of a preempted sequence not read back",
                "store not read, going on without",
                "blocks not written back to the store",
                "transfer",
            ] {
                cluster.expect_warning(warning);
            }
            let (client, bodies) = (cluster.client(), bodies(cluster, 2));
            let failing = async {
                spilling(cluster).await?;
                fail(&mut cluster.node_mut(Service::KvStore, 0).process);
                counted(cluster, "preemptions").await
            };
            let (crowded, before) = future::join(at_once(&client, &bodies), failing).await;
            let (crowded, before) = (crowded?, before?);
            let after = counted(cluster, "preemptions").await?;
            ensure!(after > before, "nobody lost blocks any more when the store had failed");
            ensure!(crowded == one_by_one(&client, &bodies).await?, "an answer shows that its blocks were gone");
            cluster.node_mut(Service::KvStore, 0).process.resume();
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_store_that_is_killed_costs_the_blocks_not_the_answers() -> Result<()> {
    without_the_store(Process::kill).await
}

#[tokio::test]
async fn a_store_that_stops_answering_costs_the_blocks_not_the_answers() -> Result<()> {
    without_the_store(Process::pause).await
}
