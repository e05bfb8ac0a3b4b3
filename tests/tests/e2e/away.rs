//! etcd gone for a minute, which is many leases long: whoever is there goes on, and when it is back, it says what is true.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Result, ensure};
use kvasir_cluster::EtcdConfig;
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
};
use tokio::{task::JoinSet, time::Instant};

use crate::prompts::{COUNT, QUESTION, chat, text};

/// How long it is gone: twelve times as long as a lease lasts unless set.
const GONE: Duration = Duration::from_secs(60);
/// Between two requests, so that other tests run beside this one.
const PAUSE: Duration = Duration::from_millis(200);
/// From one of a process's misfortunes to the next.
const STEP: Duration = Duration::from_secs(10);

/// Role, name, life's address of everybody that etcd knows.
async fn known(endpoint: &str) -> Result<BTreeSet<(String, String)>> {
    let etcd = EtcdConfig { endpoints: vec![endpoint.to_owned()], ..EtcdConfig::default() };
    // Without its future the registry shows the members as they were just read, which is all that is needed.
    let (registry, _) = kvasir_cluster::connect_etcd(etcd).await?;
    let view = registry.view().borrow().clone();
    Ok(view.members.iter().map(|member| (member.id.to_string(), format!("{}{}", member.grpc, member.http))).collect())
}

/// The same of everybody who lives.
fn living(cluster: &Cluster) -> BTreeSet<(String, String)> {
    let living = cluster.nodes().iter().filter(|node| !node.process.is_reaped());
    living.map(|node| (node.id().to_owned(), format!("{}{}", node.grpc(), node.http()))).collect()
}

#[tokio::test]
async fn etcd_gone_for_a_minute_stops_nobody_and_leaves_nothing_stale() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .routers(2)
        .run(async |cluster| {
            for warning in ["etcd", "registration not renewed", "not deregistered", "watch", "lease"] {
                cluster.expect_warning(warning);
            }
            for warning in ["a worker did not", "an answer broke off", "prefill failed, trying next"] {
                cluster.expect_warning(warning);
            }
            let clients = [0, 1].map(|at| kvasir_tests::Client::new(cluster.node(Service::Router, at).http()));
            let bodies = [QUESTION, COUNT].map(|words| chat(cluster.model(), words));
            let mut expected = Vec::new();
            for body in &bodies {
                expected.push(text(&clients[0].chat(body).await?).to_owned());
            }
            // Somebody asks all the time, from before it goes until after it is back.
            let mut asking = JoinSet::new();
            let (stop, stopped) = tokio::sync::watch::channel(false);
            for client in clients.clone() {
                let (bodies, expected, stopped) = (bodies.clone(), expected.clone(), stopped.clone());
                asking.spawn(async move {
                    let mut asked = 0;
                    while !*stopped.borrow() {
                        let at = asked % bodies.len();
                        let answer = client.chat(&bodies[at]).await?;
                        ensure!(text(&answer) == expected[at], "request {asked}: {answer}");
                        asked += 1;
                        tokio::time::sleep(PAUSE).await;
                    }
                    Ok(asked)
                });
            }

            cluster.etcd().kill();
            let back = Instant::now() + GONE;
            tokio::time::sleep(STEP).await;
            // One dies; started again it can't know the cluster, says so, and is for whoever watches over it to start again.
            cluster.node_mut(Service::Decode, 1).process.kill();
            let failed = cluster.restart(Service::Decode, 1).await;
            let failed = failed.err().map(|error| format!("{error:#}")).unwrap_or_default();
            ensure!(failed.contains("registry.etcd"), "it does not start without etcd: {failed:?}");
            tokio::time::sleep(STEP).await;
            // One leaves, and can't say so.
            let leaving = &mut cluster.node_mut(Service::Prefill, 1).process;
            leaving.terminate();
            ensure!(leaving.wait(SOON).await?.success());
            tokio::time::sleep_until(back).await;

            cluster.etcd().restart().await?;
            cluster.restart(Service::Decode, 1).await?;
            let endpoint = cluster.etcd().endpoint().to_owned();
            let true_again = async || {
                let known = known(&endpoint).await.ok()?;
                (known == living(cluster)).then_some(())
            };
            wait::until("etcd knows the living, where they are now, and nobody else", SOON, true_again).await?;
            for at in 0..2 {
                let router = cluster.node(Service::Router, at);
                let both = async || {
                    let workers = router.metrics().await.ok()?.sum("kvasir_router_decode_workers");
                    (workers == 2.0).then_some(())
                };
                wait::until("a router knows both decode workers", SOON, both).await?;
            }
            let again = cluster.node(Service::Decode, 1);
            let answers = async || (again.status().await.ok()?.requests_total > 0).then_some(());
            wait::until("the worker that was started again gets requests", SOON, answers).await?;
            stop.send_replace(true);
            while let Some(asked) = asking.join_next().await {
                let asked: usize = asked??;
                ensure!(asked > 10, "somebody asked all the time: {asked}");
            }
            Ok(())
        })
        .await
}
