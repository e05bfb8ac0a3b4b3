use insta::assert_snapshot;
use kvasir_cluster::{Member, ModelInfo};
use kvasir_types::{Incarnation, KvDtype, KvLayout, ModelFingerprint, PROTOCOL_VERSION};

use super::*;
use crate::{
    judge,
    report::{Blocks, StoreNumbers, WorkerNumbers},
};

fn member(role: Role, id: &str) -> Member {
    let worker = matches!(role, Role::Prefill | Role::Decode);
    Member {
        id: id.parse().unwrap(),
        incarnation: Incarnation(0xabc),
        role,
        grpc: if role == Role::Router { String::new() } else { "127.0.0.1:4000".to_owned() },
        admin: "127.0.0.1:4001".to_owned(),
        http: if role == Role::Router { "127.0.0.1:8000".to_owned() } else { String::new() },
        protocol: PROTOCOL_VERSION,
        version: "0.1.0".to_owned(),
        model: worker.then(|| ModelInfo {
            name: "demo".to_owned(),
            fingerprint: ModelFingerprint([0x5a; 16]),
            layout: KvLayout { block_size: 16, layers: 4, kv_heads: 2, head_dim: 32, dtype: KvDtype::Bf16 },
            max_model_len: 2048,
            tokenizer: String::new(),
        }),
        segment: None,
        draining: false,
    }
}

fn answered(member: &Member) -> MemberReport {
    let live = match member.role {
        Role::Router => None,
        Role::KvStore => Some(Live::Store(StoreNumbers {
            capacity_bytes: 64 << 20,
            used_bytes: 3 << 19,
            blocks: 48,
            lookups_total: 7,
            hit_blocks_total: 31,
            committed_blocks_total: 48,
            uptime_ms: 3 * 86_400_000 + 4 * 3_600_000,
            ..StoreNumbers::default()
        })),
        _ => Some(Live::Worker(WorkerNumbers {
            blocks: Blocks { total: 512, free: 490, cached: 12, in_use: 10 },
            running: 2,
            waiting: 1,
            requests_total: 1234,
            uptime_ms: 61_500,
        })),
    };
    MemberReport {
        role: member.role,
        id: member.id.to_string(),
        state: State::Ready,
        reason: String::new(),
        version: member.version.clone(),
        protocol: member.protocol,
        incarnation: member.incarnation.to_string(),
        grpc: member.grpc.clone(),
        http: member.http.clone(),
        admin: member.admin.clone(),
        model: member.model.as_ref().map(|model| model.name.clone()),
        live,
    }
}

/// A cluster of a router, two prefill workers, a decode worker and a store node; `change` makes it worse.
fn report(change: impl FnOnce(&mut Vec<Member>, &mut Vec<MemberReport>)) -> Report {
    let mut records: Vec<_> = [
        (Role::Router, "router-0"),
        (Role::Prefill, "prefill-0"),
        (Role::Prefill, "prefill-1"),
        (Role::Decode, "decode-0"),
        (Role::KvStore, "kv-store-0"),
    ]
    .map(|(role, id)| member(role, id))
    .into();
    let mut members: Vec<_> = records.iter().map(answered).collect();
    change(&mut records, &mut members);
    judge::report(&records, members)
}

/// A cluster in trouble: one worker gone, one with other weights and draining, no router.
fn troubled() -> Report {
    report(|records, members| {
        members[1].state = State::Unreachable;
        members[1].reason = "grpc 127.0.0.1:4000: Connection refused (os error 111)".to_owned();
        members[1].live = None;
        records[2].model.as_mut().unwrap().fingerprint = ModelFingerprint([0x66; 16]);
        members[2].state = State::Draining;
        members[2].reason = "takes no new work".to_owned();
        records[4].protocol = 2;
        records.remove(0);
        members.remove(0);
    })
}

#[test]
fn status_of_a_healthy_cluster() {
    assert_snapshot!(status(&report(|_, _| ())), @"");
}

#[test]
fn status_of_a_cluster_in_trouble() {
    assert_snapshot!(status(&troubled()), @"");
}

#[test]
fn workers_with_their_numbers() {
    assert_snapshot!(workers(&troubled()), @"");
}

#[test]
fn models_and_who_serves_them() {
    assert_snapshot!(models(&troubled()), @"");
}

#[test]
fn json_holds_everything_under_names_that_stay() {
    let report = report(|records, members| {
        records.drain(..3);
        members.drain(..3);
    });
    assert_snapshot!(json(&report), @"");
}

#[test]
fn an_empty_cluster_is_told_in_words() {
    let empty = Report::default();
    assert_snapshot!(status(&empty) + &workers(&empty) + &models(&empty), @"");
}

#[test]
fn workers_of_different_models_are_not_warned_about() {
    let report = report(|records, _| {
        for index in [1, 2] {
            let model = records[index].model.as_mut().unwrap();
            model.name = "other".to_owned();
            model.fingerprint = ModelFingerprint([1; 16]);
        }
        records.push(Member { role: Role::Decode, ..records[1].clone() });
    });
    assert_eq!(report.warnings, [""; 0]);
}

#[test]
fn numbers_are_short() {
    let shown: Vec<_> = [0, 59_999, 60_000, 3_599_000, 3_600_000, 90_000_000].map(duration).into();
    assert_eq!(shown, ["0s", "59s", "1m00s", "59m59s", "1h00m", "1d01h"]);
    let shown: Vec<_> = [0, 1023, 1024, 1536 << 10, u64::MAX].map(bytes).into();
    assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "16384.0 PiB"]);
}
