//! Readers that look into the published index themselves.

use kvasir_store_client::Error;
use kvasir_types::TransportKind;

use super::harness::{BLOCK, Client, Cluster, TestNode, eventually, hashes, soon};

/// How often a call has been made.
async fn calls(node: &TestNode, call: &str) -> u64 {
    let page = node.context.metrics.encode();
    let name = format!("kvasir_kv_store_call_seconds_count{{call=\"{call}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

async fn exists(client: &Client, count: u32) -> usize {
    let (found, error) = client.store.exists(&hashes(0..count), BLOCK, soon()).await;
    assert!(error.is_none(), "{error:?}");
    found
}

#[tokio::test]
async fn what_the_index_tells_is_read_without_a_call_over_every_transport() {
    for transport in [TransportKind::Local, TransportKind::Shm, TransportKind::Tcp] {
        let cluster = Cluster::with(&[transport]);
        // So much room that none is left out.
        let node = cluster.node("kv-0", |config| config.published_bytes = Some(1 << 20)).await;
        let writer = cluster.client(200);
        writer.write(&writer.prepare(0, &hashes(0..200))).await;
        let reader = cluster.client(200);
        let blocks = reader.places(0, &hashes(0..200));
        assert_eq!(exists(&reader, 200).await, 200, "asked, and told where the index is");
        let asked = (calls(&node, "exists").await, calls(&node, "lookup").await);
        assert_eq!(exists(&reader, 200).await, 200);
        for first in 0..190 {
            let report = reader.read(&blocks[first..first + 3]).await;
            assert_eq!((report.blocks, report.bytes, report.error.is_none()), (3, 3 * BLOCK, true));
        }
        assert!(reader.has(&blocks[..192]));
        assert_eq!((calls(&node, "exists").await, calls(&node, "lookup").await), asked, "{transport:?}");
        eventually("nothing is held", || node.node.usage().pinned == 0).await;
        assert!(node.node.totals().0.hit_blocks >= 3 * 128, "it is told what was used");
        // What is not in it is asked for.
        let report = reader.read(&reader.places(0, &hashes(199..202))).await;
        assert_eq!((report.blocks, report.error.is_none()), (1, true));
        assert_eq!(calls(&node, "lookup").await, asked.1 + 1);
    }
}

#[tokio::test]
async fn what_is_used_by_the_index_is_kept_like_what_is_asked_for() {
    let cluster = Cluster::new();
    let lru = |config: &mut crate::Config| {
        (config.eviction.memory, config.published_bytes) = (crate::store::Policy::Lru, Some(1 << 20));
    };
    let node = cluster.node("kv-0", lru).await;
    // There is room for 408 blocks. Of a prompt the end is the first to go.
    let client = cluster.client(200);
    for first in [0, 1000] {
        client.write(&client.prepare(0, &hashes(first..first + 200))).await;
        eventually("they are verified", || node.node.usage().pinned == 0).await;
    }
    assert_eq!(exists(&client, 200).await, 200);
    // The node is told of many together.
    while node.node.totals().0.hit_blocks == 0 {
        assert_eq!(client.read(&client.places(190, &hashes(190..200))).await.blocks, 10);
    }
    client.write(&client.prepare(0, &hashes(2000..2100))).await;
    assert_eq!(client.store.exists(&hashes(190..200), BLOCK, soon()).await.0, 10, "they stayed");
    assert_eq!(client.store.exists(&hashes(180..190), BLOCK, soon()).await.0, 0, "others of the prompt went");
}

#[tokio::test]
async fn a_block_that_has_gone_is_a_miss_and_its_place_is_not_taken_for_it() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (client, reader) = (cluster.client(408), cluster.client(408));
    client.write(&client.prepare(0, &hashes(0..40))).await;
    let old = reader.places(0, &hashes(0..40));
    assert_eq!(reader.read(&old).await.blocks, 40);
    assert_eq!(reader.read(&old).await.blocks, 40);
    assert_eq!(node.node.evict(&crate::store::Which::All).await.0, 0, "leased");
    eventually("leases end", || {
        node.node.expire(std::time::Instant::now() + std::time::Duration::from_secs(60));
        node.node.usage().pinned == 0
    })
    .await;
    assert_eq!(node.node.evict(&crate::store::Which::All).await.0, 40);
    // The room is others' now.
    client.write(&client.prepare(0, &hashes(500..900))).await;
    let report = reader.read(&old).await;
    assert_eq!((report.blocks, report.error.is_none()), (0, true), "{report:?}");
}

#[tokio::test]
async fn wrong_bytes_found_by_the_index_are_a_miss_and_are_reported() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(10);
    let blocks = client.prepare(0, &hashes(0..10));
    client.write(&blocks).await;
    eventually("they are verified", || node.node.usage().pinned == 0).await;
    assert_eq!(exists(&client, 10).await, 10);
    let found = node.node.lookup(crate::store::BlockBytes(BLOCK), &hashes(7..8), 0, std::time::Instant::now()).await;
    let found = found.unwrap().0.unwrap();
    node.node.engine().write_bytes(found.blocks[0].offset, &[0xee; 8]).unwrap();
    node.node.end_leases([found.lease]);
    let report = client.read(&blocks).await;
    assert_eq!(report.blocks, 7);
    assert!(matches!(report.error, Some(Error::Checksum { hash, .. }) if hash == hashes(7..8)[0]), "{report:?}");
    assert_eq!(node.node.usage().blocks, 9, "the node was told, and gave it up");
    assert_eq!(exists(&client, 10).await, 7);
}

#[tokio::test]
async fn a_block_for_which_the_index_has_no_room_is_asked_for() {
    for bytes in [0, 256, 4096] {
        let cluster = Cluster::new();
        let node = cluster.node("kv-0", |config| config.published_bytes = Some(bytes)).await;
        let client = cluster.client(200);
        let blocks = client.prepare(0, &hashes(0..200));
        client.write(&blocks).await;
        for _ in 0..3 {
            let reader = client.places(0, &hashes(0..200));
            assert_eq!(client.read(&reader).await.blocks, 200);
            assert_eq!(exists(&client, 200).await, 200);
        }
        assert!(client.has(&blocks));
        assert_eq!(node.node.published().is_some(), bytes > 0);
        assert!(calls(&node, "exists").await >= 3, "most were asked for");
    }
}

#[tokio::test]
async fn the_index_of_a_dead_node_tells_nothing() {
    let cluster = Cluster::with(&[TransportKind::Shm, TransportKind::Tcp]);
    let mut node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(10);
    let blocks = client.prepare(0, &hashes(0..10));
    client.write(&blocks).await;
    assert_eq!(exists(&client, 10).await, 10);
    assert_eq!(client.read(&blocks).await.blocks, 10);
    node.kill();
    let report = client.read(&blocks).await;
    assert_eq!(report.blocks, 0);
    assert!(report.error.is_some());
    let (found, error) = client.store.exists(&hashes(0..10), BLOCK, soon()).await;
    assert_eq!((found, error.is_some()), (0, true));
}
