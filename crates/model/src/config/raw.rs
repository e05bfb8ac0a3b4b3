//! The loose JSON form and its reading; see [the parent's page](super) for the rules.

use std::path::{Path, PathBuf};

use kvasir_types::TokenId;
use serde::{Deserialize, de::DeserializeOwned};

use super::{Family, ModelConfig};
use crate::{
    Error,
    rope::{Rope, RopeScaling},
};

/// Larger than any real `config.json` by two orders of magnitude.
const MAX_JSON_BYTES: u64 = 4 << 20;

// Bounds on dimensions: several times the largest published model of these families, and small enough that the product
// of any three is far from overflowing 64 bits.
const MAX_VOCAB: u64 = 1 << 22;
const MAX_WIDTH: u64 = 1 << 18;
const MAX_LAYERS: u64 = 1 << 10;
const MAX_HEADS: u64 = 1 << 10;
const MAX_HEAD_DIM: u64 = 1 << 10;
/// What Qwen3's configuration class assumes where the key is absent, whatever the hidden size.
const QWEN3_HEAD_DIM: usize = 128;
/// Positions up to here are exact in `f32`, which the rotation angles are computed in.
const MAX_POSITIONS: u64 = 1 << 24;

#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    vocab_size: Option<u64>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<u64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<u64>,
    layer_types: Option<Vec<String>>,
    partial_rotary_factor: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    quantization_config: Option<serde::de::IgnoredAny>,
    eos_token_id: Option<OneOrMany>,
}

/// Both `rope_scaling` (older: only the scaling, its kind under `type` or `rope_type`) and `rope_parameters` (newer: the
/// base frequency too).
#[derive(Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<u64>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
struct RawGeneration {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl OneOrMany {
    fn as_slice(&self) -> &[i64] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

pub(super) fn read(dir: &Path) -> Result<ModelConfig, Error> {
    let path = dir.join("config.json");
    let raw: RawConfig = read_json(&path, MAX_JSON_BYTES)?;
    let generation_path = dir.join("generation_config.json");
    let generation: Option<RawGeneration> =
        if generation_path.exists() { Some(read_json(&generation_path, MAX_JSON_BYTES)?) } else { None };
    Reader { path, raw }.model(generation.map(|g| (generation_path, g)))
}

/// Reads a JSON file, refusing one larger than `limit` before reading it.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > limit {
        return Err(Error::TooLarge { path: path.to_owned(), bytes, limit });
    }
    let text = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.to_owned(), source })
}

struct Reader {
    path: PathBuf,
    raw: RawConfig,
}

impl Reader {
    fn model(&self, generation: Option<(PathBuf, RawGeneration)>) -> Result<ModelConfig, Error> {
        let raw = &self.raw;
        let family = self.family()?;
        self.refuse_what_is_not_implemented()?;

        let vocab = self.dimension("vocab_size", raw.vocab_size, MAX_VOCAB)?;
        let hidden = self.dimension("hidden_size", raw.hidden_size, MAX_WIDTH)?;
        let heads = self.dimension("num_attention_heads", raw.num_attention_heads, MAX_HEADS)?;
        let kv_heads = match raw.num_key_value_heads {
            None => heads,
            some => self.dimension("num_key_value_heads", some, MAX_HEADS)?,
        };
        if heads % kv_heads != 0 {
            return Err(self.bad("num_key_value_heads", format!("{kv_heads} does not divide the {heads} query heads")));
        }
        let head_dim = match raw.head_dim {
            None if family == Family::Qwen3 => QWEN3_HEAD_DIM,
            None if hidden % heads != 0 => {
                return Err(self.bad("head_dim", format!("absent, and {heads} heads do not divide {hidden}")));
            }
            None => hidden / heads,
            some => self.dimension("head_dim", some, MAX_HEAD_DIM)?,
        };
        if head_dim % 2 != 0 {
            return Err(self.bad("head_dim", format!("{head_dim} is odd; the rotation works on pairs")));
        }
        let attention_bias = raw.attention_bias.unwrap_or(false);
        Ok(ModelConfig {
            family,
            vocab,
            hidden,
            intermediate: self.dimension("intermediate_size", raw.intermediate_size, MAX_WIDTH)?,
            layers: self.dimension("num_hidden_layers", raw.num_hidden_layers, MAX_LAYERS)?,
            heads,
            kv_heads,
            head_dim,
            rms_eps: self.positive("rms_norm_eps", raw.rms_norm_eps.unwrap_or(1e-6), 1.0)? as f32,
            rope: self.rope()?,
            tied_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            // Qwen2 has these biases always, without a key for it.
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias && family != Family::Qwen2,
            mlp_bias: raw.mlp_bias.unwrap_or(false) && family == Family::Llama,
            max_len: self.dimension("max_position_embeddings", raw.max_position_embeddings, MAX_POSITIONS)?,
            eos: self.eos(generation, vocab)?,
        })
    }

    fn family(&self) -> Result<Family, Error> {
        let model_type = self.raw.model_type.as_deref().ok_or_else(|| self.bad("model_type", "absent".into()))?;
        Family::parse(model_type).ok_or_else(|| Error::UnsupportedModel {
            path: self.path.clone(),
            model_type: model_type.chars().take(64).collect(),
            supported: Family::SUPPORTED,
        })
    }

    fn refuse_what_is_not_implemented(&self) -> Result<(), Error> {
        let raw = &self.raw;
        match raw.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(act) => return Err(self.bad("hidden_act", format!("`{act}` is not supported (only silu)"))),
        }
        if raw.use_sliding_window == Some(true) && raw.sliding_window.is_some() {
            return Err(self.bad("use_sliding_window", "sliding-window attention is not supported".into()));
        }
        let sliding = raw.layer_types.iter().flatten().find(|kind| *kind != "full_attention");
        if let Some(kind) = sliding {
            return Err(self.bad("layer_types", format!("`{kind}` is not supported (only full_attention)")));
        }
        if raw.quantization_config.is_some() {
            return Err(self.bad("quantization_config", "quantised weights are not supported (bf16, f16, f32)".into()));
        }
        Ok(())
    }

    fn rope(&self) -> Result<Rope, Error> {
        let raw = &self.raw;
        // The newer key wins where a file carries both.
        let parameters = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let partial = parameters.and_then(|p| p.partial_rotary_factor).or(raw.partial_rotary_factor);
        if partial.is_some_and(|factor| factor != 1.0) {
            return Err(self.bad("partial_rotary_factor", "rotating a part of a head is not supported".into()));
        }
        let theta = parameters.and_then(|p| p.rope_theta).or(raw.rope_theta).unwrap_or(10_000.0);
        let theta = self.positive("rope_theta", theta, 1e12)?;
        let Some(parameters) = parameters else { return Ok(Rope { theta, scaling: RopeScaling::None }) };

        let key = if raw.rope_parameters.is_some() { "rope_parameters" } else { "rope_scaling" };
        let number = |name: &str, value: Option<f64>| {
            let value = value.ok_or_else(|| self.bad(key, format!("`{name}` is absent")))?;
            self.positive(key, value, 1e6)
        };
        let scaling = match parameters.rope_type.as_deref().or(parameters.old_type.as_deref()) {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: number("factor", parameters.factor)? },
            Some("llama3") => {
                let low_freq_factor = number("low_freq_factor", parameters.low_freq_factor)?;
                let high_freq_factor = number("high_freq_factor", parameters.high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(self.bad(key, "`high_freq_factor` must be above `low_freq_factor`".into()));
                }
                RopeScaling::Llama3 {
                    factor: number("factor", parameters.factor)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_len: self.dimension(
                        key,
                        parameters.original_max_position_embeddings,
                        MAX_POSITIONS,
                    )?,
                }
            }
            Some(other) => {
                let other: String = other.chars().take(64).collect();
                return Err(self.bad(key, format!("rope type `{other}` is not supported (default, linear, llama3)")));
            }
        };
        Ok(Rope { theta, scaling })
    }

    /// End tokens of both files, `generation_config.json` first, each once.
    fn eos(&self, generation: Option<(PathBuf, RawGeneration)>, vocab: usize) -> Result<Vec<TokenId>, Error> {
        let from_generation = generation.as_ref().map(|(path, g)| (path, &g.eos_token_id));
        let mut eos = Vec::new();
        for (path, ids) in from_generation.into_iter().chain([(&self.path, &self.raw.eos_token_id)]) {
            for &id in ids.iter().flat_map(OneOrMany::as_slice) {
                let token =
                    u32::try_from(id).ok().filter(|&id| (id as usize) < vocab).map(TokenId).ok_or_else(|| {
                        let reason = format!("{id} is not a token of the vocabulary of {vocab}");
                        Error::Config { path: path.clone(), key: "eos_token_id", reason }
                    })?;
                if !eos.contains(&token) {
                    eos.push(token);
                }
            }
        }
        Ok(eos)
    }

    fn dimension(&self, key: &'static str, value: Option<u64>, limit: u64) -> Result<usize, Error> {
        match value {
            None => Err(self.bad(key, "absent".into())),
            Some(value @ 1..) if value <= limit => {
                usize::try_from(value).map_err(|_| self.bad(key, format!("{value} does not fit this machine")))
            }
            Some(value) => Err(self.bad(key, format!("{value} is not within 1 to {limit}"))),
        }
    }

    fn positive(&self, key: &'static str, value: f64, limit: f64) -> Result<f64, Error> {
        if value > 0.0 && value <= limit {
            Ok(value)
        } else {
            Err(self.bad(key, format!("{value} is not above 0 and at most {limit}")))
        }
    }

    fn bad(&self, key: &'static str, reason: String) -> Error {
        Error::Config { path: self.path.clone(), key, reason }
    }
}

#[cfg(test)]
mod tests;
