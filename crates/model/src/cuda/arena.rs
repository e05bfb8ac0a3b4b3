//! The block arena twice: in host memory, where peers, stores and other backends see it, and in the device's, with which
//! is computed.
//!
//! Both are alike whenever nothing is being computed: what a step writes on the device is mirrored to the host layer by
//! layer before the step ends, and what others write on the host is brought to the device when they say so
//! ([`crate::Backend::landed`]). One of several ranks has its own heads of every block on its device; the host's blocks are
//! whole, and each rank writes its part of them (latents, which belong to no head, the first one does). Where the host's memory could be pinned, a kernel writes what changed straight into it.

use std::sync::Arc;

use kvasir_types::{BlockId, HostMemory, KvDtype, KvLayout};

use super::{
    abi::{self, Kv, Mirror},
    driver::{Buffer, Context, Event, Registered, Rows, Stream},
    module::{Function, Module},
};
use crate::{
    Error,
    group::{Group, Place},
    weights::Dtype,
};

pub(super) struct Arena {
    /// In which the host's is written. Dropped first: it waits for what is under way.
    copies: Stream,
    mirror: Function,
    registered: Option<Registered>,
    device: Buffer,
    host: Arc<dyn HostMemory>,
    /// Of the host's blocks.
    pub(super) whole: KvLayout,
    /// Of the device's.
    pub(super) layout: KvLayout,
    place: Place,
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

/// What a rank has of blocks of a layout. Without values apart from keys it is latents that are kept: everybody has them.
pub(super) fn part(whole: &KvLayout, place: Place) -> KvLayout {
    let heads = if whole.v_dim == 0 { whole.kv_heads } else { whole.kv_heads / place.size as u32 };
    KvLayout { kv_heads: heads, ..*whole }
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
        whole: KvLayout,
        stream: &Stream,
        group: &dyn Group,
    ) -> Result<Self, Error> {
        let (blocks, place) = (blocks(host.as_ref(), &whole)?, group.place());
        let layout = part(&whole, place);
        let bytes = blocks * layout.block_bytes();
        // Memory is pinned once, for all devices.
        let pin = || {
            // SAFETY: the arena holds the memory for as long as this, whose fields are dropped in order.
            unsafe { Registered::new(context, host.base(), blocks * whole.block_bytes()) }
        };
        let registered = if place.rank == 0 {
            let registered = pin();
            group.barrier()?;
            registered
        } else {
            group.barrier()?;
            // SAFETY: the first rank's group keeps it as long as any rank computes.
            unsafe { Registered::by_another(context, host.base()) }
        };
        let registered = registered
            .inspect_err(|error| tracing::warn!(%error, "the arena can't be pinned: copies of it will be slow"))
            .ok();
        let device = Buffer::new(context, bytes)?;
        device.fill(0, stream)?;
        let (copies, mirror) = (Stream::new(context)?, module.function("mirror", 0)?);
        Ok(Self { host, registered, device, dtype: dtype(&layout), whole, layout, place, blocks, copies, mirror })
    }

    /// Whether the device writes the host's arena itself.
    pub(super) fn is_pinned(&self) -> bool {
        self.registered.is_some()
    }

    /// Where a layer is that has this place in its group's blocks.
    pub(super) fn kv(&self, place: usize) -> Kv {
        self.kv_of(&self.layout, self.device.at, place, 0)
    }

    /// The same in another arena, counting KV heads from `first` on.
    fn kv_of(&self, l: &KvLayout, arena: u64, place: usize, first: usize) -> Kv {
        let layer = place * l.layer_bytes();
        Kv {
            arena,
            block_bytes: l.block_bytes() as u64,
            keys: (layer + first * l.key_bytes()) as u64,
            values: (layer + l.kv_heads as usize * l.key_bytes() + first * l.value_bytes()) as u64,
            block_size: l.block_size,
            kv_heads: l.kv_heads,
            k_dim: l.k_dim,
            v_dim: l.v_dim,
            dtype: abi::code(self.dtype),
            pad: 0,
        }
    }

    /// The first of this rank's heads in the host's blocks.
    fn first_head(&self) -> usize {
        if self.layout.v_dim == 0 { 0 } else { self.place.rank * self.layout.kv_heads as usize }
    }

    /// Whether this rank writes the host's arena.
    fn writes(&self) -> bool {
        self.layout.v_dim > 0 || self.place.rank == 0
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
        if !self.writes() {
            // Others do.
        } else if let Some(registered) = &self.registered {
            let to = self.kv_of(&self.whole, registered.at, place, self.first_head());
            let args = Mirror { kv, to, runs: at, count: runs.len() as u32, pad: 0 };
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
        let kv = [self.kv(place), self.kv_of(&self.whole, 0, place, self.first_head())];
        let blocks = kv.map(|kv| u64::from(run.block) * kv.block_bytes);
        let halves = [
            (kv.map(|kv| kv.keys), l.key_bytes(), l.k_dim as usize * size),
            (kv.map(|kv| kv.values), l.value_bytes(), l.v_dim as usize * size),
        ];
        for head in 0..l.kv_heads as usize {
            for (half, of_head, row) in halves {
                let inside = (head * of_head + run.slot as usize * row) as u64;
                let (from, to) = (blocks[0] + half[0] + inside, blocks[1] + half[1] + inside);
                // SAFETY: slots of a block of this step (batches are checked), which nobody else touches meanwhile (the
                // arena's contract), in memory that lives as long as this.
                unsafe {
                    let to = self.host.base().add(to as usize);
                    self.copies.download(to, self.device.at + from, run.count as usize * row)?;
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
        for &(from, to) in copies.iter().filter(|(from, to)| from != to) {
            let offsets =
                |layout: &KvLayout| (layout.block_offset(from), layout.block_offset(to), layout.block_bytes());
            // Whole blocks of the host are the first rank's to copy: nothing is being computed.
            if self.place.rank == 0 {
                let (from, to, bytes) = offsets(&self.whole);
                // SAFETY: both blocks are inside the arena (checked above). `from` is complete as far as its sequence goes, and
                // `to` belongs to one who computes: nobody else touches either meanwhile (the arena's contract).
                unsafe {
                    let base = self.host.base();
                    std::ptr::copy_nonoverlapping(base.add(from).cast_const(), base.add(to), bytes);
                }
            }
            let (from, to, bytes) = offsets(&self.layout);
            // SAFETY: inside the device's arena, which has as many blocks.
            unsafe { stream.copy(self.device.at + to as u64, self.device.at + from as u64, bytes)? };
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
            self.upload(run[0], run.len(), stream)?;
        }
        // What is written into these blocks next may come from a peer, which does not know of the stream.
        stream.wait()
    }

    /// Brings this rank's part of neighbouring blocks to the device.
    fn upload(&self, first: BlockId, count: usize, stream: &Stream) -> Result<(), Error> {
        let (from, to) = (self.whole.block_offset(first), self.layout.block_offset(first));
        let to = self.device.at + to as u64;
        // SAFETY: inside both arenas (checked before). Whoever wrote them has ended (that is what landing means), and until the
        // next step nobody gets these blocks to write: that step waits for the copy.
        unsafe {
            let from = self.host.base().add(from).cast_const();
            if self.layout == self.whole {
                return stream.upload(to, from, count * self.layout.block_bytes());
            }
            // Keys and values are of one width, so the rank's heads of every layer's halves are rows of one table.
            let of_head = self.layout.key_bytes();
            let rows = Rows {
                width: self.layout.kv_heads as usize * of_head,
                from_pitch: self.whole.kv_heads as usize * of_head,
                count: 2 * self.layout.layers as usize * count,
            };
            stream.upload_rows(to, from.add(self.first_head() * of_head), rows)
        }
    }
}
