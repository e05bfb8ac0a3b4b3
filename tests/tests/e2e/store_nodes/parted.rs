//! Two store nodes that can't reach each other any more, while clients and etcd reach both.

use anyhow::{Result, ensure};
use kvasir_proto::v1::DrainRequest;
use kvasir_tests::{
    Cluster, Service,
    namespace::Namespace,
    net::Net,
    wait::{self, SOON},
};
use kvasir_types::BlockHash;

use super::{
    client::{Client, GROUP, conversation, has, raw},
    in_memory,
};

/// Placement groups that are there before the network parts.
const GROUPS: u32 = 100;

fn all() -> Vec<BlockHash> {
    (0..GROUPS).flat_map(|n| conversation(n, GROUP as u32)).collect()
}

/// Blocks of [`all`] that a node has.
async fn held(cluster: &Cluster, node: usize) -> Result<usize> {
    Ok(has(cluster.node(Service::KvStore, node), &all()).await?.into_iter().filter(|&has| has).count())
}

#[tokio::test]
async fn nodes_that_cannot_reach_each_other_serve_on_and_hand_over_when_they_can_again() -> Result<()> {
    let name = "store_nodes::parted::nodes_that_cannot_reach_each_other_serve_on_and_hand_over_when_they_can_again";
    if !Namespace::Network.entered(name)? {
        return Ok(());
    }
    let net = Net::new(2).await?;
    in_memory(2)
        .etcd(Net::here())
        .place(Service::KvStore, 0, net.place(0))
        .place(Service::KvStore, 1, net.place(1))
        .set(Service::KvStore, "capacity_bytes", 16 << 20)
        .set(Service::KvStore, "transfer.transports", "tcp")
        .set(Service::KvStore, "reservation_ms", 1000)
        // Slowly, so that there is something to be interrupted.
        .set(Service::KvStore, "handover.mib_per_s", 1)
        .run(async |cluster| {
            // A writer that can't be reached is cut off.
            cluster.expect_warning("fence");
            let client = Client::patient(cluster, 64).await?;
            let all = all();
            client.fill(&all).await?;
            let leaving = held(cluster, 0).await?;
            ensure!(leaving > GROUP * 10, "{leaving} blocks are its share");

            // One is told to hand over what it has, and when it has begun to, its network parts.
            raw(cluster.node(Service::KvStore, 0).grpc()).await?.drain(DrainRequest {}).await?;
            wait::until("something is handed over", SOON, async || {
                (held(cluster, 1).await.ok()? + leaving > all.len()).then_some(())
            })
            .await?;
            net.part()?;
            wait::until("a group does not arrive", SOON, async || {
                let metrics = cluster.node(Service::KvStore, 0).metrics().await.ok()?;
                (metrics.sum("kvasir_kv_store_handover_failed_groups_total") > 0.0).then_some(())
            })
            .await?;
            for n in 0..5 {
                ensure!(client.there(&all).await? == all.len(), "whoever reaches both reads everything");
                let run = conversation(1000 + n, 8);
                let report = client.write(0, &run).await?;
                ensure!(report.error.is_none() && report.written == run.len(), "{report:?}");
                ensure!(client.read(0, &run).await?.blocks == run.len(), "and what it writes");
            }
            let status = cluster.node(Service::KvStore, 0).store_status().await?;
            ensure!(status.leaving == "draining", "it holds what it could not hand over: {status:?}");
            ensure!(held(cluster, 1).await? < all.len(), "nothing passes between the two");

            net.heal()?;
            wait::until("all of it is handed over", SOON, async || {
                let status = cluster.node(Service::KvStore, 0).store_status().await.ok()?;
                (status.leaving == "drained").then_some(())
            })
            .await?;
            ensure!(held(cluster, 1).await? == all.len(), "drained, and the other has everything");
            cluster.node_mut(Service::KvStore, 0).process.kill();
            ensure!(client.there(&all).await? == all.len(), "nothing is missed when it is gone");
            client.close();
            Ok(())
        })
        .await
}
