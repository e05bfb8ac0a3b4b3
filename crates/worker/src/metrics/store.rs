//! What a worker counts of its dealings with the KV store.

use kvasir_runtime::metrics::{Counter, Family, FloatGauge, Gauge, LATENCY_SECONDS, TracedHistogram};

type Labels = [(&'static str, &'static str); 1];

/// The metrics that begin with `kvasir_worker_store_`.
#[derive(Clone)]
pub(crate) struct StoreMetrics {
    decisions: Family<Labels, Counter>,
    /// Of a lookup, in seconds.
    pub(crate) lookup: TracedHistogram,
    /// Of reading a run that was found, in seconds.
    pub(crate) read: TracedHistogram,
    pub(crate) read_bytes: Counter,
    /// Prompt tokens computed while the blocks behind them were read.
    pub(crate) meanwhile_tokens: Counter,
    /// What was expected at the last decision, in seconds.
    pub(crate) expected_compute: FloatGauge,
    pub(crate) expected_read: FloatGauge,
    pub(crate) write_back: WriteBackMetrics,
}

/// What became of finished blocks.
#[derive(Clone)]
pub(crate) struct WriteBackMetrics {
    pub(crate) written: Counter,
    pub(crate) present: Counter,
    pub(crate) not_taken: Counter,
    pub(crate) bytes: Counter,
    /// Blocks that wait.
    pub(crate) queued: Gauge,
    pub(crate) queue_full: Counter,
    /// Not in the cache any more when their turn came.
    pub(crate) evicted: Counter,
    pub(crate) no_staging: Counter,
}

/// What may be decided about blocks that the store may have.
const DECISIONS: [&str; 4] = ["read", "compute", "probe", "miss"];

impl StoreMetrics {
    pub(crate) fn new(page: &kvasir_runtime::Metrics) -> Self {
        let this = Self {
            decisions: page
                .counters("kvasir_worker_store_decisions", "Prompts by how the store's blocks were decided on"),
            lookup: page.traced_histogram(
                "kvasir_worker_store_lookup_seconds",
                "From asking the store until it was known what it has",
                LATENCY_SECONDS,
            ),
            read: page.traced_histogram(
                "kvasir_worker_store_read_seconds",
                "Reading the blocks of a prompt from the store",
                LATENCY_SECONDS,
            ),
            read_bytes: page.counter("kvasir_worker_store_read_bytes", "KV bytes read from the store for prompts"),
            meanwhile_tokens: page.counter(
                "kvasir_worker_store_meanwhile_tokens",
                "Prompt tokens computed while the blocks behind them were read from the store",
            ),
            expected_compute: page.float_gauge(
                "kvasir_worker_store_expected_compute_seconds",
                "At the last decision: how long computing the blocks was expected to take",
            ),
            expected_read: page.float_gauge(
                "kvasir_worker_store_expected_read_seconds",
                "At the last decision: how long reading the blocks was expected to take",
            ),
            write_back: WriteBackMetrics::new(page),
        };
        // Every series is there from the start: a rate over one that appears with its first event misses that event.
        for decision in DECISIONS {
            this.decision(decision).inc_by(0);
        }
        this
    }

    /// Counts a decision.
    pub(crate) fn decided(&self, decision: &'static str) {
        debug_assert!(DECISIONS.contains(&decision));
        self.decision(decision).inc();
    }

    fn decision(&self, decision: &'static str) -> Counter {
        self.decisions.get_or_create(&[("decision", decision)]).clone()
    }
}

impl WriteBackMetrics {
    fn new(page: &kvasir_runtime::Metrics) -> Self {
        let blocks: Family<Labels, Counter> =
            page.counters("kvasir_worker_write_back_blocks", "Finished blocks offered to the store, by what it said");
        let blocks = |outcome| blocks.get_or_create(&[("outcome", outcome)]).clone();
        let dropped: Family<Labels, Counter> =
            page.counters("kvasir_worker_write_back_dropped_blocks", "Finished blocks not offered, by reason");
        let dropped = |reason| dropped.get_or_create(&[("reason", reason)]).clone();
        Self {
            written: blocks("written"),
            present: blocks("present"),
            not_taken: blocks("not_taken"),
            bytes: page.counter("kvasir_worker_write_back_bytes", "KV bytes of finished blocks written to the store"),
            queued: page.gauge("kvasir_worker_write_back_queued_blocks", "Finished blocks that wait to be offered"),
            queue_full: dropped("queue_full"),
            evicted: dropped("evicted"),
            no_staging: dropped("staging_full"),
        }
    }
}
