//! Reading the beginning of a prompt from the store, if that is faster than computing it.
//!
//! The request that waits is never worse off by more than it would have taken to compute: that is the deadline of lookup
//! and read together, as far as it is known; a few times what they were expected to take is another, and
//! `store.read_timeout_ms` holds in any case. A node that does not say in
//! `store.lookup_timeout_ms` what it has is left alone for a while (the client's breaker); one that has blocks on disk says
//! so in this time.
//!
//! Meanwhile the engine computes for others. Has it nothing else to do, and does reading take long enough, it computes the
//! prompt's first chunks, while the blocks behind them are read: when both are there, it goes on behind what was read, and
//! if reading fails or takes too long, behind what it has computed.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use kvasir_engine::Admission;
use kvasir_runtime::metrics::TraceId;
use kvasir_store_client::Found;
use kvasir_types::{Deadline, RequestId};
use tracing::{Instrument, debug_span, field};

use super::{
    Store,
    cost::{Choice, PROBE_BLOCKS, Verdict},
    lock,
};
use crate::{config::Fetch, error::went_without_store};

/// A read that takes so many times as long as was expected is given up.
const LATE: u32 = 4;
/// What is expected of a short one is mostly chance.
const LEAST_PATIENCE: Duration = Duration::from_millis(250);

/// What becomes of a held sequence while its blocks are being read.
pub(crate) trait Meanwhile {
    /// The blocks before this one are to be computed now; peers write behind it.
    fn compute_until(&mut self, block: usize);

    /// These have arrived.
    fn arrived(&mut self, blocks: Range<usize>);
}

/// Blocks that were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fetched {
    /// Which; empty: none.
    pub(crate) blocks: Range<usize>,
    /// Whether those before them are being computed ([`Meanwhile::compute_until`]).
    pub(crate) computing: bool,
}

/// What was decided and found before any byte moved.
struct Plan {
    found: Found,
    head: usize,
    deadline: Instant,
}

impl Store {
    /// Reads blocks `wanted` of a held sequence, or some of them, and tells the sequence's owner how it goes. Run it to its
    /// end: until then blocks are being written.
    pub(crate) async fn fetch(
        &self,
        request: &RequestId,
        admission: &Admission,
        wanted: Range<usize>,
        deadline: Deadline,
        meanwhile: &mut impl Meanwhile,
    ) -> Fetched {
        let span = debug_span!("find", blocks = wanted.len());
        let plan = self.find(request, admission, wanted.clone(), deadline).instrument(span).await;
        let Some(Plan { mut found, head, deadline: until }) = plan else { return Fetched::default() };
        let start = wanted.start + head;
        let computed = || self.engine.stats().prefill.tokens;
        let before = computed();
        if head > 0 {
            found.skip(head);
            meanwhile.compute_until(start);
        }
        let started = Instant::now();
        let until = deadline.min(Deadline::after(until.saturating_duration_since(started)));
        let mut end = start;
        let arrived = |blocks| {
            meanwhile.arrived(end..start + blocks);
            end = start + blocks;
        };
        let span = debug_span!("read", blocks = found.blocks(), bytes = field::Empty);
        let report = self.client.fetch(&found, until, arrived).instrument(span.clone()).await;
        span.record("bytes", report.bytes);
        let took = started.elapsed();
        lock(&self.costs).read(report.bytes, took, Instant::now());
        self.metrics.read.observe(took.as_secs_f64(), TraceId::current());
        // The engine had nothing else to do when it got the head: what it has computed since is the head, as far as that goes.
        let meanwhile = (computed() - before).min((head * self.layout.block_size as usize) as u64);
        self.metrics.meanwhile_tokens.inc_by(meanwhile);
        self.metrics.read_bytes.inc_by(report.bytes);
        tracing::debug!(found = found.blocks(), head, read = report.blocks, ms = millis(took), "read from the store");
        if let Some(error) = &report.error {
            went_without(error, until);
        }
        self.client.release(found);
        Fetched { blocks: start..start + report.blocks, computing: head > 0 }
    }

    /// Asks the store. `None`: it has nothing, or computing is the faster way.
    async fn find(
        &self,
        request: &RequestId,
        admission: &Admission,
        wanted: Range<usize>,
        deadline: Deadline,
    ) -> Option<Plan> {
        if self.config.fetch == Fetch::Off || wanted.is_empty() || self.client.nodes() == 0 {
            return None;
        }
        let started = Instant::now();
        let asked = {
            let (stats, mut costs) = (self.engine.stats(), lock(&self.costs));
            costs.computed(stats.prefill);
            self.measured(costs.ask(wanted.clone(), self.idle_chunk(), started))
        };
        self.note(&asked, wanted.len());
        let probe = asked.choice == Choice::Probe;
        if asked.choice == Choice::Compute {
            self.metrics.decided("compute");
            return None;
        }
        let end = if probe { wanted.end.min(wanted.start + PROBE_BLOCKS) } else { wanted.end };
        let blocks = Self::located(&self.layout, &admission.hashes[..end], &admission.tables[0]);
        let until = deadline.min(Deadline::after(self.patience(&asked)));
        let block_bytes = self.layout.block_bytes() as u64;
        let mut found = self.client.find(request, blocks, wanted.start, block_bytes, until).await;
        let took = started.elapsed();
        self.metrics.lookup.observe(took.as_secs_f64(), TraceId::current());
        if let Some(error) = found.take_error() {
            went_without(&error, until);
        }
        let verdict = {
            let mut costs = lock(&self.costs);
            costs.looked_up(took);
            self.measured(costs.fetch(wanted.start..wanted.start + found.blocks(), self.idle_chunk()))
        };
        let decision = match verdict.choice {
            _ if found.blocks() == 0 => "miss",
            _ if probe => "probe",
            Choice::Compute => "compute",
            Choice::Read | Choice::Probe => "read",
        };
        self.metrics.decided(decision);
        if matches!(decision, "miss" | "compute") {
            self.client.release(found);
            return None;
        }
        // A probe may take what was expected of the whole: it is there to find out.
        let patience = self.patience(if probe { &asked } else { &verdict });
        let head = if probe { 0 } else { verdict.head };
        Some(Plan { found, head, deadline: started + patience })
    }

    /// Blocks that the engine computes at a time, if it has nothing else to do.
    fn idle_chunk(&self) -> Option<usize> {
        let stats = self.engine.stats();
        (stats.running == 0 && stats.waiting == 0).then_some(self.chunk)
    }

    /// The verdict, unless the configuration has another.
    fn measured(&self, verdict: Verdict) -> Verdict {
        match self.config.fetch {
            Fetch::Measured => verdict,
            Fetch::Always | Fetch::Off => Verdict { choice: Choice::Read, head: 0, ..verdict },
        }
    }

    /// How long a request may wait for blocks that could be computed meanwhile. A store from which nothing comes any more
    /// should cost less than the computing that is saved by one that is well.
    fn patience(&self, verdict: &Verdict) -> Duration {
        let limit = Duration::from_millis(self.config.read_timeout_ms);
        let late = verdict.read.saturating_mul(LATE).max(LEAST_PATIENCE);
        if self.config.fetch == Fetch::Measured { limit.min(verdict.compute).min(late) } else { limit }
    }

    fn note(&self, verdict: &Verdict, blocks: usize) {
        self.metrics.expected_compute.set(verdict.compute.as_secs_f64());
        self.metrics.expected_read.set(verdict.read.as_secs_f64());
        let Verdict { choice, head, compute, read } = verdict;
        tracing::debug!(
            ?choice,
            blocks,
            head,
            compute_ms = millis(*compute),
            read_ms = millis(*read),
            "store or compute"
        );
    }
}

/// A store that took longer than this request could wait has not failed.
fn went_without(error: &kvasir_store_client::Error, until: Deadline) {
    if until.passed() {
        tracing::debug!(error = kvasir_runtime::chain(error), "store not waited for any longer, going on without");
    } else {
        went_without_store(error, "store not read, going on without");
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
