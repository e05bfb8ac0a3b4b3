//! Llama 2, 3 and their like: the plain decoder, biases only where the configuration asks for them.

use super::{
    Family,
    parts::{Biases, Decoder, only_silu},
};
use crate::{Error, ModelConfig, config::raw::Raw, graph::MlpSpec};

pub(super) const FAMILY: Family = Family { model_type: "llama", architecture: "LlamaForCausalLM", read };

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    only_silu(raw)?;
    let decoder = Decoder::read(raw)?;
    decoder.one_window(None)?;
    let (heads, intermediate) = (decoder.grouped_heads(None)?, decoder.intermediate()?);
    let biases = Biases::all(raw.flag("attention_bias", false)?);
    let mlp_bias = raw.flag("mlp_bias", false)?;
    let layer = |layer| {
        let mlp = decoder.mlp(layer, "mlp", intermediate, mlp_bias);
        decoder.layer(layer, decoder.grouped(layer, heads, biases, false), MlpSpec::Dense(mlp))
    };
    let layers = (0..decoder.layers).map(layer).collect();
    decoder.model(&FAMILY, vec![raw.rope(10_000.0)?], layers, false)
}
