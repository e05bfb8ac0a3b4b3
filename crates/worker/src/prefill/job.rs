//! The life of one prompt on a prefill worker.
//!
//! ```text
//! admitted (own cache) ─▶ fetch: decode worker's blocks, then the store ─▶ compute the rest, pushing layer by layer
//!    ─▶ first token ─▶ all writes complete ─▶ done ─▶ write back to the store ─▶ release
//! ```

use std::{sync::Arc, time::Duration};

use kvasir_engine::Admission;
use kvasir_proto::v1::{PrefillDone, PrefillEvent, prefill_event::Event};
use kvasir_runtime::chain;
use kvasir_transfer::{Batch, Op, Priority, Range};
use kvasir_types::{BlockHash, Deadline};

use super::{push::Writes, service::Checked};
use crate::{
    caller::Caller,
    error::{Error, went_without_store},
    host::Host,
    metrics::{Outcome, Source},
    sequence::Sequence,
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
    let Checked { id, prompt, destination, deadline } = request;
    let writes = Writes::new(host.transfer.clone(), host.model.layout, host.groups.clone(), destination, deadline);
    let job = Job { host: &host, id: &id, prompt_tokens: prompt.len(), writes: &writes, caller: &caller };
    match job.live(&mut sequence).await {
        Ok(admission) => {
            host.metrics.outcome(Outcome::Finished);
            // The caller has its `done` and needs us no more; the blocks stay held until the store has them.
            drop(caller);
            write_back(&host, &id, &admission).await;
        }
        Err(error) => {
            writes.stop().await;
            // A caller that leaves revokes its grant, and a refused write may be how we hear of it first.
            match error {
                Error::CallerGone | Error::Revoked => tracing::info!("cancelled"),
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
}

impl Job<'_> {
    async fn live(&self, sequence: &mut Sequence) -> Result<Admission, Error> {
        let admission = sequence.admitted(self.caller).await?;
        let block_size = self.host.model.layout.block_size as usize;
        let sources = self.fetch(&admission).await;
        let found = (sources.cache + sources.peer + sources.store) / block_size;
        if sources.peer + sources.store > 0 {
            self.host.engine.landed(sequence.id(), found * block_size);
        }

        self.writes.push_found(&admission.tables, found);
        let sink = self.writes.sink(self.prompt_tokens, found);
        self.host.engine.compute(sequence.id(), Some(sink));
        let first = sequence.token(self.caller).await?;
        self.caller.send(PrefillEvent { event: Some(Event::FirstToken((&first).into())) })?;

        let bytes_written = self.writes.finish().await?;
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

    /// Reads the blocks that somebody else has and this worker lacks. What can't be had is computed: no failure here
    /// fails the request. Runs to its end even if the caller leaves, as the reads write into our blocks.
    async fn fetch(&self, admission: &Admission) -> Sources {
        let layout = &self.host.model.layout;
        let block_size = layout.block_size as usize;
        // The last token is always computed, as its logits choose the first token of the answer.
        let wanted = (self.prompt_tokens - 1) / block_size;
        let mut have = admission.cached_tokens / block_size;
        let mut sources = Sources { cache: have * block_size, ..Sources::default() };
        let timeout = Duration::from_millis(self.host.config.prefill.fetch_timeout_ms);
        let deadline = self.caller.deadline().min(Deadline::after(timeout));

        if !self.host.keeps_whole_prompts() {
            return sources;
        }
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
        if let Some(store) = self.host.store.as_ref().filter(|_| have < wanted) {
            let blocks = located(self.host, admission, wanted);
            let report = store.read_on(self.id, &blocks, have, layout.block_bytes() as u64, deadline).await;
            if let Some(error) = &report.error {
                went_without_store(error, "store not read, going on without");
            }
            sources.store = report.blocks * block_size;
        }
        sources
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

/// Offers the prompt's full blocks to the store, which takes those it lacks.
async fn write_back(host: &Host, id: &kvasir_types::RequestId, admission: &Admission) {
    let worth_keeping = host.keeps_whole_prompts() && !admission.hashes.is_empty();
    let Some(store) = host.store.as_ref().filter(|_| worth_keeping) else { return };
    let deadline = Deadline::after(Duration::from_millis(host.config.prefill.write_back_timeout_ms));
    let blocks = located(host, admission, admission.hashes.len());
    let report = store.write(id, &host.origin(), &blocks, host.model.layout.block_bytes() as u64, deadline).await;
    if let Some(error) = &report.error {
        went_without_store(error, "blocks not written back to the store");
    }
    tracing::debug!(written = report.written, skipped = report.skipped, bytes = report.bytes, "written back");
}

/// The first full blocks of the prompt with their hashes and where they are in this worker's arena.
fn located(host: &Host, admission: &Admission, blocks: usize) -> Vec<(BlockHash, u64)> {
    let place = |block| host.model.layout.block_offset(block) as u64;
    admission.hashes.iter().zip(&admission.tables[0]).take(blocks).map(|(&hash, &block)| (hash, place(block))).collect()
}
