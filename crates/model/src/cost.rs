//! What a model's arithmetic comes to: bytes and multiply-adds that no implementation can do without.
//!
//! Benchmarks divide these by the time taken and by what the machine can do at most. Only what is necessary counts: of the
//! last layer, prompt tokens nobody wants logits of need keys and values and no more; attention looks backwards only.

use crate::{Folder, ModelConfig, weights::Tensor, weights::expected::EMBEDDING};

/// The work of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of all weights the model uses, as they are stored.
    pub weight_bytes: u64,
    /// Bytes of weights that a step has to read, however few tokens it computes: all of them, but for an embedding that is
    /// no output projection, of which a row per token is enough.
    pub step_weight_bytes: u64,
    /// Parameters.
    pub parameters: u64,
    /// Multiply-adds per token in the layers' matrices.
    layers: u64,
    /// Of these, those of the last layer that come after its keys and values.
    last_layer_rest: u64,
    /// Multiply-adds per row of logits.
    output: u64,
    /// Multiply-adds of attention per token and position it looks at, per layer.
    attention: u64,
    layer_count: u64,
}

impl Cost {
    pub(crate) fn of(folder: &Folder) -> Self {
        let (config, weights) = (folder.config(), folder.weights());
        let all = weights.sorted();
        let elements = |tensor: &Tensor| tensor.rows as u64 * tensor.cols as u64;
        let bytes = |tensor: &Tensor| tensor.bytes().len() as u64;
        let weight_bytes = all.iter().map(|(_, tensor)| bytes(tensor)).sum();
        let looked_up = if config.tied_embeddings { 0 } else { bytes(weights.get(EMBEDDING)) };
        // Vectors (norms, biases) are added or scaled by, not multiplied through.
        let matrices = || all.iter().filter(|(name, tensor)| tensor.rows > 1 && name.starts_with("model.layers."));
        let last = format!("model.layers.{}.", config.layers - 1);
        let after_kv = |name: &str| name.starts_with(&last) && !["k_proj", "v_proj"].iter().any(|kv| name.contains(kv));
        Self {
            weight_bytes,
            step_weight_bytes: weight_bytes - looked_up,
            parameters: all.iter().map(|(_, tensor)| elements(tensor)).sum(),
            layers: matrices().map(|(_, tensor)| elements(tensor)).sum(),
            last_layer_rest: matrices().filter(|(name, _)| after_kv(name)).map(|(_, tensor)| elements(tensor)).sum(),
            output: (config.vocab * config.hidden) as u64,
            attention: attention(config),
            layer_count: config.layers as u64,
        }
    }

    /// Floating-point operations to compute tokens `start..start + tokens` of one sequence and the logits after the last:
    /// two per multiply-add.
    pub fn flops(&self, start: usize, tokens: usize) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let (start, tokens) = (start as f64, tokens as f64);
        let seen = tokens * start + tokens * (tokens + 1.0) / 2.0; // pairs of a token and a position at or before it
        let last_seen = start + tokens;
        let layers = tokens * self.layers as f64 - (tokens - 1.0) * self.last_layer_rest as f64;
        let attention = self.attention as f64 * (seen * (self.layer_count - 1) as f64 + last_seen);
        2.0 * (layers + attention + self.output as f64)
    }
}

/// A query's product with a key, and its weight's with a value, for every head.
fn attention(config: &ModelConfig) -> u64 {
    2 * (config.heads * config.head_dim) as u64
}

#[cfg(test)]
mod tests {
    use crate::{Folder, shapes::Shape};

    #[test]
    fn work_adds_up_over_tokens_as_in_the_books() {
        let dir = tempfile::tempdir().unwrap();
        Shape::named("qwen3-tiny").unwrap().write(dir.path(), 1, &mut |_, _| {}).unwrap();
        let cost = Folder::open(dir.path()).unwrap().cost();
        // Two layers of width 64: queries and output 64 × 64, keys and values 32 × 64, three of 192 × 64; 4 heads of 16.
        let layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64;
        let norms = 2 * 64 + 2 * 16;
        assert_eq!(cost.parameters, (512 * 64 + 2 * (layer + norms) + 64) as u64);
        assert_eq!(cost.weight_bytes, 2 * cost.parameters);
        assert_eq!(cost.step_weight_bytes, cost.weight_bytes, "the embedding is the output projection too");
        // One token at position 9 sees ten positions in both layers.
        assert_eq!(cost.flops(9, 1), f64::from(2 * (2 * layer + 512 * 64 + 2 * 10 * 2 * 64)));
        // Ten tokens from the start: the first nine need keys and values only in the last layer, and no logits.
        let last = layer + 512 * 64 + 10 * 2 * 64;
        let before = 9 * 2 * 32 * 64;
        let first_layer = 10 * layer + 55 * 2 * 64;
        assert_eq!(cost.flops(0, 10), f64::from(2 * (first_layer + before + last)));
        assert_eq!(cost.flops(5, 0), 0.0);
    }
}
