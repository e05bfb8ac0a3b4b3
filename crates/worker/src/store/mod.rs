//! A worker's dealings with the KV store: reading what a prompt begins with, writing back what was finished.
//!
//! ```text
//!   prompt ──▶ fetch ── worth it? (cost) ── lookup ── still worth it? ── read ──▶ blocks in place, the rest is computed
//!   finished ──▶ write_back (queue, policy) ── pinned in the prefix cache, a few at a time ──▶ store
//! ```
//!
//! Nothing here fails a request: what can't be had is computed, what can't be written is forgotten.

mod cost;
mod fetch;
mod queue;
mod reuse;
mod staging;
mod write_back;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kvasir_cluster::ModelInfo;
use kvasir_engine::Handle;
use kvasir_runtime::Context;
use kvasir_store_client::StoreClient;
use kvasir_transfer::TransferEngine;
use kvasir_types::{BlockHash, BlockId, KvLayout};

pub(crate) use fetch::{Fetched, Meanwhile};
pub(crate) use write_back::{Evictions, Finished, WriteBack};

use crate::{
    config::{Config, StoreConfig},
    metrics::StoreMetrics,
};
use cost::Costs;

/// The store as requests see it. Of a worker whose model's prompts can be kept as a whole.
pub(crate) struct Store {
    client: StoreClient,
    config: StoreConfig,
    layout: KvLayout,
    /// Blocks that the engine computes at a time.
    chunk: usize,
    engine: Handle,
    costs: Mutex<Costs>,
    metrics: StoreMetrics,
    /// What was finished goes this way.
    pub(crate) write_back: WriteBack,
}

/// What a worker has that uses the store.
pub(crate) struct Parts<'a> {
    pub(crate) client: StoreClient,
    pub(crate) config: &'a Config,
    pub(crate) model: &'a ModelInfo,
    /// Blocks that the worker has.
    pub(crate) blocks: usize,
    pub(crate) engine: Handle,
    pub(crate) transfer: &'a TransferEngine,
    pub(crate) evictions: &'a Evictions,
    pub(crate) context: &'a Context,
}

impl Store {
    /// On a thread of a runtime.
    pub(crate) fn new(parts: Parts<'_>) -> anyhow::Result<Arc<Self>> {
        let (layout, metrics) = (parts.model.layout, StoreMetrics::new(&parts.context.metrics));
        let costs = Costs::new(layout.block_size as usize, layout.block_bytes() as u64, Instant::now());
        let write_back = WriteBack::start(&parts, &metrics);
        if write_back.writes_evicted() {
            parts.evictions.go_to(write_back.clone(), parts.config, parts.transfer)?;
        }
        let Parts { client, config, engine, .. } = parts;
        Ok(Arc::new(Self {
            client,
            config: config.store.clone(),
            layout,
            chunk: (config.engine.chunk_tokens / layout.block_size as usize).max(1),
            engine,
            costs: Mutex::new(costs),
            metrics,
            write_back,
        }))
    }

    /// Blocks by name and by their place in this worker's arena.
    fn located(layout: &KvLayout, hashes: &[BlockHash], table: &[BlockId]) -> Vec<(BlockHash, u64)> {
        hashes.iter().zip(table).map(|(&hash, &block)| (hash, layout.block_offset(block) as u64)).collect()
    }
}

/// What the locks here guard is complete at every moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
