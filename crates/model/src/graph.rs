//! What a model computes, told without its family's name: the description that a family makes of a configuration and a
//! backend executes.
//!
//! ```text
//! x = embedding[token] · embedding_scale
//! for each layer:
//!     x += post_norm(attention(norm(x)))      grouped heads, or multi-head latent attention
//!     x += post_norm(mlp(norm(x)))            dense, or routed experts beside shared ones
//! logits = soft_cap(output · norm(x))
//! ```
//!
//! A weight is described by its name and shape, so the list of tensors a folder must hold is the description itself and
//! cannot differ from what is computed. All of it (but names) goes into the model's fingerprint: a field added here is
//! covered without anyone remembering.

use serde::Serialize;

/// A linear map: `outputs × inputs` at `{name}.weight`, perhaps a bias at `{name}.bias`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinearSpec {
    /// Its tensors' name without the last part.
    pub name: String,
    /// Width of its input.
    pub inputs: usize,
    /// Width of its output.
    pub outputs: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// An RMS norm whose weight is `{name}.weight`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NormSpec {
    /// Its tensor's name without the last part.
    pub name: String,
    /// How many elements it normalises together.
    pub width: usize,
    /// Added to the mean square under the root.
    pub eps: f32,
    /// What the weight is an offset from: 0, or 1 where weights are stored around zero (Gemma).
    pub offset: f32,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerSpec {
    /// Before the attention.
    pub attention_norm: NormSpec,
    /// The attention.
    pub attention: AttentionSpec,
    /// On the attention's output, before it is added.
    pub attention_post_norm: Option<NormSpec>,
    /// Before the MLP.
    pub mlp_norm: NormSpec,
    /// The MLP.
    pub mlp: MlpSpec,
    /// On the MLP's output, before it is added.
    pub mlp_post_norm: Option<NormSpec>,
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Where queries, keys and values come from.
    pub kind: AttentionKind,
    /// From the heads' outputs, side by side, back to the residual stream.
    pub output: LinearSpec,
    /// Which of the model's rotations.
    pub rope: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// A token sees itself and the `window - 1` before it; all before it where there is none.
    pub window: Option<usize>,
}

/// Where queries, keys and values come from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum AttentionKind {
    /// Each KV head serves a group of query heads.
    Grouped(GroupedSpec),
    /// Keys and values of all heads come from one latent vector per token (DeepSeek-V2, section 2.1).
    Latent(LatentSpec),
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupedSpec {
    /// KV heads; divides the query heads.
    pub kv_heads: usize,
    /// Width of a query, key and value.
    pub head_dim: usize,
    /// Queries of all heads.
    pub q: LinearSpec,
    /// Keys of all KV heads.
    pub k: LinearSpec,
    /// Values of all KV heads.
    pub v: LinearSpec,
    /// On each head's query and key, before the rotation.
    pub qk_norms: Option<(NormSpec, NormSpec)>,
}

/// Multi-head latent attention: what is cached of a token is `kv_norm(latent) ‖ rotated key part`, one head for all.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatentSpec {
    /// Queries of all heads: `nope ‖ rope` each.
    pub q: LatentQuery,
    /// To `latent ‖ rope`.
    pub kv_down: LinearSpec,
    /// On the latent.
    pub kv_norm: NormSpec,
    /// From the latent to `key nope ‖ value` of each head.
    pub kv_up: LinearSpec,
    /// Width of the latent.
    pub rank: usize,
    /// Width of a head's part that is not rotated.
    pub nope: usize,
    /// Width of the rotated part; even.
    pub rope: usize,
    /// Width of a head's value.
    pub v_dim: usize,
}

/// How latent attention gets its queries.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum LatentQuery {
    /// In one step.
    Direct(LinearSpec),
    /// By way of a latent of their own.
    Compressed {
        /// Into it.
        down: LinearSpec,
        /// On it.
        norm: NormSpec,
        /// And out.
        up: LinearSpec,
    },
}

/// The MLP of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum MlpSpec {
    /// One for every token.
    Dense(GatedSpec),
    /// A few of many, chosen token by token.
    Routed(RoutedSpec),
}

/// `down(activation(gate(x)) · up(x))`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GatedSpec {
    /// The part that goes through the activation.
    pub gate: LinearSpec,
    /// The part it is multiplied with.
    pub up: LinearSpec,
    /// Back to the residual stream.
    pub down: LinearSpec,
    /// The activation.
    pub activation: Activation,
}

/// The non-linearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// Experts and who chooses among them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutedSpec {
    /// One score per expert.
    pub router: LinearSpec,
    /// How scores become a choice.
    pub gate: GateSpec,
    /// The experts, in the router's order; all of one shape.
    pub experts: Vec<GatedSpec>,
    /// What every token goes through beside them.
    pub shared: Option<GatedSpec>,
}

/// How a router's scores become a choice of experts and their weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GateSpec {
    /// Experts of a token.
    pub top_k: usize,
    /// What a score goes through before anything else.
    pub scoring: Scoring,
    /// A tensor added to the scores for the choice, not for the weights (DeepSeek-V3).
    pub correction: Option<String>,
    /// Whether experts are chosen among those of the best groups only.
    pub groups: Option<ExpertGroups>,
    /// Whether the chosen weights are divided by their sum.
    pub normalise: bool,
    /// What the weights are multiplied by in the end.
    pub scale: f32,
}

/// What a router's score goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Each its own.
    Sigmoid,
}

/// Experts in groups of neighbours; a token stays within its best ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ExpertGroups {
    /// How many groups; divides the experts.
    pub count: usize,
    /// How many of them a token may use.
    pub kept: usize,
    /// A group is worth the sum of so many of its best scores.
    pub best: usize,
}

impl LayerSpec {
    /// Calls `take(name, shape)` for every tensor of the layer.
    pub(crate) fn tensors(&self, take: &mut impl FnMut(String, Vec<usize>)) {
        self.attention_norm.tensors(take);
        match &self.attention.kind {
            AttentionKind::Grouped(grouped) => {
                [&grouped.q, &grouped.k, &grouped.v].into_iter().for_each(|linear| linear.tensors(take));
                if let Some((q, k)) = &grouped.qk_norms {
                    q.tensors(take);
                    k.tensors(take);
                }
            }
            AttentionKind::Latent(latent) => {
                match &latent.q {
                    LatentQuery::Direct(q) => q.tensors(take),
                    LatentQuery::Compressed { down, norm, up } => {
                        down.tensors(take);
                        norm.tensors(take);
                        up.tensors(take);
                    }
                }
                latent.kv_down.tensors(take);
                latent.kv_norm.tensors(take);
                latent.kv_up.tensors(take);
            }
        }
        self.attention.output.tensors(take);
        self.mlp_norm.tensors(take);
        self.attention_post_norm.iter().chain(&self.mlp_post_norm).for_each(|norm| norm.tensors(take));
        match &self.mlp {
            MlpSpec::Dense(mlp) => mlp.tensors(take),
            MlpSpec::Routed(routed) => {
                routed.router.tensors(take);
                if let Some(name) = &routed.gate.correction {
                    take(name.clone(), vec![routed.experts.len()]);
                }
                routed.experts.iter().chain(&routed.shared).for_each(|expert| expert.tensors(take));
            }
        }
    }
}

impl GatedSpec {
    pub(crate) fn tensors(&self, take: &mut impl FnMut(String, Vec<usize>)) {
        [&self.gate, &self.up, &self.down].into_iter().for_each(|linear| linear.tensors(take));
    }
}

impl LinearSpec {
    fn tensors(&self, take: &mut impl FnMut(String, Vec<usize>)) {
        take(format!("{}.weight", self.name), vec![self.outputs, self.inputs]);
        if self.bias {
            take(format!("{}.bias", self.name), vec![self.outputs]);
        }
    }
}

impl NormSpec {
    pub(crate) fn tensors(&self, take: &mut impl FnMut(String, Vec<usize>)) {
        take(format!("{}.weight", self.name), vec![self.width]);
    }
}
