//! Grouped-query attention's projections: a query per head, a key and a value per KV head, rotated by position.

use super::{
    exec::Exec,
    layer::Rotated,
    linear::{Linear, RmsNorm},
};
use crate::{
    graph::{GroupedSpec, LinearSpec},
    group::Place,
    weights::Weights,
};

pub(super) struct Grouped {
    q: Linear,
    k: Linear,
    v: Linear,
    qk_norms: Option<(RmsNorm, RmsNorm)>,
    head_dim: usize,
}

impl Grouped {
    /// The heads that are this rank's.
    pub(super) fn load(weights: &Weights, spec: &GroupedSpec, place: Place) -> Self {
        let norm = |spec| RmsNorm::load(weights, spec);
        // Equal parts, so heads are whole and each is with its KV head (`group::check`).
        let heads = |spec: &LinearSpec| Linear::load(weights, spec).part(place.part(spec.outputs));
        Self {
            q: heads(&spec.q),
            k: heads(&spec.k),
            v: heads(&spec.v),
            qk_norms: spec.qk_norms.as_ref().map(|(q, k)| (norm(q), norm(k))),
            head_dim: spec.head_dim,
        }
    }

    /// Keys and values, and queries if they are wanted of the same rows: one section of products for all.
    pub(super) fn project(
        &self,
        exec: &Exec,
        x: &[f32],
        rotated: Rotated<'_>,
        q: Option<&mut Vec<f32>>,
        k: &mut Vec<f32>,
        v: &mut Vec<f32>,
    ) {
        let rows = rotated.row_of.len();
        match q {
            None => Linear::apply_all(exec, x, rows, [(&self.k, &mut *k), (&self.v, v)]),
            Some(q) => {
                Linear::apply_all(exec, x, rows, [(&self.q, &mut *q), (&self.k, &mut *k), (&self.v, v)]);
                self.rotate_queries(exec, q, rotated);
            }
        }
        self.rotate(exec, k, self.k.width(), self.qk_norms.as_ref().map(|(_, k)| k), rotated);
    }

    pub(super) fn queries(&self, exec: &Exec, x: &[f32], rotated: Rotated<'_>, q: &mut Vec<f32>) {
        self.q.apply(exec, x, rotated.row_of.len(), q);
        self.rotate_queries(exec, q, rotated);
    }

    fn rotate_queries(&self, exec: &Exec, q: &mut [f32], rotated: Rotated<'_>) {
        self.rotate(exec, q, self.q.width(), self.qk_norms.as_ref().map(|(q, _)| q), rotated);
    }

    /// Normalises (where the model does) and rotates every head of every row, in place.
    fn rotate(&self, exec: &Exec, x: &mut [f32], width: usize, norm: Option<&RmsNorm>, rotated: Rotated<'_>) {
        exec.rows(x, width, 10 * x.len(), |first, part| {
            let mut scratch = Vec::new();
            for (row, heads) in part.chunks_exact_mut(width).enumerate() {
                for head in heads.chunks_exact_mut(self.head_dim) {
                    if let Some(norm) = norm {
                        norm.apply_one(exec, head, &mut scratch);
                    }
                    rotated.rotations.apply(rotated.row_of[first + row], head);
                }
            }
        });
    }
}
