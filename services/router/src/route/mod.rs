//! Which workers get a request.
//!
//! A [`Policy`] is a pure function: the pool as it is now and what is asked go in, a decision comes out. No clock, no
//! I/O, no state: what must differ from call to call (the ticket for round robin, the dice for random) is in the
//! [`Ask`]. So a policy can be tested by its laws, replayed from a log and run in a simulator.
//!
//! ```text
//! fleet (members, loads) ──snapshot──▶ Pool ─┐
//! index (who holds what) ───cached tokens──▶ │
//! request ──▶ Ask ───────────────────────────┴─▶ Policy::decide ─▶ Decision { decode, prefill in order, why }
//! ```
//!
//! The pool holds only what may be chosen: workers that serve the model, speak our protocol, are not draining. Which
//! prefill workers can feed which decode worker is in the pool too; a policy cannot pair what does not fit.
//! What choices cost, and why: `docs/routing.md`.

mod cost;
mod kv_aware;
mod policies;
mod prices;
mod sticky;
#[cfg(test)]
mod tests;

pub use cost::{Candidate, Cost, candidates};
pub use kv_aware::KvAware;
pub use policies::{LeastLoaded, Random, RoundRobin};
pub use sticky::SessionSticky;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::Slo;

/// Most prefill workers proposed for one request: the decode worker tries them in order, then itself.
pub const MAX_PREFILL: usize = 4;

/// What a worker has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests under way there; at a prefill worker, those whose first token has not come yet.
    pub requests: u64,
    /// Prompt tokens of those requests: what a decode worker holds, what a prefill worker is to compute.
    pub tokens: u64,
}

impl Load {
    /// The whole load of a worker that told `reported` some moments ago: of the caller's own requests there, `since` were
    /// sent after that, `own` in all. What others have sent since then nobody here knows.
    pub fn estimate(reported: Self, since: Self, own: Self) -> Self {
        Self {
            requests: (reported.requests + since.requests).max(own.requests),
            tokens: (reported.tokens + since.tokens).max(own.tokens),
        }
    }
}

/// How fast a worker is, as it measured itself lately; 0 where that is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Speed {
    /// Prompt tokens that it computes in a second.
    pub prefill_tokens_per_second: f32,
    /// From one token of an answer to its next.
    pub step_seconds: f32,
    /// What it writes into decode workers' memory in a second.
    pub handoff_bytes_per_second: f32,
}

/// A decode worker that may be chosen.
#[derive(Clone, Debug, Default)]
pub struct DecodeOption {
    /// Who it is: the same number for as long as the worker has its name, so that sessions find it again.
    pub key: u64,
    /// Its load; the tokens are those of the prompts that it holds.
    pub load: Load,
    /// Prompt tokens that it is computing itself.
    pub prefilling_tokens: u64,
    /// Tokens at the prompt's beginning whose blocks it holds, as far as that is known.
    pub cached_tokens: u32,
    /// Tokens that it has blocks for, those included that it would have to evict; `None`: not known.
    pub room_tokens: Option<u64>,
    /// It computes up to so many tokens itself, whoever is proposed.
    pub local_tokens: u32,
    /// What its steps are predicted to take with one answer more, in seconds; 0: not known.
    pub next_step: f32,
    /// How fast it is.
    pub speed: Speed,
    /// The prefill workers that can feed it: an index into [`Pool::pairings`].
    pub pairing: usize,
}

/// A prefill worker that may be chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrefillOption {
    /// Who it is; see [`DecodeOption::key`].
    pub key: u64,
    /// Its load; the tokens are those that it is still to compute.
    pub load: Load,
    /// Tokens at the prompt's beginning whose blocks it holds, as far as that is known.
    pub cached_tokens: u32,
    /// How fast it is.
    pub speed: Speed,
}

/// All workers that may be chosen for a request.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// Decode workers.
    pub decode: Vec<DecodeOption>,
    /// Prefill workers.
    pub prefill: Vec<PrefillOption>,
    /// Sets of prefill workers that go together with a decode worker: indexes into `prefill`. Usually there is one.
    pub pairings: Arc<[Vec<usize>]>,
}

impl Pool {
    /// The prefill workers that can feed this decode worker.
    pub fn pairs(&self, decode: usize) -> &[usize] {
        let pairing = self.decode.get(decode).map(|option| option.pairing);
        pairing.and_then(|pairing| self.pairings.get(pairing)).map_or(&[], Vec::as_slice)
    }
}

/// What a policy may know of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Bytes that a token's keys and values take.
    pub token_bytes: u32,
    /// Tokens at the prompt's beginning that the KV store is known to have: they are read rather than computed.
    pub stored_tokens: u32,
    /// When the first token should be there, in seconds; 0: there is no target.
    pub ttft: f32,
    /// What a token after the first should take, in seconds; 0: there is no target.
    pub tpot: f32,
    /// A number for the conversation that the request belongs to, if the client says so.
    pub session: Option<u64>,
    /// The request's number at this router: 0, 1, 2, …
    pub ticket: u64,
    /// A random number, another one for each request.
    pub dice: u64,
}

impl Ask {
    /// The same with the targets of its model.
    pub(crate) fn within(self, slo: Slo) -> Self {
        Self { ttft: (slo.ttft_ms / 1e3) as f32, tpot: (slo.tpot_ms / 1e3) as f32, ..self }
    }
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Index into [`Pool::decode`].
    pub decode: usize,
    /// Indexes into [`Pool::prefill`], in the order in which to try them.
    pub prefill: Vec<usize>,
    /// What decided.
    pub reason: Reason,
}

impl Decision {
    /// Tokens of the prompt that need not be computed, if what is known of the caches is true.
    pub fn cached_tokens(&self, ask: &Ask, pool: &Pool) -> u32 {
        let prefill = self.prefill.first().and_then(|&at| pool.prefill.get(at)).map_or(0, |first| first.cached_tokens);
        let decode = pool.decode.get(self.decode).map_or(0, |decode| decode.cached_tokens);
        cost::usable(ask, prefill.max(decode))
    }
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The workers hold part of the prompt.
    Cache,
    /// Others hold more of the prompt, but have too much to do.
    Busy,
    /// The load, as nobody holds any of the prompt (or nobody asked).
    Load,
    /// The conversation's worker.
    Session,
    /// The conversation's worker has too much to do.
    SessionBusy,
    /// It was the worker's turn.
    Turn,
    /// The dice.
    Dice,
}

impl Reason {
    /// For logs, metrics and headers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Busy => "busy",
            Self::Load => "load",
            Self::Session => "session",
            Self::SessionBusy => "session-busy",
            Self::Turn => "turn",
            Self::Dice => "dice",
        }
    }
}

/// A way of choosing.
pub trait Policy: Send + Sync {
    /// Chooses; `None` only if there is no decode worker.
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision>;

    /// Whether it looks at who holds what: else nobody need find out.
    fn wants_cache(&self) -> bool {
        false
    }
}

/// The policies there are, by the names the configuration knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// The workers that cost least: for computing what they lack of the prompt, waiting, moving and answering.
    #[default]
    KvAware,
    /// The same worker for all requests of a conversation, unless it has too much to do.
    SessionSticky,
    /// The worker with the least to do.
    LeastLoaded,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
}

impl PolicyName {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::KvAware, Self::SessionSticky, Self::LeastLoaded, Self::RoundRobin, Self::Random];

    /// As the configuration has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::KvAware => "kv-aware",
            Self::SessionSticky => "session-sticky",
            Self::LeastLoaded => "least-loaded",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
        }
    }

    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == name)
    }

    /// The policy of this name.
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            Self::KvAware => Box::new(KvAware),
            Self::SessionSticky => Box::new(SessionSticky),
            Self::LeastLoaded => Box::new(LeastLoaded),
            Self::RoundRobin => Box::new(RoundRobin),
            Self::Random => Box::new(Random),
        }
    }
}
