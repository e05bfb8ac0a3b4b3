//! What `/metrics` shows: counters, gauges and histograms of this process, in the OpenMetrics text format.
//!
//! ```
//! # let context = kvasir_runtime::Context::detached("doc");
//! let requests = context.metrics.counters::<[(&str, &str); 1]>("kvasir_example_requests", "Requests by outcome");
//! requests.get_or_create(&[("outcome", "finished")]).inc();
//! assert!(context.metrics.encode().contains("kvasir_example_requests_total{outcome=\"finished\"} 1"));
//! ```
//!
//! Names: `kvasir_<crate>_<what>_<unit>`; the format adds `_total` to counters itself. Labels come from closed sets. What a
//! crate counts elsewhere is copied over when somebody looks: [`Metrics::on_scrape`].

mod exemplar;
mod process;

use std::{
    collections::HashSet,
    fmt,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::{MetricType, exemplar::HistogramWithExemplars, family::MetricConstructor},
    registry::Registry,
};
pub use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
};

pub use self::exemplar::{TraceId, TracedHistogram, wanted as wants_exemplars};
use crate::Service;

/// A gauge of a real number.
pub type FloatGauge = Gauge<f64, AtomicU64>;

/// Histograms by label.
pub type Histograms<L> = Family<L, Histogram, Buckets>;

/// Bounds in seconds for what a request waits for: a millisecond to two minutes.
pub const LATENCY_SECONDS: &[f64] =
    &[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0];

/// The content type of [`Metrics::encode`] and [`Metrics::encode_for`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What label sets must be: `[(&str, &str); N]`, `Vec<(…)>`, or a struct with prometheus-client's derive.
pub trait Labels: EncodeLabelSet + Clone + Hash + Eq + fmt::Debug + Send + Sync + 'static {}
impl<L: EncodeLabelSet + Clone + Hash + Eq + fmt::Debug + Send + Sync + 'static> Labels for L {}

/// The metrics of a service. Cheap to clone; clones are the same.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Inner>);

type Hook = Arc<dyn Fn() + Send + Sync>;

/// Both locks are held for a moment at start (registering) and at each scrape; the metrics themselves are atomics.
#[derive(Default)]
struct Inner {
    registry: Mutex<Registry>,
    hooks: Mutex<Vec<Hook>>,
    declared: Mutex<Vec<Declared>>,
}

/// What a metric says of itself before it has a value.
struct Declared {
    name: String,
    lines: String,
}

/// Upper bounds of a histogram family's buckets.
#[derive(Clone, Copy, Debug)]
pub struct Buckets(&'static [f64]);

/// A distribution as it is at one moment.
#[derive(Clone, Debug)]
pub struct Distribution {
    /// Its labels.
    pub labels: Vec<(&'static str, String)>,
    /// The upper bound of each bucket (the last one: infinite) and how many lie between it and the one before.
    pub buckets: Vec<(f64, u64)>,
    /// The sum of all values.
    pub sum: f64,
}

struct Distributions {
    name: String,
    help: String,
    read: Box<dyn Fn() -> Vec<Distribution> + Send + Sync>,
}

impl fmt::Debug for Distributions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Distributions").field("name", &self.name).finish()
    }
}

impl Collector for Distributions {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = encoder.encode_descriptor(&self.name, &self.help, None, MetricType::Histogram)?;
        for Distribution { labels, buckets, sum } in (self.read)() {
            let count = buckets.iter().map(|bucket| bucket.1).sum();
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// With the process's own: memory, open files, uptime, build.
    pub(crate) fn of_process(service: &Service) -> Self {
        let metrics = Self::new();
        process::register(&metrics, service);
        metrics
    }

    /// A number that only grows.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(total(name), help, Counter::default())
    }

    /// Numbers that only grow, by label.
    pub fn counters<L: Labels>(&self, name: &str, help: &str) -> Family<L, Counter> {
        self.register(total(name), help, Family::default())
    }

    /// A whole number that goes up and down.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    /// Whole numbers that go up and down, by label.
    pub fn gauges<L: Labels>(&self, name: &str, help: &str) -> Family<L, Gauge> {
        self.register(name, help, Family::default())
    }

    /// A real number that goes up and down.
    pub fn float_gauge(&self, name: &str, help: &str) -> FloatGauge {
        self.register(name, help, FloatGauge::default())
    }

    /// Real numbers that go up and down, by label.
    pub fn float_gauges<L: Labels>(&self, name: &str, help: &str) -> Family<L, FloatGauge> {
        self.register(name, help, Family::default())
    }

    /// A distribution, counted into `buckets` by upper bound.
    pub fn histogram(&self, name: &str, help: &str, buckets: &'static [f64]) -> Histogram {
        self.register(name, help, Buckets(buckets).new_metric())
    }

    /// A distribution whose buckets name the trace of a value in them.
    pub fn traced_histogram(&self, name: &str, help: &str, buckets: &'static [f64]) -> TracedHistogram {
        TracedHistogram(self.register(name, help, HistogramWithExemplars::new(buckets.iter().copied())))
    }

    /// Distributions by label.
    pub fn histograms<L: Labels>(&self, name: &str, help: &str, buckets: &'static [f64]) -> Histograms<L> {
        self.register(name, help, Family::new_with_constructor(Buckets(buckets)))
    }

    /// Distributions that somebody else counts, read at every scrape. Labels may differ from scrape to scrape; how many
    /// there are must be bounded by whoever counts.
    pub fn distributions(&self, name: &str, help: &str, read: impl Fn() -> Vec<Distribution> + Send + Sync + 'static) {
        let (name, help) = (name.to_owned(), help.trim_end_matches('.').to_owned() + ".");
        self.registry().register_collector(Box::new(Distributions { name, help, read: Box::new(read) }));
    }

    /// Calls `refresh` before every scrape, so that it can set gauges (and counters, with [`set_total`]) to what somebody
    /// else counts. It must not block, and should not hold this `Metrics` (that would keep both alive for ever).
    pub fn on_scrape(&self, refresh: impl Fn() + Send + Sync + 'static) {
        self.0.hooks.lock().expect(UNPOISONED).push(Arc::new(refresh));
    }

    /// The page.
    pub fn encode(&self) -> String {
        exemplar::without(&self.encode_with_exemplars())
    }

    /// The page for somebody who accepts this (an `Accept` header's value): with exemplars if that [wants them](wants_exemplars).
    pub fn encode_for(&self, accept: &str) -> String {
        if wants_exemplars(accept) { self.encode_with_exemplars() } else { self.encode() }
    }

    fn encode_with_exemplars(&self) -> String {
        let hooks = self.0.hooks.lock().expect(UNPOISONED).clone();
        hooks.iter().for_each(|refresh| refresh());
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &self.registry()).expect("writing to a string succeeds");
        self.with_those_without_values(page)
    }

    /// A family of which nothing has happened yet is on the page by name, too: who writes alerts can see that it exists.
    fn with_those_without_values(&self, mut page: String) -> String {
        const END: &str = "# EOF\n";
        let shown: HashSet<&str> =
            page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let declared = self.0.declared.lock().expect(UNPOISONED);
        let missing: String = declared
            .iter()
            .filter(|metric| !shown.contains(metric.name.as_str()))
            .map(|metric| metric.lines.as_str())
            .collect();
        if page.ends_with(END) && !missing.is_empty() {
            page.insert_str(page.len() - END.len(), &missing);
        }
        page
    }

    fn register<M: prometheus_client::registry::Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        // The registry ends the sentence itself.
        let help = help.trim_end_matches('.');
        self.registry().register(name, help, metric.clone());
        let lines = format!("# HELP {name} {help}.\n# TYPE {name} {}\n", metric.metric_type().as_str());
        self.0.declared.lock().expect(UNPOISONED).push(Declared { name: name.to_owned(), lines });
        metric
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.0.registry.lock().expect(UNPOISONED)
    }
}

const UNPOISONED: &str = "no code panics while it holds this lock";

/// Sets a counter to a total that somebody else keeps. Never lowers it: a counter only grows.
pub fn set_total(counter: &Counter, total: u64) {
    counter.inner().fetch_max(total, Ordering::Relaxed);
}

/// The format adds the suffix; a name that has it already would get it twice.
fn total(name: &str) -> &str {
    name.strip_suffix("_total").unwrap_or(name)
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_on_the_page() {
        let metrics = Metrics::new();
        metrics.counter("a_total", "As.").inc_by(3);
        metrics.counters::<[(&str, &str); 1]>("b", "Bs").get_or_create(&[("kind", "x")]).inc();
        metrics.gauge("c", "Cs").set(-4);
        metrics.gauges::<Vec<(&str, String)>>("d", "Ds").get_or_create(&vec![("state", "free".to_owned())]).set(5);
        metrics.float_gauge("e_seconds", "Es").set(0.5);
        metrics.histogram("f_seconds", "Fs", LATENCY_SECONDS).observe(0.03);
        metrics.histograms::<[(&str, &str); 1]>("g", "Gs", &[1.0]).get_or_create(&[("kind", "y")]).observe(2.0);
        let page = metrics.encode();
        for line in [
            "# HELP a As.",
            "# TYPE a counter",
            "a_total 3",
            "b_total{kind=\"x\"} 1",
            "c -4",
            "d{state=\"free\"} 5",
            "e_seconds 0.5",
            "f_seconds_bucket{le=\"0.05\"} 1",
            "f_seconds_count 1",
            "g_bucket{le=\"+Inf\",kind=\"y\"} 1",
            "# EOF",
        ] {
            assert!(page.lines().any(|found| found == line), "no {line:?} in\n{page}");
        }
    }

    #[test]
    fn a_family_is_told_before_anything_has_happened_and_once() {
        let metrics = Metrics::new();
        let refused = metrics.counters::<[(&str, &str); 1]>("refused", "Refused, by reason.");
        let told = "# HELP refused Refused, by reason.\n# TYPE refused counter\n";
        assert_eq!(metrics.encode(), format!("{told}# EOF\n"));
        refused.get_or_create(&[("reason", "full")]).inc();
        assert_eq!(metrics.encode(), format!("{told}refused_total{{reason=\"full\"}} 1\n# EOF\n"));
    }

    #[test]
    fn a_scrape_shows_what_hooks_set_and_totals_never_fall() {
        let metrics = Metrics::new();
        let (gauge, counter) = (metrics.gauge("blocks", "Blocks"), metrics.counter("moved_bytes", "Bytes"));
        let source = Arc::new(AtomicU64::new(7));
        metrics.on_scrape({
            let source = source.clone();
            move || {
                gauge.set(source.load(Ordering::Relaxed) as i64);
                set_total(&counter, source.load(Ordering::Relaxed));
            }
        });
        assert!(metrics.encode().contains("\nblocks 7\n"));
        source.store(6, Ordering::Relaxed);
        let page = metrics.clone().encode();
        assert!(page.contains("\nblocks 6\n") && page.contains("\nmoved_bytes_total 7\n"), "{page}");
    }
}
