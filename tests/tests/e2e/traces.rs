//! The way of one request through all processes, as a collector of OpenTelemetry's hears of it.

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Builder, Client, Cluster, Service,
    collector::{Collector, Span},
    wait::{self, SOON},
};
use serde_json::Value;

use crate::prompts::{chat, long};

/// What the client's own spans say.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT: &str = "b7ad6b7169203331";

/// A request that says which trace it belongs to.
async fn ask(client: &Client, body: &Value, flags: &str) -> Result<()> {
    let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", client.base()));
    let answer = request.header("traceparent", format!("00-{TRACE}-{CLIENT}-{flags}")).json(body).send().await?;
    ensure!(answer.status().is_success(), "HTTP {}: {}", answer.status(), answer.text().await?);
    Ok(())
}

fn telling(collector: &str, sample: f64) -> Builder {
    let mut builder = Cluster::builder();
    for service in [Service::Router, Service::Decode, Service::Prefill, Service::KvStore] {
        builder = builder.set(service, "trace.otlp", collector).set(service, "trace.sample", sample);
    }
    builder
}

/// The one span of that name, whose parent is that.
fn child<'a>(spans: &'a [Span], name: &str, parent: &str) -> Result<&'a Span> {
    let named: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    let found = named.iter().find(|span| span.parent == parent);
    found.copied().with_context(|| format!("{name} under {parent}; there are {named:?}"))
}

#[tokio::test]
async fn one_request_is_one_tree_of_spans_in_all_processes() -> Result<()> {
    let collector = Collector::start().await?;
    telling(&collector.url(), 1.0)
        .run(async |cluster| {
            ask(&cluster.client(), &chat(cluster.model(), &long(100)), "01").await?;
            let spans = wait::until("all spans have come", SOON, async || {
                let spans = collector.trace(TRACE);
                let here = |name: &str| spans.iter().any(|span| span.name == name);
                ["request", "decode", "prefill", "lookup"].iter().all(|name| here(name)).then_some(spans.clone())
            })
            .await?;
            // As ARCHITECTURE.md has the way of one request.
            let request = child(&spans, "request", CLIENT)?;
            let (queue, begin) = (child(&spans, "queue", &request.id)?, child(&spans, "begin", &request.id)?);
            let decode = child(&spans, "decode", &begin.id)?;
            let handoff = child(&spans, "handoff", &decode.id)?;
            let prefill = child(&spans, "prefill", &handoff.id)?;
            let find = child(&spans, "find", &prefill.id)?;
            let lookup = child(&spans, "lookup", &find.id)?;
            for (span, service) in [
                (request, "kvasir-router"),
                (queue, "kvasir-router"),
                (begin, "kvasir-router"),
                (decode, "kvasir-decode-worker"),
                (handoff, "kvasir-decode-worker"),
                (prefill, "kvasir-prefill-worker"),
                (lookup, "kvasir-kv-store"),
            ] {
                ensure!(span.service == service, "{} is {}'s", span.name, span.service);
                ensure!(span.began <= span.ended, "{span:?}");
            }
            ensure!(queue.ended <= begin.began && begin.began <= decode.began, "{queue:?}, {begin:?}, {decode:?}");
            let ids = [request, decode, prefill].map(|span| span.request.clone());
            ensure!(ids[0].is_some() && ids.iter().all(|id| *id == ids[0]), "one request id: {ids:?}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn who_begins_a_request_decides_whether_it_is_traced() -> Result<()> {
    let collector = Collector::start().await?;
    telling(&collector.url(), 0.0)
        .run(async |cluster| {
            let body = chat(cluster.model(), &long(100));
            cluster.client().chat(&body).await?; // nobody has decided: none of these
            ask(&cluster.client(), &body, "00").await?; // decided against
            ensure!(collector.all().is_empty(), "{:?}", collector.all());
            ask(&cluster.client(), &body, "01").await?;
            let all = async || collector.trace(TRACE).iter().any(|span| span.name == "request").then_some(());
            wait::until("the span of the request", SOON, all).await?;
            let requests = collector.all().into_iter().filter(|span| span.name == "request");
            ensure!(requests.count() == 1, "{:?}", collector.all());
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_collector_that_is_away_costs_no_request() -> Result<()> {
    let collector = Collector::start().await?;
    let url = collector.url();
    drop(collector);
    telling(&url, 1.0)
        .run(async |cluster| {
            // The exporter says so itself, in its own words.
            for warning in ["opentelemetry", "BatchSpanProcessor", "otel"] {
                cluster.expect_warning(warning);
            }
            for _ in 0..3 {
                ask(&cluster.client(), &chat(cluster.model(), &long(100)), "01").await?;
            }
            Ok(())
        })
        .await
}
