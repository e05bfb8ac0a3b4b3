//! What kernels take: `kernels/abi.h`, field by field. What a field means is said there.
//!
//! A module tells the sizes of its structs when it is loaded ([`SIZES`]); that fields lie in the same order is for whoever
//! changes either file.

use crate::{graph::Activation, weights::Dtype};

pub(super) const K_UNIT: usize = 64;
pub(super) const K_SLICES: usize = 8;
pub(super) const SCALE_ROWS: usize = 16;
pub(super) const SCALE_COLS: usize = 128;
pub(super) const PART: usize = 256;
const TILE: usize = 64;

pub(super) const ROW_THREADS: u32 = 256;
pub(super) const NARROW_THREADS: u32 = 256;
pub(super) const NARROW_ROWS: usize = 16;
pub(super) const WIDE_THREADS: u32 = 256;
pub(super) const WIDE_ROWS: usize = 128;
pub(super) const ATTEND_THREADS: u32 = 128;
pub(super) const DECODE_ROWS: usize = 16;
pub(super) const ANY_THREADS: u32 = 256;
pub(super) const ANY_ROWS: usize = 16;
pub(super) const SHORTLIST: usize = 256;
pub(super) const SHORTLIST_THREADS: u32 = 1024;
/// Tokens that a short list can name.
pub(super) const SHORTLIST_VOCAB: usize = 1 << 22;
pub(super) const GROUP_THREADS: u32 = 1024;
pub(super) const MAX_EXPERTS: usize = 4096;
pub(super) const MAX_TOP_K: usize = 64;

/// The slot of a row whose keys and values go nowhere.
pub(super) const NO_SLOT: u64 = u64::MAX;
/// No row.
pub(super) const NONE: u32 = u32::MAX;

/// Rows of a unit of `attend_prompt`.
pub(super) fn prompt_rows(dim: usize) -> usize {
    if dim == 256 { 32 } else { 64 }
}

/// Shared memory of `linear_wide*`.
pub(super) fn wide_shared(weight_bytes: usize, planes: usize, tile: usize) -> usize {
    let stages = if weight_bytes == 4 { 2 } else { 3 };
    stages * K_UNIT * (WIDE_ROWS * weight_bytes + tile * 2 * planes)
}

fn attend_shared(dim: usize, bytes: usize, terms: usize, rows: usize, stages: usize, totals: usize) -> usize {
    let widened = if bytes == 1 { 2 } else { 0 };
    2 * TILE * dim * (stages * bytes + widened)
        + rows * dim * 2 * terms
        + rows * (TILE + 8) * 2 * terms
        + totals * rows * dim * 4
        + 4 * rows * 4
        + 2 * PART * 8
}

/// Shared memory of `attend_decode*`.
pub(super) fn decode_shared(dim: usize, bytes: usize, terms: usize) -> usize {
    attend_shared(dim, bytes, terms, DECODE_ROWS, 2, 0)
}

/// Shared memory of `attend_prompt*`.
pub(super) fn prompt_shared(dim: usize, bytes: usize, terms: usize) -> usize {
    attend_shared(dim, bytes, terms, prompt_rows(dim), 1, 1)
}

/// Shared memory of `attend_any*`.
pub(super) fn any_shared(k_dim: usize, v_dim: usize) -> usize {
    4 * ANY_ROWS * (k_dim + TILE + 8 + 2 * v_dim)
}

/// Shared memory of `route`.
pub(super) fn route_shared(experts: usize) -> usize {
    12 * experts
}

/// Shared memory of `group`.
pub(super) fn group_shared(experts: usize) -> usize {
    8 * experts
}

/// The number of a type.
pub(super) fn code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::Bf16 => 0,
        Dtype::F16 => 1,
        Dtype::F32 => 2,
        Dtype::F8 => 3,
        Dtype::I8 => 4,
    }
}

/// Its part of a kernel's name.
pub(super) fn name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bf16 => "bf16",
        Dtype::F16 => "f16",
        Dtype::F32 => "f32",
        Dtype::F8 => "e4m3",
        Dtype::I8 => "i8",
    }
}

/// The number of an activation.
pub(super) fn activation(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

/// Arguments of a kernel.
pub(super) trait Args: Copy {}

macro_rules! structs {
    ($($(#[$doc:meta])* $kind:ident $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq)]
            pub(super) struct $name { $(pub(super) $field: $type),* }
            structs!(@$kind $name);
        )*
        /// Sizes of all of them, in the order of `KVASIR_ABI_SIZES`.
        pub(super) const SIZES: &[u32] = &[$(size_of::<$name>() as u32),*];
    };
    (@part $name:ident) => {};
    (@args $name:ident) => { impl Args for $name {} };
}

structs! {
    /// Where the keys and values of one layer are.
    part Kv {
        arena: u64, block_bytes: u64, keys: u64, values: u64,
        block_size: u32, kv_heads: u32, k_dim: u32, v_dim: u32, dtype: u32, pad: u32,
    }
    /// Rows that go through one of several matrices.
    part Group { matrix: u32, first: u32, count: u32, pad: u32 }
    /// Neighbouring tokens of one sequence, and query heads of a group.
    part Unit { row: u32, tokens: u32, position: u32, table: u32, head: u32, heads: u32 }
    /// Neighbouring slots of a block.
    part Run { block: u32, slot: u32, count: u32, pad: u32 }
    args Embed {
        weight: u64, row_scale: u64, tokens: u64, x: u64,
        rows: u32, width: u32, ld: u32, dtype: u32, scale: f32, pad: u32,
    }
    args NormArgs {
        x: u64, change: u64, post_weight: u64, weight: u64, hi: u64, lo: u64,
        rows: u32, width: u32, ld_x: u32, ld_change: u32, ld: u32, eps: f32, post_eps: f32, pad: u32,
    }
    args Gate {
        src: u64, hi: u64, lo: u64, rows: u32, width: u32, ld_src: u32, ld: u32, activation: u32, pad: u32,
    }
    args Split { src: u64, hi: u64, lo: u64, rows: u32, width: u32, ld_src: u32, ld: u32 }
    args SoftCap { y: u64, count: u64, cap: f32, pad: u32 }
    args GatherRows {
        from: u64, to: u64, row_of: u64, bytes: u64, from_stride: u64, to_stride: u64, rows: u32, pad: u32,
    }
    args ScaleBias { y: u64, scale: u64, bias: u64, rows: u32, width: u32, ld: u32, pad: u32 }
    args Widen {
        from: u64, scale: u64, to: u64, rows: u32, ld: u32, dtype: u32, pad: u32, to_f16: u32, pad2: u32,
    }
    args RotationsArgs {
        positions: u64, frequencies: u64, cos: u64, sin: u64, rows: u32, half: u32, magnitude: f32, pad: u32,
    }
    args HeadsArgs {
        kv: Kv, src: u64, q_norm: u64, k_norm: u64, cos: u64, sin: u64, rotation_of: u64, slots: u64, q_out: u64,
        rows: u32, ld_src: u32, q_at: u32, k_at: u32, v_at: u32, q_heads: u32, kv_heads: u32, dim: u32,
        q_eps: f32, k_eps: f32,
    }
    args LatentKeys {
        kv: Kv, src: u64, norm: u64, cos: u64, sin: u64, rotation_of: u64, slots: u64,
        rows: u32, ld_src: u32, rank: u32, rope: u32, eps: f32, pad: u32,
    }
    args LatentQueries {
        src: u64, cos: u64, sin: u64, rotation_of: u64, hi: u64, lo: u64, q_out: u64,
        rows: u32, ld_src: u32, heads: u32, nope: u32, rope: u32, rank: u32, nope_ld: u32, pad: u32,
    }
    args LinearArgs {
        w: u64, scale: u64, bias: u64, x_hi: u64, x_lo: u64, x_rows: u64, groups: u64, out: u64, partials: u64,
        w_stride: u64, x_stride: u64, out_stride: u64, scale_stride: u64,
        rows: u32, n: u32, k: u32, ld_w: u32, ld_x: u32, ld_out: u32, splits: u32, scale_blocks: u32,
    }
    args Attend {
        kv: Kv, q: u64, units: u64, tables: u64, partial_sums: u64, partial_max: u64, hi: u64, lo: u64,
        scale: f32, soft_cap: f32, window: u32, heads: u32, group: u32, v_dim: u32, parts: u32,
        ld: u32, head_ld: u32, pad: u32,
    }
    args Merge {
        partial_sums: u64, partial_max: u64, rows: u64, positions: u64, hi: u64, lo: u64,
        count: u32, window: u32, heads: u32, v_dim: u32, parts: u32, ld: u32, head_ld: u32, fast: u32,
    }
    args Route {
        scores: u64, correction: u64, experts_out: u64, weights_out: u64,
        rows: u32, ld: u32, experts: u32, top_k: u32, scoring: u32,
        groups: u32, groups_kept: u32, groups_best: u32, normalise: u32, scale: f32,
    }
    args GroupArgs {
        chosen: u64, groups: u64, row_of: u64, place_of: u64, rows: u32, top_k: u32, experts: u32, max_groups: u32,
    }
    args Combine {
        change: u64, weights: u64, place_of: u64, shared: u64, out: u64,
        rows: u32, top_k: u32, width: u32, ld_change: u32, ld_shared: u32, ld_out: u32,
    }
    args CopyBlocks { arena: u64, pairs: u64, block_bytes: u64, count: u32, pad: u32 }
    args Mirror { kv: Kv, to: Kv, runs: u64, count: u32, pad: u32 }
    args MoveBlocks {
        arena: u64, packed: u64, blocks: u64, block_bytes: u64, at: u64, bytes: u64, count: u32, pad: u32,
    }
    args Shortlist {
        logits: u64, allowed: u64, allowed_at: u64, bias_tokens: u64, bias_values: u64, bias_at: u64,
        tokens: u64, values: u64, summary: u64, rows: u32, vocab: u32, ld: u32, pad: u32,
    }
    args SideBySide {
        from: u64, to: u64, bytes: u64, from_stride: u64, to_stride: u64, rows: u32, pad: u32,
    }
    args Perturb { logits: u64, noise: u64, scale: u64, out: u64, rows: u32, vocab: u32, ld: u32, pad: u32 }
    args Pick { logits: u64, tokens: u64, values: u64, max: u64, rows: u32, vocab: u32, ld: u32, pad: u32 }
}
