//! A backend over an arena of its own, and tables of its blocks.

use std::sync::Arc;

use kvasir_model::{
    Backend, Error, Folder, SeqInput,
    cpu::{Compute, CpuBackend, HostArena},
    cuda::{CudaBackend, Options},
};
use kvasir_types::{BlockId, GroupKind, HostMemory, KvDtype, KvLayout, TokenId};

pub struct Rig {
    pub backend: Box<dyn Backend>,
    pub layout: KvLayout,
    blocks: u32,
    next: u32,
}

impl Rig {
    /// On the device.
    pub fn device(folder: &Folder, dtype: KvDtype, blocks: u32, options: Options) -> Result<Self, Error> {
        Self::over(folder, dtype, blocks, |layout, memory| {
            Ok(Box::new(CudaBackend::new(folder, layout, memory, options)?))
        })
    }

    /// On the processor.
    pub fn processor(folder: &Folder, dtype: KvDtype, blocks: u32) -> Result<Self, Error> {
        Self::over(folder, dtype, blocks, |layout, memory| {
            Ok(Box::new(CpuBackend::with_compute(folder, layout, memory, 1, Compute::Exact)?))
        })
    }

    fn over(
        folder: &Folder,
        dtype: KvDtype,
        blocks: u32,
        open: impl FnOnce(KvLayout, Arc<dyn HostMemory>) -> Result<Box<dyn Backend>, Error>,
    ) -> Result<Self, Error> {
        let layout = folder.kv_layout(16, dtype);
        let arena = HostArena::new(layout.block_bytes() * blocks as usize);
        let memory: Arc<dyn HostMemory> =
            arena.map_err(|source| Error::Io { path: "the host's arena".into(), source })?;
        Ok(Self { backend: open(layout, memory)?, layout, blocks, next: 0 })
    }

    /// Tables, one a group of layers, for `tokens` tokens; blocks are neither neighbours nor in order.
    pub fn tables(&mut self, tokens: usize) -> Vec<Vec<BlockId>> {
        let blocks = self.layout.blocks_for(tokens);
        let mut table = || {
            let one = |_| {
                self.next += 1;
                assert!(self.next <= self.blocks, "an arena of {} blocks is too small", self.blocks);
                BlockId(((u64::from(self.next) * 101) % u64::from(self.blocks)) as u32)
            };
            (0..blocks).map(one).collect()
        };
        (0..self.backend.groups().len()).map(|_| table()).collect()
    }

    /// All blocks may be had again.
    pub fn forget(&mut self) {
        self.next = 0;
    }

    /// The tables with those blocks gone that no token from `start` on looks at.
    pub fn with_gone(&self, tables: &[Vec<BlockId>], start: usize) -> Vec<Vec<BlockId>> {
        let mut tables = tables.to_vec();
        for (group, table) in self.backend.groups().iter().zip(&mut tables) {
            if let GroupKind::Sliding { window } = group.kind {
                let gone = (start + 1).saturating_sub(window as usize) / self.layout.block_size as usize;
                table[..gone].fill(BlockId::GONE);
            }
        }
        tables
    }

    /// Some tokens of one sequence; the last `rows` rows of logits.
    pub fn step(
        &mut self,
        tokens: &[TokenId],
        start: usize,
        tables: &[Vec<BlockId>],
        rows: usize,
    ) -> Result<Vec<f32>, Error> {
        let tables = self.with_gone(tables, start);
        let input = SeqInput { tokens, start, tables: &tables, rows };
        Ok(self.backend.forward(&[input], &mut |_| {})?.rows)
    }
}
