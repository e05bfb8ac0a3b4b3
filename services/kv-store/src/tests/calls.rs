//! Calls without one-sided bytes, and those of operators.

use kvasir_proto::{convert, v1};
use kvasir_types::{BlockHash, PROTOCOL_VERSION};
use tonic::Code;

use super::harness::{BLOCK, Cluster, content, eventually, hashes};

fn names(hashes: &[BlockHash]) -> tonic::codegen::Bytes {
    convert::pack16(hashes.iter().map(|hash| &hash.0))
}

fn sum(bytes: &[u8]) -> [u8; 16] {
    let mut sum = [0; 16];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    sum
}

fn put_request(hashes: &[BlockHash], tenant: &str) -> v1::PutRequest {
    let blocks: Vec<Vec<u8>> = hashes.iter().map(|&hash| content(hash)).collect();
    let sums: Vec<[u8; 16]> = blocks.iter().map(|block| sum(block)).collect();
    v1::PutRequest {
        protocol_version: PROTOCOL_VERSION,
        hashes: names(hashes),
        blocks: blocks.into_iter().map(Into::into).collect(),
        checksums: convert::pack16(sums.iter()),
        runs: vec![v1::BlockRun { blocks: hashes.len() as u32, position: 0, group: 1, parent: Default::default() }],
        model: vec![5; 16].into(),
        tenant: tenant.into(),
        ..Default::default()
    }
}

fn get_request(hashes: &[BlockHash]) -> v1::GetRequest {
    v1::GetRequest { protocol_version: PROTOCOL_VERSION, block_bytes: BLOCK, hashes: names(hashes), wait_ms: 0 }
}

fn exists_request(hashes: &[BlockHash]) -> v1::ExistsRequest {
    v1::ExistsRequest { protocol_version: PROTOCOL_VERSION, block_bytes: BLOCK, hashes: names(hashes), index: false }
}

fn evict_request() -> v1::EvictRequest {
    v1::EvictRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() }
}

#[tokio::test]
async fn bytes_in_messages_are_stored_and_read_like_others() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (client, mut raw) = (cluster.client(10), node.raw().await);
    let all = hashes(0..6);
    let put = raw.put(put_request(&all[..4], "")).await.unwrap().into_inner();
    assert_eq!((put.committed, put.present), (4, 0));
    let put = raw.put(put_request(&all, "")).await.unwrap().into_inner();
    assert_eq!((put.committed, put.present), (2, 4));
    assert_eq!(
        raw.exists(exists_request(&hashes(0..8))).await.unwrap().into_inner().tiers[..],
        [1, 1, 1, 1, 1, 1, 0, 0]
    );
    let got = raw.get(get_request(&hashes(0..8))).await.unwrap().into_inner();
    assert!(got.blocks.iter().zip(&all).all(|(bytes, &hash)| bytes[..] == content(hash)));
    assert_eq!(got.blocks.len(), 6);
    let usage = node.node.usage();
    assert_eq!((usage.pinned, usage.reserved), (0, 0), "nothing stays held");
    let places = client.places(0, &all);
    assert_eq!(client.read(&places).await.blocks, 6);
    assert!(client.has(&places));
}

#[tokio::test]
async fn bytes_in_messages_are_bounded_and_must_be_what_they_are_said_to_be() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let mut raw = node.raw().await;
    let good = put_request(&hashes(0..2), "");
    let mut ragged = good.clone();
    ragged.blocks[1] = vec![1; 5].into();
    let few = v1::PutRequest { checksums: vec![0; 16].into(), ..good.clone() };
    let run = v1::PutRequest { runs: vec![v1::BlockRun { blocks: 9, ..Default::default() }], ..good.clone() };
    let tenant = v1::PutRequest { tenant: "t".repeat(65), ..good.clone() };
    for (part, bad) in [("several sizes", ragged), ("checksums", few), ("runs", run), ("tenant", tenant)] {
        let status = raw.put(bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(part), "{status:?}");
    }
    let lie = v1::PutRequest { checksums: vec![9; 32].into(), ..good };
    assert_eq!(raw.put(lie).await.unwrap().into_inner().committed, 0);
    assert_eq!(node.node.usage().used_bytes, 0);
    let large = v1::GetRequest { block_bytes: 9 << 20, ..get_request(&hashes(0..1)) };
    assert_eq!(raw.get(large).await.unwrap_err().code(), Code::InvalidArgument);
    // More than fits into one answer: as many as do.
    assert!(raw.put(v1::PutRequest::default()).await.unwrap_err().message().contains("version"));
}

#[tokio::test]
async fn what_a_reader_reports_is_checked_and_only_what_is_broken_goes() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (client, mut raw) = (cluster.client(3), node.raw().await);
    client.write(&client.prepare(0, &hashes(0..3))).await;
    let report = v1::ReportRequest { block_bytes: BLOCK, hashes: names(&hashes(0..3)), ended: Vec::new() };
    assert_eq!(raw.report(report.clone()).await.unwrap().into_inner().dropped, 0);
    let found = raw.lookup(super::harness::lookup_request(&hashes(1..2))).await.unwrap().into_inner();
    raw.release(v1::ReleaseRequest { lease: found.lease }).await.unwrap();
    node.node.engine().write_bytes(found.offsets[0], &[!content(hashes(1..2)[0])[0]]).unwrap();
    assert_eq!(raw.report(report).await.unwrap().into_inner().dropped, 1);
    assert_eq!(raw.exists(exists_request(&hashes(0..3))).await.unwrap().into_inner().tiers[..], [1, 0, 1]);
    assert_eq!(client.write(&client.prepare(0, &hashes(0..3))).await.written, 1, "it can be written again");
}

#[tokio::test]
async fn an_operator_evicts_by_name_by_origin_and_by_what_comes_before() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let mut raw = node.raw().await;
    let there = || node.node.usage().blocks;
    raw.put(put_request(&hashes(0..5), "a")).await.unwrap();
    raw.put(put_request(&hashes(10..15), "b")).await.unwrap();
    let status = raw.store_status(v1::StoreStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.origins.iter().map(|origin| origin.blocks).collect::<Vec<_>>(), [5, 5]);
    assert_eq!(status.disk_state, "none");

    assert_eq!(
        raw.evict(evict_request()).await.unwrap_err().code(),
        Code::InvalidArgument,
        "not everything by mistake"
    );
    let named = v1::EvictRequest { block_bytes: BLOCK, hashes: names(&hashes(3..4)), ..evict_request() };
    let evicted = raw.evict(named).await.unwrap().into_inner();
    assert_eq!((evicted.evicted, there()), (1, 9));
    // What followed the evicted block directly, and nothing else.
    let after = v1::EvictRequest { after: evicted.gone, ..evict_request() };
    let evicted = raw.evict(after).await.unwrap().into_inner();
    assert_eq!((evicted.evicted, there()), (1, 8));
    let of = v1::EvictRequest { model: vec![5; 16].into(), tenant: Some("b".into()), ..evict_request() };
    assert_eq!(raw.evict(of).await.unwrap().into_inner().evicted, 5);
    let other = v1::EvictRequest { model: vec![6; 16].into(), ..evict_request() };
    assert_eq!(raw.evict(other).await.unwrap().into_inner().evicted, 0);

    let held = raw.lookup(super::harness::lookup_request(&hashes(0..1))).await.unwrap().into_inner();
    let all = v1::EvictRequest { all: true, ..evict_request() };
    let evicted = raw.evict(all.clone()).await.unwrap().into_inner();
    assert_eq!((evicted.evicted, evicted.in_use, there()), (2, 1, 1), "what is being read stays");
    raw.release(v1::ReleaseRequest { lease: held.lease }).await.unwrap();
    assert_eq!(raw.evict(all).await.unwrap().into_inner().evicted, 1);
    assert_eq!(node.node.usage().used_bytes, 0);
}

#[tokio::test]
async fn pinned_blocks_outlive_others_until_their_pins_end() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |config| config.capacity_bytes = 1 << 20).await;
    let (client, mut raw) = (cluster.client(60), node.raw().await);
    client.write(&client.prepare(0, &hashes(0..10))).await;
    let pin = |keep: v1::pin_request::Keep, ttl_ms| v1::PinRequest {
        protocol_version: PROTOCOL_VERSION,
        block_bytes: BLOCK,
        hashes: names(&hashes(0..12)),
        keep: keep.into(),
        ttl_ms,
    };
    assert_eq!(raw.pin(pin(v1::pin_request::Keep::Hard, 100_000)).await.unwrap().into_inner().blocks, 10);
    client.write(&client.prepare(0, &hashes(100..160))).await;
    assert_eq!(client.read(&client.places(0, &hashes(0..10))).await.blocks, 10);
    assert_eq!(raw.pin(pin(v1::pin_request::Keep::Cached, 0)).await.unwrap().into_inner().blocks, 10);
    raw.pin(pin(v1::pin_request::Keep::Soft, 50)).await.unwrap();
    eventually("the pins have ended", || node.node.usage().kept == 0).await;
    client.write(&client.prepare(0, &hashes(200..260))).await;
    assert_eq!(client.read(&client.places(0, &hashes(0..10))).await.blocks, 0);
    assert_eq!(raw.pin(pin(v1::pin_request::Keep::Unspecified, 0)).await.unwrap_err().code(), Code::InvalidArgument);
}
