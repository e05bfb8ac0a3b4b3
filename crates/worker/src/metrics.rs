//! What a worker counts. Names are promises: dashboards and alerts are built on them.

mod store;
mod transfer;
mod vllm;

use kvasir_cluster::ModelInfo;
use kvasir_engine::Handle;
use kvasir_runtime::metrics::{
    Counter, EncodeLabelSet, EncodeLabelValue, Family, Gauge, LATENCY_SECONDS, TracedHistogram, set_total,
};
use kvasir_transfer::TransferEngine;
use kvasir_types::Role;

use crate::error::Error;

pub(crate) use store::{StoreMetrics, WriteBackMetrics};

/// Bounds in seconds for the gap between two tokens: a tenth of a millisecond to ten seconds.
const TOKEN_SECONDS: &[f64] =
    &[0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Outcome {
    Finished,
    Refused,
    Cancelled,
    Deadline,
    Failed,
}

impl Outcome {
    const ALL: [Self; 5] = [Self::Finished, Self::Refused, Self::Cancelled, Self::Deadline, Self::Failed];

    pub(crate) fn of(error: &Error) -> Self {
        match error {
            Error::Message(_)
            | Error::Model { .. }
            | Error::Layout { .. }
            | Error::Token { .. }
            | Error::Targets(_)
            | Error::Rejected(_)
            | Error::Draining => Self::Refused,
            Error::CallerGone | Error::Revoked => Self::Cancelled,
            Error::Deadline => Self::Deadline,
            Error::Engine(_)
            | Error::Prefill { .. }
            | Error::Protocol { .. }
            | Error::Diverged { .. }
            | Error::Unfenced { .. }
            | Error::Transfer(_) => Self::Failed,
        }
    }
}

/// Where the KV of a prompt's tokens came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Source {
    /// This worker's prefix cache.
    Cache,
    /// The decode worker's memory.
    Peer,
    /// The KV store.
    Store,
    /// Computed here.
    Computed,
}

impl Source {
    const ALL: [Self; 4] = [Self::Cache, Self::Peer, Self::Store, Self::Computed];
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BySource {
    source: Source,
}

/// The counters and distributions that request tasks write to.
pub(crate) struct Metrics {
    requests: Family<ByOutcome, Counter>,
    prompt_tokens: Family<BySource, Counter>,
    failed_attempts: Counter,
    works_as: Family<[(&'static str, &'static str); 1], Gauge>,
    moved: Counter,
    /// From the arrival of a request to its first token, in seconds.
    pub(crate) ttft: TracedHistogram,
    /// Between two tokens of an answer, in seconds.
    pub(crate) inter_token: TracedHistogram,
    /// From asking a prefill worker until the whole prompt had landed, in seconds.
    pub(crate) handoff: TracedHistogram,
    /// Bytes that this worker wrote into decode workers' memory.
    pub(crate) handoff_bytes: Counter,
}

impl Metrics {
    pub(crate) fn new(
        page: &kvasir_runtime::Metrics,
        engine: Handle,
        transfer: TransferEngine,
        model: &ModelInfo,
        blocks: usize,
    ) -> Self {
        let metrics = Self {
            requests: page.counters("kvasir_worker_requests", "Requests by how they ended"),
            prompt_tokens: page.counters("kvasir_worker_prompt_tokens", "Prompt tokens by where their KV came from"),
            failed_attempts: page
                .counter("kvasir_worker_prefill_attempts_failed", "Prefill workers that failed a handoff"),
            works_as: page.gauges("kvasir_worker_works_as", "1 for what the worker works as now, 0 for the other"),
            moved: page.counter("kvasir_worker_role_changes", "Times the worker began to work as something else"),
            ttft: page.traced_histogram(
                "kvasir_worker_ttft_seconds",
                "From a request's arrival to its first token",
                LATENCY_SECONDS,
            ),
            inter_token: page.traced_histogram(
                "kvasir_worker_inter_token_seconds",
                "Between two tokens of an answer",
                TOKEN_SECONDS,
            ),
            handoff: page.traced_histogram(
                "kvasir_worker_handoff_seconds",
                "From asking a prefill worker until the whole prompt had landed",
                LATENCY_SECONDS,
            ),
            handoff_bytes: page.counter("kvasir_worker_handoff_bytes", "KV bytes written into decode workers' memory"),
        };
        // Every series is there from the start: a rate over one that appears with its first event misses that event.
        for outcome in Outcome::ALL {
            metrics.requests.get_or_create(&ByOutcome { outcome }).inc_by(0);
        }
        for source in Source::ALL {
            metrics.prompt_tokens(source, 0);
        }
        vllm::register(page, engine.clone(), model, blocks);
        EnginePage::register(page, engine);
        transfer::TransferPage::register(page, transfer);
        metrics
    }

    /// Counts a request's end.
    pub(crate) fn outcome(&self, outcome: Outcome) {
        self.requests.get_or_create(&ByOutcome { outcome }).inc();
    }

    /// Counts tokens of a prompt by where their KV came from.
    pub(crate) fn prompt_tokens(&self, source: Source, tokens: usize) {
        self.prompt_tokens.get_or_create(&BySource { source }).inc_by(tokens as u64);
    }

    /// Counts a prefill worker that failed a handoff.
    pub(crate) fn failed_attempt(&self) {
        self.failed_attempts.inc();
    }

    /// What the worker works as from now on.
    pub(crate) fn works_as(&self, role: Role) {
        for (one, name) in [(Role::Prefill, "prefill"), (Role::Decode, "decode")] {
            self.works_as.get_or_create(&[("role", name)]).set(i64::from(role == one));
        }
    }

    /// It works as something else than before.
    pub(crate) fn moved(&self) {
        self.moved.inc();
    }

    /// Requests that ended, however.
    pub(crate) fn requests_total(&self) -> u64 {
        Outcome::ALL.into_iter().map(|outcome| self.requests.get_or_create(&ByOutcome { outcome }).get()).sum()
    }
}

/// What became of blocks of sequences that lost their place.
#[derive(Clone)]
pub(crate) struct SpillMetrics {
    /// Blocks that the store has, written to it or there before.
    pub(crate) spilled: Counter,
    /// Blocks read back from it.
    pub(crate) recalled: Counter,
    /// Blocks not kept because no staging slot was free.
    pub(crate) no_staging: Counter,
    /// Blocks that the store did not take.
    pub(crate) not_taken: Counter,
}

impl SpillMetrics {
    pub(crate) fn new(page: &kvasir_runtime::Metrics) -> Self {
        let dropped: Family<[(&'static str, &'static str); 1], Counter> =
            page.counters("kvasir_worker_spill_dropped_blocks", "Blocks of preempted sequences not kept, by reason");
        let dropped = |reason| dropped.get_or_create(&[("reason", reason)]).clone();
        Self {
            spilled: page.counter("kvasir_worker_spilled_blocks", "Blocks of preempted sequences that the store keeps"),
            recalled: page.counter("kvasir_worker_recalled_blocks", "Blocks read back for sequences preempted before"),
            no_staging: dropped("staging_full"),
            not_taken: dropped("store"),
        }
    }
}

/// What the engine counts, copied over when somebody looks.
struct EnginePage {
    blocks: Family<[(&'static str, &'static str); 1], Gauge>,
    sequences: Family<[(&'static str, &'static str); 1], Gauge>,
    steps: Counter,
    prefilled: Counter,
    sampled: Counter,
    preemptions: Counter,
    drafted: Counter,
    accepted: Counter,
    proposer_failures: Counter,
}

impl EnginePage {
    fn register(page: &kvasir_runtime::Metrics, engine: Handle) {
        let this = Self {
            blocks: page.gauges("kvasir_worker_blocks", "KV blocks by state: free + cached + in_use = all"),
            sequences: page.gauges("kvasir_worker_sequences", "Sequences by state; waiting is the queue's depth"),
            steps: page.counter("kvasir_worker_engine_steps", "Steps that computed something"),
            prefilled: page.counter("kvasir_worker_prefilled_tokens", "Prompt tokens computed"),
            sampled: page.counter("kvasir_worker_sampled_tokens", "Tokens sampled"),
            preemptions: page.counter("kvasir_worker_preemptions", "Times a sequence lost its blocks to an older one"),
            drafted: page.counter("kvasir_worker_drafted_tokens", "Tokens guessed by speculation and checked"),
            accepted: page.counter("kvasir_worker_accepted_tokens", "Guessed tokens that the model chose, too"),
            proposer_failures: page
                .counter("kvasir_worker_proposer_failures", "Times speculation failed and was switched off"),
        };
        page.on_scrape(move || this.refresh(&engine));
    }

    fn refresh(&self, engine: &Handle) {
        let stats = engine.stats();
        let (blocks, sequences) = (stats.blocks, &stats);
        for (state, count) in [("free", blocks.free), ("cached", blocks.cached), ("in_use", blocks.in_use)] {
            self.blocks.get_or_create(&[("state", state)]).set(count as i64);
        }
        for (state, count) in [
            ("waiting", sequences.waiting),
            ("held", sequences.held),
            ("running", sequences.running),
            ("parked", sequences.parked),
        ] {
            self.sequences.get_or_create(&[("state", state)]).set(count as i64);
        }
        set_total(&self.steps, stats.steps);
        set_total(&self.prefilled, stats.prefilled_tokens);
        set_total(&self.sampled, stats.sampled_tokens);
        set_total(&self.preemptions, stats.preemptions);
        set_total(&self.drafted, stats.drafted_tokens);
        set_total(&self.accepted, stats.accepted_tokens);
        set_total(&self.proposer_failures, stats.proposer_failures);
    }
}
