//! `quantization_config`: which 8-bit weights mean what we take them for.
//!
//! The weights themselves say their type (I8, F8_E4M3) and bring their scales (`…weight_scale` or `…weight_scale_inv`: one for
//! each row, one for each block of 128 × 128, or one for all); this key says what else there might be to it. Understood are
//!
//! - `compressed-tensors` (llm-compressor, vLLM): formats `int-quantized`, `float-quantized`, `naive-quantized`; symmetric
//!   8-bit weights, scaled by channel, tensor or block. Where it asks for activations quantised on the fly too, they are left as
//!   they are: the weights were made without looking at activations, so that only loses less;
//! - `fp8` (AutoFP8 and vLLM; DeepSeek-V3 and Qwen3 with `weight_block_size`): scaled likewise, activations as above.
//!
//! All else is refused by name: blocks of other sizes and groups that share a scale, zero points, packed or sparse weights,
//! activations with scales measured beforehand, a quantised KV cache (ours has its own setting).

use serde_json::{Value, json};

use super::raw::Raw;
use crate::{Error, weights::BLOCK};

const KEY: &str = "quantization_config";

/// Refuses a quantisation that is not computed here.
pub(crate) fn check(raw: &Raw) -> Result<(), Error> {
    let Some(config) = raw.get(KEY) else { return Ok(()) };
    let checked = match config.get("quant_method").and_then(Value::as_str) {
        Some("compressed-tensors") => compressed_tensors(config),
        Some("fp8") => fp8(config),
        Some(method) => Err(format!("`quant_method` {method} is not supported (compressed-tensors, fp8)")),
        None => Err("`quant_method` is absent".to_owned()),
    };
    checked.map_err(|reason| raw.bad(KEY, reason.chars().take(256).collect::<String>()))
}

fn compressed_tensors(config: &Value) -> Result<(), String> {
    one_of(config, "format", &["int-quantized", "float-quantized", "naive-quantized"])?;
    absent(config, "kv_cache_scheme")?;
    if let Some(sparsity) = config.get("sparsity_config").filter(|sparsity| present(sparsity)) {
        one_of(sparsity, "format", &["dense"])?;
    }
    let groups = config.get("config_groups").and_then(Value::as_object).ok_or("`config_groups` is absent")?;
    for group in groups.values() {
        let weights = group.get("weights").filter(|weights| present(weights)).ok_or("a group without `weights`")?;
        one_of(weights, "type", &["int", "float"])?;
        one_of(weights, "strategy", &["channel", "tensor", "block"])?;
        if weights.get("num_bits").and_then(Value::as_u64) != Some(8) {
            return Err("`num_bits` of weights must be 8".to_owned());
        }
        if weights.get("symmetric").and_then(Value::as_bool) == Some(false) {
            return Err("asymmetric weights (zero points) are not supported".to_owned());
        }
        absent(weights, "group_size")?;
        blocks(weights, "block_structure")?;
        absent(group, "output_activations")?;
        let input = group.get("input_activations").filter(|input| present(input));
        if input.is_some_and(|input| !matches!(input.get("dynamic"), Some(Value::Bool(true)))) {
            return Err("statically quantised activations are not supported".to_owned());
        }
    }
    Ok(())
}

fn fp8(config: &Value) -> Result<(), String> {
    blocks(config, "weight_block_size")?;
    match config.get("activation_scheme").filter(|scheme| present(scheme)) {
        None => Ok(()),
        Some(_) => one_of(config, "activation_scheme", &["dynamic"]),
    }
}

fn one_of(config: &Value, key: &str, supported: &[&str]) -> Result<(), String> {
    match config.get(key).and_then(Value::as_str) {
        Some(value) if supported.contains(&value) => Ok(()),
        Some(value) => Err(format!("`{key}` {value} is not supported ({})", supported.join(", "))),
        None => Err(format!("`{key}` is absent")),
    }
}

/// Blocks that share a scale, if there are any, are ours.
fn blocks(config: &Value, key: &str) -> Result<(), String> {
    match config.get(key).filter(|value| present(value)) {
        Some(value) if *value != json!([BLOCK, BLOCK]) => {
            Err(format!("`{key}` {value} is not supported ([{BLOCK}, {BLOCK}])"))
        }
        _ => Ok(()),
    }
}

fn absent(config: &Value, key: &str) -> Result<(), String> {
    match config.get(key) {
        Some(value) if present(value) => Err(format!("`{key}` is not supported")),
        _ => Ok(()),
    }
}

/// Whether a value says anything: writers put null, or an empty object, where there is nothing.
fn present(value: &Value) -> bool {
    !value.is_null() && value.as_object().is_none_or(|object| !object.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What llm-compressor writes for W8A16, changed by `change`.
    fn compressed(change: impl FnOnce(&mut Value)) -> Result<(), String> {
        let mut config = json!({
            "config_groups": {"group_0": {
                "input_activations": null, "output_activations": null, "targets": ["Linear"],
                "weights": {"actorder": null, "block_structure": null, "dynamic": false, "group_size": null, "num_bits": 8,
                    "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": true, "type": "int"}
            }},
            "format": "int-quantized", "global_compression_ratio": null, "ignore": ["lm_head"], "kv_cache_scheme": null,
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        });
        change(&mut config);
        compressed_tensors(&config)
    }

    #[test]
    fn symmetric_weights_by_channel_are_understood() {
        assert_eq!(compressed(|_| ()), Ok(()));
        assert_eq!(compressed(|c| c["config_groups"]["group_0"]["weights"]["strategy"] = json!("tensor")), Ok(()));
        assert_eq!(
            compressed(|c| c["config_groups"]["group_0"]["input_activations"] = json!({"dynamic": true})),
            Ok(())
        );
        assert_eq!(fp8(&json!({"quant_method": "fp8", "activation_scheme": "dynamic"})), Ok(()));
        // DeepSeek-V3's own.
        let blocks = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]});
        assert_eq!(fp8(&blocks), Ok(()));
        let block = |c: &mut Value| {
            let weights = &mut c["config_groups"]["group_0"]["weights"];
            (weights["strategy"], weights["block_structure"]) = (json!("block"), json!([128, 128]));
        };
        assert_eq!(compressed(block), Ok(()));
    }

    #[test]
    fn what_is_not_computed_here_is_refused_by_name() {
        let refused = |pointer: &str, value: Value, named: &str| {
            let error = compressed(|config| match pointer.rsplit_once('/') {
                Some((parent, key)) => {
                    config.pointer_mut(parent).unwrap()[key] = value.clone();
                }
                None => unreachable!(),
            });
            assert!(error.as_ref().is_err_and(|error| error.contains(named)), "{pointer} {value}: {error:?}");
        };
        refused("/format", json!("pack-quantized"), "pack-quantized");
        refused("/kv_cache_scheme", json!({"num_bits": 8}), "kv_cache_scheme");
        refused("/sparsity_config", json!({"format": "sparse-bitmask"}), "sparse-bitmask");
        refused("/config_groups", json!(null), "config_groups");
        let weights = "/config_groups/group_0/weights/";
        refused(&format!("{weights}num_bits"), json!(4), "num_bits");
        refused(&format!("{weights}group_size"), json!(128), "group_size");
        refused(&format!("{weights}strategy"), json!("group"), "group");
        refused(&format!("{weights}symmetric"), json!(false), "asymmetric");
        refused(&format!("{weights}block_structure"), json!([64, 128]), "block_structure");
        refused("/config_groups/group_0/input_activations", json!({"dynamic": false}), "statically");
        refused("/config_groups/group_0/input_activations", json!({"dynamic": "local"}), "statically");
        assert!(fp8(&json!({"weight_block_size": [1, 128]})).is_err_and(|e| e.contains("`weight_block_size` [1,128]")));
        assert!(fp8(&json!({"activation_scheme": "static"})).is_err_and(|e| e.contains("static")));
    }
}
