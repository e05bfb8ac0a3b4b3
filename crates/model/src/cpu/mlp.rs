//! The MLP of a layer: one for all tokens, or experts of which each token takes a few.
//!
//! Tokens that chose the same expert go through it together, as one small matrix product. Experts are worked off in
//! ascending order and each adds to its tokens' rows, so a token's sum over experts has one order, whoever else is in the
//! batch.

use super::{exec::Exec, kernels, linear::Linear};
use crate::{
    Error,
    graph::{Activation, ExpertGroups, GateSpec, GatedSpec, LinearSpec, MlpSpec, RoutedSpec, Scoring},
    group::Place,
    weights::Weights,
};

#[expect(clippy::large_enum_variant, reason = "one per layer, and boxes would only hide where weights are")]
pub(super) enum Mlp {
    Dense(Gated),
    Routed(Routed),
}

/// `down(activation(gate(x)) · up(x))`.
pub(super) struct Gated {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
}

/// Experts and who chooses among them.
pub(super) struct Routed {
    router: Linear,
    gate: GateSpec,
    /// Added to the scores for the choice.
    correction: Option<Vec<f32>>,
    experts: Vec<Gated>,
    shared: Option<Gated>,
}

/// What an MLP needs between its products, kept from layer to layer.
#[derive(Default)]
pub(super) struct Scratch {
    gate: Vec<f32>,
    up: Vec<f32>,
    scores: Vec<f32>,
    gathered: Vec<f32>,
    /// Of all experts, the rows that chose them.
    gated: Vec<f32>,
    change: Vec<f32>,
}

impl Mlp {
    /// This rank's part.
    pub(super) fn load(weights: &Weights, spec: &MlpSpec, place: Place) -> Self {
        match spec {
            MlpSpec::Dense(spec) => Self::Dense(Gated::load(weights, spec, place)),
            MlpSpec::Routed(spec) => Self::Routed(Routed::load(weights, spec, place)),
        }
    }

    /// Applies it to `rows` rows of `x`; the result, of all ranks' parts, replaces what `out` held.
    pub(super) fn apply(
        &self,
        exec: &Exec,
        x: &[f32],
        rows: usize,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        match self {
            Self::Dense(mlp) => mlp.apply(exec, x, rows, &mut scratch.gate, &mut scratch.up, out)?,
            Self::Routed(mlp) => mlp.apply(exec, x, rows, scratch, out)?,
        }
        exec.group.all_gather(rows, out)
    }
}

impl Gated {
    fn load(weights: &Weights, spec: &GatedSpec, place: Place) -> Self {
        let linear = |spec: &LinearSpec| Linear::load(weights, spec).part(place.part(spec.outputs));
        Self { gate: linear(&spec.gate), up: linear(&spec.up), down: linear(&spec.down), activation: spec.activation }
    }

    /// This rank's columns of the result.
    fn apply(
        &self,
        exec: &Exec,
        x: &[f32],
        rows: usize,
        gate: &mut Vec<f32>,
        up: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        self.gated(exec, x, rows, gate, up);
        exec.group.all_gather(rows, gate)?;
        self.down.apply(exec, gate, rows, out);
        Ok(())
    }

    /// This rank's columns of what goes into `down`.
    fn gated(&self, exec: &Exec, x: &[f32], rows: usize, gate: &mut Vec<f32>, up: &mut Vec<f32>) {
        Linear::apply_all(exec, x, rows, [(&self.gate, &mut *gate), (&self.up, &mut *up)]);
        let width = self.gate.width();
        exec.rows(gate, width, 20 * up.len(), |first, part| {
            let up = &up[first * width..];
            match self.activation {
                Activation::Silu => kernels::silu_mul(exec.isa, part, up),
                Activation::GeluTanh => kernels::gelu_mul(exec.isa, part, up),
            }
        });
    }
}

impl Routed {
    fn load(weights: &Weights, spec: &RoutedSpec, place: Place) -> Self {
        Self {
            router: Linear::load(weights, &spec.router).exact(),
            correction: spec.gate.correction.as_ref().map(|name| weights.get(name).to_f32()),
            gate: spec.gate.clone(),
            experts: spec.experts.iter().map(|expert| Gated::load(weights, expert, place)).collect(),
            shared: spec.shared.as_ref().map(|shared| Gated::load(weights, shared, place)),
        }
    }

    /// This rank's columns of the result. What experts' last products take is gathered once for all of them.
    fn apply(
        &self,
        exec: &Exec,
        x: &[f32],
        rows: usize,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let Scratch { gate, up, scores, gathered, gated, change } = scratch;
        out.clear();
        if rows == 0 {
            return Ok(());
        }
        let width = x.len() / rows;
        self.router.apply(exec, x, rows, scores);
        // Which rows go to which expert, with what weight.
        let mut by_expert: Vec<Vec<(usize, f32)>> = vec![Vec::new(); self.experts.len()];
        for (row, scores) in scores.chunks_exact_mut(self.experts.len()).enumerate() {
            for (expert, weight) in choose(exec, &self.gate, self.correction.as_deref(), scores) {
                by_expert[expert].push((row, weight));
            }
        }
        gated.clear();
        let in_use = || self.experts.iter().zip(&by_expert).filter(|(_, chosen)| !chosen.is_empty());
        for (expert, chosen) in in_use() {
            gathered.clear();
            for &(row, _) in chosen {
                gathered.extend_from_slice(&x[row * width..(row + 1) * width]);
            }
            expert.gated(exec, gathered, chosen.len(), gate, up);
            gated.extend_from_slice(gate);
        }
        let places: usize = by_expert.iter().map(Vec::len).sum();
        exec.group.all_gather(places, gated)?;
        let (columns, inner) = (exec.group.place().part(width).len(), gated.len() / places);
        out.resize(rows * columns, 0.0);
        let mut gated = &gated[..];
        for (expert, chosen) in in_use() {
            let (mine, others) = gated.split_at(chosen.len() * inner);
            expert.down.apply(exec, mine, chosen.len(), change);
            for (&(row, weight), change) in chosen.iter().zip(change.chunks_exact(columns)) {
                kernels::add_scaled(exec.isa, &mut out[row * columns..(row + 1) * columns], change, weight);
            }
            gated = others;
        }
        if let Some(shared) = &self.shared {
            shared.apply(exec, x, rows, gate, up, change)?;
            exec.rows(out, columns, x.len(), |first, part| kernels::add(exec.isa, part, &change[first * columns..]));
        }
        Ok(())
    }
}

/// The experts of one token and their weights, from the router's `scores`. Equal scores are a tie that the lower expert
/// wins.
fn choose(exec: &Exec, gate: &GateSpec, correction: Option<&[f32]>, scores: &mut [f32]) -> Vec<(usize, f32)> {
    match gate.scoring {
        Scoring::Sigmoid => kernels::sigmoid(exec.isa, scores),
        Scoring::Softmax => {
            let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
            kernels::softmax_step(exec.isa, scores, &mut max, &mut sum, &mut []);
            scores.iter_mut().for_each(|score| *score /= sum);
        }
    }
    let mut rank: Vec<f32> = scores.to_vec();
    if let Some(correction) = correction {
        rank.iter_mut().zip(correction).for_each(|(rank, correction)| *rank += correction);
    }
    if let Some(groups) = gate.groups {
        leave_groups(groups, &mut rank);
    }
    let mut chosen: Vec<(usize, f32)> =
        best(&rank, gate.top_k).into_iter().map(|expert| (expert, scores[expert])).collect();
    if gate.normalise {
        let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
        chosen.iter_mut().for_each(|(_, weight)| *weight /= sum + f32::MIN_POSITIVE);
    }
    chosen.iter_mut().for_each(|(_, weight)| *weight *= gate.scale);
    chosen
}

/// Puts the experts of all but the best groups out of reach.
fn leave_groups(groups: ExpertGroups, rank: &mut [f32]) {
    let size = rank.len() / groups.count;
    let worth: Vec<f32> = rank
        .chunks_exact(size)
        .map(|group| best(group, groups.best).into_iter().map(|expert| group[expert]).sum())
        .collect();
    let kept = best(&worth, groups.kept);
    for (group, rank) in rank.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            rank.fill(f32::NEG_INFINITY);
        }
    }
}

/// The indices of the `count` largest values, largest first.
fn best(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    // A total order, so a NaN is no reason to panic; a stable sort, so ties go to the lower index.
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Compute, kernels::Isa};

    const PLAIN: GateSpec =
        GateSpec { top_k: 2, scoring: Scoring::Sigmoid, correction: None, groups: None, normalise: false, scale: 1.0 };

    fn chosen(gate: &GateSpec, correction: Option<&[f32]>, scores: &[f32]) -> Vec<(usize, f32)> {
        let exec = Exec::new(Isa::detect(), Compute::Exact, 1).unwrap();
        choose(&exec, gate, correction, &mut scores.to_vec())
    }

    fn experts(gate: &GateSpec, correction: Option<&[f32]>, scores: &[f32]) -> Vec<usize> {
        chosen(gate, correction, scores).into_iter().map(|(expert, _)| expert).collect()
    }

    #[test]
    fn a_tie_goes_to_the_lower_expert() {
        assert_eq!(experts(&PLAIN, None, &[1.0, 2.0, 2.0, 2.0]), [1, 2]);
    }

    #[test]
    fn a_correction_changes_the_choice_and_not_the_weight() {
        let scores = [0.0, 1.0, -1.0, 0.5];
        let plain = chosen(&PLAIN, None, &scores);
        let corrected = chosen(&PLAIN, Some(&[0.0, 0.0, 9.0, 0.0]), &scores);
        assert_eq!(corrected.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [2, 1]);
        assert!((corrected[0].1 - 1.0 / (1.0 + 1f32.exp())).abs() < 1e-6);
        assert_eq!(corrected[1].1, plain[0].1);
    }

    #[test]
    fn groups_are_judged_by_their_best_and_others_left() {
        // Two groups of two: the single best expert is in the second, the two best together are the first's.
        let scores = [1.0, 1.0, 1.5, -5.0];
        let gate = |best| GateSpec { groups: Some(ExpertGroups { count: 2, kept: 1, best }), ..PLAIN };
        assert_eq!(experts(&gate(1), None, &scores), [2, 3]);
        assert_eq!(experts(&gate(2), None, &scores), [0, 1]);
    }

    #[test]
    fn normalised_weights_sum_to_the_scale() {
        let gate = GateSpec { normalise: true, scale: 2.5, scoring: Scoring::Softmax, ..PLAIN };
        let sum: f32 = chosen(&gate, None, &[0.3, -2.0, 1.0, 0.9]).iter().map(|(_, weight)| weight).sum();
        assert!((sum - 2.5).abs() < 1e-6);
    }
}
