//! Which tensors a configuration asks for, by Hugging Face's names, and their shapes.

use crate::ModelConfig;

/// Name of the embedding, which is the output projection too where they are tied.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of an output projection of its own.
pub(crate) const LM_HEAD: &str = "lm_head.weight";

/// Every tensor the model needs: its ends, and what its layers' description names.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let table = vec![config.vocab, config.hidden];
    let mut list = vec![(EMBEDDING.to_owned(), table.clone())];
    if !config.tied_embeddings {
        list.push((LM_HEAD.to_owned(), table));
    }
    let mut take = |name, shape| list.push((name, shape));
    config.final_norm.tensors(&mut take);
    config.layers.iter().for_each(|layer| layer.tensors(&mut take));
    list
}
