//! One request can be followed through every process by its id, and every service shows its numbers.

use anyhow::{Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
};

use crate::prompts::{chat, long};

#[tokio::test]
async fn a_request_has_one_id_in_every_log() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let body = chat(cluster.model(), &long(100));
            let reply = cluster.client().post_as("e2e-follow-me", "/v1/chat/completions", &body).await?;
            ensure!(reply.headers.get("x-request-id").is_some_and(|id| id == "e2e-follow-me"), "{:?}", reply.headers);
            for service in [Service::Router, Service::Decode, Service::Prefill] {
                let process = &cluster.node(service, 0).process;
                let what = format!("{} logs the request's id", process.name());
                wait::until(&what, SOON, async || process.log().contains("e2e-follow-me").then_some(())).await?;
            }
            Ok(())
        })
        .await
}

#[tokio::test]
async fn every_service_shows_its_numbers() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let body = chat(cluster.model(), &long(100));
            cluster.client().chat(&body).await?;
            cluster.assert_no_leak().await?;
            let worker = ["kvasir_worker_blocks", "kvasir_worker_sequences", "kvasir_worker_requests"];
            for (service, names) in [
                (Service::Router, &["kvasir_router_ttft_seconds", "kvasir_router_inter_token_seconds"][..]),
                (Service::Router, &["kvasir_router_requests", "kvasir_router_inflight"]),
                (Service::Decode, &worker),
                (Service::Decode, &["kvasir_worker_ttft_seconds", "kvasir_worker_inter_token_seconds"]),
                (Service::Decode, &["kvasir_worker_handoff_seconds", "kvasir_transfer_bytes"]),
                (Service::Prefill, &worker),
                (
                    Service::Prefill,
                    &["kvasir_worker_prompt_tokens", "kvasir_worker_handoff_bytes", "kvasir_transfer_bytes"],
                ),
                (Service::KvStore, &["kvasir_kv_store_used_bytes", "kvasir_kv_store_blocks"]),
            ] {
                let node = cluster.node(service, 0);
                let page = node.metrics().await?;
                for name in names {
                    let declared = page.families().iter().any(|family| family == name);
                    ensure!(declared, "{} has no {name}: {:?}", node.id(), page.families());
                }
            }
            let sent = cluster.node(Service::Prefill, 0).metrics().await?;
            ensure!(sent.sum("kvasir_worker_handoff_bytes_total") > 0.0, "a remote prefill moves bytes: {sent:?}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn health_and_readiness_are_said_apart() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            for node in cluster.nodes() {
                for page in ["/health", "/ready"] {
                    let (status, text) = node.admin_page(page).await?;
                    ensure!(status == 200, "{page} of {}: HTTP {status} {text}", node.id());
                }
            }
            // Probes come to either port; what is counted is not for clients.
            for (page, expected) in [("/health", 200), ("/ready", 200), ("/metrics", 404)] {
                let status = cluster.client().get(page).await?.status;
                ensure!(status == expected, "{page} at the router's own port: HTTP {status}");
            }
            let (status, page) = cluster.node(Service::Router, 0).admin_page("/metrics").await?;
            ensure!(status == 200 && page.contains("kvasir_router_"), "HTTP {status} {page}");
            Ok(())
        })
        .await
}
