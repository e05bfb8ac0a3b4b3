//! The way of one request through all processes, as a collector of OpenTelemetry's hears of it.

use std::{
    path::Path,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Builder, Client, Cluster, Process, Service,
    collector::{Collector, Span},
    wait::{self, SOON},
};
use serde_json::{Value, json};

use crate::{
    chart::manifests::tool,
    prompts::{chat, long},
};

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
                let all = ["request", "decode", "prefill", "lookup", "write_back", "put"];
                all.iter().all(|name| here(name)).then_some(spans.clone())
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
            // What the prefill worker computed goes to the store afterwards, because of this request.
            let written = child(&spans, "write_back", &prefill.id)?;
            let put = child(&spans, "put", &written.id)?;
            for (span, service) in [
                (written, "kvasir-prefill-worker"),
                (put, "kvasir-kv-store"),
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
            let ids = [request, decode, prefill, written].map(|span| span.request.clone());
            ensure!(ids[0].is_some() && ids.iter().all(|id| *id == ids[0]), "one request id: {ids:?}");
            buckets_name_the_trace(cluster).await
        })
        .await
}

/// Blocks too large to be put with one call: room is reserved, written into, and what was written is committed.
#[tokio::test]
async fn large_blocks_are_reserved_and_committed_because_of_a_request() -> Result<()> {
    let collector = Collector::start().await?;
    telling(&collector.url(), 1.0)
        .worker("kv.block_size", 128)
        .run(async |cluster| {
            ask(&cluster.client(), &chat(cluster.model(), &long(100)), "01").await?;
            let spans = wait::until("all spans have come", SOON, async || {
                let spans = collector.trace(TRACE);
                let here = |name: &str| spans.iter().any(|span| span.name == name);
                ["write_back", "reserve", "commit"].iter().all(|name| here(name)).then_some(spans.clone())
            })
            .await?;
            let written = spans.iter().find(|span| span.name == "write_back").context("write_back")?;
            let (reserve, commit) = (child(&spans, "reserve", &written.id)?, child(&spans, "commit", &written.id)?);
            ensure!([reserve, commit].iter().all(|span| span.service == "kvasir-kv-store"), "{reserve:?}, {commit:?}");
            ensure!(
                written.began <= reserve.began && reserve.ended <= commit.began,
                "{written:?}, {reserve:?}, {commit:?}"
            );
            ensure!(commit.ended <= written.ended, "{written:?}, {commit:?}");
            Ok(())
        })
        .await
}

/// What took time, of the one request that there was, by service.
const TIMED: [(Service, &[&str]); 3] = [
    (
        Service::Router,
        &["kvasir_router_ttft_seconds", "kvasir_router_inter_token_seconds", "kvasir_router_request_seconds"],
    ),
    (
        Service::Decode,
        &["kvasir_worker_ttft_seconds", "kvasir_worker_inter_token_seconds", "kvasir_worker_handoff_seconds"],
    ),
    (Service::Prefill, &["kvasir_worker_store_lookup_seconds"]),
];

/// Who asks for OpenMetrics is told whose the values in the buckets are; a Prometheus that reads the pages has them.
async fn buckets_name_the_trace(cluster: &Cluster) -> Result<()> {
    let exemplar = format!("# {{trace_id=\"{TRACE}\"}} ");
    for (service, names) in TIMED {
        let url = format!("http://{}/metrics", cluster.node(service, 0).admin());
        let scrape = reqwest::Client::new().get(&url).header("accept", "application/openmetrics-text; version=1.0.0");
        let answer = scrape.send().await?;
        let kind = answer.headers().get("content-type").cloned().context("a content type")?;
        ensure!(kind.to_str()?.starts_with("application/openmetrics-text"), "{kind:?}");
        let page = answer.text().await?;
        ensure!(page.ends_with("# EOF\n"), "{page}");
        for name in names {
            let bucket = format!("{name}_bucket{{");
            let told = page.lines().any(|line| line.starts_with(&bucket) && line.contains(&exemplar));
            ensure!(told, "no bucket of {name} names the trace: {page}");
        }
        ensure!(!reqwest::get(&url).await?.text().await?.contains("trace_id"), "nobody asked for it");
    }
    let dir = tempfile::tempdir()?;
    let prometheus = Prometheus::start(cluster, dir.path()).await?;
    for name in TIMED.iter().flat_map(|(_, names)| names.iter()) {
        wait::until(&format!("Prometheus has the trace of {name}"), SOON, async || {
            let found = prometheus.exemplars(&format!("{name}_bucket")).await.ok()?;
            found.contains(&TRACE.to_owned()).then_some(())
        })
        .await?;
    }
    Ok(())
}

/// A real one, that reads the pages of a cluster several times a second.
struct Prometheus {
    _process: Process,
    address: String,
}

impl Prometheus {
    async fn start(cluster: &Cluster, dir: &Path) -> Result<Self> {
        let targets: Vec<_> = cluster.nodes().iter().map(|node| node.admin()).collect();
        let config = json!({
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
            "scrape_configs": [{"job_name": "kvasir", "static_configs": [{"targets": targets}]}],
        });
        let file = dir.join("prometheus.json");
        std::fs::write(&file, config.to_string())?;
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let mut command = Command::new(tool("prometheus")?);
        command.arg("--config.file").arg(&file).arg("--storage.tsdb.path").arg(dir.join("data"));
        command.args(["--web.listen-address", &address, "--enable-feature", "exemplar-storage"]);
        let process = Process::spawn("prometheus", command, dir)?;
        Ok(Self { _process: process, address })
    }

    /// The traces that buckets of that name told of.
    async fn exemplars(&self, name: &str) -> Result<Vec<String>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let (address, from, to) = (&self.address, now - 3600, now + 3600);
        let url = format!("http://{address}/api/v1/query_exemplars?query={name}&start={from}&end={to}");
        let answer: Value = reqwest::get(url).await?.json().await?;
        let series = answer["data"].as_array().context("series")?;
        let all = series.iter().filter_map(|series| series["exemplars"].as_array()).flatten();
        Ok(all.filter_map(|one| Some(one["labels"]["trace_id"].as_str()?.to_owned())).collect())
    }
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
