//! `config.json` → [`ModelConfig`]: what the arithmetic needs, checked and bounded.
//!
//! Hugging Face configurations are loose: keys appear, move and change form between versions (`rope_theta` with
//! `rope_scaling` became `rope_parameters`; `head_dim` may be absent; `eos_token_id` is a number or a list, in either of
//! two files). [`raw`] reads keys one by one and knows the forms they share; which keys a family has and what they mean
//! there is its own file's business (`families`). Two rules for all of them:
//!
//! - a key that would change the arithmetic in a way not implemented is an error, never ignored;
//! - every number is bounded here, so that later products of them cannot overflow and nothing is allocated on the word
//!   of a file (the tensors' real shapes are compared before anything is sized by them).

use std::path::Path;

use kvasir_types::{GroupKind, KvDtype, KvGroups, KvLayout, TokenId};
use serde::Serialize;

use crate::{
    Error, Rope, families,
    graph::{AttentionKind, LayerSpec, NormSpec},
};

pub(crate) mod quantization;
pub(crate) mod raw;

pub(crate) use raw::read_json;

/// Shape and arithmetic of a model. All of it is checked: no dimension is zero, no product of two overflows, and keys and
/// values have one shape in all layers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    /// The `model_type` it was read as; for people, nothing is computed by it.
    pub family: &'static str,
    /// Tokens of the vocabulary (rows of the embedding).
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// What an embedding is multiplied by.
    pub embedding_scale: f32,
    /// Rotary position embeddings, each once; layers name theirs by index.
    pub ropes: Vec<Rope>,
    /// The layers.
    pub layers: Vec<LayerSpec>,
    /// The norm before the output projection.
    pub final_norm: NormSpec,
    /// Whether the output projection is the embedding itself.
    pub tied_embeddings: bool,
    /// Logits become `cap · tanh(logit / cap)`.
    pub final_soft_cap: Option<f32>,
    /// Most positions of a sequence.
    #[serde(skip)] // as the next, not part of the fingerprint
    pub max_len: usize,
    /// Tokens that end an answer.
    #[serde(skip)]
    pub eos: Vec<TokenId>,
}

/// What the layers of a model keep of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub(crate) heads: usize,
    pub(crate) k_dim: usize,
    /// 0: the values are part of the keys.
    pub(crate) v_dim: usize,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder, and the end tokens of `generation_config.json` if there is one.
    ///
    /// # Errors
    /// The first thing that is missing, out of bounds or not supported, by file and key.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let raw = raw::Raw::open(dir)?;
        let config = (families::find(&raw)?.read)(&raw)?;
        debug_assert!(
            config.layers.windows(2).all(|pair| pair[0].attention.kv_shape() == pair[1].attention.kv_shape()),
            "a family gives all layers one KV shape"
        );
        Ok(config)
    }

    /// Which layers share a block, and how long their keys and values are looked at.
    pub fn kv_groups(&self) -> KvGroups {
        let kind = |layer: &LayerSpec| match layer.attention.window {
            None => GroupKind::Full,
            Some(window) => GroupKind::Sliding { window: u32::try_from(window).unwrap_or(u32::MAX) },
        };
        KvGroups::of_layers(&self.layers.iter().map(kind).collect::<Vec<_>>())
    }

    /// The KV layout of this model, whole (no tensor parallelism).
    pub fn kv_layout(&self, block_size: u32, dtype: KvDtype) -> KvLayout {
        let dim = |n: usize| u32::try_from(n).unwrap_or(u32::MAX); // bounded far below when read
        let shape = self.kv_shape();
        KvLayout {
            block_size,
            layers: dim(self.kv_groups().layers_per_block()),
            kv_heads: dim(shape.heads),
            k_dim: dim(shape.k_dim),
            v_dim: dim(shape.v_dim),
            dtype,
        }
    }

    /// What every layer keeps of a token.
    pub(crate) fn kv_shape(&self) -> KvShape {
        self.layers[0].attention.kv_shape()
    }
}

impl crate::graph::AttentionSpec {
    /// What the layer keeps of a token.
    pub(crate) fn kv_shape(&self) -> KvShape {
        match &self.kind {
            AttentionKind::Grouped(g) => KvShape { heads: g.kv_heads, k_dim: g.head_dim, v_dim: g.head_dim },
            AttentionKind::Latent(l) => KvShape { heads: 1, k_dim: l.rank + l.rope, v_dim: 0 },
        }
    }
}

#[cfg(test)]
mod tests;
