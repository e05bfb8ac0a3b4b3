//! The KV layout: where the keys and values of a token are inside a block.
//!
//! ```text
//! block  = [layer][k|v][kv_head][token][k_dim | v_dim]   contiguous, block_size tokens of the layers of a group
//!
//!          |<------------------- block_bytes ------------------->|
//!          | layer 0               | layer 1               | ... |
//!          |<---- layer_bytes ---->|
//!          | K: head 0 | head 1 .. | V: head 0 | head 1 .. |
//!          |<key_bytes>|         |<value_bytes>|         = block_size × k_dim (v_dim) elements
//! ```
//!
//! Which layers lie in a block is said by [`crate::KvGroups`]: all of them, for a model whose layers are of one kind.
//! `v_dim` is `k_dim` for ordinary attention, and 0 for multi-head latent attention (DeepSeek-V2, section 2.1), where one
//! latent vector per token serves all heads and the values are the first elements of the keys.
//!
//! A whole block is one transfer, one layer of a block is one transfer, and a tensor-parallel rank's heads are
//! contiguous inside a layer's K and V. Block `b` starts at `b × block_bytes` of its arena.

use serde::{Deserialize, Serialize};

use crate::BlockId;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision: the default on every device.
    F16,
    /// IEEE single precision.
    F32,
    /// 8-bit float of 4 exponent and 3 mantissa bits (OCP e4m3, no infinities), without a scale: values beyond ±448 are
    /// kept as ±448.
    Fp8,
}

impl KvDtype {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::Fp8 => 1,
        }
    }
}

/// Shape of a block; workers exchange blocks only if theirs are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Record", into = "Record")]
pub struct KvLayout {
    /// Tokens in a block.
    pub block_size: u32,
    /// Layers in a block: those of one group ([`crate::KvGroups::layers_per_block`]).
    pub layers: u32,
    /// KV heads held here (all of them without tensor parallelism).
    pub kv_heads: u32,
    /// Elements of one head's key.
    pub k_dim: u32,
    /// Elements of one head's value; 0 where values are the beginning of the keys.
    pub v_dim: u32,
    /// Element type.
    pub dtype: KvDtype,
}

/// How a layout is written in member records and by the CLI: `v_dim` only where it differs from the keys'.
#[derive(Serialize, Deserialize)]
struct Record {
    block_size: u32,
    layers: u32,
    kv_heads: u32,
    head_dim: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    v_dim: Option<u32>,
    dtype: KvDtype,
}

impl From<Record> for KvLayout {
    fn from(Record { block_size, layers, kv_heads, head_dim: k_dim, v_dim, dtype }: Record) -> Self {
        Self { block_size, layers, kv_heads, k_dim, v_dim: v_dim.unwrap_or(k_dim), dtype }
    }
}

impl From<KvLayout> for Record {
    fn from(KvLayout { block_size, layers, kv_heads, k_dim, v_dim, dtype }: KvLayout) -> Self {
        Self { block_size, layers, kv_heads, head_dim: k_dim, v_dim: (v_dim != k_dim).then_some(v_dim), dtype }
    }
}

/// A layout that no arena can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kv layout {layout:?}: every dimension must be 1 to {limit} and a block at most {limit_bytes} bytes")]
pub struct BadLayout {
    layout: KvLayout,
    limit: u32,
    limit_bytes: u64,
}

impl KvLayout {
    const LIMIT: u32 = 1 << 16;
    const LIMIT_BYTES: u64 = 1 << 30;

    /// Checks a layout from outside: no dimension is zero and no later multiplication can overflow.
    pub fn check(self) -> Result<Self, BadLayout> {
        let dims = [self.block_size, self.layers, self.kv_heads, self.k_dim];
        let a_slot = self.dtype.bytes() as u64 * (u64::from(self.k_dim) + u64::from(self.v_dim));
        let slots = [self.block_size, self.layers, self.kv_heads];
        let bytes = slots.iter().try_fold(a_slot, |product, &dim| product.checked_mul(dim.into()));
        let fine = dims.iter().all(|dim| (1..=Self::LIMIT).contains(dim))
            && self.v_dim <= Self::LIMIT
            && bytes.is_some_and(|b| b <= Self::LIMIT_BYTES);
        if fine {
            Ok(self)
        } else {
            Err(BadLayout { layout: self, limit: Self::LIMIT, limit_bytes: Self::LIMIT_BYTES })
        }
    }

    /// Bytes of one head's keys in one layer of a block.
    pub fn key_bytes(&self) -> usize {
        self.block_size as usize * self.k_dim as usize * self.dtype.bytes()
    }

    /// Bytes of one head's values in one layer of a block.
    pub fn value_bytes(&self) -> usize {
        self.block_size as usize * self.v_dim as usize * self.dtype.bytes()
    }

    /// Bytes of one layer of a block: keys, then values, of every head.
    pub fn layer_bytes(&self) -> usize {
        self.kv_heads as usize * (self.key_bytes() + self.value_bytes())
    }

    /// Bytes of a whole block.
    pub fn block_bytes(&self) -> usize {
        self.layers as usize * self.layer_bytes()
    }

    /// Where a block starts in its arena.
    pub fn block_offset(&self, block: BlockId) -> usize {
        block.0 as usize * self.block_bytes()
    }

    /// Where a layer of a block starts in its arena.
    pub fn layer_offset(&self, block: BlockId, layer: usize) -> usize {
        self.block_offset(block) + layer * self.layer_bytes()
    }

    /// Blocks that `tokens` tokens occupy, the last one perhaps in part.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: KvLayout =
        KvLayout { block_size: 16, layers: 5, kv_heads: 2, k_dim: 32, v_dim: 32, dtype: KvDtype::Bf16 };

    #[test]
    fn sizes_multiply_up() {
        assert_eq!((DEMO.key_bytes(), DEMO.value_bytes()), (16 * 32 * 2, 16 * 32 * 2));
        assert_eq!(DEMO.layer_bytes(), 2 * 2 * DEMO.key_bytes());
        assert_eq!(DEMO.block_bytes(), 5 * DEMO.layer_bytes());
        assert_eq!(DEMO.layer_offset(BlockId(3), 2), 3 * DEMO.block_bytes() + 2 * DEMO.layer_bytes());
        assert_eq!((DEMO.blocks_for(0), DEMO.blocks_for(16), DEMO.blocks_for(17)), (0, 1, 2));
    }

    #[test]
    fn layouts_that_would_overflow_are_refused() {
        let huge = u32::MAX;
        for bad in [
            KvLayout { block_size: 0, ..DEMO },
            KvLayout { layers: huge, ..DEMO },
            KvLayout { v_dim: huge, ..DEMO },
            KvLayout { k_dim: 0, ..DEMO },
            KvLayout {
                block_size: 1 << 16,
                layers: 1 << 16,
                kv_heads: 1 << 16,
                k_dim: 1 << 16,
                v_dim: 1 << 16,
                dtype: KvDtype::F32,
            },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert_eq!(DEMO.check(), Ok(DEMO));
    }

    #[test]
    fn latent_attention_keeps_no_values_of_its_own() {
        let latent = KvLayout { kv_heads: 1, k_dim: 576, v_dim: 0, ..DEMO };
        assert_eq!(latent.check(), Ok(latent));
        assert_eq!(latent.layer_bytes(), 16 * 576 * 2);
    }

    #[test]
    fn records_of_ordinary_layouts_are_as_they_always_were() {
        let text = r#"{"block_size":16,"layers":5,"kv_heads":2,"head_dim":32,"dtype":"bf16"}"#;
        assert_eq!(serde_json::from_str::<KvLayout>(text).unwrap(), DEMO);
        assert_eq!(serde_json::to_string(&DEMO).unwrap(), text);
        let latent = KvLayout { v_dim: 0, ..DEMO };
        let back: KvLayout = serde_json::from_str(&serde_json::to_string(&latent).unwrap()).unwrap();
        assert_eq!(back, latent);
    }
}
