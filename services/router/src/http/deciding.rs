//! From a prompt to the workers that get it, and why: lays out what the policy looks at, and explains what it said.
//!
//! ```text
//!   prompt ─hash─▶ index: who holds how much ─▶ Crew::lay_out: the Pool ─▶ Policy::decide ─▶ Chosen
//!                                                                               └─▶ Explanation (if somebody wants one)
//! ```
//!
//! The prompt is hashed as workers hash it (`kvasir_types::chain`), and only as far as somebody holds it, and only if the
//! policy wants to know.

use std::{
    cell::RefCell,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use kvasir_types::{BlockHash, KvLayout, ModelFingerprint, TokenId};
use serde::Serialize;
use tracing::{Level, debug};

use super::app::App;
use crate::{
    cache::Index,
    fleet::{Crew, Desk, Worker},
    route::{Ask, Decision, Policy, PolicyName, candidates},
};

/// Blocks of a prompt that are looked for, at most: 128 k tokens in blocks of 16. Hashing more would keep others waiting, and
/// workers that hold so much of a prompt are all good.
const MAX_BLOCKS: usize = 8192;
/// Candidates in a header, and in what an operator gets.
const FEW: usize = 4;
const MANY: usize = 32;

/// All policies, and which one it is now.
pub(crate) struct Policies {
    all: [Box<dyn Policy>; PolicyName::ALL.len()],
    now: AtomicUsize,
}

impl Policies {
    /// To begin with.
    pub(crate) fn new(name: PolicyName) -> Self {
        let policies = Self { all: PolicyName::ALL.map(PolicyName::build), now: AtomicUsize::new(0) };
        policies.set(name);
        policies
    }

    /// Which one it is.
    pub(crate) fn name(&self) -> PolicyName {
        PolicyName::ALL[self.now.load(Relaxed)]
    }

    /// Another one, from the next request on.
    pub(crate) fn set(&self, name: PolicyName) {
        let at = PolicyName::ALL.iter().position(|&other| other == name);
        self.now.store(at.unwrap_or(0), Relaxed);
    }

    fn now(&self) -> (PolicyName, &dyn Policy) {
        let at = self.now.load(Relaxed);
        (PolicyName::ALL[at], &*self.all[at])
    }
}

/// A prompt, as its blocks are named.
pub(crate) struct Prompt<'a> {
    /// Its tokens.
    pub(crate) tokens: &'a [TokenId],
    /// The tenant's salt.
    pub(crate) salt: &'a str,
}

/// Who gets a request.
pub(crate) struct Chosen {
    /// The decode worker.
    pub(crate) worker: Arc<Worker>,
    /// Prefill workers, in the order in which to try them.
    pub(crate) prefill: Vec<Arc<Worker>>,
    /// Tokens that they are thought to hold.
    pub(crate) cached: u32,
    /// Tokens that are to be computed then.
    pub(crate) left: usize,
    /// Why these.
    pub(crate) reason: &'static str,
}

/// A decision and what it was made of.
#[derive(Debug, Serialize)]
pub(crate) struct Explanation {
    policy: &'static str,
    reason: &'static str,
    prompt_tokens: usize,
    cached_tokens: u32,
    decode: String,
    prefill: Vec<String>,
    /// The chosen pair first, then the best other decode workers, each with its best prefill worker.
    candidates: Vec<Priced>,
}

/// What a pair would cost, in milliseconds.
#[derive(Debug, Serialize)]
struct Priced {
    decode: String,
    /// Absent: the decode worker computes the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill: Option<String>,
    cached_tokens: u32,
    total_ms: f32,
    compute_ms: f32,
    wait_ms: f32,
    transfer_ms: f32,
    decode_ms: f32,
    late_ms: f32,
}

thread_local! {
    /// Used again and again: for a thousand workers what a policy looks at takes 100 kB.
    static DESK: RefCell<Desk> = RefCell::default();
}

tokio::task_local! {
    /// The request that is being answered wants to know; what it is told.
    static WANTED: RefCell<Option<String>>;
}

/// Runs a request, and says where it went and why, if that was asked.
pub(crate) async fn explaining<F: Future>(asked: bool, request: F) -> (F::Output, Option<String>) {
    if !asked {
        return (request.await, None);
    }
    WANTED
        .scope(RefCell::new(None), async {
            let output = request.await;
            (output, WANTED.with(RefCell::take))
        })
        .await
}

/// Chooses; `None` only if there is no decode worker.
pub(crate) fn decide(app: &App, ask: Ask, prompt: &Prompt<'_>, crew: &Crew) -> Option<Chosen> {
    let began = Instant::now();
    let (name, policy) = app.policies.now();
    DESK.with_borrow_mut(|desk| {
        let ask = lay_out(app, policy.wants_cache(), ask, prompt, crew, desk);
        let decision = policy.decide(&ask, &desk.pool)?;
        app.metrics.decided(name, decision.reason, began.elapsed());
        let cached = decision.cached_tokens(&ask, &desk.pool);
        let wanted = WANTED.try_with(|_| ()).is_ok();
        if wanted || tracing::enabled!(Level::DEBUG) {
            let told = explanation(name, &ask, &decision, crew, desk, FEW);
            let told = serde_json::to_string(&told).unwrap_or_default();
            debug!(route = told, "chosen");
            let _nobody_asked = WANTED.try_with(|wanted| wanted.replace(Some(told)));
        }
        let prefill = decision.prefill.iter().filter_map(|&at| crew.prefill(at)).cloned().collect();
        let worker = Arc::clone(crew.decode(decision.decode)?);
        let (left, reason) = (prompt.tokens.len().saturating_sub(cached as usize), decision.reason.as_str());
        Some(Chosen { worker, prefill, cached, left, reason })
    })
}

/// What would be chosen now, without choosing.
pub(crate) fn explain(app: &App, ask: Ask, prompt: &Prompt<'_>, crew: &Crew) -> Option<Explanation> {
    let (name, policy) = app.policies.now();
    DESK.with_borrow_mut(|desk| {
        // Whoever asks wants to know who holds what, though the policy may not.
        let ask = lay_out(app, true, ask, prompt, crew, desk);
        let decision = policy.decide(&ask, &desk.pool)?;
        Some(explanation(name, &ask, &decision, crew, desk, MANY))
    })
}

/// A prompt was sent to an engine that does not tell what it holds.
pub(crate) fn remember(index: &Index, worker: &Worker, prompt: &Prompt<'_>) {
    let (Some(engine), Some(info)) = (&worker.engine, &worker.member.model) else { return };
    if engine.remembered.remembers() {
        engine.remembered.sent(index, chain(info.fingerprint, &info.layout, prompt));
    }
}

/// The names of a prompt's blocks, as they are asked for.
fn chain(fingerprint: ModelFingerprint, layout: &KvLayout, prompt: &Prompt<'_>) -> impl Iterator<Item = BlockHash> {
    let block_size = layout.block_size.max(1) as usize;
    let mut parent = BlockHash::root(fingerprint, layout, prompt.salt);
    prompt.tokens.chunks_exact(block_size).take(MAX_BLOCKS).map(move |block| {
        parent = parent.extend(block);
        parent
    })
}

fn lay_out(app: &App, cache: bool, ask: Ask, prompt: &Prompt<'_>, crew: &Crew, desk: &mut Desk) -> Ask {
    desk.lookup.clear();
    for (fingerprint, layout) in crew.namings().iter().filter(|_| cache) {
        if prompt.tokens.len() >= layout.block_size.max(1) as usize {
            app.index.lookup(chain(*fingerprint, layout, prompt), &mut desk.lookup);
        }
    }
    crew.lay_out(desk);
    Ask { token_bytes: crew.token_bytes(), ..ask }
}

fn explanation(
    policy: PolicyName,
    ask: &Ask,
    decision: &Decision,
    crew: &Crew,
    desk: &Desk,
    limit: usize,
) -> Explanation {
    let name = |worker: Option<&Arc<Worker>>| worker.map_or_else(String::new, |worker| worker.member.id.to_string());
    let priced = candidates(ask, &desk.pool, decision, limit).into_iter().map(|candidate| {
        let cost = candidate.cost;
        Priced {
            decode: name(crew.decode(candidate.decode)),
            prefill: candidate.prefill.map(|at| name(crew.prefill(at))),
            cached_tokens: candidate.cached_tokens,
            total_ms: ms(cost.total()),
            compute_ms: ms(cost.compute),
            wait_ms: ms(cost.wait),
            transfer_ms: ms(cost.transfer),
            decode_ms: ms(cost.decode),
            late_ms: ms(cost.late),
        }
    });
    Explanation {
        policy: policy.as_str(),
        reason: decision.reason.as_str(),
        prompt_tokens: ask.prompt_tokens,
        cached_tokens: decision.cached_tokens(ask, &desk.pool),
        decode: name(crew.decode(decision.decode)),
        prefill: decision.prefill.iter().map(|&at| name(crew.prefill(at))).collect(),
        candidates: priced.collect(),
    }
}

/// To a microsecond: for people.
fn ms(seconds: f32) -> f32 {
    (seconds * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_can_be_changed_and_is_what_was_set() {
        let policies = Policies::new(PolicyName::RoundRobin);
        for name in PolicyName::ALL {
            policies.set(name);
            assert_eq!((policies.name(), policies.now().0), (name, name));
            assert_eq!(policies.now().1.wants_cache(), name == PolicyName::KvAware);
        }
    }

    #[tokio::test]
    async fn only_who_asks_is_told() {
        let tell = async { WANTED.try_with(|wanted| wanted.replace(Some("why".into()))).is_ok() };
        assert_eq!(explaining(true, tell).await, (true, Some("why".into())));
        let tell = async { WANTED.try_with(|wanted| wanted.replace(Some("why".into()))).is_ok() };
        assert_eq!(explaining(false, tell).await, (false, None));
    }
}
