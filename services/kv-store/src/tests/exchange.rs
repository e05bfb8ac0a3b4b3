//! What nodes tell one another of what they have learned, and what they remember.

use std::sync::atomic::Ordering;

use kvasir_kv_cache::Learned;
use kvasir_proto::v1;
use kvasir_types::PROTOCOL_VERSION;

use super::harness::{BLOCK, Cluster, TestNode, eventually, hashes, lookup_request};
use crate::Config;

fn often(config: &mut Config) {
    config.eviction.exchange_ms = 20;
}

async fn told(node: &TestNode) -> v1::LearnedResponse {
    let request = v1::LearnedRequest { protocol_version: PROTOCOL_VERSION };
    node.raw().await.learned(request).await.unwrap().into_inner()
}

fn samples(told: &v1::LearnedResponse) -> f32 {
    told.sizes.iter().map(|size| Learned::decode(&size.counts).unwrap().samples()).sum()
}

#[tokio::test]
async fn what_a_node_counted_is_heard_by_all_and_told_on_by_none() {
    let cluster = Cluster::new();
    let one = cluster.node("kv-0", often).await;
    let writer = cluster.client(50);
    assert_eq!(writer.write(&writer.prepare(0, &hashes(0..50))).await.written, 50);
    let two = cluster.node("kv-1", often).await;
    let three = cluster.node("kv-2", often).await;
    for node in [&two, &three] {
        eventually("the first one's counts are heard", || node.node.heard_from.load(Ordering::Relaxed) == 1).await;
    }
    let (of_one, of_two) = (told(&one).await, told(&two).await);
    assert_eq!(of_one.sizes.iter().map(|size| size.block_bytes).collect::<Vec<_>>(), [BLOCK]);
    assert!(samples(&of_one) > 1.0, "50 blocks of a prompt count as seven");
    assert_eq!(of_two, v1::LearnedResponse::default());
}

#[tokio::test]
async fn what_a_member_said_is_forgotten_with_it() {
    let cluster = Cluster::new();
    let mut one = cluster.node("kv-0", often).await;
    let writer = cluster.client(20);
    assert_eq!(writer.write(&writer.prepare(0, &hashes(0..20))).await.written, 20);
    let two = cluster.node("kv-1", often).await;
    let heard = || two.node.heard_from.load(Ordering::Relaxed);
    eventually("it is heard", || heard() == 1).await;
    one.kill();
    one.leave().await;
    eventually("it is forgotten", || heard() == 0).await;
}

#[tokio::test]
async fn a_lookup_says_how_much_of_a_prompt_was_here_once() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (old, stranger) = (hashes(0..40), hashes(9_000..9_040));
    let writer = cluster.client(420);
    assert_eq!(writer.write(&writer.prepare(0, &old)).await.written, 40);
    // More than there is room for.
    for first in [1_000, 2_000, 3_000] {
        writer.write(&writer.prepare(0, &hashes(first..first + 400))).await;
    }
    let mut raw = node.raw().await;
    let found = raw.lookup(lookup_request(&old)).await.unwrap().into_inner();
    assert!(found.offsets.is_empty(), "all are gone");
    assert!(found.known >= 30, "{} of 40 are remembered: a few forgotten ones in a row would be believed", found.known);
    assert_eq!(raw.lookup(lookup_request(&stranger)).await.unwrap().into_inner().known, 0);
}
