//! Attention over paged KV.
//!
//! A unit of work is a few neighbouring tokens of one sequence × the query heads that share one KV head: their scores
//! against a block of keys are one small matrix product, and each key and value is loaded once for all of them.
//!
//! ```text
//! for each tile of TILE positions, counted from the sequence's beginning:
//!     scores[row][j] = q[row] · k[j]                       block by block of the tile
//!     softmax_step                                         largest score so far, rescale what was summed before
//!     acc[row]      += Σ_j weight[row][j] · v[j]           j ascending, over what the row sees
//! ```
//!
//! A row sees all positions up to its own, or the last `window` of them; blocks before that are never touched. Tiles start at
//! multiples of `TILE` of the **position**, and a row never computes with a value it does not see (not even multiplied
//! by zero: an infinity there would become a NaN here). So a row's sums have one order, whatever chunk, batch or unit
//! it is in.

use std::ops::Range;

use kvasir_types::BlockId;

use super::{
    exec::Exec,
    kernels::{self, Output, Rows},
    kv::{Half, KvArena},
};
use crate::graph::{AttentionKind, AttentionSpec};

/// Positions of one softmax step: scores of a unit stay in the first-level cache.
const TILE: usize = 128;
/// Rows (tokens × query heads) of a unit: enough to fill the register tiles (a multiple of 6, 4 and 8: 3 % over 16), few
/// enough that decode is not padded.
const UNIT_ROWS: usize = 24;

/// A run of neighbouring tokens of one sequence whose attention is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span<'a> {
    /// The sequence's blocks.
    pub(super) table: &'a [BlockId],
    /// Row of the first token among all rows of the step.
    pub(super) first_row: usize,
    /// Position of the first token.
    pub(super) start: usize,
    /// How many tokens.
    pub(super) count: usize,
}

/// One layer's attention, as seen from here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// Width of a query and a key.
    pub(super) k_dim: usize,
    /// Where values are: beside the keys, or in them (their first elements).
    pub(super) values: Half,
    /// Width of a value.
    pub(super) v_dim: usize,
    /// What scores are multiplied by.
    pub(super) scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub(super) soft_cap: Option<f32>,
    /// Positions that a token sees, itself included.
    pub(super) window: Option<usize>,
}

impl Heads {
    pub(super) fn of(spec: &AttentionSpec) -> Self {
        let AttentionSpec { heads, scale, soft_cap, window, .. } = *spec;
        let (kv_heads, k_dim, values, v_dim) = match &spec.kind {
            AttentionKind::Grouped(grouped) => (grouped.kv_heads, grouped.head_dim, Half::Values, grouped.head_dim),
            AttentionKind::Latent(latent) => (1, latent.rank + latent.rope, Half::Keys, latent.rank),
        };
        Self { heads, kv_heads, k_dim, values, v_dim, scale, soft_cap, window }
    }

    /// Query heads that share a KV head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of a cached row that are summed up: of a latent key the rotated part, too, which is then left behind. A
    /// ninth more work, and values are rows of a plain matrix.
    fn summed(self) -> usize {
        match self.values {
            Half::Keys => self.k_dim,
            Half::Values => self.v_dim,
        }
    }

    /// The positions that the token at `position` sees.
    fn seen(self, position: usize) -> Range<usize> {
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// One unit of work.
struct Unit<'a> {
    span: Span<'a>,
    kv_head: usize,
}

/// Attends for all rows of `spans`: `q` holds their rotated queries, `out` is filled with one row per row of `q`: `v_dim`
/// elements for each head.
pub(super) fn attend(
    exec: &Exec,
    kv: &KvArena,
    layer: usize,
    heads: Heads,
    spans: &[Span<'_>],
    q: &[f32],
    out: &mut Vec<f32>,
) {
    out.resize(q.len() / heads.k_dim * heads.v_dim, 0.0);
    let per_unit = (UNIT_ROWS / heads.group()).max(1);
    let mut units = Vec::new();
    let mut flops = 0;
    for span in spans {
        let seen = heads.seen(span.start + span.count - 1).len();
        flops += 2 * heads.heads * (heads.k_dim + heads.summed()) * span.count * seen;
        for first in (0..span.count).step_by(per_unit) {
            let span = Span {
                first_row: span.first_row + first,
                start: span.start + first,
                count: per_unit.min(span.count - first),
                ..*span
            };
            units.extend((0..heads.kv_heads).map(|kv_head| Unit { span, kv_head }));
        }
    }
    let output = Output::new(out);
    exec.each(units.len(), flops, |i| unit(exec, kv, layer, heads, &units[i], q, &output));
}

fn unit(
    exec: &Exec,
    kv: &KvArena,
    layer: usize,
    heads: Heads,
    &Unit { span, kv_head }: &Unit<'_>,
    q: &[f32],
    out: &Output<'_>,
) {
    let (dim, summed, group) = (heads.k_dim, heads.summed(), heads.group());
    let rows = span.count * group; // row = token × group + head of the group
    let mut queries = Vec::with_capacity(rows * dim);
    for token in 0..span.count {
        let at = ((span.first_row + token) * heads.heads + kv_head * group) * dim;
        queries.extend(q[at..at + group * dim].iter().map(|q| q * heads.scale));
    }
    let mut acc = vec![0.0f32; rows * summed];
    let mut running = vec![(f32::NEG_INFINITY, 0.0f32); rows]; // largest score, sum of weights
    let mut scores = vec![0.0f32; rows * TILE];

    // Blocks before what the first token sees may be gone.
    let (begin, end) = (heads.seen(span.start).start, span.start + span.count);
    for tile_start in (begin / TILE * TILE..end).step_by(TILE) {
        let tile = tile_start.max(begin)..end.min(tile_start + TILE);
        let scores_out = Output::new(&mut scores);
        for (block, slots, at) in runs(kv, span.table, tile.clone()) {
            let keys = kv.read(block, layer, Half::Keys, kv_head, slots);
            // SAFETY: `scores` is this unit's own.
            unsafe {
                let queries = Rows::new(&queries, dim, rows);
                kernels::matmul(exec.isa, queries, keys, &scores_out, at - tile_start, TILE);
            }
        }
        // What of the tile a token of the unit sees.
        let visible = |token: usize| {
            let seen = heads.seen(span.start + token);
            let inside = |position: usize| position.clamp(tile.start, tile.end) - tile_start;
            inside(seen.start)..inside(seen.end)
        };
        for (row, (max, sum)) in running.iter_mut().enumerate() {
            let scores = &mut scores[row * TILE..][visible(row / group)];
            if !scores.is_empty() {
                if let Some(cap) = heads.soft_cap {
                    kernels::soft_cap(exec.isa, scores, cap);
                }
                kernels::softmax_step(exec.isa, scores, max, sum, &mut acc[row * summed..(row + 1) * summed]);
            }
        }
        let mut add_values = |tokens: Range<usize>, part: Range<usize>| {
            let positions = tile_start + part.start..tile_start + part.end;
            for (block, slots, at) in runs(kv, span.table, positions) {
                let values = kv.read(block, layer, heads.values, kv_head, slots);
                let first = tokens.start * group;
                let weights = Rows::new(&scores[first * TILE + at - tile_start..], TILE, tokens.len() * group);
                kernels::accumulate(exec.isa, weights, values, &mut acc[first * summed..]);
            }
        };
        // What every token sees for all rows together; before and after it each token's own rest: ascending for every row.
        let common = visible(span.count - 1).start..visible(0).end;
        if common.is_empty() {
            (0..span.count).for_each(|token| add_values(token..token + 1, visible(token)));
        } else {
            (0..span.count).for_each(|token| add_values(token..token + 1, visible(token).start..common.start));
            add_values(0..span.count, common.clone());
            (0..span.count).for_each(|token| add_values(token..token + 1, common.end..visible(token).end));
        }
    }

    for (row, (values, (_, sum))) in acc.chunks_exact_mut(summed).zip(running).enumerate() {
        let values = &mut values[..heads.v_dim];
        values.iter_mut().for_each(|value| *value /= sum);
        let at = ((span.first_row + row / group) * heads.heads + kv_head * group + row % group) * heads.v_dim;
        // SAFETY: a row and head belong to one unit.
        unsafe { out.write(at, values) };
    }
}

/// `positions` cut at block boundaries: block, slots in it, and the first slot's position.
fn runs<'a>(
    kv: &KvArena,
    table: &'a [BlockId],
    positions: Range<usize>,
) -> impl Iterator<Item = (BlockId, Range<usize>, usize)> + use<'a> {
    let size = kv.layout().block_size as usize;
    let mut at = positions.start;
    std::iter::from_fn(move || {
        if at >= positions.end {
            return None;
        }
        let (first, slot) = (at, at % size);
        let count = (size - slot).min(positions.end - at);
        at += count;
        Some((table[first / size], slot..slot + count, first))
    })
}
