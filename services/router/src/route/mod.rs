//! Which workers get a request.
//!
//! A [`Policy`] is a pure function: the pool as it is now and what is asked go in, a decision comes out. No clock, no
//! I/O, no state: what must differ from call to call (the ticket for round robin, the dice for random) is in the
//! [`Ask`]. So a policy can be tested by its laws, replayed from a log and run in a simulator.
//!
//! ```text
//! fleet (members, loads) ──snapshot──▶ Pool ─┐
//! request ──▶ Ask ───────────────────────────┴─▶ Policy::decide ─▶ Decision { decode, prefill in order }
//! ```
//!
//! The pool holds only what may be chosen: workers that serve the model, speak our protocol, are not draining. Which
//! prefill workers can feed which decode worker is in the pool too; a policy cannot pair what does not fit.

mod policies;

pub use policies::{LeastLoaded, Random, RoundRobin};

use serde::{Deserialize, Serialize};

/// Most prefill workers proposed for one request: the decode worker tries them in order, then itself.
pub(crate) const MAX_PREFILL: usize = 4;

/// What a worker has to do for this router.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests under way there; at a prefill worker, those whose first token has not come yet.
    pub requests: u64,
    /// Prompt tokens of those requests: what a decode worker holds, what a prefill worker computes.
    pub tokens: u64,
}

/// A decode worker that may be chosen.
#[derive(Clone, Debug, Default)]
pub struct DecodeOption {
    /// Its load.
    pub load: Load,
    /// The prefill workers that can feed it: indexes into [`Pool::prefill`].
    pub pairs: Vec<usize>,
}

/// A prefill worker that may be chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrefillOption {
    /// Its load.
    pub load: Load,
}

/// All workers that may be chosen for a request.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// Decode workers.
    pub decode: Vec<DecodeOption>,
    /// Prefill workers.
    pub prefill: Vec<PrefillOption>,
}

/// What a policy may know of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The request's number at this router: 0, 1, 2, …
    pub ticket: u64,
    /// A random number, another one for each request.
    pub dice: u64,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Index into [`Pool::decode`].
    pub decode: usize,
    /// Indexes into [`Pool::prefill`], in the order in which to try them.
    pub prefill: Vec<usize>,
}

/// A way of choosing.
pub trait Policy: Send + Sync {
    /// Chooses; `None` only if there is no decode worker.
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision>;
}

/// The policies there are, by the names the configuration knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// The worker with the least to do.
    #[default]
    LeastLoaded,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
}

impl PolicyName {
    /// The policy of this name.
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            Self::LeastLoaded => Box::new(LeastLoaded),
            Self::RoundRobin => Box::new(RoundRobin),
            Self::Random => Box::new(Random),
        }
    }
}
