//! Gemma 2: every other layer slides, scores and logits are capped softly, norms before and after each half are stored
//! as offsets from one, embeddings are scaled by the root of the width.

use super::{
    Family,
    parts::{Biases, Decoder, GroupedHeads, root},
};
use crate::{
    Error, ModelConfig,
    config::raw::{MAX_POSITIONS, Raw},
    graph::{Activation, LayerSpec, MlpSpec},
};

pub(super) const FAMILY: Family = Family { model_type: "gemma2", architecture: "Gemma2ForCausalLM", read };

/// What the configuration class assumes where a key is absent.
const HEAD_DIM: usize = 256;
const WINDOW: usize = 4096;
const QUERY_PRE_ATTN_SCALAR: f64 = 256.0;
const SCORE_CAP: f64 = 50.0;
const LOGIT_CAP: f64 = 30.0;
/// Largest sane value of the three above.
pub(super) const MAX_SCALAR: f64 = 1e6;

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    let gemma = Gemma::read(raw)?;
    let decoder = &gemma.decoder;
    let windows = decoder.windows(|| window(raw, WINDOW), |layer| layer % 2 == 0)?;
    let soft_cap = cap(raw, "attn_logit_softcapping", Some(SCORE_CAP))?;
    let layer = |(layer, window): (usize, Option<usize>)| {
        let mut spec = gemma.layer(layer, false);
        (spec.attention.window, spec.attention.soft_cap) = (window, soft_cap);
        spec
    };
    let layers = windows.into_iter().enumerate().map(layer).collect();
    let mut model = decoder.model(&FAMILY, vec![raw.rope(10_000.0)?], layers, true)?;
    model.embedding_scale = gemma.embedding_scale();
    model.final_soft_cap = cap(raw, "final_logit_softcapping", Some(LOGIT_CAP))?;
    Ok(model)
}

/// What Gemma 2 and 3 share.
pub(super) struct Gemma<'a> {
    pub(super) decoder: Decoder<'a>,
    heads: GroupedHeads,
    intermediate: usize,
    biases: Biases,
    scale: f32,
}

impl<'a> Gemma<'a> {
    pub(super) fn read(raw: &'a Raw) -> Result<Self, Error> {
        // Older files carry both keys and mean the second.
        raw.only("hidden_activation", &["gelu_pytorch_tanh"])?;
        raw.never("use_bidirectional_attention")?;
        let decoder = Decoder { norm_offset: 1.0, ..Decoder::read(raw)? };
        let scalar = raw.positive_if_any("query_pre_attn_scalar", MAX_SCALAR)?.unwrap_or(QUERY_PRE_ATTN_SCALAR);
        Ok(Self {
            heads: decoder.grouped_heads(Some(HEAD_DIM))?,
            intermediate: decoder.intermediate()?,
            biases: Biases::all(raw.flag("attention_bias", false)?),
            scale: root(scalar),
            decoder,
        })
    }

    /// A layer without window and cap.
    pub(super) fn layer(&self, layer: usize, qk_norms: bool) -> LayerSpec {
        let decoder = &self.decoder;
        let mut attention = decoder.grouped(layer, self.heads, self.biases, qk_norms);
        attention.scale = self.scale;
        let mut mlp = decoder.mlp(layer, "mlp", self.intermediate, false);
        mlp.activation = Activation::GeluTanh;
        LayerSpec {
            attention_norm: decoder.norm(layer, "input_layernorm"),
            attention,
            attention_post_norm: Some(decoder.norm(layer, "post_attention_layernorm")),
            mlp_norm: decoder.norm(layer, "pre_feedforward_layernorm"),
            mlp: MlpSpec::Dense(mlp),
            mlp_post_norm: Some(decoder.norm(layer, "post_feedforward_layernorm")),
        }
    }

    pub(super) fn embedding_scale(&self) -> f32 {
        (self.decoder.hidden as f64).sqrt() as f32
    }
}

/// `sliding_window`, or what the configuration class assumes.
pub(super) fn window(raw: &Raw, default: usize) -> Result<usize, Error> {
    Ok(raw.dimension_if_any("sliding_window", MAX_POSITIONS)?.unwrap_or(default))
}

/// A soft cap: the key's, the class's default where it is absent, none where it is null.
pub(super) fn cap(raw: &Raw, key: &'static str, default: Option<f64>) -> Result<Option<f32>, Error> {
    let default = if raw.is_null(key) { None } else { default };
    Ok(raw.positive_if_any(key, MAX_SCALAR)?.or(default).map(|cap| cap as f32))
}
