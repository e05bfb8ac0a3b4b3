//! Spans, sent to a collector as OpenTelemetry's protocol (OTLP over gRPC) has them.
//!
//! ```text
//! span of `tracing` ─ closed ─▶ queue (bounded; what does not fit is dropped) ─▶ thread ─▶ collector
//! ```
//!
//! The collector is never waited for: one that is away or slow costs spans, not requests. What of a request belongs together
//! travels between processes as W3C's `traceparent` (`kvasir_rpc::trace`).

use std::time::Duration;

use anyhow::Context as _;
use opentelemetry::{
    KeyValue,
    trace::{Link, SpanKind, TraceId, TracerProvider as _},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{Sampler, SamplingResult, SdkTracerProvider, ShouldSample, Tracer},
};
use tracing::Level;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::{Layer, Registry, filter::filter_fn};

use crate::{TraceConfig, entry::Service, process::Share};

/// For the last spans, when the process ends.
const LAST: Duration = Duration::from_secs(2);
/// For the collector to take a batch.
const PATIENCE: Duration = Duration::from_secs(5);

type Boxed = Box<dyn Layer<Registry> + Send + Sync>;

/// The way of spans to the collector. Dropping it sends what is left, for a moment.
pub(crate) struct Spans {
    provider: SdkTracerProvider,
    // The connection lives in it: the service's own may be busy, or gone when the last spans are sent.
    _runtime: tokio::runtime::Runtime,
}

impl Spans {
    /// The way, and the layer that puts spans on it; `None` if no collector is named.
    pub(crate) fn start(
        service: &Service,
        config: &TraceConfig,
        share: &Share,
    ) -> anyhow::Result<Option<(Self, Boxed)>> {
        let Some(endpoint) = &config.otlp else { return Ok(None) };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("trace")
            .enable_all()
            .build()
            .context("cannot start threads")?;
        let _inside = runtime.enter();
        let exporter =
            SpanExporter::builder().with_tonic().with_endpoint(endpoint.as_str()).with_timeout(PATIENCE).build();
        let exporter =
            exporter.with_context(|| format!("trace.otlp: {endpoint:?} can't be used, expected http://host:port"))?;
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            // Whoever began the request has decided, if anybody has.
            .with_sampler(Sampler::ParentBased(Box::new(share.clone())))
            .with_resource(resource(service))
            .build();
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        let layer = layer(provider.tracer("kvasir"));
        drop(_inside);
        Ok(Some((Self { provider, _runtime: runtime }, layer)))
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST) {
            tracing::debug!(%error, "the last spans were not sent");
        }
    }
}

/// The share as it is now, which may be changed while the process runs.
impl ShouldSample for Share {
    fn should_sample(
        &self,
        parent: Option<&opentelemetry::Context>,
        trace: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        Sampler::TraceIdRatioBased(self.get()).should_sample(parent, trace, name, kind, attributes, links)
    }
}

fn resource(service: &Service) -> Resource {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    Resource::builder()
        .with_service_name(format!("kvasir-{}", service.name))
        .with_attributes([
            KeyValue::new("service.version", service.version),
            KeyValue::new("service.instance.id", format!("{}-{}", host.trim(), std::process::id())),
            KeyValue::new("host.name", host.trim().to_owned()),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ])
        .build()
}

/// Our own spans down to `debug`, and what is logged in them from `info` on.
fn layer(tracer: Tracer) -> Boxed {
    let ours = filter_fn(|metadata| {
        let level = if metadata.is_span() { Level::DEBUG } else { Level::INFO };
        *metadata.level() <= level && metadata.target().starts_with("kvasir")
    });
    // What costs time on every entry and leads nowhere here is left out.
    OpenTelemetryLayer::new(tracer)
        .with_context_activation(false)
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(ours)
        .boxed()
}
