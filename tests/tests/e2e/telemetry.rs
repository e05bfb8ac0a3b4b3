//! One request can be followed through every process by its id, and every service shows its numbers.

use std::collections::HashMap;

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

/// Set to write docs/metrics.md anew.
const BLESS: &str = "BLESS";

/// What docs/metrics.md says of one service's page: a row for each name.
fn described(page: &str) -> Vec<String> {
    let mut kinds = HashMap::new();
    let mut texts = HashMap::new();
    for line in page.lines() {
        if let Some((name, text)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            texts.insert(name, text.replace('|', "\\|"));
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            kinds.insert(name, kind);
        }
    }
    let row = |(name, kind): (&str, &str)| {
        let suffix = if kind == "counter" { "_total" } else { "" };
        format!("| `{name}{suffix}` | {kind} | {} |", texts.get(name).map_or("", String::as_str))
    };
    let mut rows: Vec<_> = kinds.into_iter().map(row).collect();
    rows.sort();
    rows
}

#[tokio::test]
async fn every_number_is_documented() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let mut text = String::from(
                "# Metrics\n\nWhat `GET /metrics` shows on the admin port of each service. This page is made from those pages \
                 (`BLESS=1 cargo nextest\nrun -p kvasir-tests --test e2e -E 'test(every_number_is_documented)'`), and a \
                 test compares them. What they are good for:\n[observability.md](observability.md).\n",
            );
            let mut shared: Option<Vec<String>> = None;
            let mut pages = Vec::new();
            for service in [Service::Router, Service::Decode, Service::KvStore] {
                let (_, page) = cluster.node(service, 0).admin_page("/metrics").await?;
                let rows = described(&page);
                ensure!(!rows.is_empty(), "{page}");
                match &mut shared {
                    Some(shared) => shared.retain(|row| rows.contains(row)),
                    None => shared = Some(rows.clone()),
                }
                pages.push((service, rows));
            }
            let shared = shared.unwrap_or_default();
            for (title, rows) in [("Every service", shared.clone())].into_iter().chain(pages.into_iter().map(|(service, rows)| {
                let title = match service {
                    Service::Router => "Routers",
                    Service::KvStore => "Store nodes",
                    _ => "Workers, prefill and decode",
                };
                (title, rows.into_iter().filter(|row| !shared.contains(row)).collect())
            })) {
                text += &format!("\n## {title}\n\n| name | kind | what |\n| --- | --- | --- |\n{}\n", rows.join("\n"));
            }
            let file = kvasir_tests::workspace::root().join("docs/metrics.md");
            if std::env::var_os(BLESS).is_some() {
                std::fs::write(&file, &text)?;
            }
            let found = std::fs::read_to_string(&file).unwrap_or_default();
            let missing: Vec<_> = text.lines().filter(|line| !found.lines().any(|row| row == *line)).collect();
            ensure!(found == text, "docs/metrics.md is not true any more; run this test with {BLESS}=1. It lacks: {missing:#?}");
            Ok(())
        })
        .await
}
