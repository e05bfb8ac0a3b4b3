//! What each family makes of its keys, and what it refuses.

use std::fs;

use kvasir_types::GroupKind;
use serde_json::{Value, json};

use super::*;
use crate::{
    RopeScaling,
    graph::{AttentionKind, MlpSpec, Scoring},
};

/// A good configuration of a family with `changes` laid over it.
fn read_as(model_type: &str, changes: Value) -> Result<ModelConfig, Error> {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 512, "head_dim": 16,
    });
    let experts = json!({"moe_intermediate_size": 32, "num_experts_per_tok": 2});
    let more = match model_type {
        "mixtral" => json!({"num_local_experts": 8, "num_experts_per_tok": 2}),
        "qwen3_moe" => json!({"num_experts": 8}),
        "deepseek_v2" | "deepseek_v3" => json!({
            "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 24,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 4, "topk_group": 2,
        }),
        _ => json!({}),
    };
    let experts =
        if more.get("n_routed_experts").or_else(|| more.get("num_experts")).is_some() { experts } else { json!({}) };
    for (key, value) in [&experts, &more, &changes].into_iter().flat_map(|keys| keys.as_object().unwrap()) {
        config[key] = value.clone();
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    ModelConfig::read(dir.path())
}

/// The key that the error about `changes` names.
fn refused(model_type: &str, changes: Value) -> &'static str {
    match read_as(model_type, changes.clone()) {
        Err(Error::Config { key, .. }) => key,
        other => panic!("{model_type} {changes}: {other:?}"),
    }
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.attention.window).collect()
}

#[test]
fn every_family_reads_a_plain_configuration() {
    for model_type in supported() {
        let config = read_as(model_type, json!({})).unwrap();
        assert_eq!((config.family, config.layers.len()), (model_type, 6));
        assert_eq!(config.kv_groups().layers(), 6);
    }
}

#[test]
fn an_unknown_architecture_is_refused_by_name_with_all_that_are_known() {
    for unknown in ["mamba", "gpt_oss", "gemma3", "llama4"] {
        let error = read_as(unknown, json!({})).unwrap_err().to_string();
        assert!(error.contains(&format!("`{unknown}`")), "{error}");
        assert!(supported().all(|known| error.contains(known)), "{error}");
    }
    let error = read_as("llama", json!({"architectures": ["LlamaForSequenceClassification"]})).unwrap_err();
    assert!(error.to_string().contains("`LlamaForSequenceClassification`"), "{error}");
    read_as("llama", json!({"architectures": ["LlamaForCausalLM"]})).unwrap();
}

#[test]
fn no_family_ignores_a_key_that_changes_the_arithmetic() {
    for model_type in supported() {
        assert_eq!(refused(model_type, json!({"quantization_config": {}})), "quantization_config");
        assert_eq!(refused(model_type, json!({"layer_types": vec!["linear_attention"; 6]})), "layer_types");
        assert_eq!(refused(model_type, json!({"layer_types": ["full_attention"]})), "layer_types");
        assert_eq!(refused(model_type, json!({"partial_rotary_factor": 0.5})), "partial_rotary_factor");
        let act = if model_type.starts_with("gemma") { "hidden_activation" } else { "hidden_act" };
        assert_eq!(refused(model_type, json!({act: "relu"})), act);
    }
    for gemma in ["gemma2", "gemma3_text"] {
        assert_eq!(refused(gemma, json!({"use_bidirectional_attention": true})), "use_bidirectional_attention");
    }
    assert_eq!(refused("gemma3_text", json!({"attn_logit_softcapping": 50.0})), "attn_logit_softcapping");
    assert_eq!(refused("gemma3_text", json!({"rope_parameters": {"rope_theta": 1e4}})), "rope_parameters");
    assert_eq!(refused("deepseek_v2", json!({"norm_topk_prob": true})), "norm_topk_prob");
    assert_eq!(refused("deepseek_v2", json!({"scoring_func": "sigmoid"})), "scoring_func");
    assert_eq!(refused("deepseek_v3", json!({"topk_method": "greedy"})), "topk_method");
    assert_eq!(refused("deepseek_v3", json!({"rope_interleave": false})), "rope_interleave");
    assert_eq!(refused("deepseek_v3", json!({"moe_layer_freq": 2})), "moe_layer_freq");
    assert_eq!(refused("deepseek_v3", json!({"num_key_value_heads": 2})), "num_key_value_heads");
    let linear = json!({"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0});
    assert_eq!(refused("deepseek_v2", json!({"rope_scaling": linear})), "mscale_all_dim");
}

#[test]
fn windows_follow_each_familys_rule() {
    let all = |model_type, changes| windows(&read_as(model_type, changes).unwrap());
    let (w, full) = (Some(32), None);
    assert_eq!(all("mistral", json!({})), [Some(4096); 6]);
    assert_eq!(all("mistral", json!({"sliding_window": null})), [full; 6]);
    assert_eq!(all("mistral", json!({"sliding_window": 32})), [w; 6]);
    assert_eq!(all("mixtral", json!({})), [full; 6]);
    assert_eq!(all("gemma2", json!({"sliding_window": 32})), [w, full, w, full, w, full]);
    assert_eq!(all("gemma3_text", json!({"sliding_window": 32})), [w, w, w, w, w, full]);
    assert_eq!(
        all("gemma3_text", json!({"sliding_window": 32, "sliding_window_pattern": 3})),
        [w, w, full, w, w, full]
    );
    let qwen = json!({"use_sliding_window": true, "sliding_window": 32, "max_window_layers": 4});
    assert_eq!(all("qwen2", qwen.clone()), [full, full, full, full, w, w]);
    assert_eq!(all("qwen3", qwen.clone()), [full, full, full, full, w, w]);
    assert_eq!(all("qwen3_moe", qwen), [w; 6]);
    assert_eq!(all("qwen2", json!({"sliding_window": 32})), [full; 6]);
    let mut kinds = ["full_attention"; 6];
    kinds[1] = "sliding_attention";
    let by_layer = json!({"layer_types": kinds, "use_sliding_window": true, "sliding_window": 32});
    assert_eq!(all("qwen2", by_layer.clone()), [full, w, full, full, full, full]);
    // A window whose size nothing says, and families whose layers cannot differ.
    assert_eq!(refused("qwen2", json!({"layer_types": kinds})), "layer_types");
    assert_eq!(refused("mistral", json!({"layer_types": kinds})), "layer_types");
    assert_eq!(refused("llama", json!({"layer_types": kinds})), "layer_types");
}

#[test]
fn layers_of_one_kind_share_blocks() {
    let gemma = read_as("gemma3_text", json!({"sliding_window": 32, "sliding_window_pattern": 3})).unwrap();
    let groups = gemma.kv_groups();
    let told: Vec<_> = groups.iter().map(|group| (group.kind, group.layers.as_slice())).collect();
    let sliding = GroupKind::Sliding { window: 32 };
    assert_eq!(told, [(GroupKind::Full, &[2, 5][..]), (sliding, &[0, 1]), (sliding, &[3, 4])]);
    let layout = gemma.kv_layout(16, kvasir_types::KvDtype::Bf16);
    assert_eq!((layout.layers, layout.k_dim, layout.v_dim), (2, 16, 16));
}

#[test]
fn a_latent_is_all_that_is_cached_of_a_token() {
    let layout = read_as("deepseek_v3", json!({})).unwrap().kv_layout(16, kvasir_types::KvDtype::Bf16);
    assert_eq!((layout.layers, layout.kv_heads, layout.k_dim, layout.v_dim), (6, 1, 32, 0));
}

#[test]
fn gemma_has_a_rotation_for_each_kind_of_layer_in_both_forms_of_the_keys() {
    let old =
        json!({"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let new = json!({"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }});
    for keys in [old, new] {
        let config = read_as("gemma3_text", keys).unwrap();
        assert_eq!(config.ropes[0], crate::Rope { theta: 2e6, scaling: RopeScaling::Linear { factor: 8.0 } });
        assert_eq!(config.ropes[1], crate::Rope { theta: 3e4, scaling: RopeScaling::None });
        assert_eq!(config.layers.iter().map(|layer| layer.attention.rope).collect::<Vec<_>>(), [1, 1, 1, 1, 1, 0]);
    }
    let absent = read_as("gemma3_text", json!({})).unwrap();
    assert_eq!(absent.ropes.iter().map(|rope| rope.theta).collect::<Vec<_>>(), [1e6, 1e4]);
}

#[test]
fn experts_are_where_each_family_has_them() {
    let routed = |model_type, changes| -> Vec<bool> {
        let config = read_as(model_type, changes).unwrap();
        config.layers.iter().map(|layer| matches!(layer.mlp, MlpSpec::Routed(_))).collect()
    };
    assert_eq!(routed("mixtral", json!({})), [true; 6]);
    assert_eq!(routed("qwen3_moe", json!({"mlp_only_layers": [0, 3]})), [false, true, true, false, true, true]);
    assert_eq!(routed("qwen3_moe", json!({"decoder_sparse_step": 2})), [false, true, false, true, false, true]);
    assert_eq!(routed("deepseek_v2", json!({"first_k_dense_replace": 2})), [false, false, true, true, true, true]);
    assert_eq!(routed("deepseek_v3", json!({"first_k_dense_replace": 0})), [true; 6]);
}

#[test]
fn qwens_experts_are_counted_under_either_name() {
    let plain = read_as("qwen3_moe", json!({"num_experts": 8})).unwrap();
    assert_eq!(read_as("qwen3_moe", json!({"num_experts": null, "num_local_experts": 8})).unwrap(), plain);
}

#[test]
fn numbers_of_experts_are_bounded() {
    for (model_type, key) in
        [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("deepseek_v3", "n_routed_experts")]
    {
        assert_eq!(refused(model_type, json!({key: 1u64 << 40})), key);
        assert_eq!(refused(model_type, json!({key: 4096, "num_hidden_layers": 1024})), key);
        assert_eq!(refused(model_type, json!({"num_experts_per_tok": 9})), "num_experts_per_tok");
    }
    assert_eq!(refused("deepseek_v3", json!({"n_group": 3})), "n_group");
    assert_eq!(refused("deepseek_v3", json!({"n_group": 8, "topk_group": 2})), "topk_group"); // groups of one have no two best
    assert_eq!(refused("deepseek_v3", json!({"topk_group": 1, "num_experts_per_tok": 3})), "topk_group");
    assert_eq!(refused("deepseek_v3", json!({"qk_rope_head_dim": 7})), "qk_rope_head_dim");
}

#[test]
fn deepseek_chooses_experts_by_its_versions_rule() {
    let gate = |model_type, changes| {
        let config = read_as(model_type, changes).unwrap();
        match &config.layers[5].mlp {
            MlpSpec::Routed(routed) => routed.gate.clone(),
            MlpSpec::Dense(_) => panic!("experts are expected"),
        }
    };
    let greedy = gate("deepseek_v2", json!({"topk_method": "greedy", "routed_scaling_factor": 16.0}));
    assert_eq!((greedy.scoring, greedy.groups, greedy.normalise, greedy.scale), (Scoring::Softmax, None, false, 16.0));
    let limited = gate("deepseek_v2", json!({"topk_method": "group_limited_greedy"}));
    assert_eq!(limited.groups.map(|groups| (groups.count, groups.kept, groups.best)), Some((4, 2, 1)));
    let v3 = gate("deepseek_v3", json!({}));
    assert_eq!((v3.scoring, v3.normalise, v3.scale), (Scoring::Sigmoid, true, 2.5));
    assert_eq!(v3.correction.as_deref(), Some("model.layers.5.mlp.gate.e_score_correction_bias"));
    assert_eq!(v3.groups.map(|groups| groups.best), Some(2));
}

#[test]
fn yarn_for_all_dimensions_moves_from_the_rotation_to_the_scores() {
    let yarn = |all: f64| {
        let scaling = json!({"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": all, "beta_fast": 32,
                             "beta_slow": 1, "original_max_position_embeddings": 128});
        let config = read_as("deepseek_v3", json!({"rope_scaling": scaling})).unwrap();
        (config.ropes[0].magnitude(), config.layers[0].attention.scale)
    };
    let mscale = 0.1 * 40f32.ln() + 1.0;
    let (magnitude, scale) = yarn(1.0);
    assert!((magnitude - 1.0).abs() < 1e-6 && (scale * 24f32.sqrt() - mscale * mscale).abs() < 1e-5);
    let (magnitude, scale) = yarn(1e-9);
    assert!((magnitude - mscale).abs() < 1e-5 && (scale * 24f32.sqrt() - 1.0).abs() < 1e-5);
    assert!(matches!(read_as("deepseek_v3", json!({})).unwrap().layers[0].attention.kind, AttentionKind::Latent(_)));
}

/// Sizes of published models: their configurations as far as they matter, and their parameters in billions as told by their
/// authors (DeepSeek-V3's without the layer that predicts a second token). A tensor misnamed is found by the tiny models;
/// one of a wrong size, or forgotten, shows here.
#[test]
fn published_models_have_the_parameters_they_are_known_for() {
    let seven_b = json!({
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": null, "vocab_size": 32000,
    });
    let with = |base: &Value, more: Value| {
        let mut all = base.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let latent = json!({"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128});
    let published = [
        ("mistral", seven_b.clone(), 7.24),
        ("mixtral", with(&seven_b, json!({"num_local_experts": 8})), 46.70),
        (
            "qwen3_moe",
            json!({
                "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
                "vocab_size": 151_936,
            }),
            30.53,
        ),
        (
            "gemma2",
            json!({
                "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
                "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256_000,
            }),
            9.24,
        ),
        (
            "gemma3_text",
            json!({
                "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
                "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
            }),
            1.00,
        ),
        (
            "deepseek_v2",
            with(
                &latent,
                json!({
                    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
                    "num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
                    "n_group": 1, "topk_group": 1, "vocab_size": 102_400,
                }),
            ),
            15.71,
        ),
        (
            "deepseek_v3",
            with(
                &latent,
                json!({
                    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                    "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 256,
                    "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
                    "vocab_size": 129_280,
                }),
            ),
            671.03,
        ),
    ];
    for (model_type, keys, billions) in published {
        let config = read_as(model_type, keys).unwrap();
        let tensors = crate::weights::expected::tensors(&config);
        let parameters: u64 =
            tensors.iter().map(|(_, shape)| shape.iter().map(|&dim| dim as u64).product::<u64>()).sum();
        assert_eq!((parameters as f64 / 1e7).round() / 100.0, billions, "{model_type}");
    }
}
