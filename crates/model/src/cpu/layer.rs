//! One layer, loaded: its norms, its attention's projections and its MLP, in the order they are used.

use super::{
    attention::Heads,
    exec::Exec,
    grouped::Grouped,
    latent::Latent,
    linear::{Linear, RmsNorm},
    mlp::Mlp,
};
use crate::{
    Error,
    graph::{AttentionKind, AttentionSpec, LayerSpec},
    group::Place,
    rope::Rotations,
    weights::Weights,
};

pub(super) struct Layer {
    pub(super) attention_norm: RmsNorm,
    pub(super) attention: Attention,
    pub(super) attention_post_norm: Option<RmsNorm>,
    pub(super) mlp_norm: RmsNorm,
    pub(super) mlp: Mlp,
    pub(super) mlp_post_norm: Option<RmsNorm>,
}

/// What surrounds the sum over cached positions.
pub(super) struct Attention {
    pub(super) heads: Heads,
    /// Which of the model's rotations.
    pub(super) rope: usize,
    projections: Projections,
    output: Linear,
}

/// Where queries, keys and values come from.
enum Projections {
    Grouped(Grouped),
    Latent(Latent),
}

/// Rows whose positions are rows of a table of rotations.
#[derive(Clone, Copy)]
pub(super) struct Rotated<'a> {
    pub(super) rotations: &'a Rotations,
    /// Row of the table for each row of the data.
    pub(super) row_of: &'a [usize],
}

impl Layer {
    /// This rank's part.
    pub(super) fn load(weights: &Weights, spec: &LayerSpec, place: Place) -> Self {
        let norm = |spec| RmsNorm::load(weights, spec);
        Self {
            attention_norm: norm(&spec.attention_norm),
            attention: Attention::load(weights, &spec.attention, place),
            attention_post_norm: spec.attention_post_norm.as_ref().map(norm),
            mlp_norm: norm(&spec.mlp_norm),
            mlp: Mlp::load(weights, &spec.mlp, place),
            mlp_post_norm: spec.mlp_post_norm.as_ref().map(norm),
        }
    }
}

impl Attention {
    fn load(weights: &Weights, spec: &AttentionSpec, place: Place) -> Self {
        let projections = match &spec.kind {
            AttentionKind::Grouped(grouped) => Projections::Grouped(Grouped::load(weights, grouped, place)),
            AttentionKind::Latent(latent) => Projections::Latent(Latent::load(weights, latent, spec.heads, place)),
        };
        let output = Linear::load(weights, &spec.output).part(place.part(spec.output.outputs));
        Self { heads: Heads::of(spec, place), rope: spec.rope, projections, output }
    }

    /// What is cached of every row: keys into `k` and, where they are kept apart, values into `v`; and the queries of the
    /// same rows, if they are wanted.
    pub(super) fn project(
        &self,
        exec: &Exec,
        x: &[f32],
        rotated: Rotated<'_>,
        q: Option<&mut Vec<f32>>,
        k: &mut Vec<f32>,
        v: &mut Vec<f32>,
    ) {
        match &self.projections {
            Projections::Grouped(grouped) => grouped.project(exec, x, rotated, q, k, v),
            Projections::Latent(latent) => {
                latent.keys(exec, x, rotated, k);
                if let Some(q) = q {
                    latent.queries(exec, x, rotated, q);
                }
            }
        }
    }

    /// The queries of every row, as wide as the cached keys.
    pub(super) fn queries(&self, exec: &Exec, x: &[f32], rotated: Rotated<'_>, q: &mut Vec<f32>) {
        match &self.projections {
            Projections::Grouped(grouped) => grouped.queries(exec, x, rotated, q),
            Projections::Latent(latent) => latent.queries(exec, x, rotated, q),
        }
    }

    /// From what was summed up for this rank's heads back to the residual stream's width.
    pub(super) fn output(
        &self,
        exec: &Exec,
        attended: &mut Vec<f32>,
        rows: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        if let Projections::Latent(latent) = &self.projections {
            latent.expand(exec, attended, rows);
        }
        exec.group.all_gather(rows, attended)?;
        self.output.apply(exec, attended, rows, out);
        exec.group.all_gather(rows, out)
    }

    /// Whether what is cached belongs to no head, so that one rank writes it for all.
    pub(super) fn is_latent(&self) -> bool {
        matches!(self.projections, Projections::Latent(_))
    }
}
