//! The model families: one file each, turning the keys of its configuration into the description that a backend executes.
//!
//! Adding a family is a file here and a line in [`ALL`]; scheduler, cache and backends know no family. A file answers
//! three questions: which keys change the arithmetic and how (an unsupported one is refused by name), what the tensors
//! are called, and where the family departs from the common decoder of [`parts`].

use crate::{Error, ModelConfig, config::raw::Raw};

mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod mixtral;
mod parts;
mod qwen2;
mod qwen3;
mod qwen3_moe;

/// One family.
pub(crate) struct Family {
    /// The `model_type` of its `config.json`.
    pub(crate) model_type: &'static str,
    /// The class that `architectures` names, where it names one.
    pub(crate) architecture: &'static str,
    /// From the keys to the description.
    pub(crate) read: fn(&Raw) -> Result<ModelConfig, Error>,
}

/// All of them.
const ALL: &[Family] = &[
    qwen3::FAMILY,
    qwen3_moe::FAMILY,
    qwen2::FAMILY,
    llama::FAMILY,
    mistral::FAMILY,
    mixtral::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    deepseek_v2::FAMILY,
    deepseek_v3::FAMILY,
];

/// The `model_type`s that can be served.
pub fn supported() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|family| family.model_type)
}

/// Whose file reads this configuration.
pub(crate) fn find(raw: &Raw) -> Result<&'static Family, Error> {
    let model_type = raw.text("model_type")?.ok_or_else(|| raw.bad("model_type", "absent"))?;
    let unsupported = |what: &str| Error::UnsupportedModel {
        path: raw.path().to_owned(),
        model: what.chars().take(64).collect(),
        supported: supported().collect::<Vec<_>>().join(", "),
    };
    let family = ALL.iter().find(|family| family.model_type == model_type).ok_or_else(|| unsupported(model_type))?;
    // A classifier or a reward model has the decoder's type and another head.
    match raw.list("architectures")? {
        Some([first, ..]) if first.as_str() != Some(family.architecture) => {
            Err(unsupported(first.as_str().unwrap_or("?")))
        }
        _ => Ok(family),
    }
}

#[cfg(test)]
mod tests;
