//! The life of one prompt on a prefill worker.
//!
//! ```text
//! admitted (own cache) ─▶ fetch: decode worker's blocks, then the store ─▶ compute the rest, pushing layer by layer
//!    ─▶ first token ─▶ all writes complete ─▶ done ─▶ release; the blocks are queued for the store
//! ```
//!
//! What was found is pushed as it is found: blocks that come from the store go on to the decode worker while those behind
//! them are still on their way here.

use std::{sync::Arc, time::Duration};

use kvasir_engine::Admission;
use kvasir_proto::v1::{PrefillDone, PrefillEvent, prefill_event::Event};
use kvasir_runtime::{chain, story::Story};
use kvasir_transfer::{Batch, Op, Priority, Range};
use kvasir_types::Deadline;

use super::{push::Writes, service::Checked};
use crate::{
    caller::Caller,
    error::Error,
    host::Host,
    metrics::{Outcome, Source},
    sequence::Sequence,
    store::{Fetched, Finished, Meanwhile},
};

/// Where a prompt's KV came from, in tokens.
#[derive(Default)]
struct Sources {
    cache: usize,
    peer: usize,
    store: usize,
}

/// Runs a prompt to its end. Never cancelled: it ends by itself soon after the caller is gone.
pub(super) async fn run(host: Arc<Host>, request: Checked, mut sequence: Sequence, caller: Caller<PrefillEvent>) {
    let Checked { id, tenant, prompt, destination, deadline, story } = request;
    let writes = Writes::new(host.transfer.clone(), host.model.layout, host.groups.clone(), destination, deadline);
    let job =
        Job { host: &host, id: &id, prompt_tokens: prompt.len(), writes: &writes, caller: &caller, story: &story };
    match job.live(&mut sequence).await {
        Ok(admission) => {
            host.metrics.outcome(Outcome::Finished);
            story.end("finished", []);
            return finished(&host, id, tenant, admission, sequence);
        }
        Err(error) => {
            let how = match error {
                Error::CallerGone | Error::Revoked => "cancelled",
                Error::Draining => "goes on elsewhere",
                _ => "failed",
            };
            story.end(how, [("why", chain(&error).into())]);
            writes.stop().await;
            // A caller that leaves revokes its grant, and a refused write may be how we hear of it first.
            match error {
                Error::CallerGone | Error::Revoked => tracing::info!("cancelled"),
                Error::Draining => tracing::info!("goes on elsewhere: this worker is drained"),
                ref error => tracing::warn!(error = chain(error), "prefill failed"),
            }
            caller.fail(&error);
            host.metrics.outcome(Outcome::of(&error));
        }
    }
    // Only now: no transfer touches its blocks any more.
    drop(sequence);
}

struct Job<'a> {
    host: &'a Host,
    id: &'a kvasir_types::RequestId,
    prompt_tokens: usize,
    writes: &'a Writes,
    caller: &'a Caller<PrefillEvent>,
    story: &'a Story,
}

impl Job<'_> {
    async fn live(&self, sequence: &mut Sequence) -> Result<Admission, Error> {
        let admission = sequence.admitted(self.caller).await?;
        let block_size = self.host.model.layout.block_size as usize;
        self.story.tell("admitted", [("cached_tokens", admission.cached_tokens.into())]);
        let sources = self.fetch(&admission, sequence).await;
        let found = (sources.cache + sources.peer + sources.store) / block_size;
        self.story.tell(
            "computes the rest",
            [
                ("its_cache_tokens", sources.cache.into()),
                ("from_decode_tokens", sources.peer.into()),
                ("from_store_tokens", sources.store.into()),
                ("computed_tokens", (self.prompt_tokens - found * block_size).into()),
            ],
        );
        let first = sequence.token(self.caller).await?;
        self.caller.send(PrefillEvent { event: Some(Event::FirstToken((&first).into())) })?;
        self.story.tell("first token", []);

        let (bytes_written, took) = self.writes.finish().await?;
        self.story.tell("written", [("bytes", bytes_written.into()), ("writes_took_ms", took.into())]);
        if bytes_written > 0 {
            self.host.pushed(bytes_written, took);
        }
        let computed = self.prompt_tokens - found * block_size;
        self.count(&sources, computed, bytes_written);
        let done = PrefillDone {
            from_cache: sources.cache as u32,
            from_peer: sources.peer as u32,
            from_store: sources.store as u32,
            computed: computed as u32,
            bytes_written,
        };
        self.caller.send(PrefillEvent { event: Some(Event::Done(done)) })?;
        tracing::info!(
            computed,
            from_cache = sources.cache,
            from_peer = sources.peer,
            from_store = sources.store,
            bytes = bytes_written,
            "prefilled"
        );
        Ok(admission)
    }

    /// Reads the blocks that somebody else has and this worker lacks, and has the others computed: what can't be had, too, so
    /// no failure here fails the request. Runs to its end even if the caller leaves, as the reads write into our blocks.
    async fn fetch(&self, admission: &Admission, sequence: &Sequence) -> Sources {
        let layout = &self.host.model.layout;
        let block_size = layout.block_size as usize;
        // The last token is always computed, as its logits choose the first token of the answer.
        let wanted = (self.prompt_tokens - 1) / block_size;
        let mut have = admission.cached_tokens / block_size;
        let mut sources = Sources { cache: have * block_size, ..Sources::default() };
        self.writes.push_found(&admission.tables, 0..have);
        if !self.host.keeps_whole_prompts() {
            self.compute(sequence, have);
            return sources;
        }
        let timeout = Duration::from_millis(self.host.now().prefill.fetch_timeout_ms);
        let deadline = self.caller.deadline().min(Deadline::after(timeout));
        let present = self.writes.destination().groups[0].present.min(wanted);
        if have < present {
            match self.read_from_caller(admission, have..present, deadline).await {
                Ok(()) => {
                    sources.peer = (present - have) * block_size;
                    have = present;
                }
                Err(Error::Revoked) => {} // nobody wants them any more: the next write is told so, too
                Err(error) => {
                    tracing::warn!(error = chain(&error), "blocks of the decode worker not read, going on without")
                }
            }
        }
        let mut fetched = Fetched::default();
        if let Some(store) = &self.host.store {
            if sources.peer > 0 {
                self.host.engine.landed(sequence.id(), have * block_size);
            }
            let mut meanwhile = Pushing { job: self, admission, sequence, have };
            let deadline = self.caller.deadline();
            fetched = store.fetch(self.id, admission, have..wanted, deadline, &mut meanwhile).await;
            sources.store = fetched.blocks.len() * block_size;
        }
        if sources.peer + sources.store > 0 {
            self.host.engine.landed(sequence.id(), fetched.blocks.end.max(have) * block_size);
        }
        if fetched.computing {
            self.host.engine.compute(sequence.id(), None);
        } else {
            self.compute(sequence, have + fetched.blocks.len());
        }
        sources
    }

    /// Has the rest behind the first `found` blocks computed and pushed.
    fn compute(&self, sequence: &Sequence, found: usize) {
        self.host.engine.compute(sequence.id(), Some(self.writes.sink(self.prompt_tokens, found)));
    }

    async fn read_from_caller(
        &self,
        admission: &Admission,
        blocks: std::ops::Range<usize>,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let layout = &self.host.model.layout;
        let destination = self.writes.destination();
        let range = |i: usize| {
            let (local, len) = (layout.block_offset(admission.tables[0][i]) as u64, layout.block_bytes() as u64);
            destination.groups[0].offsets[i].map(|remote| Range { local, remote, len })
        };
        let ranges = blocks.filter_map(range).collect();
        let target = destination.segment.clone();
        let batch =
            Batch { priority: Priority::High, ..Batch::new(Op::Read, target, destination.grant, ranges, deadline) };
        self.host.transfer.submit(batch).await?;
        Ok(())
    }

    fn count(&self, sources: &Sources, computed: usize, bytes_written: u64) {
        let metrics = &self.host.metrics;
        metrics.prompt_tokens(Source::Cache, sources.cache);
        metrics.prompt_tokens(Source::Peer, sources.peer);
        metrics.prompt_tokens(Source::Store, sources.store);
        metrics.prompt_tokens(Source::Computed, computed);
        metrics.handoff_bytes.inc_by(bytes_written);
    }
}

/// What is read is pushed, and what comes before it computed and pushed.
struct Pushing<'a> {
    job: &'a Job<'a>,
    admission: &'a Admission,
    sequence: &'a Sequence,
    have: usize,
}

impl Meanwhile for Pushing<'_> {
    fn compute_until(&mut self, block: usize) {
        let Job { host, writes, prompt_tokens, .. } = self.job;
        let sink = writes.sink(*prompt_tokens, self.have);
        host.engine.compute_until(self.sequence.id(), Some(sink), block * host.model.layout.block_size as usize);
    }

    fn arrived(&mut self, blocks: std::ops::Range<usize>) {
        self.job.writes.push_found(&self.admission.tables, blocks);
    }
}

/// The prompt's full blocks are the store's to have, and the sequence is over.
fn finished(host: &Host, request: kvasir_types::RequestId, tenant: Arc<str>, admission: Admission, sequence: Sequence) {
    let Some(store) = host.store.as_ref().filter(|store| store.write_back.wants_finished()) else { return };
    let table = admission.tables.into_iter().next().unwrap_or_default();
    let held = store.write_back.needs_sequence().then_some((sequence, table));
    store.write_back.offer(Finished { request, tenant, chain: admission.hashes, first: 0, held });
}
