use insta::assert_snapshot;
use kvasir_cluster::{Member, ModelInfo};
use kvasir_types::{Incarnation, KvDtype, KvLayout, ModelFingerprint, PROTOCOL_VERSION, PeerTraffic, TransportKind};

use super::*;
use crate::{
    judge,
    output::json,
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
            layout: KvLayout { block_size: 16, layers: 4, kv_heads: 2, k_dim: 32, v_dim: 32, dtype: KvDtype::Bf16 },
            max_model_len: 2048,
            tokenizer: String::new(),
        }),
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
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
            peers: vec![],
        })),
    };
    MemberReport {
        role: member.role,
        works_as: member.works_as(),
        pinned: member.duty.pinned,
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
    assert_snapshot!(status(&report(|_, _| ()), false), @r#"
    all is well: 5 members

    ROLE      MEMBER      STATE  VERSION  MODEL  FREE  CACHED  IN USE  RUNNING  WAITING
    router    router-0    ready  0.1.0    -      -     -       -       -        -
    prefill   prefill-0   ready  0.1.0    demo   490   12      10      2        1
    prefill   prefill-1   ready  0.1.0    demo   490   12      10      2        1
    decode    decode-0    ready  0.1.0    demo   490   12      10      2        1
    kv-store  kv-store-0  ready  0.1.0    -      -     -       -       -        -

    router: 1 of 1 ready
    prefill: 2 of 2 ready, 1024 blocks (980 free, 24 cached, 20 in use), 4 running, 2 waiting
    decode: 1 of 1 ready, 512 blocks (490 free, 12 cached, 10 in use), 2 running, 1 waiting
    kv-store: 1 of 1 ready
    "#);
}

#[test]
fn status_of_a_cluster_in_trouble() {
    assert_snapshot!(status(&troubled(), false), @r#"
    6 things are wrong, see below

    ROLE      MEMBER      STATE        VERSION  MODEL  FREE  CACHED  IN USE  RUNNING  WAITING
    prefill   prefill-0   unreachable  0.1.0    demo   -     -       -       -        -
    prefill   prefill-1   draining     0.1.0    demo   490   12      10      2        1
    decode    decode-0    ready        0.1.0    demo   490   12      10      2        1
    kv-store  kv-store-0  ready        0.1.0    -      -     -       -       -        -

    prefill: 0 of 2 ready, 512 blocks (490 free, 12 cached, 10 in use), 2 running, 1 waiting
    decode: 1 of 1 ready, 512 blocks (490 free, 12 cached, 10 in use), 2 running, 1 waiting
    kv-store: 1 of 1 ready

    prefill prefill-0: unreachable: grpc 127.0.0.1:4000: Connection refused (os error 111)
    prefill prefill-1: draining: takes no new work
    warning: kv-store kv-store-0 speaks protocol 2, this kvasirctl 1
    warning: prefill-1 and decode-0 never work together: model fingerprint is 66666666666666666666666666666666 and 5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a
    warning: model demo: no decode worker with these weights and this layout, so nobody answers
    warning: no router: clients have nobody to talk to
    warning: model demo: no prefill worker is ready: decode workers read prompts themselves
    "#);
}

#[test]
fn workers_with_their_numbers() {
    assert_snapshot!(workers(&troubled()), @r#"
    ROLE     MEMBER     STATE        GRPC            UPTIME  REQUESTS  RUNNING  WAITING  BLOCKS  FREE  CACHED  IN USE
    prefill  prefill-0  unreachable  127.0.0.1:4000  -       -         -        -        -       -     -       -
    prefill  prefill-1  draining     127.0.0.1:4000  1m01s   1234      2        1        512     490   12      10
    decode   decode-0   ready        127.0.0.1:4000  1m01s   1234      2        1        512     490   12      10

    STORE       STATE  GRPC            UPTIME  USED     CAPACITY  BLOCKS  PINNED  RESERVED  LOOKUPS  HITS  WRITTEN  EVICTED
    kv-store-0  ready  127.0.0.1:4000  3d04h   1.5 MiB  64.0 MiB  48      0       0         7        31    48       0

    prefill prefill-0: unreachable: grpc 127.0.0.1:4000: Connection refused (os error 111)
    prefill prefill-1: draining: takes no new work
    "#);
}

#[test]
fn transfers_by_pair_with_the_reason_for_their_way() {
    let report = report(|_, answers| {
        let Some(Live::Worker(worker)) = &mut answers[1].live else { panic!("a worker") };
        let peer = PeerTraffic {
            name: "decode-0".into(),
            transport: Some(TransportKind::Shm),
            reason: "same host".into(),
            read_bytes: 0,
            written_bytes: 3 << 20,
            completed: 40,
            failed: 0,
            in_flight_bytes: 0,
            p50_us: 64,
            p99_us: 2048,
            failures_in_a_row: 0,
            resting_ms: 0,
            busy_us: 0,
        };
        let dead = PeerTraffic {
            name: "kv-store-0".into(),
            transport: None,
            reason: "always possible; shm: another host".into(),
            p50_us: 0,
            p99_us: 0,
            failed: 5,
            failures_in_a_row: 5,
            resting_ms: 2_000,
            ..peer.clone()
        };
        worker.peers = vec![peer, dead];
    });
    assert_eq!(
        transfers(&report),
        "\
MEMBER     PEER        TRANSPORT  READ  WRITTEN  DONE  FAILED  P50     P99      STATE     WHY
prefill-0  decode-0    shm        0 B   3.0 MiB  40    0       ≤64 µs  ≤2.0 ms  ok        same host
prefill-0  kv-store-0  ?          0 B   3.0 MiB  40    5       -       -        rests 2s  always possible; shm: another host
"
    );
    assert_eq!(transfers(&Report::default()), "no transfers: no worker has moved KV blocks yet\n");
}

#[test]
fn models_and_who_serves_them() {
    assert_snapshot!(models(&troubled()), @r#"
    MODEL  FINGERPRINT   CONTEXT  KV DTYPE  BLOCK      BLOCK BYTES  PREFILL    DECODE
    demo   5a5a5a5a5a5a  2048     bf16      16 tokens  16.0 KiB     prefill-0  decode-0
    demo   666666666666  2048     bf16      16 tokens  16.0 KiB     prefill-1  -
    "#);
}

#[test]
fn json_holds_everything_under_names_that_stay() {
    let report = report(|records, members| {
        records.drain(..3);
        members.drain(..3);
    });
    assert_snapshot!(json(&report), @r#"
    {
      "members": [
        {
          "role": "decode",
          "works_as": "decode",
          "pinned": false,
          "id": "decode-0",
          "state": "ready",
          "reason": "",
          "version": "0.1.0",
          "protocol": 1,
          "incarnation": "0000000000000abc",
          "grpc": "127.0.0.1:4000",
          "http": "",
          "admin": "127.0.0.1:4001",
          "model": "demo",
          "live": {
            "worker": {
              "blocks": {
                "total": 512,
                "free": 490,
                "cached": 12,
                "in_use": 10
              },
              "running": 2,
              "waiting": 1,
              "requests_total": 1234,
              "uptime_ms": 61500,
              "peers": []
            }
          }
        },
        {
          "role": "kv-store",
          "works_as": "kv-store",
          "pinned": false,
          "id": "kv-store-0",
          "state": "ready",
          "reason": "",
          "version": "0.1.0",
          "protocol": 1,
          "incarnation": "0000000000000abc",
          "grpc": "127.0.0.1:4000",
          "http": "",
          "admin": "127.0.0.1:4001",
          "model": null,
          "live": {
            "store": {
              "capacity_bytes": 67108864,
              "used_bytes": 1572864,
              "blocks": 48,
              "pinned": 0,
              "reserved": 0,
              "lookups_total": 7,
              "hit_blocks_total": 31,
              "committed_blocks_total": 48,
              "evicted_blocks_total": 0,
              "uptime_ms": 273600000
            }
          }
        }
      ],
      "totals": [
        {
          "role": "decode",
          "members": 1,
          "ready": 1,
          "blocks": {
            "total": 512,
            "free": 490,
            "cached": 12,
            "in_use": 10
          },
          "running": 2,
          "waiting": 1
        },
        {
          "role": "kv-store",
          "members": 1,
          "ready": 1,
          "blocks": {
            "total": 0,
            "free": 0,
            "cached": 0,
            "in_use": 0
          },
          "running": 0,
          "waiting": 0
        }
      ],
      "models": [
        {
          "name": "demo",
          "fingerprint": "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a",
          "max_model_len": 2048,
          "layout": {
            "block_size": 16,
            "layers": 4,
            "kv_heads": 2,
            "head_dim": 32,
            "dtype": "bf16"
          },
          "block_bytes": 16384,
          "tokenizer": "",
          "prefill": [],
          "decode": [
            "decode-0"
          ]
        }
      ],
      "warnings": [
        "no router: clients have nobody to talk to"
      ]
    }
    "#);
}

#[test]
fn an_empty_cluster_is_told_in_words() {
    let empty = Report::default();
    assert_snapshot!(status(&empty, false) + &workers(&empty) + &models(&empty), @r#"
    no members: no service of this cluster is running (or --prefix names another cluster)
    no workers and no store nodes
    no models: no worker is running
    "#);
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

#[test]
fn status_of_a_large_cluster_is_one_screen_and_shows_who_is_not_ready() {
    let large = report(|records, members| {
        for at in 0..200 {
            let record = member(Role::Decode, &format!("more-{at}"));
            members.push(answered(&record));
            records.push(record);
        }
        members[100].state = State::Unreachable;
        members[100].reason = "grpc 127.0.0.1:4000: no answer within 3000 ms".to_owned();
        members[100].live = None;
    });
    assert_snapshot!(status(&large, false), @r#"
    one thing is wrong, see below

    ROLE    MEMBER   STATE        VERSION  MODEL  FREE  CACHED  IN USE  RUNNING  WAITING
    decode  more-95  unreachable  0.1.0    demo   -     -       -       -        -
    … and 204 more: -o wide shows them

    router: 1 of 1 ready
    prefill: 2 of 2 ready, 1024 blocks (980 free, 24 cached, 20 in use), 4 running, 2 waiting
    decode: 200 of 201 ready, 102400 blocks (98000 free, 2400 cached, 2000 in use), 400 running, 200 waiting
    kv-store: 1 of 1 ready

    decode more-95: unreachable: grpc 127.0.0.1:4000: no answer within 3000 ms
    "#);
    assert_eq!(status(&large, true).lines().filter(|line| line.contains("more-")).count(), 201, "200 and the reason");
}

#[test]
fn what_does_not_fit_or_does_not_work_is_warned_of() {
    use kvasir_cluster::StoreInfo;

    let warnings = |change: &dyn Fn(&mut Vec<Member>, &mut Vec<MemberReport>)| report(change).warnings;
    let tokenizers = warnings(&|records, _| {
        records[1].model.as_mut().unwrap().tokenizer = "aaaaaaaaaaaaaaaa".to_owned();
        records[3].model.as_mut().unwrap().tokenizer = "bbbbbbbbbbbbbbbb".to_owned();
    });
    assert_eq!(tokenizers, ["model demo: tokenizers differ: prefill-0 has aaaaaaaaaaaa, decode-0 has bbbbbbbbbbbb"]);
    let stores = warnings(&|records, _| {
        records[4].store = Some(StoreInfo::default());
        let other = Member { store: Some(StoreInfo { replicas: 2, ..StoreInfo::default() }), ..records[4].clone() };
        records.push(Member { id: "kv-store-1".parse().unwrap(), ..other });
    });
    assert_eq!(stores, ["store nodes divide unlike: replicas is 1 on kv-store-0 and 2 on kv-store-1"]);
    let routers = warnings(&|_, members| members[0].state = State::NotReady);
    assert_eq!(routers, ["no router is ready: clients have nobody to talk to"]);
    let decode = warnings(&|_, members| members[3].state = State::Draining);
    assert_eq!(decode, ["model demo: no decode worker is ready, so nobody answers"]);
    let one_of_two = warnings(&|_, members| members[1].state = State::Unreachable);
    assert_eq!(one_of_two, [""; 0]);
    let way = warnings(&|_, members| {
        let Some(Live::Worker(worker)) = &mut members[1].live else { panic!("a worker") };
        worker.peers.push(PeerTraffic {
            name: "decode-0".into(),
            transport: None,
            reason: String::new(),
            read_bytes: 0,
            written_bytes: 0,
            completed: 0,
            failed: 5,
            in_flight_bytes: 0,
            p50_us: 0,
            p99_us: 0,
            failures_in_a_row: 5,
            resting_ms: 10,
            busy_us: 0,
        });
    });
    assert_eq!(way.len(), 1);
    assert!(way[0].starts_with("prefill-0 can't move blocks to or from decode-0: 5 failures in a row"), "{way:?}");
}
