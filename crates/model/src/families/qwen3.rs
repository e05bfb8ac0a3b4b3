//! Qwen3: an RMS norm on each head's query and key, heads of a width of their own; upper layers may slide.

use super::{
    Family,
    parts::{Biases, Decoder, only_silu},
    qwen2,
};
use crate::{
    Error, ModelConfig,
    config::raw::Raw,
    graph::{LayerSpec, MlpSpec},
};

pub(super) const FAMILY: Family = Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", read };

/// What the configuration class assumes where the key is absent, whatever the hidden size.
const HEAD_DIM: usize = 128;

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    only_silu(raw)?;
    let decoder = Decoder::read(raw)?;
    let heads = decoder.grouped_heads(Some(HEAD_DIM))?;
    let (intermediate, windows) = (decoder.intermediate()?, qwen2::windows(&decoder)?);
    let biases = Biases::all(raw.flag("attention_bias", false)?);
    let layer = |(layer, window)| {
        let mut attention = decoder.grouped(layer, heads, biases, true);
        attention.window = window;
        decoder.layer(layer, attention, MlpSpec::Dense(decoder.mlp(layer, "mlp", intermediate, false)))
    };
    let layers: Vec<LayerSpec> = windows.into_iter().enumerate().map(layer).collect();
    decoder.model(&FAMILY, vec![raw.rope(10_000.0)?], layers, false)
}
