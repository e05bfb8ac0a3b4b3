//! Which tensors a configuration asks for, by Hugging Face's names, and their shapes.

use crate::ModelConfig;

/// Name of the embedding, which is the output projection too where they are tied.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of an output projection of its own.
pub(crate) const LM_HEAD: &str = "lm_head.weight";
/// Name of the norm before the output projection.
pub(crate) const FINAL_NORM: &str = "model.norm.weight";

/// Every tensor the model needs.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let c = config;
    let mut list = vec![(EMBEDDING.to_owned(), vec![c.vocab, c.hidden]), (FINAL_NORM.to_owned(), vec![c.hidden])];
    if !c.tied_embeddings {
        list.push((LM_HEAD.to_owned(), vec![c.vocab, c.hidden]));
    }
    for layer in 0..c.layers {
        let mut push =
            |name: &str, shape: &[usize]| list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        push("input_layernorm.weight", &[c.hidden]);
        push("post_attention_layernorm.weight", &[c.hidden]);
        if c.qk_norm {
            push("self_attn.q_norm.weight", &[c.head_dim]);
            push("self_attn.k_norm.weight", &[c.head_dim]);
        }
        for (name, rows, cols, bias) in [
            ("self_attn.q_proj", c.q_width(), c.hidden, c.qkv_bias),
            ("self_attn.k_proj", c.kv_width(), c.hidden, c.qkv_bias),
            ("self_attn.v_proj", c.kv_width(), c.hidden, c.qkv_bias),
            ("self_attn.o_proj", c.hidden, c.q_width(), c.o_bias),
            ("mlp.gate_proj", c.intermediate, c.hidden, c.mlp_bias),
            ("mlp.up_proj", c.intermediate, c.hidden, c.mlp_bias),
            ("mlp.down_proj", c.hidden, c.intermediate, c.mlp_bias),
        ] {
            push(&format!("{name}.weight"), &[rows, cols]);
            if bias {
                push(&format!("{name}.bias"), &[rows]);
            }
        }
    }
    list
}
