//! The model on the device: its description ([`crate::graph`]) with every weight's address.
//!
//! Nothing here knows a family. What a description asks for that kernels do not do is refused when it is loaded.

use super::{
    abi,
    load::{Loader, Matrix, Norm, padded},
};
use crate::{
    Error, ModelConfig,
    graph::{
        Activation, AttentionKind, AttentionSpec, GateSpec, GatedSpec, GroupedSpec, LatentQuery, LatentSpec, LayerSpec,
        LinearSpec, MlpSpec, RoutedSpec,
    },
    weights::{Dtype, EMBEDDING, LM_HEAD, Tensor},
};

/// Everything that has weights: one rank's part. Heads, widths and rows are what this rank has of them.
pub(super) struct Model {
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Norm,
    pub(super) output: Matrix,
    pub(super) ropes: Vec<Frequencies>,
}

/// One of the model's rotations.
pub(super) struct Frequencies {
    /// An `f32` per pair.
    pub(super) at: u64,
    pub(super) half: usize,
    pub(super) magnitude: f32,
}

pub(super) struct Layer {
    pub(super) attention_norm: Norm,
    pub(super) attention: Attention,
    pub(super) attention_post_norm: Option<Norm>,
    pub(super) mlp_norm: Norm,
    pub(super) mlp: Mlp,
    pub(super) mlp_post_norm: Option<Norm>,
}

pub(super) struct Attention {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// Width of a query.
    pub(super) k_dim: usize,
    /// Width of what is summed up for a head.
    pub(super) v_dim: usize,
    pub(super) scale: f32,
    pub(super) soft_cap: Option<f32>,
    pub(super) window: Option<usize>,
    pub(super) rope: usize,
    pub(super) projections: Projections,
    pub(super) output: Matrix,
}

#[expect(clippy::large_enum_variant, reason = "one per layer, and boxes would only hide where weights are")]
pub(super) enum Projections {
    Grouped(Grouped),
    Latent(Latent),
}

/// Queries, keys and values side by side.
pub(super) struct Grouped {
    /// All three.
    pub(super) all: Vec<Matrix>,
    /// Queries alone.
    pub(super) q: Vec<Matrix>,
    /// Keys and values.
    pub(super) kv: Vec<Matrix>,
    pub(super) norms: Option<(Norm, Norm)>,
}

pub(super) struct Latent {
    pub(super) q: Query,
    pub(super) kv_down: Matrix,
    pub(super) kv_norm: Norm,
    /// For each head, from what is not rotated of a query to the latent: `W_ukᵀ`, `rank` rows.
    pub(super) absorb: Matrix,
    /// `kv_up` as it is stored: of each head `nope` rows that are not used here, then `W_uv`.
    pub(super) up: Matrix,
    pub(super) rank: usize,
    pub(super) nope: usize,
    pub(super) rope: usize,
    pub(super) value: usize,
}

pub(super) enum Query {
    Direct(Matrix),
    Compressed { down: Matrix, norm: Norm, up: Matrix },
}

#[expect(clippy::large_enum_variant, reason = "one per layer")]
pub(super) enum Mlp {
    Dense(Gated),
    Routed(Routed),
}

pub(super) struct Gated {
    /// Gate beside up.
    pub(super) gate_up: Vec<Matrix>,
    pub(super) down: Matrix,
    pub(super) width: usize,
    pub(super) activation: Activation,
}

pub(super) struct Routed {
    pub(super) router: Matrix,
    pub(super) gate: GateSpec,
    /// An `f32` per expert, or 0.
    pub(super) correction: u64,
    pub(super) experts: usize,
    /// All experts' gates beside their ups, one expert after the other.
    pub(super) gate_up: Matrix,
    /// All experts' downs.
    pub(super) down: Matrix,
    pub(super) width: usize,
    pub(super) activation: Activation,
    pub(super) shared: Option<Gated>,
}

impl Model {
    pub(super) fn load(config: &ModelConfig, loader: &mut Loader<'_>) -> Result<Self, Error> {
        let rotated = match &config.layers[0].attention.kind {
            AttentionKind::Grouped(grouped) => grouped.head_dim,
            AttentionKind::Latent(latent) => latent.rope,
        };
        let ropes = config.ropes.iter().map(|rope| {
            let frequencies = rope.frequencies(rotated);
            let (half, magnitude) = (frequencies.len(), rope.magnitude());
            Ok(Frequencies { at: loader.numbers(&frequencies)?, half, magnitude })
        });
        let ropes = ropes.collect::<Result<_, Error>>()?;
        // Its rows are read as well as multiplied by.
        let embedding = loader.plain(&[loader.tensor(EMBEDDING)], None)?;
        let vocab = loader.place.part(config.vocab);
        let output = match config.tied_embeddings {
            true => embedding.rows(vocab.start, vocab.len()),
            false => loader.stack(&[&loader.part(LM_HEAD)], None)?,
        };
        let layers = config.layers.iter().map(|layer| Layer::load(layer, loader)).collect::<Result<_, _>>()?;
        Ok(Self { embedding, layers, final_norm: loader.norm(&config.final_norm)?, output, ropes })
    }
}

impl Layer {
    fn load(spec: &LayerSpec, loader: &mut Loader<'_>) -> Result<Self, Error> {
        Ok(Self {
            attention_norm: loader.norm(&spec.attention_norm)?,
            attention: Attention::load(&spec.attention, loader)?,
            attention_post_norm: spec.attention_post_norm.as_ref().map(|norm| loader.norm(norm)).transpose()?,
            mlp_norm: loader.norm(&spec.mlp_norm)?,
            mlp: match &spec.mlp {
                MlpSpec::Dense(mlp) => Mlp::Dense(Gated::load(mlp, loader)?),
                MlpSpec::Routed(mlp) => Mlp::Routed(Routed::load(mlp, loader)?),
            },
            mlp_post_norm: spec.mlp_post_norm.as_ref().map(|norm| loader.norm(norm)).transpose()?,
        })
    }
}

impl Attention {
    fn load(spec: &AttentionSpec, loader: &mut Loader<'_>) -> Result<Self, Error> {
        let &AttentionSpec { scale, soft_cap, window, rope, .. } = spec;
        let heads = loader.place.part(spec.heads).len();
        let (kv_heads, k_dim, v_dim, projections) = match &spec.kind {
            AttentionKind::Grouped(grouped) => {
                let dim = grouped.head_dim;
                let kv_heads = loader.place.part(grouped.kv_heads).len();
                (kv_heads, dim, dim, Projections::Grouped(Grouped::load(grouped, loader)?))
            }
            AttentionKind::Latent(latent) => {
                let projections = Projections::Latent(Latent::load(latent, heads, loader)?);
                (1, latent.rank + latent.rope, latent.rank, projections)
            }
        };
        let output = loader.linear(&spec.output)?;
        Ok(Self { heads, kv_heads, k_dim, v_dim, scale, soft_cap, window, rope, projections, output })
    }
}

impl Grouped {
    fn load(spec: &GroupedSpec, loader: &mut Loader<'_>) -> Result<Self, Error> {
        let all = loader.linears(&[&spec.q, &spec.k, &spec.v])?;
        let (q, kv) = match &all[..] {
            [one] => {
                let queries = loader.place.part(spec.q.outputs).len();
                (vec![one.rows(0, queries)], vec![one.rows(queries, one.rows - queries)])
            }
            several => (several[..1].to_vec(), several[1..].to_vec()),
        };
        let norms = match &spec.qk_norms {
            Some((q, k)) => Some((loader.norm(q)?, loader.norm(k)?)),
            None => None,
        };
        Ok(Self { all, q, kv, norms })
    }
}

impl Latent {
    fn load(spec: &LatentSpec, heads: usize, loader: &mut Loader<'_>) -> Result<Self, Error> {
        let &LatentSpec { rank, nope, rope, v_dim: value, .. } = spec;
        let up = &loader.part(&format!("{}.weight", spec.kv_up.name));
        // A scale per row becomes one per column: then the numbers themselves are written down.
        let dtype = if up.dtype.is_scaled() { Dtype::F32 } else { up.dtype };
        let absorb = loader.made((dtype, heads * rank, padded(nope)), || transposed(up, dtype, heads, spec))?;
        Ok(Self {
            q: match &spec.q {
                LatentQuery::Direct(q) => Query::Direct(loader.linear(q)?),
                LatentQuery::Compressed { down, norm, up } => {
                    Query::Compressed { down: loader.whole(down)?, norm: loader.norm(norm)?, up: loader.linear(up)? }
                }
            },
            kv_down: loader.whole(&spec.kv_down)?,
            kv_norm: loader.norm(&spec.kv_norm)?,
            absorb,
            // Heads begin anywhere in a block.
            up: loader.plain(&[up], None)?,
            rank,
            nope,
            rope,
            value,
        })
    }
}

/// `W_ukᵀ` of every head, rows padded: `rank` rows of `nope` elements from `nope` rows of `rank`.
fn transposed(up: &Tensor, dtype: Dtype, heads: usize, spec: &LatentSpec) -> Vec<u8> {
    let (bytes, ld) = (dtype.bytes(), padded(spec.nope));
    let mut out = vec![0; heads * spec.rank * ld * bytes];
    let mut row = vec![0.0; spec.rank];
    for head in 0..heads {
        for k in 0..spec.nope {
            let from = head * (spec.nope + spec.v_dim) + k;
            let stored = &up.bytes()[from * spec.rank * up.dtype.bytes()..][..spec.rank * up.dtype.bytes()];
            if dtype != up.dtype {
                up.row_into(from, &mut row);
            }
            for r in 0..spec.rank {
                let to = &mut out[((head * spec.rank + r) * ld + k) * bytes..][..bytes];
                if dtype == up.dtype {
                    to.copy_from_slice(&stored[r * bytes..][..bytes]);
                } else {
                    to.copy_from_slice(&row[r].to_le_bytes());
                }
            }
        }
    }
    out
}

impl Gated {
    fn load(spec: &GatedSpec, loader: &mut Loader<'_>) -> Result<Self, Error> {
        Ok(Self {
            gate_up: loader.linears(&[&spec.gate, &spec.up])?,
            down: loader.linear(&spec.down)?,
            width: loader.place.part(spec.gate.outputs).len(),
            activation: spec.activation,
        })
    }
}

impl Routed {
    fn load(spec: &RoutedSpec, loader: &mut Loader<'_>) -> Result<Self, Error> {
        let refused = |what: String| Error::NotOnDevice { device: "cuda".to_owned(), what };
        let (experts, top_k) = (spec.experts.len(), spec.gate.top_k);
        if experts > abi::MAX_EXPERTS || top_k > abi::MAX_TOP_K {
            let (most, chosen) = (abi::MAX_EXPERTS, abi::MAX_TOP_K);
            return Err(refused(format!("{top_k} of {experts} experts, kernels choose at most {chosen} of {most}")));
        }
        let correction = match &spec.gate.correction {
            Some(name) => loader.numbers(&loader.tensor(name).to_f32())?,
            None => 0,
        };
        let mut one = |pick: &dyn Fn(&GatedSpec) -> Vec<&LinearSpec>| {
            let part = |linear: &LinearSpec| loader.part(&format!("{}.weight", linear.name));
            let tensors: Vec<Tensor> = spec.experts.iter().flat_map(pick).map(part).collect();
            let same = tensors.iter().all(|tensor| tensor.dtype == tensors[0].dtype && tensor.cols == tensors[0].cols);
            if !same || spec.experts.iter().flat_map(pick).any(|linear| linear.bias) {
                return Err::<Matrix, _>(refused(
                    "experts whose weights differ in type, or that have biases".to_owned(),
                ));
            }
            loader.stack(&tensors.iter().collect::<Vec<_>>(), None)
        };
        let gate_up = one(&|expert| vec![&expert.gate, &expert.up])?;
        let down = one(&|expert| vec![&expert.down])?;
        Ok(Self {
            router: loader.whole(&spec.router)?,
            gate: spec.gate.clone(),
            correction,
            experts,
            gate_up,
            down,
            width: loader.place.part(spec.experts[0].gate.outputs).len(),
            activation: spec.experts[0].activation,
            shared: spec.shared.as_ref().map(|shared| Gated::load(shared, loader)).transpose()?,
        })
    }
}
