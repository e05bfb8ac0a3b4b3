//! Reading keys of a loose JSON configuration; see [the parent's page](super) for the rules.
//!
//! A key that is `null` counts as absent, as it does for the reference, but for the few places where the two differ
//! ([`Raw::is_null`]). Every number comes with a bound.

use std::path::{Path, PathBuf};

use kvasir_types::TokenId;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    Error,
    rope::{Rope, RopeScaling},
};

/// Larger than any real `config.json` by two orders of magnitude.
const MAX_JSON_BYTES: u64 = 4 << 20;

// Bounds on dimensions: several times the largest published model of these families, and small enough that the product
// of any three is far from overflowing 64 bits.
pub(crate) const MAX_VOCAB: u64 = 1 << 22;
pub(crate) const MAX_WIDTH: u64 = 1 << 18;
pub(crate) const MAX_LAYERS: u64 = 1 << 10;
pub(crate) const MAX_HEADS: u64 = 1 << 10;
pub(crate) const MAX_HEAD_DIM: u64 = 1 << 10;
/// Positions up to here are exact in `f32`, which the rotation angles are computed in.
pub(crate) const MAX_POSITIONS: u64 = 1 << 24;
/// How much of a foreign string an error repeats.
const QUOTED: usize = 64;

/// The configuration of a model folder, as it is in its files.
pub(crate) struct Raw {
    path: PathBuf,
    keys: Map<String, Value>,
    generation: Option<(PathBuf, Map<String, Value>)>,
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

impl Raw {
    /// The files of a model folder.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let keys = read_json(&path, MAX_JSON_BYTES)?;
        let generation_path = dir.join("generation_config.json");
        let generation = if generation_path.exists() {
            let keys = read_json(&generation_path, MAX_JSON_BYTES)?;
            Some((generation_path, keys))
        } else {
            None
        };
        Ok(Self { path, keys, generation })
    }

    /// The configuration file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// An error about `key`.
    pub(crate) fn bad(&self, key: &'static str, reason: impl Into<String>) -> Error {
        Error::Config { path: self.path.clone(), key, reason: reason.into() }
    }

    /// The value of a key that is there and not null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    /// Whether a key is there and null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.keys.get(key).is_some_and(Value::is_null)
    }

    /// A whole number of 1 to `limit`.
    pub(crate) fn dimension(&self, key: &'static str, limit: u64) -> Result<usize, Error> {
        self.dimension_if_any(key, limit)?.ok_or_else(|| self.bad(key, "absent"))
    }

    /// A whole number of 1 to `limit`, if there is one.
    pub(crate) fn dimension_if_any(&self, key: &'static str, limit: u64) -> Result<Option<usize>, Error> {
        self.get(key).map(|value| self.bounded(key, value, limit)).transpose()
    }

    /// A whole number of 0 to `limit`, if there is one.
    pub(crate) fn count_if_any(&self, key: &'static str, limit: u64) -> Result<Option<usize>, Error> {
        match self.get(key) {
            Some(value) if value.as_u64() == Some(0) => Ok(Some(0)),
            _ => self.dimension_if_any(key, limit),
        }
    }

    fn bounded(&self, key: &'static str, value: &Value, limit: u64) -> Result<usize, Error> {
        let number = value.as_u64().filter(|number| (1..=limit).contains(number));
        number
            .and_then(|number| usize::try_from(number).ok())
            .ok_or_else(|| self.bad(key, format!("{} is not a whole number within 1 to {limit}", quoted(value))))
    }

    /// A number above 0 and at most `limit`, if there is one.
    pub(crate) fn positive_if_any(&self, key: &'static str, limit: f64) -> Result<Option<f64>, Error> {
        self.get(key).map(|value| self.positive(key, value, limit)).transpose()
    }

    fn positive(&self, key: &'static str, value: &Value, limit: f64) -> Result<f64, Error> {
        let number = value.as_f64().filter(|number| *number > 0.0 && *number <= limit);
        number.ok_or_else(|| self.bad(key, format!("{} is not a number above 0 and at most {limit}", quoted(value))))
    }

    /// A yes or no, if there is one.
    pub(crate) fn flag_if_any(&self, key: &'static str) -> Result<Option<bool>, Error> {
        let flag = |value: &Value| value.as_bool();
        self.typed(key, flag, "true or false")
    }

    /// A yes or no.
    pub(crate) fn flag(&self, key: &'static str, default: bool) -> Result<bool, Error> {
        Ok(self.flag_if_any(key)?.unwrap_or(default))
    }

    /// A string, if there is one.
    pub(crate) fn text(&self, key: &'static str) -> Result<Option<&str>, Error> {
        self.typed(key, Value::as_str, "a string")
    }

    /// A list, if there is one.
    pub(crate) fn list(&self, key: &'static str) -> Result<Option<&[Value]>, Error> {
        self.typed(key, |value| value.as_array().map(Vec::as_slice), "a list")
    }

    fn typed<'a, T>(
        &'a self,
        key: &'static str,
        of: impl Fn(&'a Value) -> Option<T>,
        what: &str,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        of(value).map(Some).ok_or_else(|| self.bad(key, format!("{} is not {what}", quoted(value))))
    }

    /// Refuses any value of `key` but those in `fine`; absent is fine.
    pub(crate) fn only(&self, key: &'static str, fine: &[&str]) -> Result<(), Error> {
        match self.text(key)? {
            Some(text) if !fine.contains(&text) => {
                let text: String = text.chars().take(QUOTED).collect();
                Err(self.bad(key, format!("`{text}` is not supported (only {})", fine.join(", "))))
            }
            _ => Ok(()),
        }
    }

    /// Refuses `key: true`.
    pub(crate) fn never(&self, key: &'static str) -> Result<(), Error> {
        if self.flag(key, false)? { Err(self.bad(key, "not supported")) } else { Ok(()) }
    }

    /// The `rope_parameters` (newer: base frequency and scaling) or `rope_scaling` (older: the scaling, its kind under
    /// `type` or `rope_type`) beside `rope_theta`; the newer wins where a file carries both. `default_theta` is the
    /// family's where no key says.
    pub(crate) fn rope(&self, default_theta: f64) -> Result<Rope, Error> {
        let (key, parameters) = match (self.object("rope_parameters")?, self.object("rope_scaling")?) {
            (Some(parameters), _) => ("rope_parameters", Some(parameters)),
            (None, parameters) => ("rope_scaling", parameters),
        };
        let theta = self.positive_if_any("rope_theta", MAX_THETA)?.unwrap_or(default_theta);
        self.rope_of(key, parameters, theta)
    }

    /// The object under `key`, if there is one.
    pub(crate) fn object(&self, key: &'static str) -> Result<Option<&Map<String, Value>>, Error> {
        self.typed(key, Value::as_object, "an object")
    }

    /// The rotation that `parameters`, found under `key`, describe; `theta` where they name no base of their own.
    pub(crate) fn rope_of(
        &self,
        key: &'static str,
        parameters: Option<&Map<String, Value>>,
        theta: f64,
    ) -> Result<Rope, Error> {
        let part = |name: &str| parameters.and_then(|p| p.get(name)).filter(|value| !value.is_null());
        let of_head = part("partial_rotary_factor").or_else(|| self.get("partial_rotary_factor"));
        if of_head.is_some_and(|factor| factor.as_f64() != Some(1.0)) {
            return Err(self.bad("partial_rotary_factor", "rotating a part of a head is not supported"));
        }
        let theta = match part("rope_theta") {
            Some(theta) => self.positive("rope_theta", theta, MAX_THETA)?,
            None => theta,
        };
        let optional = |name: &str| part(name).map(|value| self.positive(key, value, 1e6)).transpose();
        let number = |name: &str| optional(name)?.ok_or_else(|| self.bad(key, format!("`{name}` is absent")));
        let original_max_len = || match part("original_max_position_embeddings") {
            Some(value) => self.bounded(key, value, MAX_POSITIONS),
            None => self.dimension("max_position_embeddings", MAX_POSITIONS),
        };
        let kind = part("rope_type").or_else(|| part("type")).map(|kind| kind.as_str().unwrap_or("?"));
        let scaling = match kind {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: number("factor")? },
            Some("llama3") => {
                let (low_freq_factor, high_freq_factor) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if high_freq_factor <= low_freq_factor {
                    return Err(self.bad(key, "`high_freq_factor` must be above `low_freq_factor`"));
                }
                let factor = number("factor")?;
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_len: original_max_len()? }
            }
            Some("yarn") => {
                if part("truncate").is_some_and(|truncate| truncate.as_bool() != Some(true)) {
                    return Err(self.bad(key, "`truncate` other than true is not supported"));
                }
                let factor = number("factor")?;
                let (mscale, mscale_all_dim) = (optional("mscale")?, optional("mscale_all_dim")?);
                let by_factor = |mscale: f64| yarn_magnitude(factor, mscale);
                let magnitude = match (optional("attention_factor")?, mscale, mscale_all_dim) {
                    (Some(given), _, _) => given,
                    (None, Some(mscale), Some(all)) => by_factor(mscale) / by_factor(all),
                    (None, _, _) => by_factor(1.0),
                };
                let (beta_fast, beta_slow) =
                    (optional("beta_fast")?.unwrap_or(32.0), optional("beta_slow")?.unwrap_or(1.0));
                RopeScaling::Yarn { factor, beta_fast, beta_slow, magnitude, original_max_len: original_max_len()? }
            }
            Some(other) => {
                let other: String = other.chars().take(QUOTED).collect();
                return Err(
                    self.bad(key, format!("rope type `{other}` is not supported (default, linear, llama3, yarn)"))
                );
            }
        };
        Ok(Rope { theta, scaling })
    }

    /// End tokens of both files, `generation_config.json` first, each once.
    pub(crate) fn eos(&self, vocab: usize) -> Result<Vec<TokenId>, Error> {
        const KEY: &str = "eos_token_id";
        let from_generation = self.generation.as_ref().map(|(path, keys)| (path, keys));
        let mut eos = Vec::new();
        for (path, keys) in from_generation.into_iter().chain([(&self.path, &self.keys)]) {
            let ids = match keys.get(KEY) {
                None | Some(Value::Null) => &[][..],
                Some(Value::Array(ids)) => ids,
                Some(id) => std::slice::from_ref(id),
            };
            for id in ids {
                let number = id.as_u64().filter(|&id| id < vocab as u64).and_then(|id| u32::try_from(id).ok());
                let token = number.map(TokenId).ok_or_else(|| {
                    let reason = format!("{} is not a token of the vocabulary of {vocab}", quoted(id));
                    Error::Config { path: path.clone(), key: KEY, reason }
                })?;
                if !eos.contains(&token) {
                    eos.push(token);
                }
            }
        }
        Ok(eos)
    }
}

const MAX_THETA: f64 = 1e12;

/// How much longer YaRN makes rotated queries and keys for a context `factor` times as long (YaRN, section 3.4).
pub(crate) fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// A foreign value, short enough for an error.
fn quoted(value: &Value) -> String {
    value.to_string().chars().take(QUOTED).collect()
}
