//! Our regions as UCX knows them: each registered when it is first used, once, and its key packed once.

use std::{
    collections::HashMap,
    rc::Rc,
    sync::{Arc, Weak},
};

use super::worker::{Memory, Status, Worker};
use crate::space::Mapped;

/// A region, registered.
pub(super) struct Registered {
    pub(super) memory: Memory,
    /// What peers need to reach it.
    pub(super) key: Vec<u8>,
    region: Weak<Mapped>,
}

/// The regions registered so far, by their base, which is never given out twice.
#[derive(Default)]
pub(super) struct Registry(HashMap<u64, Rc<Registered>>);

impl Registry {
    /// The region's registration; made if this is its first use. Whoever starts an operation with it keeps the region
    /// in use until that has ended, as batches and grants do.
    pub(super) fn get(&mut self, worker: &Worker, region: &Arc<Mapped>) -> Result<Rc<Registered>, Status> {
        if let Some(registered) = self.0.get(&region.base) {
            return Ok(Rc::clone(registered));
        }
        self.sweep();
        // SAFETY: mapped for all its length while the region is in use; when that ends, `sweep` drops the registration,
        // until which UCX (with real devices: the adapter) keeps the pages, but nobody starts an operation on them.
        let memory = unsafe { worker.register(region.at(region.base, region.len), region.len as usize) }?;
        let key = memory.pack_key()?;
        let registered = Rc::new(Registered { memory, key, region: Arc::downgrade(region) });
        self.0.insert(region.base, Rc::clone(&registered));
        Ok(registered)
    }

    /// Lets go of regions that were unregistered.
    pub(super) fn sweep(&mut self) {
        self.0.retain(|_, registered| registered.region.strong_count() > 0);
    }
}
