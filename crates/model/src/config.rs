//! `config.json` → [`ModelConfig`]: what the arithmetic needs, checked and bounded.
//!
//! Hugging Face configurations are loose: keys appear, move and change form between versions (`rope_theta` with
//! `rope_scaling` became `rope_parameters`; `head_dim` may be absent; `eos_token_id` is a number or a list, in either of
//! two files). This file is the only place that knows. Two rules:
//!
//! - a key that would change the arithmetic in a way not implemented is an error, never ignored;
//! - every number is bounded here, so that later products of them cannot overflow and nothing is allocated on the word
//!   of a file (the tensors' real shapes are compared before anything is sized by them).

use std::path::Path;

use kvasir_types::{KvDtype, KvGroups, KvLayout, TokenId};

use crate::{Error, Rope};

mod raw;

pub(crate) use raw::read_json;

/// Which family's conventions a model follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Qwen3: RMS norm on each head's query and key.
    Qwen3,
    /// Qwen2 and 2.5: bias on query, key and value.
    Qwen2,
    /// Llama 2, 3 and their like.
    Llama,
}

impl Family {
    const SUPPORTED: &'static str = "qwen3, qwen2, llama";

    fn parse(model_type: &str) -> Option<Self> {
        match model_type {
            "qwen3" => Some(Self::Qwen3),
            "qwen2" => Some(Self::Qwen2),
            "llama" => Some(Self::Llama),
            _ => None,
        }
    }

    /// The `model_type` of its `config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qwen3 => "qwen3",
            Self::Qwen2 => "qwen2",
            Self::Llama => "llama",
        }
    }
}

/// Shape and conventions of a model. All of it is checked: no dimension is zero, no product of two overflows.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Whose conventions.
    pub family: Family,
    /// Tokens of the vocabulary (rows of the embedding).
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square under the root of every norm.
    pub rms_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the output projection is the embedding itself.
    pub tied_embeddings: bool,
    /// Whether queries and keys are normalised head by head.
    pub qk_norm: bool,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the MLP's projections have a bias.
    pub mlp_bias: bool,
    /// Most positions of a sequence.
    pub max_len: usize,
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder, and the end tokens of `generation_config.json` if there is one.
    ///
    /// # Errors
    /// The first thing that is missing, out of bounds or not supported, by file and key.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        raw::read(dir)
    }

    /// Which layers share a block, and how long their keys and values are looked at.
    pub fn kv_groups(&self) -> KvGroups {
        KvGroups::full(self.layers)
    }

    /// The KV layout of this model, whole (no tensor parallelism).
    pub fn kv_layout(&self, block_size: u32, dtype: KvDtype) -> KvLayout {
        let dim = |n: usize| u32::try_from(n).unwrap_or(u32::MAX); // bounded far below when read
        KvLayout {
            block_size,
            layers: dim(self.kv_groups().layers_per_block()),
            kv_heads: dim(self.kv_heads),
            k_dim: dim(self.head_dim),
            v_dim: dim(self.head_dim),
            dtype,
        }
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
