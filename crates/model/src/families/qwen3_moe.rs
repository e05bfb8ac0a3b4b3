//! Qwen3-MoE: Qwen3's attention, and routed experts in all layers but those named as dense.

use super::{
    Family,
    parts::{Biases, Decoder, only_silu},
};
use crate::{
    Error, ModelConfig,
    config::raw::{MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH, Raw},
    graph::{GateSpec, MlpSpec, Scoring},
};

pub(super) const FAMILY: Family = Family { model_type: "qwen3_moe", architecture: "Qwen3MoeForCausalLM", read };

/// What the configuration class assumes of a window where only its use is asked for.
const WINDOW: usize = 4096;

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    only_silu(raw)?;
    let decoder = Decoder::read(raw)?;
    let window = if raw.flag("use_sliding_window", false)? && !raw.is_null("sliding_window") {
        Some(raw.dimension_if_any("sliding_window", MAX_POSITIONS)?.unwrap_or(WINDOW))
    } else {
        None
    };
    let window = decoder.one_window(window)?;
    let heads = decoder.grouped_heads(None)?;
    let biases = Biases::all(raw.flag("attention_bias", false)?);
    // The published files' name, and the one that newer versions of transformers write.
    let key = if raw.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let experts = decoder.experts(key)?;
    let expert_width = raw.dimension("moe_intermediate_size", MAX_WIDTH)?;
    let step = raw.dimension_if_any("decoder_sparse_step", MAX_LAYERS)?.unwrap_or(1);
    let dense = raw
        .list("mlp_only_layers")?
        .unwrap_or_default()
        .iter()
        .map(|layer| layer.as_u64().ok_or_else(|| raw.bad("mlp_only_layers", "not a list of layers")));
    let dense = dense.collect::<Result<Vec<u64>, _>>()?;
    let is_dense = |layer: usize| dense.contains(&(layer as u64)) || !(layer + 1).is_multiple_of(step);
    // Read only where a layer has one: a configuration without dense layers may lack it.
    let intermediate = if (0..decoder.layers).any(is_dense) { decoder.intermediate()? } else { 0 };
    let gate = GateSpec {
        top_k: decoder.top_k("num_experts_per_tok", experts)?,
        scoring: Scoring::Softmax,
        correction: None,
        groups: None,
        normalise: raw.flag("norm_topk_prob", false)?,
        scale: 1.0,
    };
    let layer = |layer| {
        let mut attention = decoder.grouped(layer, heads, biases, true);
        attention.window = window;
        let mlp = if is_dense(layer) {
            MlpSpec::Dense(decoder.mlp(layer, "mlp", intermediate, false))
        } else {
            let expert = |i| decoder.mlp(layer, &format!("mlp.experts.{i}"), expert_width, false);
            MlpSpec::Routed(decoder.routed(layer, "mlp", gate.clone(), (0..experts).map(expert).collect()))
        };
        decoder.layer(layer, attention, mlp)
    };
    let layers = (0..decoder.layers).map(layer).collect();
    decoder.model(&FAMILY, vec![raw.rope(10_000.0)?], layers, false)
}
