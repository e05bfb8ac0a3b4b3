//! Pushes a prompt's KV into the decode worker's memory while the rest of it is still being computed.
//!
//! The rule: **every byte of the destination is written at most once.** Writes of one handoff go over several
//! connections and arrive in any order; if a half-filled block were pushed and later pushed again full, the first might
//! arrive last. So a layer of a block is pushed when the chunk that completes the block has passed that layer, and the
//! partial block at the prompt's end with the last chunk.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use kvasir_engine::{LayerDone, LayerSink};
use kvasir_transfer::{Batch, Op, Priority, Range, Transfer, TransferEngine};
use kvasir_types::{BlockId, Deadline, KvGroups, KvLayout};

use super::service::{Destination, Landing};
use crate::error::Error;

/// The writes of one handoff. Added to by the engine's thread (layers) and the job (cached blocks), taken by the job.
#[derive(Clone)]
pub(super) struct Writes {
    state: Arc<Mutex<State>>,
    target: Arc<Target>,
}

struct Target {
    transfer: TransferEngine,
    layout: KvLayout,
    groups: KvGroups,
    destination: Destination,
    deadline: Deadline,
}

#[derive(Default)]
struct State {
    started: Vec<Transfer>,
    /// Set when the job gives up: the engine may be in the middle of a step and must start no more writes.
    stopped: bool,
}

impl Writes {
    pub(super) fn new(
        transfer: TransferEngine,
        layout: KvLayout,
        groups: KvGroups,
        destination: Destination,
        deadline: Deadline,
    ) -> Self {
        let target = Target { transfer, layout, groups, destination, deadline };
        Self { state: Arc::default(), target: Arc::new(target) }
    }

    /// The decode worker's memory.
    pub(super) fn destination(&self) -> &Destination {
        &self.target.destination
    }

    /// Pushes whole blocks that were found rather than computed: those among them that the decode worker lacks.
    pub(super) fn push_found(&self, tables: &[Vec<BlockId>], found: std::ops::Range<usize>) {
        let Target { layout, destination, .. } = &*self.target;
        let len = layout.block_bytes() as u64;
        let mut ranges = Vec::new();
        for (table, landing) in tables.iter().zip(&destination.groups) {
            let lacking = table.iter().enumerate().take(found.end).skip(found.start.max(landing.present));
            ranges.extend(lacking.filter_map(|(index, &block)| {
                let remote = wanted(landing, block, index)?;
                Some(Range { local: layout.block_offset(block) as u64, remote, len })
            }));
        }
        self.submit(ranges);
    }

    /// What the engine tells about finished layers. The first `found` blocks are taken care of.
    pub(super) fn sink(&self, prompt_tokens: usize, found: usize) -> Box<dyn LayerSink> {
        let pushed = self.destination().groups.iter().map(|landing| found.max(landing.present)).collect();
        Box::new(Sink { writes: self.clone(), prompt_tokens, pushed })
    }

    /// Waits for every write; the number of bytes that are in the decode worker's memory now and how long the writes took,
    /// one added to the other, or the first failure.
    pub(super) async fn finish(&self) -> Result<(u64, Duration), Error> {
        let (mut bytes, mut took) = (0, Duration::ZERO);
        let mut failure = None;
        // All of them, also after a failure: our blocks are out of reach only when the last one has ended.
        for transfer in self.take() {
            match transfer.await {
                Ok(report) => {
                    bytes += report.bytes;
                    took += report.elapsed;
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok((bytes, took)), |error| Err(error.into()))
    }

    /// Starts no more writes, and waits until those under way no longer touch this worker's memory.
    pub(super) async fn stop(&self) {
        self.lock().stopped = true;
        let transfers = self.take();
        transfers.iter().for_each(Transfer::cancel);
        for transfer in transfers {
            let _ = transfer.await; // cancelled, or done in time: either way it is over
        }
    }

    fn submit(&self, ranges: Vec<Range>) {
        if ranges.is_empty() {
            return;
        }
        let Target { transfer, destination, deadline, .. } = &*self.target;
        let mut state = self.lock();
        if !state.stopped {
            let target = destination.segment.clone();
            let batch = Batch {
                priority: Priority::High,
                ..Batch::new(Op::Write, target, destination.grant, ranges, *deadline)
            };
            state.started.push(transfer.submit(batch));
        }
    }

    fn take(&self) -> Vec<Transfer> {
        std::mem::take(&mut self.lock().started)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }
}

struct Sink {
    writes: Writes,
    prompt_tokens: usize,
    /// Blocks from the prompt's beginning that are taken care of, by group.
    pushed: Vec<usize>,
}

/// Where a block must land, if it is here and the decode worker has a place for it.
///
/// Blocks before a sliding window leave this worker's table while the prompt goes on, perhaps before a push of theirs has
/// ended. None of these is ever asked for: the decode worker has places for what the prompt's last token looks at, and
/// that stays here as long as the sequence.
fn wanted(landing: &Landing, block: BlockId, index: usize) -> Option<u64> {
    landing.offsets.get(index).copied().flatten().filter(|_| block != BlockId::GONE)
}

impl LayerSink for Sink {
    fn layer_done(&mut self, done: LayerDone<'_>) {
        let Target { layout, groups, destination, .. } = &*self.writes.target;
        let (landing, pushed) = (&destination.groups[done.group], &mut self.pushed[done.group]);
        let complete = completed_blocks(layout.block_size as usize, done.tokens.end, self.prompt_tokens);
        let len = layout.layer_bytes() as u64;
        let ranges = done
            .blocks
            .iter()
            .zip(done.first_block..)
            .filter(|&(_, index)| (*pushed..complete).contains(&index))
            .filter_map(|(&block, index)| {
                let remote = wanted(landing, block, index)? + done.place as u64 * len;
                Some(Range { local: layout.layer_offset(block, done.place) as u64, remote, len })
            })
            .collect();
        if done.place + 1 == groups[done.group].layers.len() {
            *pushed = complete.max(*pushed);
        }
        self.writes.submit(ranges);
    }
}

/// Blocks, counted from the prompt's first, that hold all they ever will once tokens up to `end` are computed.
fn completed_blocks(block_size: usize, end: usize, prompt_tokens: usize) -> usize {
    if end >= prompt_tokens { end.div_ceil(block_size) } else { end / block_size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_pushed_by_the_chunk_that_completes_it_and_by_no_other() {
        for prompt in 1..60usize {
            for chunk in 1..20usize {
                let mut pushes = vec![0; prompt.div_ceil(4)];
                let mut pushed = 0;
                let mut start = 0;
                while start < prompt {
                    let end = (start + chunk).min(prompt);
                    let complete = completed_blocks(4, end, prompt);
                    // The chunk touches these; the sink pushes those among them in pushed..complete.
                    for index in (start / 4..end.div_ceil(4)).filter(|i| (pushed..complete).contains(i)) {
                        pushes[index] += 1;
                    }
                    pushed = pushed.max(complete);
                    start = end;
                }
                assert!(pushes.iter().all(|&times| times == 1), "prompt {prompt}, chunk {chunk}: {pushes:?}");
            }
        }
    }
}
