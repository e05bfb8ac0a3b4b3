//! From answers to a report: sums, models, and what does not fit together. Pure.

use std::collections::BTreeMap;

use kvasir_cluster::{Member, Mismatch};
use kvasir_types::Role;

use crate::report::{Blocks, MemberReport, ModelReport, Report, RoleTotals, State};

/// Most warnings that are told; the rest is a number.
const MAX_WARNINGS: usize = 20;

const ROLES: [Role; 4] = [Role::Router, Role::Prefill, Role::Decode, Role::KvStore];

/// Puts the records and what their owners said together.
pub(crate) fn report(records: &[Member], members: Vec<MemberReport>) -> Report {
    let models = models(records);
    let mut warnings = warnings(records, &models);
    if warnings.len() > MAX_WARNINGS {
        let more = warnings.len() - MAX_WARNINGS;
        warnings.truncate(MAX_WARNINGS);
        warnings.push(format!("and {more} more warnings"));
    }
    Report { totals: ROLES.iter().filter_map(|&role| totals(role, &members)).collect(), members, models, warnings }
}

fn totals(role: Role, members: &[MemberReport]) -> Option<RoleTotals> {
    let mut totals = RoleTotals { role, members: 0, ready: 0, blocks: Blocks::default(), running: 0, waiting: 0 };
    for member in members.iter().filter(|member| member.works_as == role) {
        totals.members += 1;
        totals.ready += u64::from(member.state == State::Ready);
        if let Some(numbers) = member.live.as_ref().and_then(|live| live.worker()) {
            totals.blocks += numbers.blocks;
            totals.running = totals.running.saturating_add(numbers.running);
            totals.waiting = totals.waiting.saturating_add(numbers.waiting);
        }
    }
    (totals.members > 0).then_some(totals)
}

/// Models by name; workers that call different weights or layouts by one name are different rows.
fn models(records: &[Member]) -> Vec<ModelReport> {
    let mut models: BTreeMap<(String, String, String), ModelReport> = BTreeMap::new();
    for member in records {
        let Some(model) = &member.model else { continue };
        let fingerprint = model.fingerprint.to_string();
        let key = (model.name.clone(), fingerprint.clone(), format!("{:?}", model.layout));
        let row = models.entry(key).or_insert_with(|| ModelReport {
            name: model.name.clone(),
            fingerprint,
            max_model_len: model.max_model_len,
            layout: model.layout,
            block_bytes: model.layout.block_bytes() as u64,
            tokenizer: model.tokenizer.clone(),
            prefill: Vec::new(),
            decode: Vec::new(),
        });
        match member.works_as() {
            Role::Prefill => row.prefill.push(member.id.to_string()),
            Role::Decode => row.decode.push(member.id.to_string()),
            Role::Router | Role::KvStore => {}
        }
        // What all of its workers can take.
        row.max_model_len = row.max_model_len.min(model.max_model_len);
    }
    models.into_values().collect()
}

fn warnings(records: &[Member], models: &[ModelReport]) -> Vec<String> {
    let mut warnings = Vec::new();
    for member in records {
        if let Err(mismatch) = member.speaks_our_protocol() {
            let (ours, theirs) = (mismatch.ours, mismatch.theirs);
            warnings.push(format!("{} {} speaks protocol {theirs}, this kvasirctl {ours}", member.role, member.id));
        }
    }
    for prefill in records.iter().filter(|member| member.works_as() == Role::Prefill) {
        for decode in records.iter().filter(|member| member.works_as() == Role::Decode) {
            let name = |member: &Member| member.model.as_ref().map(|model| model.name.clone());
            // Workers of different models are not meant to work together.
            if name(prefill) != name(decode) {
                continue;
            }
            if let Err(Mismatch { what, ours, theirs }) = prefill.compatible(decode) {
                let (prefill, decode) = (&prefill.id, &decode.id);
                warnings.push(format!("{prefill} and {decode} never work together: {what} is {ours} and {theirs}"));
            }
        }
    }
    for model in models.iter().filter(|model| model.decode.is_empty()) {
        warnings.push(format!(
            "model {}: no decode worker with these weights and this layout, so nobody answers",
            model.name
        ));
    }
    if !records.iter().any(|member| member.role == Role::Router) {
        warnings.push("no router: clients have nobody to talk to".to_owned());
    }
    warnings
}
