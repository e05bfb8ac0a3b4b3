//! DeepSeek-V2 and its Lite: experts by softmax, greedily or within the groups with the best experts.

use super::{Family, deepseek};
use crate::{
    Error, ModelConfig,
    config::raw::Raw,
    graph::{ExpertGroups, GateSpec, Scoring},
};

pub(super) const FAMILY: Family = Family { model_type: "deepseek_v2", architecture: "DeepseekV2ForCausalLM", read };

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    raw.only("scoring_func", &["softmax"])?;
    raw.only("topk_method", &["greedy", "group_limited_greedy"])?;
    // DeepSeek's own code normalises instead of scaling, transformers ignores the key: no published model has it set.
    raw.never("norm_topk_prob")?;
    let grouped = raw.text("topk_method")? == Some("group_limited_greedy");
    let scale = raw.positive_if_any("routed_scaling_factor", 1e6)?.unwrap_or(1.0) as f32;
    let mlp_bias = raw.flag("mlp_bias", false)?;
    deepseek::read(raw, &FAMILY, mlp_bias, |top_k, groups| {
        if grouped && groups.is_none() {
            return Err(raw.bad("n_group", "absent (or topk_group), and `topk_method` needs it"));
        }
        Ok(GateSpec {
            top_k,
            scoring: Scoring::Softmax,
            correction: None,
            groups: groups.filter(|_| grouped).map(|(count, kept)| ExpertGroups { count, kept, best: 1 }),
            normalise: false,
            scale,
        })
    })
}
