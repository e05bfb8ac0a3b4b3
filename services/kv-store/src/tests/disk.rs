//! A node with a disk: what memory has no room for, what a restart finds, and a disk that lies or is full.

use std::path::Path;

use kvasir_proto::v1;
use kvasir_types::BlockHash;

use super::harness::{BLOCK, Client, Cluster, TestNode, eventually, hashes};

/// Room for 51 blocks in memory, and 204 on disk.
async fn node(cluster: &Cluster, path: &Path) -> TestNode {
    cluster
        .node("kv-0", |config| {
            config.capacity_bytes = 1 << 20;
            config.disk.path = Some(path.to_owned());
            config.disk.capacity_bytes = 4 << 20;
        })
        .await
}

async fn on_disk(node: &TestNode, blocks: u64) {
    eventually("all is written down", || node.node.usage().disk_blocks == blocks).await;
    eventually("nobody is at them", || node.node.usage().pinned == 0).await;
}

/// Reads until the whole run has come, as a client that has time does.
async fn read_all(client: &Client, hashes: &[BlockHash]) -> usize {
    let places = client.places(0, hashes);
    let report = client.read(&places).await;
    assert!(report.error.is_none(), "{report:?}");
    assert!(client.has(&places[..report.blocks]), "the right bytes");
    report.blocks
}

#[tokio::test]
async fn what_memory_has_no_room_for_comes_from_disk() {
    let (cluster, dir) = (Cluster::new(), tempfile::tempdir().unwrap());
    let node = node(&cluster, dir.path()).await;
    let client = cluster.client(50);
    for first in [0, 100, 200] {
        client.write(&client.prepare(0, &hashes(first..first + 40))).await;
        on_disk(&node, u64::from(first / 100 + 1) * 40).await;
    }
    assert_eq!(node.node.usage().memory_blocks, 51);
    for first in [0, 100, 200, 0] {
        assert_eq!(read_all(&client, &hashes(first..first + 40)).await, 40);
    }
    let (totals, _) = node.node.totals();
    assert!(totals.promoted_blocks >= 80 && totals.evicted_blocks == 0, "{totals:?}");
}

#[tokio::test]
async fn a_node_that_was_killed_has_its_blocks_when_it_comes_back() {
    let (cluster, dir) = (Cluster::new(), tempfile::tempdir().unwrap());
    let mut first = node(&cluster, dir.path()).await;
    let client = cluster.client(50);
    let mut raw = first.raw().await;
    client.write(&client.prepare(0, &hashes(0..40))).await;
    on_disk(&first, 40).await;
    let tail: Vec<_> = hashes(38..40);
    let names = kvasir_proto::convert::pack16(tail.iter().map(|hash| &hash.0));
    let evict =
        v1::EvictRequest { protocol_version: 1, block_bytes: BLOCK, hashes: names, ..v1::EvictRequest::default() };
    assert_eq!(raw.evict(evict).await.unwrap().into_inner().evicted, 2);
    first.kill();
    drop(first);
    let again = node(&cluster, dir.path()).await;
    assert_eq!(again.node.usage().disk_blocks, 38, "what was evicted by name does not come back");
    let client = cluster.client(50);
    assert_eq!(read_all(&client, &hashes(0..40)).await, 38);
    assert_eq!(again.node.usage().memory_blocks, 38);
}

#[tokio::test]
async fn bytes_that_changed_on_disk_are_misses() {
    let (cluster, dir) = (Cluster::new(), tempfile::tempdir().unwrap());
    let mut first = node(&cluster, dir.path()).await;
    let client = cluster.client(50);
    client.write(&client.prepare(0, &hashes(0..40))).await;
    on_disk(&first, 40).await;
    first.kill();
    drop(first);
    // Every slot of the data file, but not the first page of the file: some block stays whole or none does.
    let path = dir.path().join("data");
    let mut bytes = std::fs::read(&path).unwrap();
    (0..bytes.len()).step_by(BLOCK as usize * 2).for_each(|at| bytes[at] ^= 1);
    std::fs::write(&path, &bytes).unwrap();
    let again = node(&cluster, dir.path()).await;
    assert_eq!(again.node.usage().disk_blocks, 40, "their records are whole");
    let client = cluster.client(50);
    let mut found = 0;
    for hash in hashes(0..40) {
        found += read_all(&client, &[hash]).await;
    }
    assert_eq!(found, 20);
    assert_eq!(again.node.totals().0.torn_on_disk_blocks, 20);
    assert_eq!(client.write(&client.prepare(0, &hashes(0..40))).await.written, 20, "and can be written again");
}
