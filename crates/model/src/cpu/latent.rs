//! Multi-head latent attention's projections, in the absorbed form (DeepSeek-V2, section 2.1.2).
//!
//! What is cached of a token is its normalised latent `c` and one rotated key part `r` for all heads. A head's key would
//! be `[W_uk c ‖ r]` and its value `W_uv c`. Neither is ever made:
//!
//! ```text
//! q · key   = q_nope · (W_uk c) + q_rope · r  =  [W_ukᵀ q_nope ‖ q_rope] · [c ‖ r]      one query as wide as the cache
//! Σ w value = W_uv (Σ w c)                                                              one product after the sum
//! ```
//!
//! So attention reads the cache as it lies, the same for a prompt as for a single token: another order of the sums for
//! prompts would be faster there, and would break the law that a token's bits do not depend on its chunk.

use super::{
    exec::Exec,
    kernels::{self, Matrix, Output, Rows},
    layer::Rotated,
    linear::{Linear, RmsNorm},
};
use crate::{
    graph::{LatentQuery, LatentSpec, LinearSpec},
    group::Place,
    weights::{Tensor, Weights},
};

/// Tokens of one task of the products per head: enough to use a weight that was loaded several times.
const TOKENS: usize = 32;

pub(super) struct Latent {
    q: Query,
    kv_down: Linear,
    kv_norm: RmsNorm,
    /// `W_uk ‖ W_uv` head by head.
    kv_up: Tensor,
    heads: usize,
    rank: usize,
    nope: usize,
    rope: usize,
    v_dim: usize,
}

enum Query {
    Direct(Linear),
    Compressed { down: Linear, norm: RmsNorm, up: Linear },
}

impl Latent {
    /// The heads that are this rank's; every rank has the latents.
    pub(super) fn load(weights: &Weights, spec: &LatentSpec, heads: usize, place: Place) -> Self {
        let linear = |spec| Linear::load(weights, spec);
        let heads_of = |spec: &LinearSpec| Linear::load(weights, spec).part(place.part(spec.outputs));
        let kv_up = weights.get(&format!("{}.weight", spec.kv_up.name));
        Self {
            q: match &spec.q {
                LatentQuery::Direct(q) => Query::Direct(heads_of(q)),
                LatentQuery::Compressed { down, norm, up } => {
                    Query::Compressed { down: linear(down), norm: RmsNorm::load(weights, norm), up: heads_of(up) }
                }
            },
            kv_down: linear(&spec.kv_down),
            kv_norm: RmsNorm::load(weights, &spec.kv_norm),
            // Its rows are factors of sums as well as sums: of blocks that share a scale the numbers themselves are kept.
            kv_up: kv_up.part(place.part(kv_up.rows)).without_blocks(),
            heads: place.part(heads).len(),
            rank: spec.rank,
            nope: spec.nope,
            rope: spec.rope,
            v_dim: spec.v_dim,
        }
    }

    /// `latent ‖ rotated part` of every row.
    pub(super) fn keys(&self, exec: &Exec, x: &[f32], rotated: Rotated<'_>, k: &mut Vec<f32>) {
        self.kv_down.apply(exec, x, rotated.row_of.len(), k);
        let mut scratch = Vec::new();
        for (key, &row) in k.chunks_exact_mut(self.rank + self.rope).zip(rotated.row_of) {
            let (latent, rope) = key.split_at_mut(self.rank);
            self.kv_norm.apply_one(exec, latent, &mut scratch);
            rotated.rotations.apply_to_neighbours(row, rope);
        }
    }

    /// The absorbed query of every head of every row.
    pub(super) fn queries(&self, exec: &Exec, x: &[f32], rotated: Rotated<'_>, q: &mut Vec<f32>) {
        let rows = rotated.row_of.len();
        let mut plain = Vec::new();
        match &self.q {
            Query::Direct(linear) => linear.apply(exec, x, rows, &mut plain),
            Query::Compressed { down, norm, up } => {
                let (mut latent, mut normed) = (Vec::new(), Vec::new());
                down.apply(exec, x, rows, &mut latent);
                norm.apply(exec, &latent, &mut normed);
                up.apply(exec, &normed, rows, &mut plain);
            }
        }
        let (head_dim, key) = (self.nope + self.rope, self.rank + self.rope);
        q.resize(rows * self.heads * key, 0.0);
        let out = Output::new(q);
        self.per_head(exec, rows, 2 * self.nope * self.rank, |head, first, count| {
            let at = |row: usize| (row * self.heads + head) * head_dim;
            let mut absorbed = vec![0.0; count * self.rank];
            let nope = Rows::new(&plain[at(first)..], self.heads * head_dim, count);
            kernels::accumulate(exec.isa, nope, self.part(head, 0, self.nope), &mut absorbed);
            let mut rope = vec![0.0; self.rope];
            for (row, absorbed) in (first..first + count).zip(absorbed.chunks_exact(self.rank)) {
                rope.copy_from_slice(&plain[at(row) + self.nope..][..self.rope]);
                rotated.rotations.apply_to_neighbours(rotated.row_of[row], &mut rope);
                let to = (row * self.heads + head) * key;
                // SAFETY: a row and head belong to one task.
                unsafe {
                    out.write(to, absorbed);
                    out.write(to + self.rank, &rope);
                }
            }
        });
    }

    /// Turns the latent that each head summed up into the head's value, for every row of `attended`.
    pub(super) fn expand(&self, exec: &Exec, attended: &mut Vec<f32>, rows: usize) {
        let mut values = vec![0.0; rows * self.heads * self.v_dim];
        let out = Output::new(&mut values);
        self.per_head(exec, rows, 2 * self.v_dim * self.rank, |head, first, count| {
            let (stride, width) = (self.heads * self.rank, self.heads * self.v_dim);
            let latents = Rows::new(&attended[first * stride + head * self.rank..], stride, count);
            let weight = self.part(head, self.nope, self.v_dim);
            // SAFETY: a row and head belong to one task.
            unsafe { kernels::matmul(exec.isa, latents, weight, &out, first * width + head * self.v_dim, width) };
        });
        *attended = values;
    }

    /// Calls `task(head, first row, rows)` for every head and every few rows; `flops` are those of one row and head.
    fn per_head(&self, exec: &Exec, rows: usize, flops: usize, task: impl Fn(usize, usize, usize) + Sync) {
        let blocks = rows.div_ceil(TOKENS);
        exec.each(self.heads * blocks, self.heads * rows * flops, |i| {
            let first = i % blocks * TOKENS;
            task(i / blocks, first, TOKENS.min(rows - first));
        });
    }

    /// Rows of a head's part of `kv_up`.
    fn part(&self, head: usize, first: usize, count: usize) -> Matrix<'_> {
        self.kv_up.matrix().slice(head * (self.nope + self.v_dim) + first, count)
    }
}
