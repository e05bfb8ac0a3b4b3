//! What a model's arithmetic comes to: bytes and multiply-adds that no implementation can do without.
//!
//! Benchmarks divide these by the time taken and by what the machine can do at most. Only what is necessary counts: of the
//! last layer, prompt tokens nobody wants logits of need keys and values and no more; attention looks backwards only.

use crate::{
    Folder,
    graph::{AttentionKind, AttentionSpec, LayerSpec, MlpSpec},
    weights::{Dtype, Tensor, expected::EMBEDDING},
};

/// The work of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    /// Bytes of all weights the model uses, as they are stored.
    pub weight_bytes: u64,
    /// Bytes of weights that a step has to read, however few tokens it computes: all of them, but for an embedding that is
    /// no output projection, of which a row per token is enough, and for the experts that one token does not choose.
    pub step_weight_bytes: u64,
    /// Parameters. Scales of quantized weights are none.
    pub parameters: u64,
    /// What most parameters are stored in.
    pub weight_dtype: Dtype,
    layers: Vec<LayerCost>,
    /// Multiply-adds per row of logits.
    output: u64,
}

/// Multiply-adds of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
struct LayerCost {
    /// Per token, in matrices that make keys and values.
    keys_and_values: u64,
    /// Per token, in the others that it goes through.
    rest: u64,
    /// Per token and position that it looks at.
    attention: u64,
    window: Option<usize>,
}

impl Cost {
    pub(crate) fn of(folder: &Folder) -> Self {
        let (config, weights) = (folder.config(), folder.weights());
        let all = weights.sorted();
        let elements = |tensor: &Tensor| tensor.rows as u64 * tensor.cols as u64;
        let bytes = |tensor: &Tensor| tensor.bytes().len() as u64;
        let weight_bytes = all.iter().map(|(_, tensor)| bytes(tensor)).sum();
        let looked_up = if config.tied_embeddings { 0 } else { bytes(weights.get(EMBEDDING)) };
        let idle = |layer: &LayerSpec| match &layer.mlp {
            MlpSpec::Dense(_) => 0,
            MlpSpec::Routed(routed) => {
                let mut expert = 0;
                routed.experts[0].tensors(&mut |name, _| expert += bytes(weights.get(&name)));
                expert * (routed.experts.len() - routed.gate.top_k) as u64
            }
        };
        let parameters = || all.iter().filter(|(name, _)| !name.ends_with("_scale")).map(|(_, tensor)| *tensor);
        let stored_in = |dtype| parameters().filter(|tensor| tensor.dtype == dtype).map(elements).sum::<u64>();
        let most = parameters().max_by_key(|tensor| stored_in(tensor.dtype));
        let weight_dtype = most.expect("a model has weights").dtype;
        let idle: u64 = config.layers.iter().map(idle).sum();
        Self {
            weight_bytes,
            step_weight_bytes: weight_bytes - looked_up - idle,
            parameters: parameters().map(elements).sum(),
            weight_dtype,
            layers: config.layers.iter().map(LayerCost::of).collect(),
            output: (config.vocab * config.hidden) as u64,
        }
    }

    /// Floating-point operations to compute tokens `start..start + tokens` of one sequence and the logits after the last:
    /// two per multiply-add.
    pub fn flops(&self, start: usize, tokens: usize) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let (last, others) = self.layers.split_last().expect("a model has layers");
        let others: f64 = others.iter().map(|layer| layer.of_tokens(start, tokens)).sum();
        // Of the last layer only the last token needs more than keys and values.
        let last = ((tokens - 1) as u64 * last.keys_and_values) as f64 + last.of_tokens(start + tokens - 1, 1);
        2.0 * (others + last + self.output as f64)
    }
}

impl LayerCost {
    fn of(layer: &LayerSpec) -> Self {
        // Vectors (norms, biases) are added or scaled by, not multiplied through.
        let mut matrices = 0;
        let mut add = |_, shape: Vec<usize>| {
            matrices += if shape.len() > 1 { shape.iter().map(|&dim| dim as u64).product() } else { 0 };
        };
        layer.tensors(&mut add);
        if let MlpSpec::Routed(routed) = &layer.mlp {
            let expert = &routed.experts[0];
            let expert = [&expert.gate, &expert.up, &expert.down].map(|linear| linear.inputs * linear.outputs);
            matrices -= expert.iter().sum::<usize>() as u64 * (routed.experts.len() - routed.gate.top_k) as u64;
        }
        let AttentionSpec { heads, window, .. } = layer.attention;
        let (made, width) = match &layer.attention.kind {
            AttentionKind::Grouped(grouped) => (vec![&grouped.k, &grouped.v], 2 * grouped.head_dim),
            // A query as wide as what is cached, and a sum as wide as the latent.
            AttentionKind::Latent(latent) => (vec![&latent.kv_down], 2 * latent.rank + latent.rope),
        };
        let keys_and_values = made.iter().map(|linear| (linear.inputs * linear.outputs) as u64).sum();
        Self { keys_and_values, rest: matrices - keys_and_values, attention: (heads * width) as u64, window }
    }

    /// Multiply-adds to compute these tokens in full.
    fn of_tokens(&self, start: usize, tokens: usize) -> f64 {
        // The first so many see all before them, the others a window.
        let growing = self.window.map_or(tokens, |window| window.saturating_sub(start).min(tokens));
        let (first, n) = (start as f64, growing as f64);
        let seen = n * first + n * (n + 1.0) / 2.0 + ((tokens - growing) * self.window.unwrap_or(0)) as f64;
        tokens as f64 * (self.keys_and_values + self.rest) as f64 + self.attention as f64 * seen
    }
}

#[cfg(test)]
mod tests {
    use super::LayerCost;
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

    #[test]
    fn a_window_bounds_what_a_token_sees() {
        let layer = |window| LayerCost { keys_and_values: 0, rest: 0, attention: 1, window };
        for (start, tokens) in [(0, 3), (0, 9), (2, 7), (9, 4)] {
            let seen = |window: usize| (start..start + tokens).map(|at| (at + 1).min(window)).sum::<usize>() as f64;
            assert_eq!(layer(Some(4)).of_tokens(start, tokens), seen(4));
            assert_eq!(layer(None).of_tokens(start, tokens), seen(usize::MAX));
        }
    }
}
