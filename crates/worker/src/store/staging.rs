//! Memory for blocks that have lost their own and are on their way to the store.

use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use kvasir_transfer::{Memory, TransferEngine};
use kvasir_types::KvLayout;

use super::lock;
use crate::config::Config;

/// Registered memory in slots of a block each.
pub(super) struct Staging {
    /// Offsets of those that are free. Taken by the engine's thread, given back by whoever drops copies; a leaf.
    free: Mutex<Vec<u64>>,
}

impl Staging {
    /// Registers `bytes` bytes, as far as they make whole slots.
    pub(super) fn new(
        config: &Config,
        bytes: u64,
        layout: &KvLayout,
        transfer: &TransferEngine,
    ) -> anyhow::Result<Arc<Self>> {
        let (key, block_bytes) = ("store.write_back.staging_bytes", layout.block_bytes() as u64);
        let slots = bytes / block_bytes;
        if slots == 0 {
            return Ok(Arc::new(Self { free: Mutex::default() }));
        }
        let bytes = usize::try_from(slots * block_bytes).context(key)?;
        let memory = transfer.register(Memory::Allocate(config.transfer.arena(bytes))).context(key)?;
        // From the back: the first slots are taken first.
        let free = (0..slots).rev().map(|slot| memory.base() + slot * block_bytes).collect();
        Ok(Arc::new(Self { free: Mutex::new(free) }))
    }

    /// A free slot.
    pub(super) fn take(&self) -> Option<u64> {
        lock(&self.free).pop()
    }

    /// Nothing reads or writes that slot any more.
    fn give_back(&self, slots: &mut Vec<u64>) {
        lock(&self.free).append(slots);
    }
}

/// Copies of blocks that follow one another in a chain, the last one first. Dropped, their slots are free.
pub(super) struct Copies {
    staging: Arc<Staging>,
    /// Index behind the last block.
    end: usize,
    slots: Vec<u64>,
}

impl Copies {
    /// One block's.
    pub(super) fn one(staging: &Arc<Staging>, slot: u64) -> Self {
        Self { staging: Arc::clone(staging), end: 1, slots: vec![slot] }
    }

    /// The last one has that index in its chain.
    pub(super) fn ending_with(mut self, index: usize) -> Self {
        self.end = index + 1;
        self
    }

    /// The block before the others is here, too.
    pub(super) fn add_before(&mut self, slot: u64) {
        self.slots.push(slot);
    }

    /// Where a block is.
    pub(super) fn place(&self, index: usize) -> u64 {
        self.slots[self.end - 1 - index]
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.staging.give_back(&mut self.slots);
    }
}
