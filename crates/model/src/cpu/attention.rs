//! Attention over paged KV.
//!
//! A unit of work is neighbouring tokens of one sequence × the query heads that share one KV head: their scores against a
//! tile of keys are one small matrix product, and each key and value is loaded once for all of them.
//!
//! ```text
//! for each part of PART positions, counted from the sequence's beginning:
//!     for each tile of TILE positions in it:
//!         scores[row][j] = q[row] · k[j]
//!         softmax_step                                     largest score so far, rescale what was summed before
//!         acc[row]      += Σ_j weight[row][j] · v[j]       j ascending, over what the row sees
//!     merge                                                with the parts before it
//! ```
//!
//! A row sees all positions up to its own, or the last `window` of them; blocks before that are never touched. Parts and
//! tiles start at multiples of their size of the **position**, and a row never computes with a value it does not see (not
//! even multiplied by zero: an infinity there would become a NaN here). So a row's sums have one order, whatever chunk,
//! batch or unit it is in, and where there are more threads than units, parts are computed side by side.
//!
//! How a tile is computed is [`exact`]'s or [`fast`]'s.

use std::{cell::RefCell, ops::Range, thread::LocalKey};

use kvasir_types::BlockId;

use super::{
    exec::{Compute, Exec},
    kernels::{
        self, Output,
        fast::pairs::{self, LANES, Line},
    },
    kv::{Half, KvArena},
};
use crate::{
    graph::{AttentionKind, AttentionSpec},
    group::Place,
};

mod exact;
mod fast;
#[cfg(test)]
mod tests;

/// Positions of one softmax step: scores of a few rows stay in the first-level cache.
const TILE: usize = 128;
/// Positions whose sums begin anew: what a thread can take of one sequence's work without waiting for another.
const PART: usize = 512;

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
    /// Those of a rank.
    pub(super) fn of(spec: &AttentionSpec, place: Place) -> Self {
        let AttentionSpec { heads, scale, soft_cap, window, .. } = *spec;
        let of_rank = |heads| place.part(heads).len();
        let heads = of_rank(heads);
        let (kv_heads, k_dim, values, v_dim) = match &spec.kind {
            AttentionKind::Grouped(grouped) => {
                (of_rank(grouped.kv_heads), grouped.head_dim, Half::Values, grouped.head_dim)
            }
            AttentionKind::Latent(latent) => (1, latent.rank + latent.rope, Half::Keys, latent.rank),
        };
        Self { heads, kv_heads, k_dim, values, v_dim, scale, soft_cap, window }
    }

    /// Query heads that share a KV head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// The positions that the token at `position` sees.
    fn seen(self, position: usize) -> Range<usize> {
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// One unit of work: rows = tokens × query heads of the group, token by token.
#[derive(Clone, Copy)]
struct Unit<'a> {
    kv: &'a KvArena,
    layer: usize,
    heads: Heads,
    span: Span<'a>,
    kv_head: usize,
}

impl Unit<'_> {
    fn rows(&self) -> usize {
        self.span.count * self.heads.group()
    }

    /// Where each row's query lies, in rows of `k_dim`; its result lies in the same row of `v_dim`.
    fn places(&self) -> impl Iterator<Item = usize> {
        let Heads { heads, .. } = self.heads;
        let (group, first) = (self.heads.group(), self.kv_head * self.heads.group());
        (self.span.first_row..self.span.first_row + self.span.count)
            .flat_map(move |row| (0..group).map(move |head| row * heads + first + head))
    }

    /// All that any of its tokens sees. Blocks before may be gone.
    fn seen(&self) -> Range<usize> {
        self.heads.seen(self.span.start).start..self.span.start + self.span.count
    }

    /// What of `tile` a token of the unit sees, counted from the tile's beginning.
    fn visible(&self, token: usize, tile: Tile) -> Range<usize> {
        let seen = self.heads.seen(self.span.start + token);
        let inside = |position: usize| position.clamp(tile.start, tile.end) - tile.start;
        inside(seen.start)..inside(seen.end)
    }

    /// The parts it has something to see in.
    fn parts(&self) -> Range<usize> {
        let seen = self.seen();
        seen.start / PART..seen.end.div_ceil(PART)
    }
}

/// Positions of one softmax step; the first is a multiple of [`TILE`].
#[derive(Clone, Copy)]
struct Tile {
    start: usize,
    end: usize,
}

/// What a unit has summed up: for every row the largest score, the sum of weights and the weighted sum of values.
#[derive(Clone, Debug, Default)]
struct Sums {
    running: Vec<(f32, f32)>,
    /// Rows of `width` elements.
    acc: Vec<Line<f32>>,
    width: usize,
}

/// What a thread keeps from unit to unit: fresh pages cost as much as packing.
#[derive(Default)]
struct Scratch<T> {
    tiles: T,
    sums: Sums,
    part: Sums,
}

impl Sums {
    fn reset(&mut self, rows: usize, width: usize) {
        self.width = width;
        self.running.clear();
        self.running.resize(rows, (f32::NEG_INFINITY, 0.0));
        self.acc.clear();
        self.acc.resize((rows * width).div_ceil(LANES), Line::default());
    }

    /// Takes in the sums over positions that follow. A row that has seen nothing on one side is the other side's.
    fn merge(&mut self, exec: &Exec, later: &mut Self) {
        let (acc, more) = (pairs::flat(&mut self.acc), pairs::flat(&mut later.acc));
        let rows = acc.chunks_exact_mut(self.width).zip(more.chunks_exact(self.width));
        for ((mine, &theirs), (acc, more)) in self.running.iter_mut().zip(&later.running).zip(rows) {
            if theirs.1 == 0.0 {
                continue;
            }
            if mine.1 == 0.0 {
                *mine = theirs;
                acc.copy_from_slice(more);
                continue;
            }
            kernels::merge(exec.isa, acc, mine, more, theirs);
        }
    }
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
    match exec.compute {
        Compute::Exact => run::<exact::Tiles>(exec, kv, layer, heads, spans, q, out),
        Compute::Fast => run::<fast::Tiles>(exec, kv, layer, heads, spans, q, out),
    }
}

/// A way to compute tiles.
trait Tiles: Default + 'static {
    /// Rows (tokens × query heads) of a unit, where there are enough units.
    const ROWS: usize;
    /// This thread's.
    fn scratch() -> &'static LocalKey<RefCell<Scratch<Self>>>;
    /// Tokens of a unit are a multiple of as many as this.
    fn tokens(group: usize) -> usize;
    /// Elements of a row of sums.
    fn width(heads: Heads) -> usize;
    /// Takes a unit's queries.
    fn begin(&mut self, exec: &Exec, unit: &Unit<'_>, q: &[f32]);
    /// Adds what the rows of the unit see of a tile.
    fn add(&mut self, exec: &Exec, unit: &Unit<'_>, tile: Tile, sums: &mut Sums);
}

fn run<T: Tiles>(
    exec: &Exec,
    kv: &KvArena,
    layer: usize,
    heads: Heads,
    spans: &[Span<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    let rows: usize = spans.iter().map(|span| span.count * heads.group()).sum();
    // As large as may be, as long as every thread finds a few.
    let fair = rows * heads.kv_heads / (4 * exec.threads());
    let least = T::tokens(heads.group());
    let tokens = T::ROWS.min(fair) / heads.group() / least * least;
    let tokens = tokens.max(least);
    let mut units = Vec::new();
    let mut flops = 0;
    for span in spans {
        let seen = heads.seen(span.start + span.count - 1).len();
        flops += 2 * heads.heads * (heads.k_dim + heads.v_dim) * span.count * seen;
        for first in (0..span.count).step_by(tokens) {
            let span = Span {
                first_row: span.first_row + first,
                start: span.start + first,
                count: tokens.min(span.count - first),
                ..*span
            };
            units.extend((0..heads.kv_heads).map(|kv_head| Unit { kv, layer, heads, span, kv_head }));
        }
    }
    let output = Output::new(out);
    if units.len() >= 2 * exec.threads() {
        return exec.each(units.len(), flops, |i| {
            // The longest come first: at the end threads wait for one another as little as may be.
            let unit = &units[units.len() - 1 - i];
            T::scratch().with_borrow_mut(|Scratch { tiles, sums, part }| {
                tiles.begin(exec, unit, q);
                for (number, index) in unit.parts().enumerate() {
                    if number == 0 {
                        compute(exec, unit, tiles, index, sums);
                    } else {
                        compute(exec, unit, tiles, index, part);
                        sums.merge(exec, part);
                    }
                }
                finish(unit, sums, &output);
            });
        });
    }
    // Few long sequences: parts side by side, then what belongs together.
    let parts: Vec<(&Unit<'_>, usize)> =
        units.iter().flat_map(|unit| unit.parts().map(move |index| (unit, index))).collect();
    let mut sums = vec![Sums::default(); parts.len()];
    exec.chunks(&mut sums, 1, flops, |i, sums| {
        let (unit, index) = parts[i];
        T::scratch().with_borrow_mut(|Scratch { tiles, .. }| {
            tiles.begin(exec, unit, q);
            compute(exec, unit, tiles, index, &mut sums[0]);
        });
    });
    let mut rest = &mut sums[..];
    for unit in &units {
        let (mine, others) = rest.split_at_mut(unit.parts().len());
        let (first, later) = mine.split_first_mut().expect("a token sees itself");
        later.iter_mut().for_each(|later| first.merge(exec, later));
        finish(unit, first, &output);
        rest = others;
    }
}

/// The sums of a unit over one part.
fn compute<T: Tiles>(exec: &Exec, unit: &Unit<'_>, tiles: &mut T, part: usize, sums: &mut Sums) {
    sums.reset(unit.rows(), T::width(unit.heads));
    let seen = unit.seen();
    let (begin, end) = (seen.start.max(part * PART), seen.end.min((part + 1) * PART));
    for start in (begin / TILE * TILE..end).step_by(TILE) {
        tiles.add(exec, unit, Tile { start, end: end.min(start + TILE) }, sums);
    }
}

/// Writes a unit's rows.
fn finish(unit: &Unit<'_>, sums: &mut Sums, out: &Output<'_>) {
    let v_dim = unit.heads.v_dim;
    let rows = pairs::flat(&mut sums.acc).chunks_exact_mut(sums.width).zip(&sums.running);
    for ((values, (_, sum)), place) in rows.zip(unit.places()) {
        let values = &mut values[..v_dim];
        values.iter_mut().for_each(|value| *value /= sum);
        // SAFETY: a row and head belong to one unit.
        unsafe { out.write(place * v_dim, values) };
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
