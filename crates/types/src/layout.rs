//! The KV layout: where the keys and values of a token are inside a block.
//!
//! ```text
//! block  = [layer][k|v][kv_head][token][head_dim]        contiguous, block_size tokens of ALL layers
//!
//!          |<------------------- block_bytes ------------------->|
//!          | layer 0               | layer 1               | ... |
//!          |<---- layer_bytes ---->|
//!          | K: head 0 | head 1 .. | V: head 0 | head 1 .. |
//!          |<head_bytes>|  = block_size × head_dim elements
//! ```
//!
//! A whole block is one transfer, one layer of a block is one transfer, and a tensor-parallel rank's heads are
//! contiguous inside a layer's K and V. Block `b` starts at `b × block_bytes` of its arena.

use serde::{Deserialize, Serialize};

use crate::BlockId;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// bfloat16: the default on every device.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl KvDtype {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Shape of a block; workers exchange blocks only if theirs are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvLayout {
    /// Tokens in a block.
    pub block_size: u32,
    /// Layers of the model.
    pub layers: u32,
    /// KV heads held here (all of them without tensor parallelism).
    pub kv_heads: u32,
    /// Elements of one head's key (and value).
    pub head_dim: u32,
    /// Element type.
    pub dtype: KvDtype,
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
        let dims = [self.block_size, self.layers, self.kv_heads, self.head_dim];
        let bytes =
            dims.iter().try_fold(2 * self.dtype.bytes() as u64, |product, &dim| product.checked_mul(dim.into()));
        let fine =
            dims.iter().all(|dim| (1..=Self::LIMIT).contains(dim)) && bytes.is_some_and(|b| b <= Self::LIMIT_BYTES);
        if fine {
            Ok(self)
        } else {
            Err(BadLayout { layout: self, limit: Self::LIMIT, limit_bytes: Self::LIMIT_BYTES })
        }
    }

    /// Bytes of one head's keys (or values) in one layer of a block.
    pub fn head_bytes(&self) -> usize {
        self.block_size as usize * self.head_dim as usize * self.dtype.bytes()
    }

    /// Bytes of one layer of a block: keys, then values, of every head.
    pub fn layer_bytes(&self) -> usize {
        2 * self.kv_heads as usize * self.head_bytes()
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

    const DEMO: KvLayout = KvLayout { block_size: 16, layers: 5, kv_heads: 2, head_dim: 32, dtype: KvDtype::Bf16 };

    #[test]
    fn sizes_multiply_up() {
        assert_eq!(DEMO.head_bytes(), 16 * 32 * 2);
        assert_eq!(DEMO.layer_bytes(), 2 * 2 * DEMO.head_bytes());
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
            KvLayout {
                block_size: 1 << 16,
                layers: 1 << 16,
                kv_heads: 1 << 16,
                head_dim: 1 << 16,
                dtype: KvDtype::F32,
            },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert_eq!(DEMO.check(), Ok(DEMO));
    }
}
