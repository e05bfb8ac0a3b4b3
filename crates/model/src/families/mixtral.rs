//! Mixtral: Mistral with a few of many MLPs per token; softmax over all experts, the chosen weights made to sum to one.

use super::{
    Family,
    parts::{Biases, Decoder, only_silu},
};
use crate::{
    Error, ModelConfig,
    config::raw::{MAX_POSITIONS, Raw},
    graph::{GateSpec, MlpSpec, Scoring},
};

pub(super) const FAMILY: Family = Family { model_type: "mixtral", architecture: "MixtralForCausalLM", read };

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    only_silu(raw)?;
    let mut decoder = Decoder::read(raw)?;
    if raw.get("rms_norm_eps").is_none() {
        decoder.eps = 1e-5; // the configuration class's own default
    }
    let window = decoder.one_window(raw.dimension_if_any("sliding_window", MAX_POSITIONS)?)?;
    let (heads, intermediate) = (decoder.grouped_heads(None)?, decoder.intermediate()?);
    let experts = decoder.experts("num_local_experts")?;
    let gate = GateSpec {
        top_k: decoder.top_k("num_experts_per_tok", experts)?,
        scoring: Scoring::Softmax,
        correction: None,
        groups: None,
        normalise: true,
        scale: 1.0,
    };
    let layer = |layer| {
        let mut attention = decoder.grouped(layer, heads, Biases::NONE, false);
        attention.window = window;
        let expert = |i| {
            let [w1, w3, w2] = ["w1", "w3", "w2"].map(|part| format!("block_sparse_moe.experts.{i}.{part}"));
            decoder.gated(layer, [&w1, &w3, &w2], intermediate, false)
        };
        let experts = (0..experts).map(expert).collect();
        let mlp = decoder.routed(layer, "block_sparse_moe", gate.clone(), experts);
        decoder.layer(layer, attention, MlpSpec::Routed(mlp))
    };
    let layers = (0..decoder.layers).map(layer).collect();
    decoder.model(&FAMILY, vec![raw.rope(1_000_000.0)?], layers, false)
}
