//! The block arena twice: in host memory, where peers, stores and other backends see it, and in the device's, with which
//! is computed.
//!
//! Both are alike whenever nothing is being computed: what a step writes on the device is mirrored to the host layer by
//! layer before the step ends, and what others write on the host is brought to the device when they say so
//! ([`crate::Backend::landed`]). Where the host's memory could be pinned, a kernel writes what changed straight into it.

use std::sync::Arc;

use kvasir_types::{BlockId, HostMemory, KvDtype, KvLayout};

use super::{
    abi::{self, Kv, Mirror},
    driver::{Buffer, Context, Event, Registered, Stream},
    module::{Function, Module},
};
use crate::{Error, weights::Dtype};

pub(super) struct Arena {
    /// In which the host's is written. Dropped first: it waits for what is under way.
    copies: Stream,
    mirror: Function,
    registered: Option<Registered>,
    device: Buffer,
    host: Arc<dyn HostMemory>,
    pub(super) layout: KvLayout,
    pub(super) dtype: Dtype,
    pub(super) blocks: usize,
}

/// Blocks in an arena of that many bytes.
pub(super) fn blocks(host: &dyn HostMemory, layout: &KvLayout) -> Result<usize, Error> {
    // Block ids are 32 bits: what lies beyond could not be named.
    let blocks = (host.len() / layout.block_bytes()).min(u32::MAX as usize);
    if blocks == 0 {
        return Err(Error::ArenaTooSmall { bytes: host.len(), block_bytes: layout.block_bytes() });
    }
    Ok(blocks)
}

/// What a layout's elements are stored as.
pub(super) fn dtype(layout: &KvLayout) -> Dtype {
    match layout.dtype {
        KvDtype::Bf16 => Dtype::Bf16,
        KvDtype::F16 => Dtype::F16,
        KvDtype::F32 => Dtype::F32,
        KvDtype::Fp8 => Dtype::F8,
    }
}

impl Arena {
    pub(super) fn new(
        context: &Arc<Context>,
        module: &Module,
        host: Arc<dyn HostMemory>,
        layout: KvLayout,
        stream: &Stream,
    ) -> Result<Self, Error> {
        let blocks = blocks(host.as_ref(), &layout)?;
        let bytes = blocks * layout.block_bytes();
        // SAFETY: the arena holds the memory for as long as this, whose fields are dropped in order.
        let registered = unsafe { Registered::new(context, host.base(), bytes) };
        let registered = registered
            .inspect_err(|error| tracing::warn!(%error, "the arena can't be pinned: copies of it will be slow"))
            .ok();
        let device = Buffer::new(context, bytes)?;
        device.fill(0, stream)?;
        let (copies, mirror) = (Stream::new(context)?, module.function("mirror", 0)?);
        Ok(Self { host, registered, device, dtype: dtype(&layout), layout, blocks, copies, mirror })
    }

    /// Whether the device writes the host's arena itself.
    pub(super) fn is_pinned(&self) -> bool {
        self.registered.is_some()
    }

    /// Where a layer is that has this place in its group's blocks.
    pub(super) fn kv(&self, place: usize) -> Kv {
        let l = &self.layout;
        let keys = (place * l.layer_bytes()) as u64;
        Kv {
            arena: self.device.at,
            block_bytes: l.block_bytes() as u64,
            keys,
            values: keys + (l.kv_heads as usize * l.key_bytes()) as u64,
            block_size: l.block_size,
            kv_heads: l.kv_heads,
            k_dim: l.k_dim,
            v_dim: l.v_dim,
            dtype: abi::code(self.dtype),
            pad: 0,
        }
    }

    /// Once `written` has passed, writes one layer of these slots into the host's arena, and moves `done` behind that.
    /// `runs` is the same list twice: where the device finds it, and here.
    pub(super) fn mirror(
        &self,
        place: usize,
        runs: (u64, &[abi::Run]),
        written: &Event,
        done: &Event,
    ) -> Result<(), Error> {
        let (at, runs) = runs;
        let kv = self.kv(place);
        self.copies.after(written)?;
        if let Some(registered) = &self.registered {
            let args = Mirror { kv, to: registered.at, runs: at, count: runs.len() as u32, pad: 0 };
            self.copies.launch(self.mirror, [runs.len(), self.layout.kv_heads as usize, 1], abi::ROW_THREADS, &args)?;
        } else {
            for run in runs {
                self.download(place, run)?;
            }
        }
        done.record(&self.copies)
    }

    /// The same for one run, copy by copy.
    fn download(&self, place: usize, run: &abi::Run) -> Result<(), Error> {
        let l = &self.layout;
        let size = l.dtype.bytes();
        let layer = l.layer_offset(BlockId(run.block), place);
        let halves = [(0, l.key_bytes(), l.k_dim), (l.kv_heads as usize * l.key_bytes(), l.value_bytes(), l.v_dim)];
        for head in 0..l.kv_heads as usize {
            for (half, of_head, dim) in halves {
                let row = dim as usize * size;
                let offset = layer + half + head * of_head + run.slot as usize * row;
                // SAFETY: slots of a block of this step (batches are checked), which nobody else touches meanwhile (the
                // arena's contract), in memory that lives as long as this.
                unsafe {
                    let to = self.host.base().add(offset);
                    self.copies.download(to, self.device.at + offset as u64, run.count as usize * row)?;
                }
            }
        }
        Ok(())
    }

    fn check(&self, blocks: impl Iterator<Item = BlockId>) -> Result<(), Error> {
        let mut blocks = blocks;
        match blocks.find(|block| block.0 as usize >= self.blocks) {
            Some(block) => Err(Error::BlockOutOfArena { input: 0, block, blocks: self.blocks }),
            None => Ok(()),
        }
    }

    /// Copies whole blocks in both arenas, in order.
    pub(super) fn copy(&self, copies: &[(BlockId, BlockId)], stream: &Stream) -> Result<(), Error> {
        self.check(copies.iter().flat_map(|&(from, to)| [from, to]))?;
        let bytes = self.layout.block_bytes();
        for &(from, to) in copies {
            let (from, to) = (self.layout.block_offset(from), self.layout.block_offset(to));
            if from == to {
                continue;
            }
            // SAFETY: both blocks are inside both arenas (checked above). `from` is complete as far as its sequence goes, and
            // `to` belongs to one who computes: nobody else touches either meanwhile (the arena's contract).
            unsafe {
                let base = self.host.base();
                std::ptr::copy_nonoverlapping(base.add(from).cast_const(), base.add(to), bytes);
                stream.copy(self.device.at + to as u64, self.device.at + from as u64, bytes)?;
            }
        }
        Ok(())
    }

    /// Brings blocks that others have written to the device.
    pub(super) fn landed(&self, blocks: &[BlockId], stream: &Stream) -> Result<(), Error> {
        self.check(blocks.iter().copied())?;
        let mut blocks = blocks.to_vec();
        blocks.sort_unstable();
        blocks.dedup();
        // Neighbours go together.
        for run in blocks.chunk_by(|a, b| a.0 + 1 == b.0) {
            let offset = self.layout.block_offset(run[0]);
            // SAFETY: inside both arenas (checked above). Whoever wrote them has ended (that is what landing means), and
            // until the next step nobody gets these blocks to write: that step waits for the copy.
            unsafe {
                let from = self.host.base().add(offset);
                stream.upload(self.device.at + offset as u64, from, run.len() * self.layout.block_bytes())?;
            }
        }
        // What is written into these blocks next may come from a peer, which does not know of the stream.
        stream.wait()
    }
}
