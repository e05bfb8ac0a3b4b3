//! Gemma 3, text only: Gemma 2 with norms on queries and keys instead of capped scores, five sliding layers to a full one,
//! and a rotation for each of the two kinds.

use super::{
    Family,
    gemma2::{Gemma, cap, window},
};
use crate::{
    Error, ModelConfig, Rope,
    config::raw::{MAX_LAYERS, Raw},
};

pub(super) const FAMILY: Family = Family { model_type: "gemma3_text", architecture: "Gemma3ForCausalLM", read };

/// What the configuration class assumes where a key is absent.
const WINDOW: usize = 4096;
const PATTERN: usize = 6;
const FULL_THETA: f64 = 1_000_000.0;
const SLIDING_THETA: f64 = 10_000.0;

const FULL: usize = 0;
const SLIDING: usize = 1;

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    // The reference reads the key and does not use it, so nobody knows what a value should do.
    if raw.get("attn_logit_softcapping").is_some() {
        return Err(raw.bad("attn_logit_softcapping", "not supported in this family"));
    }
    let gemma = Gemma::read(raw)?;
    let pattern = raw.dimension_if_any("sliding_window_pattern", MAX_LAYERS)?.unwrap_or(PATTERN);
    let windows = gemma.decoder.windows(|| window(raw, WINDOW), |layer| !(layer + 1).is_multiple_of(pattern))?;
    let layer = |(layer, window): (usize, Option<usize>)| {
        let mut spec = gemma.layer(layer, true);
        spec.attention.window = window;
        spec.attention.rope = if window.is_some() { SLIDING } else { FULL };
        spec
    };
    let layers = windows.into_iter().enumerate().map(layer).collect();
    let mut model = gemma.decoder.model(&FAMILY, ropes(raw)?, layers, true)?;
    model.embedding_scale = gemma.embedding_scale();
    model.final_soft_cap = cap(raw, "final_logit_softcapping", None)?;
    Ok(model)
}

/// Newer files have an entry for each kind of layer under `rope_parameters`; older ones `rope_theta` and `rope_scaling` for
/// the full layers, and `rope_local_base_freq` for the others.
fn ropes(raw: &Raw) -> Result<Vec<Rope>, Error> {
    let by_kind = raw.object("rope_parameters")?;
    if let Some(key) = by_kind.and_then(|by_kind| by_kind.keys().find(|key| !key.ends_with("_attention"))) {
        let key: String = key.chars().take(64).collect();
        return Err(raw.bad("rope_parameters", format!("`{key}` is not a kind of layer")));
    }
    let mut ropes = Vec::new();
    for (kind, theta_key, default, scaling) in [
        ("full_attention", "rope_theta", FULL_THETA, raw.object("rope_scaling")?),
        ("sliding_attention", "rope_local_base_freq", SLIDING_THETA, None),
    ] {
        let theta = raw.positive_if_any(theta_key, 1e12)?.unwrap_or(default);
        let rope = match by_kind {
            None => raw.rope_of("rope_scaling", scaling, theta)?,
            Some(_) if scaling.is_some() => {
                return Err(raw.bad("rope_scaling", "there is `rope_parameters`, too"));
            }
            Some(by_kind) => match by_kind.get(kind) {
                None | Some(serde_json::Value::Null) => raw.rope_of("rope_parameters", None, theta)?,
                Some(serde_json::Value::Object(parameters)) => {
                    raw.rope_of("rope_parameters", Some(parameters), theta)?
                }
                Some(_) => return Err(raw.bad("rope_parameters", format!("`{kind}` is not an object"))),
            },
        };
        ropes.push(rope);
    }
    Ok(ropes)
}
