//! DeepSeek-V3 and R1: experts by sigmoid, chosen with a bias that keeps their load even, within the groups whose two best
//! are best.

use super::{Family, deepseek};
use crate::{
    Error, ModelConfig,
    config::raw::Raw,
    graph::{ExpertGroups, GateSpec, Scoring},
};

pub(super) const FAMILY: Family = Family { model_type: "deepseek_v3", architecture: "DeepseekV3ForCausalLM", read };

fn read(raw: &Raw) -> Result<ModelConfig, Error> {
    raw.only("scoring_func", &["sigmoid"])?;
    raw.only("topk_method", &["noaux_tc"])?;
    if !raw.flag("rope_interleave", true)? {
        return Err(raw.bad("rope_interleave", "false is not supported"));
    }
    let normalise = raw.flag("norm_topk_prob", true)?;
    let scale = raw.positive_if_any("routed_scaling_factor", 1e6)?.unwrap_or(2.5) as f32;
    deepseek::read(raw, &FAMILY, false, |top_k, groups| {
        let (count, kept) = groups.ok_or_else(|| raw.bad("n_group", "absent (or topk_group)"))?;
        Ok(GateSpec {
            top_k,
            scoring: Scoring::Sigmoid,
            correction: Some("mlp.gate.e_score_correction_bias".into()),
            groups: Some(ExpertGroups { count, kept, best: 2 }),
            normalise,
            scale,
        })
    })
}
