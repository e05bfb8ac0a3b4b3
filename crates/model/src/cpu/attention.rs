//! Attention over paged KV.
//!
//! A unit of work is a few neighbouring tokens of one sequence × the query heads that share one KV head: their scores
//! against a block of keys are one small matrix product, and each key and value is loaded once for all of them.
//!
//! ```text
//! for each tile of TILE positions, counted from the sequence's beginning:
//!     scores[row][j] = q[row] · k[j]                       block by block of the tile
//!     softmax_step                                         largest score so far, rescale what was summed before
//!     acc[row]      += Σ_j weight[row][j] · v[j]           j ascending, up to the row's own position
//! ```
//!
//! Tiles start at multiples of `TILE` of the **position**, and a row never computes with a value past its own position
//! (not even multiplied by zero: an infinity there would become a NaN here). So a row's sums have one order, whatever
//! chunk, batch or unit it is in.

use std::ops::Range;

use kvasir_types::BlockId;

use super::{
    exec::Exec,
    kernels::{self, Output, Rows},
    kv::{Half, KvArena},
};

/// Positions of one softmax step: scores of a unit stay in the first-level cache.
const TILE: usize = 128;
/// Rows (tokens × query heads) of a unit: enough to fill the register tiles, few enough that decode is not padded.
const UNIT_ROWS: usize = 16;

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

/// The heads of a model, as attention sees them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Heads {
    /// Query heads that share a KV head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }
}

/// One unit of work.
struct Unit<'a> {
    span: Span<'a>,
    kv_head: usize,
}

/// Attends for all rows of `spans`: `q` holds their rotated queries, `out` is filled with one row per row of `q`.
pub(super) fn attend(
    exec: &Exec,
    kv: &KvArena,
    layer: usize,
    heads: Heads,
    spans: &[Span<'_>],
    q: &[f32],
    out: &mut Vec<f32>,
) {
    out.resize(q.len(), 0.0);
    let per_unit = (UNIT_ROWS / heads.group()).max(1);
    let mut units = Vec::new();
    let mut flops = 0;
    for span in spans {
        flops += 4 * heads.heads * heads.head_dim * span.count * (span.start + span.count);
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
    let (dim, group, width) = (heads.head_dim, heads.group(), heads.heads * heads.head_dim);
    let rows = span.count * group; // row = token × group + head of the group
    let scale = 1.0 / (dim as f32).sqrt();
    let mut queries = Vec::with_capacity(rows * dim);
    for token in 0..span.count {
        let at = (span.first_row + token) * width + kv_head * group * dim;
        queries.extend(q[at..at + group * dim].iter().map(|q| q * scale));
    }
    let mut acc = vec![0.0f32; rows * dim];
    let mut running = vec![(f32::NEG_INFINITY, 0.0f32); rows]; // largest score, sum of weights
    let mut scores = vec![0.0f32; rows * TILE];

    let end = span.start + span.count;
    for tile_start in (0..end).step_by(TILE) {
        let tile = tile_start..end.min(tile_start + TILE);
        let scores_out = Output::new(&mut scores);
        for (block, slots, at) in runs(kv, span.table, tile.clone()) {
            let keys = kv.read(block, layer, Half::Keys, kv_head, slots);
            // SAFETY: `scores` is this unit's own.
            unsafe {
                let queries = Rows::new(&queries, dim, rows);
                kernels::matmul(exec.isa, queries, keys, &scores_out, at - tile_start, TILE);
            }
        }
        // How much of the tile a token of the unit may see.
        let visible = |token: usize| (span.start + token + 1).clamp(tile.start, tile.end) - tile.start;
        for (row, (max, sum)) in running.iter_mut().enumerate() {
            let scores = &mut scores[row * TILE..][..visible(row / group)];
            if !scores.is_empty() {
                kernels::softmax_step(exec.isa, scores, max, sum, &mut acc[row * dim..(row + 1) * dim]);
            }
        }
        let mut add_values = |tokens: Range<usize>, part: Range<usize>| {
            let positions = tile_start + part.start..tile_start + part.end;
            for (block, slots, at) in runs(kv, span.table, positions) {
                let values = kv.read(block, layer, Half::Values, kv_head, slots);
                let first = tokens.start * group;
                let weights = Rows::new(&scores[first * TILE + at - tile_start..], TILE, tokens.len() * group);
                kernels::accumulate(exec.isa, weights, values, &mut acc[first * dim..]);
            }
        };
        // All rows together as far as the first token sees, then each token's own rest: still ascending for every row.
        let common = visible(0);
        add_values(0..span.count, 0..common);
        for token in 1..span.count {
            add_values(token..token + 1, common..visible(token));
        }
    }

    for (row, (values, (_, sum))) in acc.chunks_exact_mut(dim).zip(running).enumerate() {
        values.iter_mut().for_each(|value| *value /= sum);
        let at = (span.first_row + row / group) * width + (kv_head * group + row % group) * dim;
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
