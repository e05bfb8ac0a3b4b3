//! What DeepSeek-V2 and V3 share: multi-head latent attention, a dense MLP in the first layers and routed experts beside
//! shared ones in the others.

use super::{
    Family,
    parts::{Decoder, in_layer, linear, only_silu, root},
};
use crate::{
    Error, ModelConfig, Rope, RopeScaling,
    config::raw::{MAX_HEAD_DIM, MAX_LAYERS, MAX_WIDTH, Raw, yarn_magnitude},
    graph::{
        AttentionKind, AttentionSpec, ExpertGroups, GateSpec, LatentQuery, LatentSpec, LayerSpec, LinearSpec, MlpSpec,
        NormSpec,
    },
};

/// The norms of the latents keep the class's default whatever `rms_norm_eps` says.
const LATENT_EPS: f32 = 1e-6;
/// More shared experts than any published model has.
const MAX_SHARED: u64 = 1 << 6;

/// The model, with the family's rule of choosing experts: `gate(top_k, groups)`.
pub(super) fn read(
    raw: &Raw,
    family: &Family,
    mlp_bias: bool,
    gate: impl Fn(usize, Option<(usize, usize)>) -> Result<GateSpec, Error>,
) -> Result<ModelConfig, Error> {
    only_silu(raw)?;
    if raw.get("moe_layer_freq").is_some_and(|every| every.as_u64() != Some(1)) {
        return Err(raw.bad("moe_layer_freq", "other than 1 is not supported"));
    }
    if raw.get("sliding_window").is_some() {
        return Err(raw.bad("sliding_window", "not supported in this family"));
    }
    let decoder = Decoder::read(raw)?;
    decoder.one_window(None)?;
    let rope = raw.rope(10_000.0)?;
    let latent = Latent::read(&decoder, rope)?;
    let first_routed = raw.count_if_any("first_k_dense_replace", MAX_LAYERS)?;
    let first_routed = first_routed.ok_or_else(|| raw.bad("first_k_dense_replace", "absent"))?;
    let intermediate = if first_routed > 0 { decoder.intermediate()? } else { 0 };
    let experts = decoder.experts("n_routed_experts")?;
    let expert_width = raw.dimension("moe_intermediate_size", MAX_WIDTH)?;
    let shared = raw.dimension("n_shared_experts", MAX_SHARED)?;
    let groups =
        match (raw.dimension_if_any("n_group", experts as u64)?, raw.dimension_if_any("topk_group", experts as u64)?) {
            (Some(count), Some(kept)) => {
                if experts % count != 0 || kept > count {
                    return Err(raw.bad("n_group", format!("{count} groups, {kept} kept, of {experts} experts")));
                }
                Some((count, kept))
            }
            _ => None,
        };
    let top_k = decoder.top_k("num_experts_per_tok", experts)?;
    let gate = gate(top_k, groups)?;
    let per_group = |groups: &ExpertGroups| experts / groups.count;
    if gate
        .groups
        .as_ref()
        .is_some_and(|groups| top_k > groups.kept * per_group(groups) || groups.best > per_group(groups))
    {
        return Err(raw.bad("topk_group", "the groups kept have too few experts"));
    }
    let layer = |layer| {
        let mlp = if layer < first_routed {
            MlpSpec::Dense(decoder.mlp(layer, "mlp", intermediate, mlp_bias))
        } else {
            let expert = |i| decoder.mlp(layer, &format!("mlp.experts.{i}"), expert_width, false);
            let mut gate = gate.clone();
            gate.correction = gate.correction.map(|part| in_layer(layer, &part));
            let mut routed = decoder.routed(layer, "mlp", gate, (0..experts).map(expert).collect());
            routed.shared = Some(decoder.mlp(layer, "mlp.shared_experts", expert_width * shared, mlp_bias));
            MlpSpec::Routed(routed)
        };
        decoder.layer(layer, latent.attention(&decoder, layer), mlp)
    };
    let layers: Vec<LayerSpec> = (0..decoder.layers).map(layer).collect();
    decoder.model(family, vec![rope], layers, false)
}

/// The sizes of latent attention.
struct Latent {
    q_rank: Option<usize>,
    rank: usize,
    nope: usize,
    rope: usize,
    v_dim: usize,
    bias: bool,
    scale: f32,
}

impl Latent {
    fn read(decoder: &Decoder<'_>, rope: Rope) -> Result<Self, Error> {
        let raw = decoder.raw;
        let (nope, rope_dim) =
            (raw.dimension("qk_nope_head_dim", MAX_HEAD_DIM)?, raw.dimension("qk_rope_head_dim", MAX_HEAD_DIM)?);
        if rope_dim % 2 != 0 {
            return Err(raw.bad("qk_rope_head_dim", format!("{rope_dim} is odd; the rotation works on pairs")));
        }
        // One latent serves all heads, so this key can mean nothing else.
        if raw.dimension_if_any("num_key_value_heads", u64::MAX)?.is_some_and(|heads| heads != decoder.heads) {
            return Err(raw.bad("num_key_value_heads", "other than the number of query heads is not supported"));
        }
        Ok(Self {
            q_rank: raw.dimension_if_any("q_lora_rank", MAX_WIDTH)?,
            rank: raw.dimension("kv_lora_rank", MAX_WIDTH)?,
            nope,
            rope: rope_dim,
            v_dim: raw.dimension("v_head_dim", MAX_HEAD_DIM)?,
            bias: raw.flag("attention_bias", false)?,
            scale: root((nope + rope_dim) as f64) * score_factor(raw, rope)?,
        })
    }

    fn attention(&self, decoder: &Decoder<'_>, layer: usize) -> AttentionSpec {
        let (heads, hidden) = (decoder.heads, decoder.hidden);
        let linear = |part: &str, inputs, outputs, bias| -> LinearSpec {
            linear(layer, &format!("self_attn.{part}"), inputs, outputs, bias)
        };
        let norm = |part: &str, width| NormSpec {
            name: in_layer(layer, &format!("self_attn.{part}")),
            width,
            eps: LATENT_EPS,
            offset: 0.0,
        };
        let q_width = heads * (self.nope + self.rope);
        let q = match self.q_rank {
            None => LatentQuery::Direct(linear("q_proj", hidden, q_width, false)),
            Some(rank) => LatentQuery::Compressed {
                down: linear("q_a_proj", hidden, rank, self.bias),
                norm: norm("q_a_layernorm", rank),
                up: linear("q_b_proj", rank, q_width, false),
            },
        };
        AttentionSpec {
            heads,
            kind: AttentionKind::Latent(LatentSpec {
                q,
                kv_down: linear("kv_a_proj_with_mqa", hidden, self.rank + self.rope, self.bias),
                kv_norm: norm("kv_a_layernorm", self.rank),
                kv_up: linear("kv_b_proj", self.rank, heads * (self.nope + self.v_dim), false),
                rank: self.rank,
                nope: self.nope,
                rope: self.rope,
                v_dim: self.v_dim,
            }),
            output: linear("o_proj", heads * self.v_dim, hidden, self.bias),
            rope: 0,
            scale: self.scale,
            soft_cap: None,
            window: None,
        }
    }
}

/// What YaRN multiplies the scores by beside what it does to the rotated parts: `mscale_all_dim` is meant for the parts that
/// are not rotated, too, so the rotation's magnitude has it divided out and the scores get it squared.
fn score_factor(raw: &Raw, rope: Rope) -> Result<f32, Error> {
    let parameters = raw.object("rope_parameters")?.or(raw.object("rope_scaling")?);
    let all = parameters.and_then(|p| p.get("mscale_all_dim")).and_then(|all| all.as_f64());
    match (rope.scaling, all) {
        (RopeScaling::None, _) | (_, None) => Ok(1.0),
        (RopeScaling::Yarn { factor, .. }, Some(all)) => Ok(yarn_magnitude(factor, all).powi(2) as f32),
        (RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. }, Some(_)) => {
            Err(raw.bad("mscale_all_dim", "supported with rope type yarn only"))
        }
    }
}
