use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{RopeScaling, graph::GroupedSpec};

/// A folder with one `config.json`: a good one with `changes` laid over it (null removes a key).
fn read_with(changes: Value) -> Result<ModelConfig, Error> {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "eos_token_id": 2,
    });
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            config.as_object_mut().unwrap().remove(key);
        } else {
            config[key] = value.clone();
        }
    }
    read_text(&config.to_string(), None)
}

fn read_text(config: &str, generation: Option<&str>) -> Result<ModelConfig, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    if let Some(generation) = generation {
        fs::write(dir.path().join("generation_config.json"), generation).unwrap();
    }
    ModelConfig::read(dir.path())
}

/// The attention of the first layer.
fn grouped(config: &ModelConfig) -> &GroupedSpec {
    match &config.layers[0].attention.kind {
        AttentionKind::Grouped(grouped) => grouped,
        AttentionKind::Latent(_) => panic!("grouped attention is expected"),
    }
}

/// The key an error names.
fn refused(changes: Value) -> &'static str {
    match read_with(changes.clone()) {
        Err(Error::Config { key, .. }) => key,
        other => panic!("{changes}: {other:?}"),
    }
}

#[test]
fn what_is_absent_is_derived() {
    let config = read_with(json!({})).unwrap();
    let attention = grouped(&config);
    assert_eq!((attention.kv_heads, attention.head_dim, config.tied_embeddings), (4, 16, false));
    assert!(attention.qk_norms.is_none());
    assert_eq!(config.ropes, [Rope { theta: 10_000.0, scaling: RopeScaling::None }]);
    assert_eq!(grouped(&read_with(json!({"model_type": "qwen3"})).unwrap()).head_dim, 128);
    let given = read_with(json!({"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2})).unwrap();
    let given = grouped(&given);
    assert_eq!((given.head_dim, given.q.outputs, given.k.outputs), (32, 128, 64));
    assert!(given.qk_norms.is_some());
}

#[test]
fn both_forms_of_the_rope_keys_mean_the_same() {
    let linear = Rope { theta: 5e5, scaling: RopeScaling::Linear { factor: 4.0 } };
    for form in [
        json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4}}),
        json!({"rope_parameters": {"rope_theta": 500000, "rope_type": "linear", "factor": 4.0}}),
    ] {
        assert_eq!(read_with(form.clone()).unwrap().ropes, [linear], "{form}");
    }
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192});
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(5e5);
    let old = read_with(json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
    let new = read_with(json!({"rope_parameters": parameters})).unwrap();
    assert_eq!(old, new);
    assert!(matches!(old.ropes[0].scaling, RopeScaling::Llama3 { original_max_len: 8192, .. }));
}

#[test]
fn biases_follow_the_family() {
    let bias = |changes| {
        let config = read_with(changes).unwrap();
        let crate::graph::MlpSpec::Dense(mlp) = &config.layers[0].mlp else { panic!("a dense MLP is expected") };
        (grouped(&config).q.bias, config.layers[0].attention.output.bias, mlp.down.bias)
    };
    assert_eq!(bias(json!({})), (false, false, false));
    assert_eq!(bias(json!({"attention_bias": true, "mlp_bias": true})), (true, true, true));
    assert_eq!(bias(json!({"model_type": "qwen3", "attention_bias": true})), (true, true, false));
    assert_eq!(bias(json!({"model_type": "qwen2"})), (true, false, false));
}

#[test]
fn end_tokens_come_from_both_files_each_once() {
    let config = json!({
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "eos_token_id": [2, 7],
    });
    let eos = |generation| read_text(&config.to_string(), generation).unwrap().eos;
    assert_eq!(eos(None), [TokenId(2), TokenId(7)]);
    assert_eq!(eos(Some(r#"{"eos_token_id": 9}"#)), [TokenId(9), TokenId(2), TokenId(7)]);
    assert_eq!(eos(Some(r#"{"eos_token_id": [7, 2]}"#)), [TokenId(7), TokenId(2)]);
    assert_eq!(eos(Some("{}")), [TokenId(2), TokenId(7)]);
    let bad = read_text(&config.to_string(), Some(r#"{"eos_token_id": 100}"#)).unwrap_err();
    assert!(bad.to_string().contains("generation_config.json: `eos_token_id`: 100"), "{bad}");
}

#[test]
fn what_would_change_the_arithmetic_is_refused_by_key() {
    assert_eq!(refused(json!({"hidden_act": "gelu"})), "hidden_act");
    assert_eq!(refused(json!({"hidden_act": 3})), "hidden_act");
    assert_eq!(refused(json!({"layer_types": ["full_attention", "sliding_attention"]})), "layer_types");
    assert_eq!(refused(json!({"quantization_config": {"quant_method": "gptq"}})), "quantization_config");
    assert_eq!(refused(json!({"partial_rotary_factor": 0.5})), "partial_rotary_factor");
    assert_eq!(refused(json!({"rope_scaling": {"type": "longrope", "factor": 2.0}})), "rope_scaling");
    assert_eq!(refused(json!({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": false}})), "rope_scaling");
    assert_eq!(refused(json!({"rope_parameters": {"rope_type": "linear"}})), "rope_parameters");
    read_with(json!({"model_type": "qwen2", "use_sliding_window": false, "sliding_window": 128})).unwrap();
}

#[test]
fn numbers_out_of_bounds_are_refused_by_key() {
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ] {
        for bad in [json!(0), json!(u64::MAX), json!(1u64 << 40)] {
            assert_eq!(refused(json!({key: bad})), key);
        }
    }
    assert_eq!(refused(json!({"num_key_value_heads": 3})), "num_key_value_heads");
    assert_eq!(refused(json!({"head_dim": 15})), "head_dim");
    assert_eq!(refused(json!({"hidden_size": 66})), "head_dim");
    assert_eq!(refused(json!({"rms_norm_eps": 0.0})), "rms_norm_eps");
    assert_eq!(refused(json!({"rope_theta": -1.0})), "rope_theta");
    assert_eq!(refused(json!({"eos_token_id": -1})), "eos_token_id");
    assert_eq!(refused(json!({"vocab_size": null})), "vocab_size");
}

#[test]
fn a_file_too_large_is_not_read() {
    let error = read_text(&" ".repeat((4 << 20) + 1), None).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

proptest! {
    /// Any number under any key: an error or a configuration whose products cannot overflow, never a panic.
    #[test]
    fn hostile_numbers_never_panic(
        keys in prop::collection::vec((
            prop::sample::select(vec!["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
                "rope_theta", "eos_token_id", "sliding_window"]),
            prop_oneof![any::<i64>().prop_map(|n| json!(n)), any::<f64>().prop_map(|n| json!(n)), Just(json!("x")),
                (0u64..2000).prop_map(|n| json!(n))],
        ), 0..4),
    ) {
        let changes: serde_json::Map<String, Value> = keys.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        if let Ok(config) = read_with(Value::Object(changes)) {
            for (name, shape) in crate::weights::expected::tensors(&config) {
                let elements = shape.iter().try_fold(4usize * 1024, |product, &dim| product.checked_mul(dim));
                prop_assert!(elements.is_some(), "{name} {shape:?}");
            }
        }
    }
}
