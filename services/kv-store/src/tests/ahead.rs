//! Room made ahead: one call a block for whoever writes one after the other, and what becomes of room that nobody fills.

use kvasir_proto::{convert, v1};
use kvasir_store_client::{Origin, WriteReport};
use kvasir_transfer::Op;
use kvasir_types::{BlockHash, TransportKind};

use super::harness::{
    BLOCK, Client, Cluster, TestNode, commit_request, content, eventually, hashes, request, reserve_request, soon,
};

/// Blocks that are too large to be sent along with a call.
const LARGE: u64 = 8 * BLOCK;

async fn write_large(client: &Client, hash: BlockHash, offset: u64) -> WriteReport {
    client.store.write(&request(), &Origin::default(), &[(hash, offset)], LARGE, soon()).await
}

async fn read_large(client: &Client, hash: BlockHash, offset: u64) -> usize {
    client.store.read(&request(), &[(hash, offset)], LARGE, soon()).await.blocks
}

/// How often a call was made.
fn calls(node: &TestNode, call: &str) -> u64 {
    let begins = format!("kvasir_kv_store_call_seconds_count{{call=\"{call}\"}} ");
    let page = node.context.metrics.encode();
    page.lines().find_map(|line| line.strip_prefix(&begins)).map_or(0, |count| count.parse().unwrap())
}

/// Reserves a block by hand, and another one ahead.
async fn reserve_ahead(node: &TestNode, first: u32) -> (v1::ReserveResponse, Option<v1::Ahead>) {
    let message = v1::ReserveRequest { ahead: true, ..reserve_request(&hashes(first..first + 1)) };
    let reserved = node.raw().await.reserve(message).await.unwrap().into_inner();
    let ahead = reserved.ahead;
    (reserved, ahead)
}

/// Commits the arena's first block into room made ahead, under this name.
fn named(client: &Client, reservation: u64, hash: BlockHash) -> v1::CommitRequest {
    let sum = client.engine.checksum(0, BLOCK).unwrap();
    let named = v1::ReserveRequest { ahead: true, ..reserve_request(&[hash]) };
    v1::CommitRequest { named: Some(named), ..commit_request(reservation, &[(hash, sum)]) }
}

#[tokio::test]
async fn blocks_written_one_after_the_other_take_one_call_each() {
    for transport in [TransportKind::Local, TransportKind::Shm, TransportKind::Tcp] {
        let cluster = Cluster::with(&[transport]);
        let node = cluster.node("kv-0", |_| {}).await;
        let client = cluster.client(16);
        let all = hashes(0..8);
        for &hash in &all {
            let part = |n: u64| {
                client.engine.write_bytes(n * BLOCK, &content(hash.extend(&[kvasir_types::TokenId(n as u32)])))
            };
            (0..8).for_each(|n| part(n).unwrap());
            let sum = client.engine.checksum(0, LARGE).unwrap();
            let report = write_large(&client, hash, 0).await;
            assert_eq!((report.written, report.error.is_none()), (1, true), "{transport:?}: {report:?}");
            assert_eq!(read_large(&client, hash, LARGE).await, 1, "{transport:?}");
            assert_eq!(client.engine.checksum(LARGE, LARGE).unwrap(), sum, "{transport:?}");
        }
        assert!(calls(&node, "reserve") < 8 && calls(&node, "commit") == 8, "room made ahead is not used");
        assert_eq!(write_large(&client, all[3], 0).await.present, 1);
        eventually("what nobody filled is free", || {
            let usage = node.node.usage();
            usage.reserved == 0 && usage.used_bytes == 8 * LARGE
        })
        .await;
        let (totals, torn) = node.node.totals();
        assert_eq!((totals.committed_blocks, totals.expired_reservations, torn), (8, 0, 0));
    }
}

#[tokio::test]
async fn a_writer_who_dies_with_room_made_ahead_is_fenced_off_and_its_room_is_free_again() {
    for transport in [TransportKind::Local, TransportKind::Shm, TransportKind::Tcp] {
        let cluster = Cluster::with(&[transport]);
        let node = cluster.node("kv-0", |config| config.reservation_ms = 100).await;
        let client = cluster.client(2);
        client.prepare(0, &hashes(1..2));
        let (_, ahead) = reserve_ahead(&node, 0).await;
        let ahead = ahead.unwrap();
        client.touch(Op::Write, &node, ahead.grant, ahead.offset).await.unwrap();
        eventually("the room is free", || node.node.usage().used_bytes == 0).await;
        client.touch(Op::Write, &node, ahead.grant, ahead.offset).await.unwrap_err();
        let late =
            node.raw().await.commit(named(&client, ahead.reservation, hashes(1..2)[0])).await.unwrap().into_inner();
        assert_eq!((late.committed, late.state(), late.ahead), (0, v1::slot::State::Unspecified, None));
        assert_eq!(node.node.usage().blocks, 0);
    }
}

#[tokio::test]
async fn a_block_committed_into_room_made_ahead_can_no_longer_be_written() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (client, hash) = (cluster.client(2), hashes(1..2)[0]);
    client.prepare(0, &[hash]);
    let ahead = reserve_ahead(&node, 0).await.1.unwrap();
    client.touch(Op::Write, &node, ahead.grant, ahead.offset).await.unwrap();
    let commit = named(&client, ahead.reservation, hash);
    for state in [v1::slot::State::Reserved, v1::slot::State::Unspecified] {
        let answer = node.raw().await.commit(commit.clone()).await.unwrap().into_inner();
        assert_eq!((answer.committed, answer.state()), (1, state), "again is the same");
    }
    client.engine.write_bytes(0, &vec![0; BLOCK as usize]).unwrap();
    client.touch(Op::Write, &node, ahead.grant, ahead.offset).await.unwrap_err();
    let places = client.places(1, &[hash]);
    assert_eq!(client.read(&places).await.blocks, 1);
    assert!(client.has(&places));
}

#[tokio::test]
async fn of_two_writers_of_a_block_one_writes_and_the_other_is_told_whatever_room_they_have() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(2);
    client.prepare(0, &hashes(1..2));
    let mut raw = node.raw().await;
    // One has reserved it by its name, the other has room that has none yet.
    let (reserved, ahead) = reserve_ahead(&node, 1).await;
    let busy = raw.commit(named(&client, ahead.unwrap().reservation, hashes(1..2)[0])).await.unwrap().into_inner();
    assert_eq!((busy.committed, busy.state(), busy.ahead), (0, v1::slot::State::Busy, None));
    let ahead = reserve_ahead(&node, 2).await.1.unwrap();
    client.touch(Op::Write, &node, reserved.grant, reserved.slots[0].offset).await.unwrap();
    let sum = client.engine.checksum(0, BLOCK).unwrap();
    let first = raw.commit(commit_request(reserved.reservation, &[(hashes(1..2)[0], sum)])).await.unwrap().into_inner();
    assert_eq!(first.committed, 1);
    let second = raw.commit(named(&client, ahead.reservation, hashes(1..2)[0])).await.unwrap().into_inner();
    assert_eq!((second.committed, second.state(), second.ahead), (0, v1::slot::State::Present, None));
    eventually("their room is free again", || node.node.usage().used_bytes == 2 * BLOCK).await;
}

#[tokio::test]
async fn lies_about_a_block_in_room_made_ahead_are_not_believed() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (client, hash, mut raw) = (cluster.client(2), hashes(1..2)[0], node.raw().await);
    client.prepare(0, &[hash]);
    let ahead = reserve_ahead(&node, 0).await.1.unwrap();
    // Nothing was written there; it has another size; it is two blocks; it was not made ahead; it has no name.
    let torn = raw.commit(named(&client, ahead.reservation, hash)).await.unwrap().into_inner();
    assert_eq!((torn.committed, torn.state(), torn.ahead), (0, v1::slot::State::Reserved, None));
    let (reserved, ahead) = reserve_ahead(&node, 2).await;
    let ahead = ahead.unwrap();
    let mut other = named(&client, ahead.reservation, hash);
    other.named.as_mut().unwrap().block_bytes = 2 * BLOCK;
    assert_eq!(raw.commit(other).await.unwrap().into_inner().state(), v1::slot::State::Unspecified);
    let mut two = named(&client, ahead.reservation, hash);
    two.named.as_mut().unwrap().hashes = convert::pack16(hashes(1..3).iter().map(|hash| &hash.0));
    raw.commit(two).await.unwrap_err();
    let answer = raw.commit(named(&client, reserved.reservation, hash)).await.unwrap().into_inner();
    assert_eq!((answer.committed, answer.state()), (0, v1::slot::State::Unspecified));
    client.touch(Op::Write, &node, ahead.grant, ahead.offset).await.unwrap();
    let sum = client.engine.checksum(0, BLOCK).unwrap();
    let nameless = raw.commit(commit_request(ahead.reservation, &[(hash, sum)])).await.unwrap().into_inner();
    assert_eq!(nameless.committed, 0);
    assert_eq!(node.node.usage().blocks, 0);
    // Beyond its slot nothing is open to the writer.
    let ahead = reserve_ahead(&node, 3).await.1.unwrap();
    client.touch(Op::Write, &node, ahead.grant, ahead.offset + 1).await.unwrap_err();
}

#[tokio::test]
async fn who_does_not_ask_for_room_ahead_gets_none_and_nobody_does_of_a_node_that_leaves() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let mut raw = node.raw().await;
    assert_eq!(raw.reserve(reserve_request(&hashes(0..1))).await.unwrap().into_inner().ahead, None);
    assert!(reserve_ahead(&node, 1).await.1.is_some());
    assert_eq!(reserve_ahead(&node, 1).await.1, None, "there is nothing to write");
    // However many ask: an eighth of the memory.
    let mut given = 1;
    while reserve_ahead(&node, 100 + given).await.1.is_some() {
        given += 1;
    }
    assert!((2..=64).contains(&given) && u64::from(given) * BLOCK <= 1 << 20, "{given}");
    raw.drain(v1::DrainRequest {}).await.unwrap();
    eventually("the rest has ended", || node.node.usage().reserved <= 2 + u64::from(given)).await;
    assert_eq!(reserve_ahead(&node, 50).await.1, None);
}

#[tokio::test]
async fn a_node_that_was_started_anew_knows_nothing_of_room_it_had_made() {
    let cluster = Cluster::new();
    let mut node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(16);
    let all = hashes(0..3);
    client.prepare(0, &hashes(0..8));
    assert_eq!(write_large(&client, all[0], 0).await.written, 1);
    let old = reserve_ahead(&node, 9).await.1.unwrap();
    node.kill();
    node.leave().await;
    let node = cluster.node("kv-0", |_| {}).await;
    assert_eq!(write_large(&client, all[1], 0).await.written, 1);
    client.touch(Op::Write, &node, old.grant, old.offset).await.unwrap_err();
    let answer = node.raw().await.commit(named(&client, old.reservation, all[2])).await.unwrap().into_inner();
    assert_eq!((answer.committed, answer.state()), (0, v1::slot::State::Unspecified));
    assert_eq!(read_large(&client, all[1], LARGE).await, 1);
    assert_eq!(read_large(&client, all[0], LARGE).await, 0);
}
