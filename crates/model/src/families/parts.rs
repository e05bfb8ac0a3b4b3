//! What nearly all families share: the sizes of a decoder, Hugging Face's names for its tensors, windows and biases.

use super::Family;
use crate::{
    Error, ModelConfig,
    config::quantization,
    config::raw::{MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH, Raw},
    graph::{
        Activation, AttentionKind, AttentionSpec, GateSpec, GatedSpec, GroupedSpec, LayerSpec, LinearSpec, MlpSpec,
        NormSpec, RoutedSpec,
    },
    rope::Rope,
};

/// More experts than any published model has in a layer.
const MAX_EXPERTS: u64 = 1 << 12;
/// And in all its layers: their names alone take memory.
const MAX_EXPERTS_IN_ALL: usize = 1 << 16;

/// The sizes of a decoder, and its tensors' names.
pub(super) struct Decoder<'a> {
    pub(super) raw: &'a Raw,
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) eps: f32,
    /// What the weights of its norms are offsets from.
    pub(super) norm_offset: f32,
}

impl<'a> Decoder<'a> {
    /// The sizes that every configuration has, and what every family refuses.
    pub(super) fn read(raw: &'a Raw) -> Result<Self, Error> {
        quantization::check(raw)?;
        let eps = raw.positive_if_any("rms_norm_eps", 1.0)?.unwrap_or(1e-6) as f32;
        Ok(Self {
            raw,
            vocab: raw.dimension("vocab_size", MAX_VOCAB)?,
            hidden: raw.dimension("hidden_size", MAX_WIDTH)?,
            layers: raw.dimension("num_hidden_layers", MAX_LAYERS)?,
            heads: raw.dimension("num_attention_heads", MAX_HEADS)?,
            eps,
            norm_offset: 0.0,
        })
    }

    /// KV heads (as many as query heads where no key says), and the width of each.
    pub(super) fn grouped_heads(&self, default_head_dim: Option<usize>) -> Result<GroupedHeads, Error> {
        let raw = self.raw;
        let kv_heads = raw.dimension_if_any("num_key_value_heads", MAX_HEADS)?.unwrap_or(self.heads);
        if !self.heads.is_multiple_of(kv_heads) {
            let reason = format!("{kv_heads} does not divide the {} query heads", self.heads);
            return Err(raw.bad("num_key_value_heads", reason));
        }
        let head_dim = match raw.dimension_if_any("head_dim", MAX_HEAD_DIM)?.or(default_head_dim) {
            Some(head_dim) => head_dim,
            None if !self.hidden.is_multiple_of(self.heads) => {
                let reason = format!("absent, and {} heads do not divide {}", self.heads, self.hidden);
                return Err(raw.bad("head_dim", reason));
            }
            None => self.hidden / self.heads,
        };
        if head_dim % 2 != 0 {
            return Err(raw.bad("head_dim", format!("{head_dim} is odd; the rotation works on pairs")));
        }
        Ok(GroupedHeads { kv_heads, head_dim })
    }

    /// The width of a dense MLP.
    pub(super) fn intermediate(&self) -> Result<usize, Error> {
        self.raw.dimension("intermediate_size", MAX_WIDTH)
    }

    /// The number under `key`, of experts.
    pub(super) fn experts(&self, key: &'static str) -> Result<usize, Error> {
        let experts = self.raw.dimension(key, MAX_EXPERTS)?;
        if experts * self.layers > MAX_EXPERTS_IN_ALL {
            let layers = self.layers;
            return Err(self
                .raw
                .bad(key, format!("{experts} in each of {layers} layers are more than {MAX_EXPERTS_IN_ALL}")));
        }
        Ok(experts)
    }

    /// Which layers slide, by `layer_types` or else by `slides`; a layer of any other kind is refused. The window is read
    /// only where a layer needs it.
    pub(super) fn windows(
        &self,
        window: impl Fn() -> Result<usize, Error>,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, Error> {
        let raw = self.raw;
        let kinds: Vec<bool> = match raw.list("layer_types")? {
            None => (0..self.layers).map(slides).collect(),
            Some(kinds) if kinds.len() != self.layers => {
                let reason = format!("{} entries for {} layers", kinds.len(), self.layers);
                return Err(raw.bad("layer_types", reason));
            }
            Some(kinds) => kinds
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Ok(false),
                    Some("sliding_attention") => Ok(true),
                    other => {
                        let other: String = other.unwrap_or("?").chars().take(64).collect();
                        let reason = format!("`{other}` is not supported (full_attention, sliding_attention)");
                        Err(raw.bad("layer_types", reason))
                    }
                })
                .collect::<Result<_, _>>()?,
        };
        kinds.into_iter().map(|slides| if slides { window().map(Some) } else { Ok(None) }).collect()
    }

    /// The same window in every layer, or in none.
    pub(super) fn one_window(&self, window: Option<usize>) -> Result<Option<usize>, Error> {
        // Refuses `layer_types` that say otherwise: the reference does not look at the key in these families.
        let by_layer = self.windows(
            || window.ok_or_else(|| self.raw.bad("layer_types", "a layer slides, but there is no window")),
            |_| window.is_some(),
        )?;
        if by_layer.iter().any(|layer| *layer != window) {
            return Err(self.raw.bad("layer_types", "not all the same, which this family is not supported with"));
        }
        Ok(window)
    }

    /// `sliding_window`.
    pub(super) fn sliding_window(&self) -> Result<usize, Error> {
        self.raw.dimension("sliding_window", MAX_POSITIONS)
    }

    /// A norm of the residual stream's width in a layer.
    pub(super) fn norm(&self, layer: usize, part: &str) -> NormSpec {
        self.norm_of(layer, part, self.hidden)
    }

    /// A norm in a layer.
    pub(super) fn norm_of(&self, layer: usize, part: &str, width: usize) -> NormSpec {
        NormSpec { name: in_layer(layer, part), width, eps: self.eps, offset: self.norm_offset }
    }

    /// The attention of a layer by the common names; no soft cap, no window, scores divided by the root of the head's width.
    pub(super) fn grouped(
        &self,
        layer: usize,
        GroupedHeads { kv_heads, head_dim }: GroupedHeads,
        Biases { qkv, o }: Biases,
        qk_norms: bool,
    ) -> AttentionSpec {
        let (q_width, kv_width) = (self.heads * head_dim, kv_heads * head_dim);
        let from = |part: &str, width| linear(layer, part, self.hidden, width, qkv);
        let norms = || {
            let norm = |part: &str| self.norm_of(layer, part, head_dim);
            (norm("self_attn.q_norm"), norm("self_attn.k_norm"))
        };
        AttentionSpec {
            heads: self.heads,
            kind: AttentionKind::Grouped(GroupedSpec {
                kv_heads,
                head_dim,
                q: from("self_attn.q_proj", q_width),
                k: from("self_attn.k_proj", kv_width),
                v: from("self_attn.v_proj", kv_width),
                qk_norms: qk_norms.then(norms),
            }),
            output: linear(layer, "self_attn.o_proj", q_width, self.hidden, o),
            rope: 0,
            scale: root(head_dim as f64),
            soft_cap: None,
            window: None,
        }
    }

    /// An MLP by the common names below `part`, through SiLU.
    pub(super) fn mlp(&self, layer: usize, part: &str, intermediate: usize, bias: bool) -> GatedSpec {
        self.gated(
            layer,
            [&format!("{part}.gate_proj"), &format!("{part}.up_proj"), &format!("{part}.down_proj")],
            intermediate,
            bias,
        )
    }

    /// An MLP by the names of its gate, up and down projections, through SiLU.
    pub(super) fn gated(
        &self,
        layer: usize,
        [gate, up, down]: [&str; 3],
        intermediate: usize,
        bias: bool,
    ) -> GatedSpec {
        GatedSpec {
            gate: linear(layer, gate, self.hidden, intermediate, bias),
            up: linear(layer, up, self.hidden, intermediate, bias),
            down: linear(layer, down, intermediate, self.hidden, bias),
            activation: Activation::Silu,
        }
    }

    /// Experts below `{part}.experts`, routed by `{part}.gate`.
    pub(super) fn routed(&self, layer: usize, part: &str, gate: GateSpec, experts: Vec<GatedSpec>) -> RoutedSpec {
        let router = linear(layer, &format!("{part}.gate"), self.hidden, experts.len(), false);
        RoutedSpec { router, gate, experts, shared: None }
    }

    /// The experts a token goes to, under `key`; not more than there are.
    pub(super) fn top_k(&self, key: &'static str, experts: usize) -> Result<usize, Error> {
        let top_k = self.raw.dimension(key, MAX_EXPERTS)?;
        if top_k > experts {
            return Err(self.raw.bad(key, format!("{top_k} of {experts} experts")));
        }
        Ok(top_k)
    }

    /// A layer with a norm before each half, by the common names.
    pub(super) fn layer(&self, layer: usize, attention: AttentionSpec, mlp: MlpSpec) -> LayerSpec {
        LayerSpec {
            attention_norm: self.norm(layer, "input_layernorm"),
            attention,
            attention_post_norm: None,
            mlp_norm: self.norm(layer, "post_attention_layernorm"),
            mlp,
            mlp_post_norm: None,
        }
    }

    /// The model of these layers, with what the configuration says of its ends.
    pub(super) fn model(
        &self,
        family: &Family,
        ropes: Vec<Rope>,
        layers: Vec<LayerSpec>,
        tied: bool,
    ) -> Result<ModelConfig, Error> {
        Ok(ModelConfig {
            family: family.model_type,
            vocab: self.vocab,
            hidden: self.hidden,
            embedding_scale: 1.0,
            ropes,
            layers,
            final_norm: NormSpec {
                name: "model.norm".into(),
                width: self.hidden,
                eps: self.eps,
                offset: self.norm_offset,
            },
            tied_embeddings: self.raw.flag("tie_word_embeddings", tied)?,
            final_soft_cap: None,
            max_len: self.raw.dimension("max_position_embeddings", MAX_POSITIONS)?,
            eos: self.raw.eos(self.vocab)?,
        })
    }
}

/// KV heads, and the width of each head.
#[derive(Clone, Copy)]
pub(super) struct GroupedHeads {
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

/// Which projections of an attention have a bias.
#[derive(Clone, Copy)]
pub(super) struct Biases {
    pub(super) qkv: bool,
    pub(super) o: bool,
}

impl Biases {
    pub(super) const NONE: Self = Self { qkv: false, o: false };

    /// All of them.
    pub(super) fn all(bias: bool) -> Self {
        Self { qkv: bias, o: bias }
    }
}

/// `model.layers.{layer}.{part}`.
pub(super) fn in_layer(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// A linear map in a layer.
pub(super) fn linear(layer: usize, part: &str, inputs: usize, outputs: usize, bias: bool) -> LinearSpec {
    LinearSpec { name: in_layer(layer, part), inputs, outputs, bias }
}

/// One over the root, which scores are multiplied by.
pub(super) fn root(width: f64) -> f32 {
    (1.0 / width.sqrt()) as f32
}

/// Refuses any activation but SiLU.
pub(super) fn only_silu(raw: &Raw) -> Result<(), Error> {
    raw.only("hidden_act", &["silu", "swish"])
}
