//! Workers that do not match are never paired: the decode worker does without, and no byte moves.

use anyhow::{Result, ensure};
use kvasir_tests::{Builder, Cluster, Service, workspace};

use crate::prompts::{chat, long, text};

#[tokio::test]
async fn workers_whose_blocks_look_otherwise_are_never_paired() -> Result<()> {
    prefill_worker_stays_idle(Cluster::builder().set(Service::Prefill, "kv.block_size", 32)).await?;
    prefill_worker_stays_idle(Cluster::builder().set(Service::Prefill, "kv.dtype", "bf16")).await
}

#[tokio::test]
async fn a_worker_with_other_weights_under_the_same_name_is_never_paired() -> Result<()> {
    let other = workspace::root().join("models/tiny/qwen3-tied");
    prefill_worker_stays_idle(Cluster::builder().set(Service::Prefill, "model.path", other.to_string_lossy())).await
}

/// The misfit is there, ready and known, and is not asked.
async fn prefill_worker_stays_idle(misfit: Builder) -> Result<()> {
    misfit
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            cluster.expect_warning("a worker is not used");
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(100)));
            let answer = client.chat(&body).await?;
            ensure!(!text(&answer).is_empty(), "the decode worker answers by itself: {answer}");
            let asked = cluster.node(Service::Prefill, 0).status().await?.requests_total;
            ensure!(asked == 0, "the misfit was asked {asked} times");
            Ok(())
        })
        .await
}
