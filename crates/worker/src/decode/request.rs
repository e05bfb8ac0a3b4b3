//! The life of one request on the decode worker that owns it.
//!
//! ```text
//! admitted ─┬─ little to compute ───────────────────────── compute here ─┐
//!           └─ remote ─▶ attempt 1 ─▶ attempt 2 ─▶ … ─ all failed ─▶ compute here ─┤
//!                            └── landed ─▶ resume ──────────────────────▶ tokens ─▶ finished
//! ```

use std::{sync::Arc, time::Instant};

use kvasir_engine::{Admission, Event};
use kvasir_runtime::chain;
use kvasir_transfer::Revoke;
use kvasir_types::TokenId;

use super::{
    answer::Answer,
    remote::{self, Attempt},
    service::Checked,
};
use crate::{error::Error, handoff::plan, host::Host, metrics::Source, peers::Peers, sequence::Sequence};

/// How a request's prompt came to be in this worker's memory.
struct Prefilled {
    first: TokenId,
    cached_tokens: usize,
    member: String,
}

/// Runs a request to its end. Never cancelled: it ends by itself soon after the caller is gone.
pub(super) async fn run(
    host: Arc<Host>,
    peers: Arc<Peers>,
    request: Checked,
    mut sequence: Sequence,
    mut answer: Answer,
) {
    let mut open_fences = Vec::new();
    match live(&host, &peers, &request, &mut sequence, &mut answer, &mut open_fences).await {
        Ok(end) => {
            tracing::info!(
                output_tokens = end.output_tokens,
                cached_tokens = end.cached_tokens,
                prefill = end.member,
                "finished"
            );
            answer.complete();
        }
        Err(error) => {
            match error {
                Error::CallerGone => tracing::info!("cancelled"),
                ref error => tracing::warn!(error = chain(error), "request failed"),
            }
            answer.fail(&error);
        }
    }
    // The answer is out; what is left here keeps nobody waiting.
    for fence in open_fences {
        tracing::warn!(sequence = ?sequence.id(), "its blocks stay out of use until a stalled peer goes on or dies");
        fence.await;
    }
    // Only now: every grant over its blocks has been revoked.
    drop(sequence);
}

struct End {
    cached_tokens: usize,
    output_tokens: u32,
    member: String,
}

async fn live(
    host: &Host,
    peers: &Peers,
    request: &Checked,
    sequence: &mut Sequence,
    answer: &mut Answer,
    open_fences: &mut Vec<Revoke>,
) -> Result<End, Error> {
    let admission = sequence.admitted(answer.caller()).await?;
    let prefilled = prefill_elsewhere(host, peers, request, &admission, answer, open_fences).await?;

    // A first token that an attempt sent before it failed comes out of the engine once more and is compared, not sent.
    let mut repeated_first = false;
    let (cached_tokens, member) = match prefilled {
        Some(done) => {
            host.engine.landed(sequence.id(), request.prompt.len());
            host.engine.resume(sequence.id(), done.first);
            (done.cached_tokens, done.member)
        }
        None => {
            host.engine.compute(sequence.id(), None);
            host.metrics.prompt_tokens(Source::Cache, admission.cached_tokens);
            host.metrics.prompt_tokens(Source::Computed, request.prompt.len() - admission.cached_tokens);
            repeated_first = answer.has_first();
            (admission.cached_tokens, String::new())
        }
    };

    loop {
        match sequence.next(answer.caller()).await? {
            Event::Token { choice: 0, sampled } if std::mem::take(&mut repeated_first) => answer.first(&sampled)?,
            Event::Token { choice, sampled } => answer.token(choice, &sampled)?,
            Event::Finished { choice, reason, left } => {
                let told = answer.finished(choice, reason, request.prompt.len(), cached_tokens, &member);
                if left == 0 {
                    // A caller that left in this very moment has its answers or does not want them: the end is the same.
                    return Ok(End { cached_tokens, output_tokens: answer.sent_tokens(), member });
                }
                told?;
            }
            Event::Admitted(_) | Event::Failed(_) => {} // admitted once already; failures come out of `next` as errors
        }
    }
}

/// Has a prefill worker compute the prompt, trying the candidates in order; `None` if the decode worker must do it.
async fn prefill_elsewhere(
    host: &Host,
    peers: &Peers,
    request: &Checked,
    admission: &Admission,
    answer: &mut Answer,
    open_fences: &mut Vec<Revoke>,
) -> Result<Option<Prefilled>, Error> {
    let Some(landing) = plan(
        &host.model.layout,
        &admission.tables,
        request.prompt.len(),
        admission.cached_tokens,
        request.candidates.len(),
        host.config.decode.local_prefill_tokens,
    ) else {
        return Ok(None);
    };
    let mut candidates: Vec<_> = request.candidates.iter().collect();
    candidates.sort_by_cached_key(|candidate| peers.rests(&candidate.address)); // stable: else in the router's order
    for (number, candidate) in candidates.into_iter().take(host.config.decode.max_prefill_attempts).enumerate() {
        let started = Instant::now();
        let attempt = Attempt { host, peers, request, landing: &landing, candidate, open_fences };
        match remote::attempt(attempt, answer).await {
            Ok(landed) => {
                host.metrics.handoff.observe(started.elapsed().as_secs_f64());
                let computed = (landed.done.computed as usize).min(request.prompt.len());
                return Ok(Some(Prefilled {
                    first: landed.first,
                    cached_tokens: request.prompt.len() - computed,
                    member: candidate.member.clone(),
                }));
            }
            Err(error @ (Error::CallerGone | Error::Deadline | Error::Diverged { .. } | Error::Unfenced { .. })) => {
                return Err(error);
            }
            Err(error) => {
                peers.rest(&candidate.address);
                host.metrics.failed_attempt();
                tracing::warn!(
                    prefill = candidate.member,
                    attempt = number,
                    error = chain(&error),
                    "prefill failed, trying next"
                );
            }
        }
    }
    Ok(None)
}
