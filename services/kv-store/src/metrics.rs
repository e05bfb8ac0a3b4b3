//! What a store node counts.
//!
//! | name | unit | labels |
//! | --- | --- | --- |
//! | `kvasir_kv_store_capacity_bytes`, `_used_bytes` | bytes | |
//! | `kvasir_kv_store_blocks` | blocks | `state`: present (in memory or on disk), memory, disk, pinned (being read), kept (by a soft or hard pin), reserved |
//! | `kvasir_kv_store_disk_capacity_bytes`, `_disk_used_bytes` | bytes | |
//! | `kvasir_kv_store_disk_dirty_blocks` | blocks waiting to be written to disk, at most | |
//! | `kvasir_kv_store_promoted_blocks_total`, `_demoted_blocks_total` | blocks read from disk into memory; given up by memory and on disk | |
//! | `kvasir_kv_store_disk_written_blocks_total`, `_disk_torn_blocks_total` | blocks | |
//! | `kvasir_kv_store_lookups_total` | calls | |
//! | `kvasir_kv_store_hit_blocks_total`, `_missed_blocks_total` | blocks asked for | |
//! | `kvasir_kv_store_committed_blocks_total`, `_evicted_blocks_total` | blocks | |
//! | `kvasir_kv_store_refused_total` | blocks, calls for `busy` | `reason`: full, torn, busy |
//! | `kvasir_kv_store_expired_total` | holds | `hold`: lease, reservation |
//! | `kvasir_kv_store_moved_bytes_total` | bytes | `transport`: local, tcp; `direction`: read, written |
//! | `kvasir_kv_store_fenced_connections_total` | connections cut so that memory could be reused | |
//! | `kvasir_kv_store_handed_over_blocks_total`, `_handed_over_bytes_total` | blocks, bytes given to other nodes | |
//! | `kvasir_kv_store_handover_failed_groups_total` | times that a group did not arrive elsewhere | |
//! | `kvasir_kv_store_not_handed_over_blocks` | blocks that others were to have and nobody took | |
//! | `kvasir_kv_store_handover_groups_left`, `_hot_groups` | placement groups | |
//! | `kvasir_kv_store_heard_from_nodes` | nodes whose counts are counted with this one's | |
//! | `kvasir_kv_store_call_seconds` | seconds | `call` |

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use kvasir_runtime::metrics::{Histograms, set_total};
use kvasir_types::TransportKind;
use prometheus_client::metrics::histogram::Histogram;

use crate::node::Node;

/// Bounds in seconds for a call: most are a look into a table.
const CALL_SECONDS: &[f64] =
    &[0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0];

/// Which call is timed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    Lookup,
    Used,
    Release,
    Reserve,
    Commit,
    Exists,
    Get,
    Put,
    Report,
    Pin,
    Evict,
    Drain,
    Learned,
}

impl Call {
    const ALL: [Self; 13] = [
        Self::Lookup,
        Self::Used,
        Self::Release,
        Self::Reserve,
        Self::Commit,
        Self::Exists,
        Self::Get,
        Self::Put,
        Self::Report,
        Self::Pin,
        Self::Evict,
        Self::Drain,
        Self::Learned,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Used => "used",
            Self::Release => "release",
            Self::Reserve => "reserve",
            Self::Commit => "commit",
            Self::Exists => "exists",
            Self::Get => "get",
            Self::Put => "put",
            Self::Report => "report",
            Self::Pin => "pin",
            Self::Evict => "evict",
            Self::Drain => "drain",
            Self::Learned => "learned",
        }
    }
}

/// What is counted as it happens; the rest is copied from the node at each scrape.
#[derive(Clone)]
pub(crate) struct Metrics {
    /// One for each call, in the order of [`Call::ALL`]: no look-up by label on the way of a call.
    calls: Arc<[Histogram]>,
}

impl Metrics {
    pub(crate) fn new(page: &kvasir_runtime::Metrics, node: &Arc<Node>) -> Self {
        copy_at_scrape(page, node);
        let calls: Histograms<[(&str, &str); 1]> =
            page.histograms("kvasir_kv_store_call_seconds", "Time to serve a call.", CALL_SECONDS);
        Self { calls: Call::ALL.iter().map(|call| calls.get_or_create(&[("call", call.label())]).clone()).collect() }
    }

    /// Measures a call until the result is dropped.
    pub(crate) fn time(&self, call: Call) -> Timer<'_> {
        Timer { histogram: &self.calls[call as usize], started: Instant::now() }
    }
}

/// A call under way.
#[must_use]
pub(crate) struct Timer<'a> {
    histogram: &'a Histogram,
    started: Instant,
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.histogram.observe(self.started.elapsed().as_secs_f64());
    }
}

/// The store's own counters and gauges.
fn copy_at_scrape(page: &kvasir_runtime::Metrics, node: &Arc<Node>) {
    type One = [(&'static str, &'static str); 1];
    let capacity = page.gauge("kvasir_kv_store_capacity_bytes", "Memory for blocks.");
    let used = page.gauge("kvasir_kv_store_used_bytes", "Memory of blocks present or reserved.");
    let blocks = page.gauges::<One>("kvasir_kv_store_blocks", "Blocks by state; pinned ones are present too.");
    let disk_capacity = page.gauge("kvasir_kv_store_disk_capacity_bytes", "Room for blocks on disk.");
    let disk_used = page.gauge("kvasir_kv_store_disk_used_bytes", "Room of blocks on disk, or on their way.");
    let dirty = page.gauge("kvasir_kv_store_disk_dirty_blocks", "Blocks waiting to be written to disk, at most.");
    let promoted = page.counter("kvasir_kv_store_promoted_blocks", "Blocks read from disk into memory.");
    let demoted = page.counter("kvasir_kv_store_demoted_blocks", "Blocks given up by memory that are on disk.");
    let written = page.counter("kvasir_kv_store_disk_written_blocks", "Blocks written to disk.");
    let torn_on_disk =
        page.counter("kvasir_kv_store_disk_torn_blocks", "Blocks on disk with other bytes than written.");
    let lookups = page.counter("kvasir_kv_store_lookups", "Lookups served.");
    let hits = page.counter("kvasir_kv_store_hit_blocks", "Blocks asked for that were found.");
    let misses = page.counter("kvasir_kv_store_missed_blocks", "Blocks asked for from the first missing one on.");
    let committed = page.counter("kvasir_kv_store_committed_blocks", "Blocks that became visible.");
    let evicted = page.counter("kvasir_kv_store_evicted_blocks", "Blocks given up for room.");
    let refused = page.counters::<One>(
        "kvasir_kv_store_refused",
        "Blocks for which there was no room or whose bytes were not as claimed, and calls past the limits.",
    );
    let expired = page.counters::<One>("kvasir_kv_store_expired", "Leases and reservations that nobody ended.");
    let moved = page.counters::<[(&'static str, &'static str); 2]>(
        "kvasir_kv_store_moved_bytes",
        "Bytes that clients read from and wrote into this node.",
    );
    let fenced = page.counter("kvasir_kv_store_fenced_connections", "Connections cut so that memory could be reused.");
    let heard_from = page.gauge("kvasir_kv_store_heard_from_nodes", "Nodes whose counts are counted with this one's.");
    // The page outlives the node where the process does.
    let node = Arc::downgrade(node);
    page.on_scrape(move || {
        let Some(node) = node.upgrade() else { return };
        heard_from.set(gauge(node.heard_from.load(Ordering::Relaxed)));
        let (usage, (totals, torn), stats) = (node.usage(), node.totals(), node.engine().stats());
        capacity.set(gauge(usage.capacity_bytes));
        used.set(gauge(usage.used_bytes));
        disk_capacity.set(gauge(usage.disk_capacity_bytes));
        disk_used.set(gauge(usage.disk_used_bytes));
        dirty.set(gauge(usage.dirty));
        set_total(&promoted, totals.promoted_blocks);
        set_total(&demoted, totals.demoted_blocks);
        set_total(&written, totals.written_blocks);
        set_total(&torn_on_disk, totals.torn_on_disk_blocks);
        for (state, count) in [
            ("present", usage.blocks),
            ("memory", usage.memory_blocks),
            ("disk", usage.disk_blocks),
            ("pinned", usage.pinned),
            ("kept", usage.kept),
            ("reserved", usage.reserved),
        ] {
            blocks.get_or_create(&[("state", state)]).set(gauge(count));
        }
        set_total(&lookups, totals.lookups);
        set_total(&hits, totals.hit_blocks);
        set_total(&misses, totals.missed_blocks);
        set_total(&committed, totals.committed_blocks);
        set_total(&evicted, totals.evicted_blocks);
        for (reason, count) in [("full", totals.full_blocks), ("torn", torn), ("busy", totals.refused_calls)] {
            set_total(&refused.get_or_create(&[("reason", reason)]), count);
        }
        for (hold, count) in [("lease", totals.expired_leases), ("reservation", totals.expired_reservations)] {
            set_total(&expired.get_or_create(&[("hold", hold)]), count);
        }
        let owner = stats.owner;
        for transport in TransportKind::ALL {
            let (traffic, transport) = (owner.of(transport), transport.name());
            for (direction, bytes) in [("read", traffic.read_bytes), ("written", traffic.written_bytes)] {
                set_total(&moved.get_or_create(&[("transport", transport), ("direction", direction)]), bytes);
            }
        }
        set_total(&fenced, stats.fenced_connections);
    });
}

fn gauge(value: u64) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}
