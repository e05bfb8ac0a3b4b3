//! A rolling upgrade, as Kubernetes does it with the chart: each process is replaced while many are being answered, and every answer
//! is the one that would have come anyway.

use std::time::Duration;

use anyhow::{Result, ensure};
use kvasir_tests::{Balancer, Client, Cluster, Service};

use crate::load::Load;

const STREAMS: usize = 12;
/// A process's grace, the ten seconds after it, and some.
const END: Duration = Duration::from_secs(45);

#[tokio::test]
async fn every_part_is_replaced_under_load_and_no_request_is_lost() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .set(Service::Router, "limits.notice_ms", 2_000)
        .run(async |cluster| {
            // Who calls a worker at the moment it leaves is refused, or finds the connection closing, and tries another.
            for warning in ["a worker did not begin an answer", "prefill failed, trying next"] {
                cluster.expect_warning(warning);
            }
            cluster.expect_warning("blocks not written back to the store");
            let service = Balancer::start(vec![cluster.node(Service::Router, 0).http().to_owned()]).await?;
            let load = Load::through(Client::new(&service.address()), cluster.model(), STREAMS)?;
            let more = async || load.more("the load goes on", 2 * STREAMS).await;
            load.run(async {
                more().await?;
                // Deployments: a new pod is ready, then an old one is to end.
                let rolled = [Service::Prefill, Service::Prefill, Service::Decode, Service::Decode, Service::Router];
                let mut old = [0, 1, 0, 1, 0].into_iter();
                for kind in rolled {
                    let (new, old) = (cluster.join(kind).await?, old.next().unwrap_or_default());
                    cluster.node_mut(kind, old).process.terminate();
                    if kind == Service::Router {
                        // Whoever balances hears of it later than the pod: new connections still come to the one that leaves.
                        load.more("the one that leaves still takes requests", STREAMS).await?;
                        service.set(vec![cluster.node(kind, new).http().to_owned()]);
                    }
                    let status = cluster.node_mut(kind, old).process.wait(END).await?;
                    ensure!(status.success(), "{kind:?} {old} ended with {status}");
                    more().await?;
                }
                // A StatefulSet: the old pod has ended before the new one starts with its name.
                cluster.node_mut(Service::KvStore, 0).process.terminate();
                let status = cluster.node_mut(Service::KvStore, 0).process.wait(END).await?;
                ensure!(status.success(), "kv-store ended with {status}");
                more().await?;
                cluster.restart(Service::KvStore, 0).await?;
                more().await
            })
            .await?;
            let router = cluster.node(Service::Router, 1).metrics().await?;
            ensure!(
                router.sum_where("kvasir_router_requests_total", &[("status", "5xx")]) == 0.0,
                "somebody got an error"
            );
            ensure!(
                router.sum_where("kvasir_router_answers_total", &[("outcome", "failed")]) == 0.0,
                "an answer broke off"
            );
            ensure!(router.sum("kvasir_router_decode_workers") == 2.0, "the new workers are the ones that are known");
            Ok(())
        })
        .await
}

/// Without notice, or when it is over, the port is closed: a client on a connection that was kept has heard so before.
#[tokio::test]
async fn an_answer_of_a_router_that_leaves_closes_its_connection() -> Result<()> {
    Cluster::builder()
        .kv_store(0)
        .set(Service::Router, "limits.notice_ms", 20_000)
        .set(Service::Router, "shutdown.grace_ms", 2_000)
        .run(async |cluster| {
            let client = cluster.client();
            let before = client.get("/v1/models").await?;
            ensure!(!before.headers.contains_key("connection"), "{:?}", before.headers);
            cluster.node_mut(Service::Router, 0).process.terminate();
            let leaving =
                kvasir_tests::wait::until("answers close their connection", kvasir_tests::wait::SOON, async || {
                    let reply = client.get("/v1/models").await.ok()?;
                    (reply.status == 200 && reply.headers.get("connection").is_some_and(|value| value == "close"))
                        .then_some(())
                });
            leaving.await?;
            // The notice is within the grace, however long it is said to be.
            let status = cluster.node_mut(Service::Router, 0).process.wait(END).await?;
            ensure!(status.success(), "{status}");
            Ok(())
        })
        .await
}
