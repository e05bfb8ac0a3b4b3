//! Keys and values in the arena: written once per token and layer, read back by attention.
//!
//! The one place of the backend that touches the arena's memory. Several ranks share an arena: each reads and writes its own
//! heads there, whose numbers it counts from its first. What belongs to no head (latents) is everybody's to read and the first
//! rank's to write.
//!
//! Attention reads what is in the arena even for tokens of
//! the running step, rounded to the KV dtype, so it sees the same numbers as a worker that received the block.
#![expect(unsafe_code, reason = "the arena is shared raw memory, see kvasir_types::HostMemory")]

use std::{ops::Range, sync::Arc};

use half::slice::HalfFloatSliceExt;
use kvasir_types::{BlockId, HostMemory, KvDtype, KvLayout};

use super::kernels::{self, Isa, Matrix};
use crate::{Error, group::Place, weights::Dtype};

/// A block arena and how its blocks are laid out.
pub(super) struct KvArena {
    memory: Arc<dyn HostMemory>,
    layout: KvLayout,
    dtype: Dtype,
    blocks: usize,
    /// The heads that are read and written here.
    heads: Range<usize>,
    /// Whether they are written here.
    writes: bool,
}

/// Which half of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Keys,
    Values,
}

impl KvArena {
    /// The arena in `memory`, as many whole blocks as fit.
    #[cfg(test)]
    pub(super) fn new(memory: Arc<dyn HostMemory>, layout: KvLayout) -> Result<Self, Error> {
        Self::of(memory, layout, Place::ALONE)
    }

    /// The same for one of several ranks.
    pub(super) fn of(memory: Arc<dyn HostMemory>, layout: KvLayout, place: Place) -> Result<Self, Error> {
        // Block ids are 32 bits: what lies beyond could not be named.
        let blocks = (memory.len() / layout.block_bytes()).min(u32::MAX as usize);
        if blocks == 0 {
            return Err(Error::ArenaTooSmall { bytes: memory.len(), block_bytes: layout.block_bytes() });
        }
        let dtype = match layout.dtype {
            KvDtype::Bf16 => Dtype::Bf16,
            KvDtype::F16 => Dtype::F16,
            KvDtype::F32 => Dtype::F32,
            KvDtype::Fp8 => Dtype::F8,
        };
        let all = layout.kv_heads as usize;
        // Without values apart from keys it is latents that are kept.
        let (heads, writes) = if layout.v_dim == 0 { (0..all, place.rank == 0) } else { (place.part(all), true) };
        Ok(Self { memory, layout, dtype, blocks, heads, writes })
    }

    /// Copies what it writes of whole blocks, in order.
    ///
    /// # Errors
    /// A block outside the arena; nothing was copied then.
    pub(super) fn copy(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        let outside = copies.iter().flat_map(|&(from, to)| [from, to]).find(|block| block.0 as usize >= self.blocks);
        if let Some(block) = outside {
            return Err(Error::BlockOutOfArena { input: 0, block, blocks: self.blocks });
        }
        let parts = self.parts();
        for &(from, to) in copies {
            let (from, to) = (self.layout.block_offset(from), self.layout.block_offset(to));
            for part in &parts {
                // SAFETY: both blocks are inside the arena (checked above), and parts inside blocks. `from` is complete as far
                // as its sequence goes, and `to` belongs to one who computes: nobody else touches these heads of either
                // meanwhile (the arena's contract). `copy` allows for overlap, should they be one block.
                unsafe {
                    let base = self.memory.base();
                    std::ptr::copy(base.add(from + part.start).cast_const(), base.add(to + part.start), part.len());
                }
            }
        }
        Ok(())
    }

    /// What of a block is written here.
    fn parts(&self) -> Vec<Range<usize>> {
        let l = &self.layout;
        if !self.writes {
            return Vec::new();
        }
        if self.heads.len() == l.kv_heads as usize {
            return std::iter::once(0..l.block_bytes()).collect();
        }
        let values = l.kv_heads as usize * l.key_bytes();
        let of = |begin: usize, bytes: usize| begin + self.heads.start * bytes..begin + self.heads.end * bytes;
        let layers = (0..l.layers as usize).map(|layer| layer * l.layer_bytes());
        layers.flat_map(|layer| [of(layer, l.key_bytes()), of(layer + values, l.value_bytes())]).collect()
    }

    /// Elements of one head's row.
    fn dim(&self, half: Half) -> usize {
        match half {
            Half::Keys => self.layout.k_dim as usize,
            Half::Values => self.layout.v_dim as usize,
        }
    }

    /// What its elements are stored as.
    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How many KV heads are here.
    pub(super) fn heads(&self) -> usize {
        self.heads.len()
    }

    pub(super) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// How many blocks there are.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Writes one half of one token: `values` are all its KV heads', one after the other. In f16 and fp8 a value beyond the range
    /// is kept as the largest there is: an infinite key would make its whole row of attention NaN.
    pub(super) fn write(&mut self, isa: Isa, block: BlockId, layer: usize, half: Half, slot: usize, values: &[f32]) {
        let dim = self.dim(half);
        assert_eq!(values.len(), dim * self.heads.len(), "one row of all heads");
        if !self.writes {
            return;
        }
        for (head, values) in values.chunks_exact(dim).enumerate() {
            let offset = self.offset(block, layer, half, head, slot, 1);
            // SAFETY: `offset` has checked that the token's row of this head is inside the arena, and the arena's contract
            // gives a block that is being computed to the one who computes it: nobody reads or writes it meanwhile.
            unsafe {
                let to = self.memory.base().add(offset);
                match self.dtype {
                    Dtype::Bf16 => store(to, values, |from, to| kernels::to_bf16(isa, from, to)),
                    Dtype::F16 => store(to, values, saturating_f16),
                    Dtype::F32 => store(to, values, |from, to| each(from, to, f32::to_bits)),
                    Dtype::F8 => store(to, values, |from, to| kernels::to_fp8(isa, from, to)),
                    Dtype::I8 => unreachable!("no KV dtype"),
                }
            }
        }
    }

    /// One half of tokens `slots` of a block, one head's: a row per token.
    pub(super) fn read(
        &self,
        block: BlockId,
        layer: usize,
        half: Half,
        head: usize,
        slots: Range<usize>,
    ) -> Matrix<'_> {
        let dim = self.dim(half);
        let dtype = self.dtype;
        let len = slots.len() * dim * dtype.bytes();
        let offset = self.offset(block, layer, half, head, slots.start, slots.len());
        // SAFETY: inside the arena by `offset`; initialised (the arena was zeroed); these tokens are complete, so nobody
        // writes them while their sequence holds the block (the arena's contract), and `write` needs `&mut self`.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.base().add(offset).cast_const(), len) };
        Matrix::new(bytes, dtype, slots.len(), dim)
    }

    /// Where `count` tokens from `slot` on lie.
    ///
    /// # Panics
    /// If they do not lie in the arena. Batches are checked before, so this is a bug's last fence before foreign memory.
    fn offset(&self, block: BlockId, layer: usize, half: Half, head: usize, slot: usize, count: usize) -> usize {
        let l = &self.layout;
        assert!((block.0 as usize) < self.blocks && layer < l.layers as usize, "{block} layer {layer} is in the arena");
        assert!(head < self.heads.len() && slot + count <= l.block_size as usize, "head {head} slot {slot}");
        let head = self.heads.start + head;
        let of_head = match half {
            Half::Keys => head * l.key_bytes(),
            Half::Values => l.kv_heads as usize * l.key_bytes() + head * l.value_bytes(),
        };
        l.layer_offset(block, layer) + of_head + slot * self.dim(half) * l.dtype.bytes()
    }
}

/// Elements converted at a time: on the stack, in the first-level cache.
const PART: usize = 128;

/// Stores converted elements one after the other, the lowest byte first.
///
/// # Safety
/// Room for all of them at `to`.
unsafe fn store<T: Copy + Default>(to: *mut u8, values: &[f32], convert: impl Fn(&[f32], &mut [T])) {
    const { assert!(cfg!(target_endian = "little"), "numbers in the arena are little endian") };
    let mut part = [T::default(); PART];
    for (i, values) in values.chunks(PART).enumerate() {
        let part = &mut part[..values.len()];
        convert(values, part);
        // SAFETY: elements i * PART.. of the caller's room, which is no part of this stack.
        unsafe {
            let to = to.add(i * PART * size_of::<T>());
            std::ptr::copy_nonoverlapping(part.as_ptr().cast(), to, size_of_val(part));
        }
    }
}

fn each<T>(from: &[f32], to: &mut [T], convert: impl Fn(f32) -> T) {
    from.iter().zip(to).for_each(|(&from, to)| *to = convert(from));
}

/// A NaN stays one.
fn saturating_f16(from: &[f32], to: &mut [half::f16]) {
    /// The largest number of f16.
    const MAX: f32 = 65_504.0;
    let mut part = [0.0; PART];
    let part = &mut part[..from.len()];
    each(from, part, |value| value.clamp(-MAX, MAX));
    to.convert_from_f32_slice(part);
}

#[cfg(test)]
mod tests {
    use super::saturating_f16;

    #[test]
    fn values_beyond_f16_become_its_largest() {
        let mut out = [half::f16::ZERO; 5];
        saturating_f16(&[1e9, f32::NEG_INFINITY, 65_519.0, -0.1, f32::NAN], &mut out);
        assert_eq!(out[..4], [half::f16::MAX, half::f16::MIN, half::f16::MAX, half::f16::from_f32(-0.1)]);
        assert!(out[4].is_nan());
    }
}
