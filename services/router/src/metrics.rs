//! What a router counts.
//!
//! | name | labels | what |
//! | --- | --- | --- |
//! | `kvasir_router_requests_total` | `endpoint`, `status` | HTTP answers, by class of status (`2xx` …) |
//! | `kvasir_router_answers_total` | `outcome` | answers begun: `complete`, `failed`, `cancelled` (the client left) |
//! | `kvasir_router_turned_away_total` | `why` | requests without a key (`no_key`), or with one there isn't (`bad_key`) |
//! | `kvasir_router_waiting`, `kvasir_router_placed` | `model` | requests that wait for their turn; that have it |
//! | `kvasir_router_wait_seconds` | | from a request's tokens being known to its turn |
//! | `kvasir_router_not_let_in_total` | `why` | requests that too many waited for (`full`), that would have been, or were, too `late`, over a `rate` |
//! | `kvasir_router_inflight` | | generation requests under way |
//! | `kvasir_router_ttft_seconds` | | from a request's head to its first token |
//! | `kvasir_router_inter_token_seconds` | | between two tokens of an answer |
//! | `kvasir_router_request_seconds` | | from a request's head to the end of its answer |
//! | `kvasir_router_prompt_tokens_total`, `…_cached_tokens_total`, `…_output_tokens_total` | | tokens |
//! | `kvasir_router_upstream_errors_total` | `kind` | failed calls to decode workers, retried ones too |
//! | `kvasir_router_second_tries_total` | `allowed` | tries after a worker's failure, and those that `retry` did not allow |
//! | `kvasir_router_move_seconds` | | from a worker's failure within an answer to the next token, from another one |
//! | `kvasir_router_decode_workers` | | decode workers that may be chosen |
//! | `kvasir_router_decisions_total` | `policy`, `reason` | requests that were given a worker, second tries too, and what decided |
//! | `kvasir_router_decision_seconds` | | for one decision, finding out who holds what included |
//! | `kvasir_router_predicted_cached_tokens_total` | | tokens of prompts that the chosen workers were thought to hold; beside `…_cached_tokens_total` |
//! | `kvasir_router_slo_total` | `target`, `met` | answers whose first token (`ttft`), whose tokens on average (`tpot`) came in time, `yes` or `no` |
//! | `kvasir_router_plans` | | 1 while this router is the one that plans |
//! | `kvasir_router_worker_moves_total` | `to` | workers that it moved |
//! | `kvasir_router_indexed_blocks`, `…_indexed_holdings` | | blocks that some worker is known to hold; the same, once for each worker |
//! | `kvasir_router_feeds_connected` | | workers that tell what they hold |
//! | `kvasir_router_feed_resyncs_total` | `cause` | times a worker's cache was learned anew: `gap` (changes were lost), `reconnect` |
//!
//! The distributions of what a request waited for name a trace in each bucket, if traces are recorded.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_runtime::metrics::{
    Counter, Family, Gauge, Histogram, LATENCY_SECONDS, Metrics as Page, TraceId, TracedHistogram,
};
use kvasir_types::Role;

use crate::{
    access::Unknown,
    admission::Gates,
    cache::Index,
    config::Slo,
    route::{PolicyName, Reason},
};

/// Bounds in seconds between tokens: fast decoding is well under a millisecond here.
const INTER_TOKEN_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0];

/// Bounds in seconds for a decision.
const DECISION_SECONDS: &[f64] =
    &[2e-6, 5e-6, 10e-6, 20e-6, 35e-6, 50e-6, 75e-6, 100e-6, 150e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 10e-3];

/// What the feeds count. Cheap to clone.
#[derive(Clone)]
pub(crate) struct CacheMetrics {
    connected: Gauge,
    resyncs: Family<[(&'static str, &'static str); 1], Counter>,
}

impl CacheMetrics {
    /// Registers them, and those of the index.
    pub(crate) fn new(page: &Page, index: &Arc<Index>) -> Self {
        let blocks = page.gauge("kvasir_router_indexed_blocks", "Blocks that some worker is known to hold");
        let held =
            page.gauge("kvasir_router_indexed_holdings", "The same, counted once for each worker that holds them");
        let index = Arc::clone(index);
        page.on_scrape(move || {
            blocks.set(index.blocks() as i64);
            held.set(index.held() as i64);
        });
        let metrics = Self {
            connected: page.gauge("kvasir_router_feeds_connected", "Workers that tell what they hold"),
            resyncs: page.counters("kvasir_router_feed_resyncs", "Times a worker's cache was learned anew, by cause"),
        };
        for cause in ["gap", "reconnect"] {
            // The series is there from the start.
            metrics.resyncs.get_or_create(&[("cause", cause)]).inc_by(0);
        }
        metrics
    }

    /// A worker tells, until the guard is dropped.
    pub(crate) fn connected(&self) -> Connected {
        self.connected.inc();
        Connected(self.connected.clone())
    }

    /// A worker's cache is learned anew.
    pub(crate) fn resync(&self, cause: &'static str) {
        self.resyncs.get_or_create(&[("cause", cause)]).inc();
    }
}

/// See [`CacheMetrics::connected`].
pub(crate) struct Connected(Gauge);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What the planner counts. Cheap to clone.
#[derive(Clone)]
pub(crate) struct PlannerMetrics {
    leads: Gauge,
    moves: Family<[(&'static str, &'static str); 1], Counter>,
}

impl PlannerMetrics {
    /// Registers them.
    pub(crate) fn new(page: &Page) -> Self {
        let metrics = Self {
            leads: page.gauge("kvasir_router_plans", "1 while this router is the one that plans"),
            moves: page
                .counters("kvasir_router_worker_moves", "Workers that this router moved, by what they work as since"),
        };
        for to in ["prefill", "decode"] {
            metrics.moves.get_or_create(&[("to", to)]).inc_by(0);
        }
        metrics
    }

    /// Whether this router plans.
    pub(crate) fn leads(&self, leads: bool) {
        self.leads.set(i64::from(leads));
    }

    /// It moved a worker.
    pub(crate) fn moved(&self, to: Role) {
        let to = if to == Role::Prefill { "prefill" } else { "decode" };
        self.moves.get_or_create(&[("to", to)]).inc();
    }
}

/// The router's metrics. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Metrics {
    requests: Family<[(&'static str, &'static str); 2], Counter>,
    answers: Family<[(&'static str, &'static str); 1], Counter>,
    decisions: Family<[(&'static str, &'static str); 2], Counter>,
    decision: Histogram,
    predicted_cached_tokens: Counter,
    upstream_errors: Family<[(&'static str, &'static str); 1], Counter>,
    not_let_in: Family<[(&'static str, &'static str); 1], Counter>,
    wait: TracedHistogram,
    turned_away: Family<[(&'static str, &'static str); 1], Counter>,
    second_tries: Family<[(&'static str, &'static str); 1], Counter>,
    moved: TracedHistogram,
    inflight: Gauge,
    ttft: TracedHistogram,
    inter_token: TracedHistogram,
    request: TracedHistogram,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    output_tokens: Counter,
    slo: Family<[(&'static str, &'static str); 2], Counter>,
    /// Set by the task that watches the members.
    pub(crate) decode_workers: Gauge,
}

impl Metrics {
    /// Registers all of them.
    pub(crate) fn new(page: &Page) -> Self {
        let metrics = Self {
            requests: page.counters("kvasir_router_requests", "HTTP answers by endpoint and class of status"),
            answers: page.counters("kvasir_router_answers", "Answers begun, by how they ended"),
            decisions: page.counters("kvasir_router_decisions", "Requests given a worker, by policy and what decided"),
            decision: page.histogram("kvasir_router_decision_seconds", "For one decision", DECISION_SECONDS),
            predicted_cached_tokens: page.counter(
                "kvasir_router_predicted_cached_tokens",
                "Tokens of prompts that the chosen workers were thought to hold",
            ),
            upstream_errors: page.counters("kvasir_router_upstream_errors", "Failed calls to decode workers"),
            not_let_in: page.counters("kvasir_router_not_let_in", "Requests refused for want of room or by a limit"),
            wait: page.traced_histogram(
                "kvasir_router_wait_seconds",
                "Waiting for a place at the workers",
                LATENCY_SECONDS,
            ),
            turned_away: page.counters("kvasir_router_turned_away", "Requests without a key that is known"),
            second_tries: page.counters("kvasir_router_second_tries", "Tries after a worker's failure"),
            moved: page.traced_histogram(
                "kvasir_router_move_seconds",
                "A worker's failure within an answer to the next token",
                LATENCY_SECONDS,
            ),
            inflight: page.gauge("kvasir_router_inflight", "Generation requests under way"),
            ttft: page.traced_histogram("kvasir_router_ttft_seconds", "Request head to first token", LATENCY_SECONDS),
            inter_token: page.traced_histogram(
                "kvasir_router_inter_token_seconds",
                "Between two tokens of an answer",
                INTER_TOKEN_SECONDS,
            ),
            request: page.traced_histogram(
                "kvasir_router_request_seconds",
                "Request head to end of answer",
                LATENCY_SECONDS,
            ),
            prompt_tokens: page.counter("kvasir_router_prompt_tokens", "Tokens of prompts"),
            cached_tokens: page.counter("kvasir_router_cached_tokens", "Tokens of prompts that were not computed"),
            output_tokens: page.counter("kvasir_router_output_tokens", "Tokens of answers"),
            slo: page.counters("kvasir_router_slo", "Answers that kept a target, or did not"),
            decode_workers: page.gauge("kvasir_router_decode_workers", "Decode workers that may be chosen"),
        };
        // Every series is there from the start: a rate over one that appears with its first event misses that event.
        for why in ["full", "late", "rate"] {
            metrics.not_let_in.get_or_create(&[("why", why)]).inc_by(0);
        }
        for why in ["no_key", "bad_key"] {
            metrics.turned_away.get_or_create(&[("why", why)]).inc_by(0);
        }
        for allowed in ["yes", "no"] {
            metrics.second_tries.get_or_create(&[("allowed", allowed)]).inc_by(0);
        }
        for outcome in ["complete", "failed", "cancelled"] {
            metrics.answers.get_or_create(&[("outcome", outcome)]).inc_by(0);
        }
        metrics
    }

    /// An HTTP answer.
    pub(crate) fn answered(&self, endpoint: &'static str, status: http::StatusCode) {
        let class = match status.as_u16() / 100 {
            2 => "2xx",
            4 => "4xx",
            5 => "5xx",
            _ => "other",
        };
        self.requests.get_or_create(&[("endpoint", endpoint), ("status", class)]).inc();
    }

    /// A failed call to a worker.
    pub(crate) fn upstream_error(&self, kind: &'static str) {
        self.upstream_errors.get_or_create(&[("kind", kind)]).inc();
    }

    /// A request was given a worker.
    pub(crate) fn decided(&self, policy: PolicyName, reason: Reason, took: Duration) {
        self.decisions.get_or_create(&[("policy", policy.as_str()), ("reason", reason.as_str())]).inc();
        self.decision.observe(took.as_secs_f64());
    }

    /// The worker that took a request was thought to hold so many tokens of it.
    pub(crate) fn predicted(&self, cached: u32) {
        self.predicted_cached_tokens.inc_by(cached.into());
    }

    /// Shows how many wait at each gate.
    pub(crate) fn watch_gates(page: &Page, gates: Gates) {
        type ByModel = Family<[(&'static str, String); 1], Gauge>;
        let waiting: ByModel = page.gauges("kvasir_router_waiting", "Requests that wait for their turn");
        let placed: ByModel = page.gauges("kvasir_router_placed", "Requests that have had their turn, under way");
        page.on_scrape(move || {
            for (model, gate) in gates.iter() {
                let (wait, have) = gate.counts();
                waiting.get_or_create(&[("model", model.clone())]).set(wait as i64);
                placed.get_or_create(&[("model", model.clone())]).set(have as i64);
            }
        });
    }

    /// A request had its turn after so long.
    pub(crate) fn waited(&self, wait: Duration) {
        self.wait.observe(wait.as_secs_f64(), TraceId::current());
    }

    /// A request was not let in.
    pub(crate) fn not_let_in(&self, why: &'static str) {
        self.not_let_in.get_or_create(&[("why", why)]).inc();
    }

    /// Nobody knows who sent a request.
    pub(crate) fn turned_away(&self, why: Unknown) {
        let why = match why {
            Unknown::NoKey => "no_key",
            Unknown::BadKey => "bad_key",
        };
        self.turned_away.get_or_create(&[("why", why)]).inc();
    }

    /// A worker failed: whether the request may be tried again.
    pub(crate) fn second_try(&self, allowed: bool) {
        self.second_tries.get_or_create(&[("allowed", if allowed { "yes" } else { "no" })]).inc();
    }

    fn in_time(&self, target: &'static str, met: bool) {
        self.slo.get_or_create(&[("target", target), ("met", if met { "yes" } else { "no" })]).inc();
    }

    /// An answer went on elsewhere, so long after its worker failed.
    pub(crate) fn moved(&self, pause: Duration) {
        self.moved.observe(pause.as_secs_f64(), TraceId::current());
    }

    /// A generation request that was let in; it counts as under way until the guard is dropped.
    pub(crate) fn admitted(&self) -> Inflight {
        self.inflight.inc();
        Inflight { metrics: self.clone(), start: Instant::now(), trace: TraceId::current() }
    }
}

/// A request under way.
pub(crate) struct Inflight {
    metrics: Metrics,
    start: Instant,
    /// Known where the request is let in: its end may be noticed by somebody who has no span of it.
    trace: Option<TraceId>,
}

impl Inflight {
    /// Its answer, of so many choices, has begun: the first token is here.
    pub(crate) fn begun(self, prompt_tokens: usize, choices: usize, slo: Slo) -> Progress {
        let now = Instant::now();
        let ttft = (now - self.start).as_secs_f64();
        self.metrics.ttft.observe(ttft, self.trace);
        self.metrics.in_time("ttft", ttft * 1e3 <= slo.ttft_ms);
        self.metrics.prompt_tokens.inc_by(prompt_tokens as u64);
        let tpot = TokenTime { target: Duration::from_secs_f64(slo.tpot_ms / 1e3), ..TokenTime::default() };
        Progress { inflight: self, last: vec![None; choices], tpot, outcome: "cancelled" }
    }
}

impl Drop for Inflight {
    fn drop(&mut self) {
        self.metrics.inflight.dec();
    }
}

/// An answer under way. Dropped without an outcome, the client has left.
pub(crate) struct Progress {
    inflight: Inflight,
    /// When each choice had its last token.
    last: Vec<Option<Instant>>,
    tpot: TokenTime,
    outcome: &'static str,
}

/// How long an answer's tokens took, all choices together.
#[derive(Default)]
struct TokenTime {
    target: Duration,
    gaps: u32,
    time: Duration,
}

impl Progress {
    /// A token of a choice came.
    pub(crate) fn token(&mut self, choice: usize) {
        let (now, metrics) = (Instant::now(), &self.inflight.metrics);
        if let Some(last) = self.last[choice].replace(now) {
            metrics.inter_token.observe((now - last).as_secs_f64(), self.inflight.trace);
            self.tpot.gaps += 1;
            self.tpot.time += now - last;
        }
        metrics.output_tokens.inc();
    }

    /// The answer is complete; `cached`: prompt tokens that were not computed.
    pub(crate) fn complete(&mut self, cached: u32) {
        self.inflight.metrics.cached_tokens.inc_by(cached.into());
        self.outcome = "complete";
    }

    /// It broke off, and nobody goes on with it.
    pub(crate) fn failed(&mut self) {
        self.outcome = "failed";
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let metrics = &self.inflight.metrics;
        metrics.request.observe(self.inflight.start.elapsed().as_secs_f64(), self.inflight.trace);
        let TokenTime { target, gaps, time } = self.tpot;
        if gaps > 0 {
            metrics.in_time("tpot", time <= target * gaps);
        }
        metrics.answers.get_or_create(&[("outcome", self.outcome)]).inc();
    }
}
