//! The life of one request on the decode worker that owns it.
//!
//! ```text
//! admitted ─┬─ little to compute ───────────────────────── compute here ─┐
//!           └─ remote ─▶ attempt 1 ─▶ attempt 2 ─▶ … ─ all failed ─▶ compute here ─┤
//!                            └── landed ─▶ resume ──────────────────────▶ tokens ─▶ finished ─▶ blocks queued for the store
//! ```
//!
//! What is computed here is first looked for in the store, where that is the faster way.

use std::{sync::Arc, time::Instant};

use kvasir_engine::{Admission, Event};
use kvasir_proto::v1;
use kvasir_runtime::{chain, metrics::TraceId};
use kvasir_transfer::Revoke;
use kvasir_types::TokenId;

use super::{
    answer::Answer,
    remote::{self, Attempt},
    service::Checked,
    written::Written,
};
use crate::{
    error::Error, handoff::plan, host::Host, metrics::Source, peers::Peers, sequence::Sequence, store::Meanwhile,
};

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
            let told = [("output_tokens", end.output_tokens.into()), ("cached_tokens", end.cached_tokens.into())];
            request.story.end("finished", told);
            answer.complete();
        }
        Err(error) => {
            let how = match error {
                Error::CallerGone => "cancelled",
                Error::Draining => "goes on elsewhere",
                _ => "failed",
            };
            request.story.end(how, [("why", chain(&error).into())]);
            match error {
                Error::CallerGone => tracing::info!("cancelled"),
                Error::Draining => tracing::info!("goes on elsewhere: this worker is drained"),
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
    request.story.tell("admitted", [("cached_tokens", admission.cached_tokens.into())]);
    let prefilled = prefill_elsewhere(host, peers, request, &admission, answer, open_fences).await?;

    // A first token that an attempt sent before it failed comes out of the engine once more and is compared, not sent.
    let mut repeated_first = false;
    let mut written = Written::new(host, request, &admission);
    let (cached_tokens, member) = match prefilled {
        Some(done) => {
            host.engine.landed(sequence.id(), request.prompt.len());
            host.engine.resume(sequence.id(), done.first);
            written.prompt_is_anothers();
            written.token(0, done.first);
            (done.cached_tokens, done.member)
        }
        None => {
            let read = fetch(host, request, &admission, sequence, answer).await;
            host.engine.compute(sequence.id(), None);
            let cached_tokens = admission.cached_tokens + read;
            let computed = request.prompt.len() - cached_tokens;
            let told = [("from_store_tokens", read.into()), ("computed_tokens", computed.into())];
            request.story.tell("computes the prompt itself", told);
            host.metrics.prompt_tokens(Source::Cache, admission.cached_tokens);
            host.metrics.prompt_tokens(Source::Store, read);
            host.metrics.prompt_tokens(Source::Computed, request.prompt.len() - cached_tokens);
            repeated_first = answer.has_first();
            (cached_tokens, String::new())
        }
    };

    loop {
        let event = sequence.next(answer.caller()).await?;
        if let Event::Token { choice, sampled } = &event {
            written.token(*choice, sampled.token);
        }
        match event {
            Event::Token { choice: 0, sampled } if std::mem::take(&mut repeated_first) => answer.first(&sampled)?,
            Event::Token { choice, sampled } => answer.token(choice, &sampled)?,
            Event::Finished { choice, reason, left } => {
                let told = answer.finished(choice, reason, request.prompt.len(), cached_tokens, &member);
                written.finished(choice);
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

/// Reads what the store has of the prompt and this worker lacks, where that is faster than computing it; how many tokens. Runs to
/// its end even if the caller leaves, as the reads write into our blocks.
async fn fetch(host: &Host, request: &Checked, admission: &Admission, sequence: &Sequence, answer: &Answer) -> usize {
    let Some(store) = &host.store else { return 0 };
    let block_size = host.model.layout.block_size as usize;
    // The last token is always computed, as its logits choose the first token of the answer.
    let (have, wanted) = (admission.cached_tokens / block_size, (request.prompt.len() - 1) / block_size);
    let mut meanwhile = Computing { host, sequence };
    let deadline = answer.caller().deadline();
    let fetched = store.fetch(&request.id, admission, have..wanted, deadline, &mut meanwhile).await;
    if !fetched.blocks.is_empty() {
        host.engine.landed(sequence.id(), fetched.blocks.end * block_size);
    }
    fetched.blocks.len() * block_size
}

/// What comes before the blocks that are read is computed.
struct Computing<'a> {
    host: &'a Host,
    sequence: &'a Sequence,
}

impl Meanwhile for Computing<'_> {
    fn compute_until(&mut self, block: usize) {
        let tokens = block * self.host.model.layout.block_size as usize;
        self.host.engine.compute_until(self.sequence.id(), None, tokens);
    }

    fn arrived(&mut self, _: std::ops::Range<usize>) {}
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
        host.now().decode.local_prefill_tokens,
    ) else {
        return Ok(None);
    };
    let mut candidates: Vec<_> = request.candidates.iter().collect();
    // Stable: else in the router's order. The router may not have heard yet that one is leaving.
    candidates.sort_by_cached_key(|candidate| host.passes_by(&candidate.member) || peers.rests(&candidate.address));
    for (number, candidate) in candidates.into_iter().take(host.now().decode.max_prefill_attempts).enumerate() {
        let started = Instant::now();
        request.story.tell("prefill asked", [("worker", candidate.member.as_str().into())]);
        let attempt = Attempt { host, peers, request, landing: &landing, candidate, open_fences };
        match remote::attempt(attempt, answer).await {
            Ok(landed) => {
                host.metrics.handoff.observe(started.elapsed().as_secs_f64(), TraceId::current());
                let computed = (landed.done.computed as usize).min(request.prompt.len());
                let v1::PrefillDone { from_cache, from_peer, from_store, computed: of_prompt, bytes_written } =
                    landed.done;
                request.story.tell(
                    "prefill landed",
                    [
                        ("worker", candidate.member.as_str().into()),
                        ("its_cache_tokens", from_cache.into()),
                        ("from_here_tokens", from_peer.into()),
                        ("from_store_tokens", from_store.into()),
                        ("computed_tokens", of_prompt.into()),
                        ("bytes", bytes_written.into()),
                        ("took_ms", started.elapsed().into()),
                    ],
                );
                return Ok(Some(Prefilled {
                    first: landed.first,
                    cached_tokens: request.prompt.len() - computed,
                    member: candidate.member.clone(),
                }));
            }
            Err(
                error @ (Error::CallerGone
                | Error::Deadline
                | Error::Draining
                | Error::Diverged { .. }
                | Error::Unfenced { .. }),
            ) => {
                return Err(error);
            }
            Err(error) if error.is_leave() => {
                request
                    .story
                    .tell("prefill failed", [("worker", candidate.member.as_str().into()), ("why", "leaving".into())]);
                peers.rest(&candidate.address);
                tracing::info!(
                    prefill = candidate.member,
                    attempt = number,
                    "a prefill worker is leaving, trying next"
                );
            }
            Err(error) => {
                peers.rest(&candidate.address);
                host.metrics.failed_attempt();
                let told = [("worker", candidate.member.as_str().into()), ("why", chain(&error).into())];
                request.story.tell("prefill failed", told);
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
