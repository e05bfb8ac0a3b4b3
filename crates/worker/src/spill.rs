//! Keeps in the KV store what sequences had computed that lost their blocks, and brings it back.
//!
//! ```text
//!   engine thread                                     async side
//!   out   blocks are copied into staging slots ─────▶ written to the store, slots free again
//!   back  the sequence is held ─────────────────────▶ (its write awaited) read from the store into its new blocks,
//!                                                     landed, compute
//! ```
//!
//! **Staging** is memory of its own, registered beside the arena, so that no slot of it can be taken for one of the engine's
//! blocks; its size bounds what is under way. Blocks for which no slot is free are not kept: the first ones of a sequence go
//! before the later ones, which are no use without them.
//!
//! **Names** are the ones prefill workers write under, so whoever asks the store for the same tokens finds these, too, and
//! a prompt that the store has already is not written twice. Models whose layers form several groups are left out, as they
//! are there: of a window only its last blocks are kept, and the store's unit is a run from the first block on.
//!
//! **The rule guarded here:** while a read may still write into a sequence's blocks, nobody gives them back. Whoever drops a
//! [`crate::sequence::Sequence`] asks [`Spills::leave`]; during a recall the sequence is aborted by the recall itself, once
//! its read has returned. A recall begins only for a sequence that has not left, and both are decided under one lock.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use kvasir_engine::{Admission, Handle, SeqId, Spill, SpilledBlock};
use kvasir_runtime::{Kind, Tasks};
use kvasir_store_client::{Origin, StoreClient};
use kvasir_transfer::{Memory, TransferEngine};
use kvasir_types::{BlockHash, Deadline, KvLayout, RequestId};
use tokio::sync::oneshot;

use crate::{
    config::{Config, SpillConfig},
    error::went_without_store,
    metrics::SpillMetrics,
};

/// The store as the place where preempted sequences' blocks go. Clones are the same.
#[derive(Clone)]
pub(crate) struct Spills(Arc<Shared>);

struct Shared {
    config: SpillConfig,
    store: StoreClient,
    transfer: TransferEngine,
    layout: KvLayout,
    tasks: Tasks,
    /// Tasks are started from the engine's thread, which is none of its own.
    runtime: tokio::runtime::Handle,
    metrics: SpillMetrics,
    /// Offsets of staging slots that are free. Taken by the engine's thread, given back by tasks; a leaf.
    slots: Mutex<Vec<u64>>,
    /// Sequences whose owners have not let go. Written by those, by the engine's thread and by recalls; a leaf.
    sequences: Mutex<HashMap<SeqId, Entry>>,
}

/// A sequence that may be moved out and brought back.
struct Entry {
    engine: Handle,
    request: RequestId,
    /// A read may be writing into its blocks.
    recalled: bool,
    /// Resolves when the last write of its blocks has ended.
    written: Option<oneshot::Receiver<()>>,
}

impl Spills {
    /// Registers the staging memory. `None` if there is room for no block. On a thread of a runtime.
    pub(crate) fn new(
        config: &Config,
        layout: KvLayout,
        transfer: &TransferEngine,
        store: &StoreClient,
        tasks: &Tasks,
        metrics: SpillMetrics,
    ) -> anyhow::Result<Option<Self>> {
        let spill = config.store.spill.clone();
        let block_bytes = layout.block_bytes() as u64;
        let slots = spill.staging_bytes / block_bytes;
        if slots == 0 {
            return Ok(None);
        }
        let bytes = usize::try_from(slots * block_bytes).context("store.spill.staging_bytes")?;
        let staging =
            transfer.register(Memory::Allocate(config.transfer.arena(bytes))).context("store.spill.staging_bytes")?;
        Ok(Some(Self(Arc::new(Shared {
            config: spill,
            store: store.clone(),
            transfer: transfer.clone(),
            layout,
            tasks: tasks.clone(),
            runtime: tokio::runtime::Handle::current(),
            metrics,
            // From the back: the first slots are taken first.
            slots: Mutex::new((0..slots).rev().map(|slot| staging.base() + slot * block_bytes).collect()),
            sequences: Mutex::default(),
        }))))
    }

    /// From now on the sequence may be moved out. It can't have been preempted before: its owner has not let it run yet.
    pub(crate) fn enter(&self, seq: SeqId, engine: Handle, request: RequestId) {
        let entry = Entry { engine, request, recalled: false, written: None };
        lock(&self.0.sequences).insert(seq, entry);
    }

    /// The sequence's owner lets go of it. True: it is being brought back just now, and aborted when that has ended.
    pub(crate) fn leave(&self, seq: SeqId) -> bool {
        lock(&self.0.sequences).remove(&seq).is_some_and(|entry| entry.recalled)
    }
}

impl Spill for Spills {
    fn out(&mut self, seq: SeqId, blocks: &[SpilledBlock]) {
        let shared = &self.0;
        if shared.store.nodes() == 0 {
            return;
        }
        let mut staged = Staged::take(shared, blocks.len());
        let dropped = blocks.len() - staged.slots.len();
        for (spilled, &slot) in blocks.iter().zip(&staged.slots) {
            let (from, len) = (shared.layout.block_offset(spilled.block) as u64, shared.layout.block_bytes() as u64);
            shared.transfer.copy_within(from, slot, len).expect("blocks and slots are registered memory");
            staged.blocks.push((spilled.hash, slot));
        }
        shared.metrics.no_staging.inc_by(dropped as u64);
        let (ended, written) = oneshot::channel();
        let Some(request) = lock(&shared.sequences).get_mut(&seq).map(|entry| {
            entry.written = Some(written);
            entry.request.clone()
        }) else {
            return; // its owner has let go: the abort is on its way
        };
        if !staged.blocks.is_empty() {
            let span = tracing::info_span!("spill", request_id = %request, blocks = staged.blocks.len());
            let _on = shared.runtime.enter();
            shared.tasks.spawn_in(Kind::Background, "spill", span, staged.write(request, ended));
        }
    }

    fn back(&mut self, seq: SeqId, admission: &Admission) -> bool {
        let shared = &self.0;
        if shared.store.nodes() == 0 {
            return false;
        }
        let Some((recall, request, written)) = Recall::begin(shared, seq) else { return false };
        let have = admission.cached_tokens / shared.layout.block_size as usize;
        let place = |block| shared.layout.block_offset(block) as u64;
        let blocks = admission.hashes.iter().zip(&admission.tables[0]).map(|(&hash, &block)| (hash, place(block)));
        let span = tracing::info_span!("recall", request_id = %request, have);
        let _on = shared.runtime.enter();
        shared.tasks.spawn_in(Kind::Request, "recall", span, recall.read(request, blocks.collect(), have, written));
        true
    }
}

/// Copies of blocks on their way to the store. Dropped, their slots are free.
struct Staged {
    shared: Arc<Shared>,
    slots: Vec<u64>,
    blocks: Vec<(BlockHash, u64)>,
}

impl Staged {
    /// As many slots as are wanted and free.
    fn take(shared: &Arc<Shared>, wanted: usize) -> Self {
        let mut free = lock(&shared.slots);
        let rest = free.len().saturating_sub(wanted);
        let slots: Vec<u64> = free.split_off(rest).into_iter().rev().collect();
        drop(free);
        Self { shared: Arc::clone(shared), blocks: Vec::with_capacity(slots.len()), slots }
    }

    /// Writes them; `_ended` resolves, by being dropped, when no transfer reads the slots any more.
    async fn write(self, request: RequestId, _ended: oneshot::Sender<()>) -> anyhow::Result<()> {
        let Shared { store, config, metrics, layout, .. } = &*self.shared;
        let deadline = Deadline::after(Duration::from_millis(config.write_timeout_ms));
        let report =
            store.write(&request, &Origin::default(), &self.blocks, layout.block_bytes() as u64, deadline).await;
        if let Some(error) = &report.error {
            went_without_store(error, "blocks of a preempted sequence not kept");
        }
        metrics.spilled.inc_by((report.written + report.present) as u64);
        metrics.not_taken.inc_by(report.skipped as u64);
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        lock(&self.shared.slots).append(&mut self.slots);
    }
}

/// A held sequence whose blocks are being read. Dropped, however that comes about, it goes on: computed from what has
/// arrived, or aborted if its owner has left.
struct Recall {
    shared: Arc<Shared>,
    engine: Handle,
    seq: SeqId,
    /// Tokens whose KV is there.
    landed: usize,
}

impl Recall {
    /// `None`: its owner has let go.
    fn begin(shared: &Arc<Shared>, seq: SeqId) -> Option<(Self, RequestId, Option<oneshot::Receiver<()>>)> {
        let mut sequences = lock(&shared.sequences);
        let entry = sequences.get_mut(&seq)?;
        entry.recalled = true;
        let recall = Self { shared: Arc::clone(shared), engine: entry.engine.clone(), seq, landed: 0 };
        Some((recall, entry.request.clone(), entry.written.take()))
    }

    /// Reads what the store has of `blocks` behind the first `have`.
    async fn read(
        mut self,
        request: RequestId,
        blocks: Vec<(BlockHash, u64)>,
        have: usize,
        written: Option<oneshot::Receiver<()>>,
    ) -> anyhow::Result<()> {
        let Shared { store, config, metrics, layout, .. } = &*self.shared;
        let deadline = Deadline::after(Duration::from_millis(config.read_timeout_ms));
        if let Some(written) = written {
            let _ended_or_too_late = tokio::time::timeout_at(deadline.instant().into(), written).await;
        }
        let report = store.read_on(&request, &blocks, have, layout.block_bytes() as u64, deadline).await;
        if let Some(error) = &report.error {
            went_without_store(error, "blocks of a preempted sequence not read back, computing them");
        }
        metrics.recalled.inc_by(report.blocks as u64);
        tracing::debug!(wanted = blocks.len() - have, recalled = report.blocks, "brought back");
        self.landed = (have + report.blocks) * layout.block_size as usize;
        Ok(())
    }
}

impl Drop for Recall {
    fn drop(&mut self) {
        let wanted = lock(&self.shared.sequences).get_mut(&self.seq).map(|entry| entry.recalled = false).is_some();
        if wanted {
            self.engine.landed(self.seq, self.landed);
            self.engine.compute(self.seq, None);
        } else {
            self.engine.abort(self.seq);
        }
    }
}

/// What the locks here guard is complete at every moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
