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
    warnings.extend(not_ready(&members, &models));
    warnings.extend(unlike(records));
    warnings.extend(broken_ways(&members));
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

/// What is there, and does not work: nobody of a kind is ready.
fn not_ready(members: &[MemberReport], models: &[ModelReport]) -> Vec<String> {
    let mut warnings = Vec::new();
    let none_ready = |role: Role, of: &dyn Fn(&MemberReport) -> bool| {
        let mut those = members.iter().filter(|member| member.works_as == role && of(member)).peekable();
        those.peek().is_some() && those.all(|member| member.state != State::Ready)
    };
    if none_ready(Role::Router, &|_| true) {
        warnings.push("no router is ready: clients have nobody to talk to".to_owned());
    }
    for model in models.iter().filter(|model| !model.decode.is_empty()) {
        if none_ready(Role::Decode, &|member| model.decode.contains(&member.id)) {
            warnings.push(format!("model {}: no decode worker is ready, so nobody answers", model.name));
        } else if none_ready(Role::Prefill, &|member| model.prefill.contains(&member.id)) {
            let then = "decode workers read prompts themselves";
            warnings.push(format!("model {}: no prefill worker is ready: {then}", model.name));
        }
    }
    warnings
}

/// What should be the same everywhere, and is not.
fn unlike(records: &[Member]) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut tokenizers: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
    for member in records {
        if let Some(model) = member.model.as_ref().filter(|model| !model.tokenizer.is_empty()) {
            tokenizers.entry(&model.name).or_default().entry(&model.tokenizer).or_insert(member.id.as_str());
        }
    }
    for (model, by_hash) in tokenizers.iter().filter(|(_, by_hash)| by_hash.len() > 1) {
        let who =
            by_hash.iter().map(|(hash, member)| format!("{member} has {hash:.12}")).collect::<Vec<_>>().join(", ");
        warnings.push(format!("model {model}: tokenizers differ: {who}"));
    }
    let mut stores = records.iter().filter_map(|member| Some((member, member.store.as_ref()?)));
    if let Some((first, ours)) = stores.next() {
        for (other, theirs) in stores {
            for (what, ours, theirs) in
                [("group_blocks", ours.group_blocks, theirs.group_blocks), ("replicas", ours.replicas, theirs.replicas)]
            {
                if ours != theirs {
                    let (first, other) = (&first.id, &other.id);
                    warnings.push(format!(
                        "store nodes divide unlike: {what} is {ours} on {first} and {theirs} on {other}"
                    ));
                }
            }
        }
    }
    warnings
}

/// Pairs between which nothing moves any more.
fn broken_ways(members: &[MemberReport]) -> Vec<String> {
    let workers = members.iter().filter_map(|member| Some((member, member.live.as_ref()?.worker()?)));
    let broken = workers.flat_map(|(member, worker)| {
        let broken = worker.peers.iter().filter(|peer| peer.resting_ms > 0);
        broken.map(move |peer| {
            let (id, peer, failures) = (&member.id, &peer.name, peer.failures_in_a_row);
            format!("{id} can't move blocks to or from {peer}: {failures} failures in a row (kvasirctl transfers)")
        })
    });
    broken.collect()
}
