//! Tiles in bf16 products: a tile's keys and values are packed once for all rows of the unit, then a few rows at a time are
//! taken through scores, weights and sums while these are in the first-level cache.
//!
//! Values are multiplied in pairs of positions, the first one even. A pair of which a row sees one half is packed again
//! with a zero in place of the other, for that row alone.

use std::{cell::RefCell, ops::Range, thread::LocalKey};

use super::{Heads, Scratch, Sums, TILE, Tile, Unit, runs};
use crate::cpu::{
    exec::Exec,
    kernels::{
        self,
        fast::pairs::{self, LANES, Left, Line, Out, Pairs, multiply},
    },
    kv::Half,
};

/// Rows of a register tile.
const TALL: usize = 6;

#[derive(Default)]
pub(super) struct Tiles {
    /// Rows of bf16, an even number of elements apart.
    queries: Vec<u16>,
    keys: Pairs,
    values: Pairs,
    /// A pair of positions of which one is seen.
    half: Pairs,
    /// Of a few rows at a time, [`TILE`] each.
    scores: Vec<Line<f32>>,
    weights: Vec<u16>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch<Tiles>> = RefCell::default();
}

impl super::Tiles for Tiles {
    /// Packing keys takes as long as the products of seven rows; sums, queries and packed tiles together are half of a
    /// second-level cache.
    const ROWS: usize = 528;

    fn scratch() -> &'static LocalKey<RefCell<Scratch<Self>>> {
        &SCRATCH
    }

    /// Whole register tiles.
    fn tokens(group: usize) -> usize {
        TALL / gcd(TALL, group)
    }

    fn width(heads: Heads) -> usize {
        heads.v_dim.next_multiple_of(LANES)
    }

    fn begin(&mut self, exec: &Exec, unit: &Unit<'_>, q: &[f32]) {
        let (dim, scale) = (unit.heads.k_dim, unit.heads.scale);
        let stride = dim.next_multiple_of(2);
        self.queries.clear();
        self.queries.resize(unit.rows() * stride, 0);
        for (place, row) in unit.places().zip(self.queries.chunks_exact_mut(stride)) {
            kernels::to_operand(exec.isa, &q[place * dim..(place + 1) * dim], scale, &mut row[..dim]);
        }
    }

    fn add(&mut self, exec: &Exec, unit: &Unit<'_>, tile: Tile, sums: &mut Sums) {
        let Unit { kv, heads, span, .. } = *unit;
        let (group, dtype) = (heads.group(), kv.dtype());
        let keys = rows(unit, Half::Keys, tile);
        if heads.values == Half::Values {
            fetch(unit, Half::Values, tile);
        }
        pairs::pack_columns(exec.isa, &keys, dtype, heads.k_dim, &mut self.keys);
        let values = if heads.values == Half::Keys { keys } else { rows(unit, heads.values, tile) };
        pairs::pack_rows(exec.isa, &values, dtype, heads.v_dim, &mut self.values);
        fetch(unit, Half::Keys, Tile { start: tile.end, end: unit.seen().end.min(tile.end + TILE) });
        let few = Self::tokens(group);
        for first in (0..span.count).step_by(few) {
            let tokens = first..span.count.min(first + few);
            self.weigh(exec, unit, tile, tokens.clone(), sums);
            self.sum_up(exec, unit, tile, tokens, &values, sums);
        }
    }
}

impl Tiles {
    /// Scores of a few tokens become weights, as operands.
    fn weigh(&mut self, exec: &Exec, unit: &Unit<'_>, tile: Tile, tokens: Range<usize>, sums: &mut Sums) {
        const STRIDE: usize = TILE / LANES;
        let (heads, group) = (unit.heads, unit.heads.group());
        let (first, rows) = (tokens.start * group, tokens.len() * group);
        let stride = heads.k_dim.next_multiple_of(2);
        let width = unit.visible(tokens.end - 1, tile).end.div_ceil(LANES);
        if self.scores.len() < rows * STRIDE {
            self.scores.resize(rows * STRIDE, Line::default());
        }
        let queries = Left::new(&self.queries[first * stride..], stride, rows);
        let scores = Out::new(&mut self.scores, STRIDE);
        multiply(exec.isa, queries, &self.keys, 0..stride / 2, width, scores, true);

        self.weights.clear();
        self.weights.resize(rows * TILE, 0);
        let scores = pairs::flat(&mut self.scores);
        let visible = |row: usize| unit.visible(tokens.start + row / group, tile);
        let stride = sums.width / LANES;
        for (row, scores) in scores.chunks_exact_mut(TILE).take(rows).enumerate() {
            let scores = &mut scores[visible(row)];
            if let Some(cap) = heads.soft_cap {
                kernels::soft_cap(exec.isa, scores, cap);
            }
            let (max, sum) = &mut sums.running[first + row];
            let acc = pairs::flat(&mut sums.acc[(first + row) * stride..][..stride]);
            kernels::raise(exec.isa, scores, max, sum, acc);
        }
        let weights = self.weights.chunks_exact_mut(TILE);
        for (row, (scores, weights)) in scores.chunks_exact(TILE).zip(weights).enumerate() {
            let (max, sum) = &mut sums.running[first + row];
            kernels::weigh(exec.isa, &scores[visible(row)], *max, sum, &mut weights[visible(row)]);
        }
    }

    /// Adds the values of what a few tokens see, weighted: position after position for every row.
    fn sum_up(
        &mut self,
        exec: &Exec,
        unit: &Unit<'_>,
        tile: Tile,
        tokens: Range<usize>,
        values: &[&[u8]],
        sums: &mut Sums,
    ) {
        let Self { values: packed, half, weights, .. } = self;
        let mut weighted = Weighted { exec, group: unit.heads.group(), weights, first: tokens.start, sums };
        let mut one = |weighted: &mut Weighted<'_>, token: usize, position: usize| {
            let mut pair: [&[u8]; 2] = [&[]; 2];
            pair[position % 2] = values[position];
            pairs::pack_rows(exec.isa, &pair, unit.kv.dtype(), unit.heads.v_dim, half);
            weighted.add(token..token + 1, half, 0..1, position / 2);
        };
        let seen = |token: usize| unit.visible(token, tile);
        let common = pairs_in(seen(tokens.end - 1).start..seen(tokens.start).end);
        for token in tokens.clone().filter(|&token| !seen(token).is_empty()) {
            let pairs = pairs_in(seen(token));
            if !seen(token).start.is_multiple_of(2) {
                one(&mut weighted, token, seen(token).start);
            }
            let until = if common.is_empty() { pairs.end } else { common.start };
            weighted.add(token..token + 1, packed, pairs.start..until, 0);
        }
        weighted.add(tokens.clone(), packed, common.clone(), 0);
        for token in tokens.filter(|&token| !seen(token).is_empty()) {
            if !common.is_empty() {
                weighted.add(token..token + 1, packed, common.end..pairs_in(seen(token)).end, 0);
            }
            if !seen(token).end.is_multiple_of(2) {
                one(&mut weighted, token, seen(token).end - 1);
            }
        }
    }
}

/// Weights of a few tokens, and where their sums are.
struct Weighted<'a> {
    exec: &'a Exec,
    group: usize,
    /// Rows of [`TILE`].
    weights: &'a [u16],
    /// The token of the first row.
    first: usize,
    sums: &'a mut Sums,
}

impl Weighted<'_> {
    /// Adds pairs of `values`, of which the first one there is the tile's pair number `offset`, to the sums of `tokens`.
    fn add(&mut self, tokens: Range<usize>, values: &Pairs, pairs: Range<usize>, offset: usize) {
        let (from, rows) = ((tokens.start - self.first) * self.group, tokens.len() * self.group);
        let left = Left::new(&self.weights[from * TILE + 2 * offset..], TILE, rows);
        let stride = self.sums.width / LANES;
        let out = Out::new(&mut self.sums.acc[tokens.start * self.group * stride..], stride);
        multiply(self.exec.isa, left, values, pairs, stride, out, false);
    }
}

/// The pairs that are inside as a whole.
fn pairs_in(positions: Range<usize>) -> Range<usize> {
    let start = positions.start.div_ceil(2);
    start..(positions.end / 2).max(start)
}

/// Brings one half of a tile's positions nearer. Decoding has little to compute with each: it would wait for a few lines at
/// a time, where this asks for all.
fn fetch(unit: &Unit<'_>, half: Half, tile: Tile) {
    for (block, slots, _) in runs(unit.kv, unit.span.table, tile.start.max(unit.seen().start)..tile.end) {
        kernels::prefetch(unit.kv.read(block, unit.layer, half, unit.kv_head, slots).stored());
    }
}

/// One half of a tile's positions as they are stored; what is before all that is seen is empty.
fn rows<'a>(unit: &Unit<'a>, half: Half, tile: Tile) -> Vec<&'a [u8]> {
    let begin = unit.seen().start.clamp(tile.start, tile.end);
    let mut rows: Vec<&[u8]> = vec![&[]; begin - tile.start];
    for (block, slots, _) in runs(unit.kv, unit.span.table, begin..tile.end) {
        rows.extend(unit.kv.read(block, unit.layer, half, unit.kv_head, slots).stored_rows());
    }
    rows
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
