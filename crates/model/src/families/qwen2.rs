//! Qwen2 and 2.5: bias on query, key and value, without a key for it; upper layers may slide.

use super::{
    Family,
    parts::{Biases, Decoder, only_silu},
};
use crate::{
    Error, ModelConfig,
    config::raw::{MAX_LAYERS, Raw},
    graph::{LayerSpec, MlpSpec},
};

pub(super) const FAMILY: Family = Family { model_type: "qwen2", architecture: "Qwen2ForCausalLM", read };

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    only_silu(raw)?;
    let decoder = Decoder::read(raw)?;
    let heads = decoder.grouped_heads(None)?;
    let (intermediate, windows) = (decoder.intermediate()?, windows(&decoder)?);
    let layer = |(layer, window)| {
        let mut attention = decoder.grouped(layer, heads, Biases { qkv: true, o: false }, false);
        attention.window = window;
        decoder.layer(layer, attention, MlpSpec::Dense(decoder.mlp(layer, "mlp", intermediate, false)))
    };
    let layers: Vec<LayerSpec> = windows.into_iter().enumerate().map(layer).collect();
    decoder.model(&FAMILY, vec![raw.rope(10_000.0)?], layers, false)
}

/// Qwen's rule: with `use_sliding_window`, layers from `max_window_layers` on slide, unless `layer_types` says which do.
pub(super) fn windows(decoder: &Decoder<'_>) -> Result<Vec<Option<usize>>, Error> {
    let raw = decoder.raw;
    let used = raw.flag("use_sliding_window", false)? && !raw.is_null("sliding_window");
    let first = raw.count_if_any("max_window_layers", MAX_LAYERS)?.unwrap_or(28);
    let window = || {
        if used {
            decoder.sliding_window()
        } else {
            Err(raw.bad("layer_types", "a layer slides, but `use_sliding_window` is not set"))
        }
    };
    decoder.windows(window, |layer| used && layer >= first)
}
