//! Tiles in `f32`, keys and values as they lie in their blocks.

use std::{cell::RefCell, ops::Range, thread::LocalKey};

use super::{Heads, Scratch, Sums, TILE, Tile, Unit, runs};
use crate::cpu::{
    exec::Exec,
    kernels::{self, Output, Rows, fast::pairs},
    kv::Half,
};

#[derive(Default)]
pub(super) struct Tiles {
    /// Rows of `k_dim`.
    queries: Vec<f32>,
    /// Rows of [`TILE`].
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch<Tiles>> = RefCell::default();
}

impl super::Tiles for Tiles {
    /// Enough to fill the register tiles (a multiple of 6, 4 and 8), few enough that decode is not padded.
    const ROWS: usize = 24;

    fn scratch() -> &'static LocalKey<RefCell<Scratch<Self>>> {
        &SCRATCH
    }

    fn tokens(_: usize) -> usize {
        1
    }

    /// Of a latent key the rotated part is summed up, too, and then left behind: a ninth more work, and values are rows of
    /// a plain matrix.
    fn width(heads: Heads) -> usize {
        match heads.values {
            Half::Keys => heads.k_dim,
            Half::Values => heads.v_dim,
        }
    }

    fn begin(&mut self, _: &Exec, unit: &Unit<'_>, q: &[f32]) {
        let (dim, scale) = (unit.heads.k_dim, unit.heads.scale);
        self.queries.clear();
        self.queries.reserve(unit.rows() * dim);
        for place in unit.places() {
            self.queries.extend(q[place * dim..(place + 1) * dim].iter().map(|q| q * scale));
        }
        self.scores.clear();
        self.scores.resize(unit.rows() * TILE, 0.0);
    }

    fn add(&mut self, exec: &Exec, unit: &Unit<'_>, tile: Tile, sums: &mut Sums) {
        let Unit { kv, layer, heads, span, kv_head } = *unit;
        let (width, group, scores) = (sums.width, heads.group(), &mut self.scores);
        let acc = pairs::flat(&mut sums.acc);
        let scores_out = Output::new(scores);
        for (block, slots, at) in runs(kv, span.table, tile.start.max(unit.seen().start)..tile.end) {
            let keys = kv.read(block, layer, Half::Keys, kv_head, slots);
            // SAFETY: `scores` is this unit's own.
            unsafe {
                let queries = Rows::new(&self.queries, heads.k_dim, unit.rows());
                kernels::matmul(exec.isa, queries, keys, &scores_out, at - tile.start, TILE);
            }
        }
        for (row, (max, sum)) in sums.running.iter_mut().enumerate() {
            let scores = &mut scores[row * TILE..][unit.visible(row / group, tile)];
            if !scores.is_empty() {
                if let Some(cap) = heads.soft_cap {
                    kernels::soft_cap(exec.isa, scores, cap);
                }
                kernels::softmax_step(exec.isa, scores, max, sum, &mut acc[row * width..(row + 1) * width]);
            }
        }
        let mut add_values = |tokens: Range<usize>, part: Range<usize>| {
            for (block, slots, at) in runs(kv, span.table, tile.start + part.start..tile.start + part.end) {
                let values = kv.read(block, layer, heads.values, kv_head, slots);
                let first = tokens.start * group;
                let weights = Rows::new(&scores[first * TILE + at - tile.start..], TILE, tokens.len() * group);
                kernels::accumulate(exec.isa, weights, values, &mut acc[first * width..]);
            }
        };
        // What every token sees for all rows together; before and after it each token's own rest: ascending for every row.
        let visible = |token| unit.visible(token, tile);
        let common = visible(span.count - 1).start..visible(0).end;
        if common.is_empty() {
            (0..span.count).for_each(|token| add_values(token..token + 1, visible(token)));
        } else {
            (0..span.count).for_each(|token| add_values(token..token + 1, visible(token).start..common.start));
            add_values(0..span.count, common.clone());
            (0..span.count).for_each(|token| add_values(token..token + 1, common.end..visible(token).end));
        }
    }
}
