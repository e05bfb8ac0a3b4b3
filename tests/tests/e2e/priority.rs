//! Who goes first: `service_tier` from the front door to the engine's queue.

use std::cell::RefCell;

use anyhow::{Result, ensure};
use futures_util::future;
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
};

use crate::prompts::{COUNT, QUESTION, chat, streamed};

/// Waits until so many requests wait for blocks of the decode worker.
async fn queued(cluster: &Cluster, count: u32) -> Result<()> {
    let node = cluster.node(Service::Decode, 0);
    let waits = async || (node.status().await.ok()?.waiting == count).then_some(());
    wait::until(&format!("{count} requests wait"), SOON, waits).await
}

#[tokio::test]
async fn an_online_request_passes_one_that_can_wait() -> Result<()> {
    Cluster::builder()
        .set(Service::Decode, "engine.max_running", 1)
        .run(async |cluster| {
            let client = cluster.client();
            let mut endless = streamed(cluster.model(), COUNT);
            endless["max_tokens"] = 8000.into();
            endless["ignore_eos"] = true.into();
            let mut running = client.stream("/v1/chat/completions", &endless).await?;
            running.chunk().await?;

            let (order, client) = (RefCell::new(Vec::new()), &client);
            let ask = async |tier: &'static str| {
                let mut body = chat(cluster.model(), QUESTION);
                body["service_tier"] = tier.into();
                let answer = client.chat(&body).await?;
                order.borrow_mut().push(tier);
                ensure!(answer["service_tier"] == tier, "{answer}");
                Ok(())
            };
            let hang_up = async {
                queued(cluster, 2).await?;
                drop(running);
                anyhow::Ok(())
            };
            let second = async {
                queued(cluster, 1).await?;
                ask("default").await
            };
            future::try_join3(ask("flex"), second, hang_up).await?;
            ensure!(*order.borrow() == ["default", "flex"], "{:?}", order.borrow());
            Ok(())
        })
        .await
}
