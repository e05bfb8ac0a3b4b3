//! Mistral: Llama without biases, all layers sliding where the configuration names a window.

use super::{
    Family,
    parts::{Biases, Decoder, only_silu},
};
use crate::{
    Error, ModelConfig,
    config::raw::{MAX_POSITIONS, Raw},
    graph::MlpSpec,
};

pub(super) const FAMILY: Family = Family { model_type: "mistral", architecture: "MistralForCausalLM", read };

/// What the configuration class assumes where the key is absent; null means no window.
const WINDOW: usize = 4096;

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    only_silu(raw)?;
    let decoder = Decoder::read(raw)?;
    let window = match raw.dimension_if_any("sliding_window", MAX_POSITIONS)? {
        None if raw.is_null("sliding_window") => None,
        None => Some(WINDOW),
        some => some,
    };
    let window = decoder.one_window(window)?;
    let (heads, intermediate) = (decoder.grouped_heads(None)?, decoder.intermediate()?);
    let layer = |layer| {
        let mut attention = decoder.grouped(layer, heads, Biases::NONE, false);
        attention.window = window;
        decoder.layer(layer, attention, MlpSpec::Dense(decoder.mlp(layer, "mlp", intermediate, false)))
    };
    let layers = (0..decoder.layers).map(layer).collect();
    decoder.model(&FAMILY, vec![raw.rope(10_000.0)?], layers, false)
}
