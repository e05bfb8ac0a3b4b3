//! How blocks are divided among nodes that come and go, by clients that know it late.

use std::sync::Arc;

use kvasir_cluster::View;
use kvasir_proto::v1;
use kvasir_store_client::{
    Config,
    rendezvous::{Rendezvous, Spot},
};
use kvasir_types::{BlockHash, TransportKind};
use tokio::sync::watch;

use super::harness::{BLOCK, Client, Cluster, TestNode, eventually, hashes};

const GROUP: usize = 4;
const BLOCKS: u32 = 200;

/// Who has each group, by the names of the nodes.
fn homes(nodes: &[&str], copies: usize) -> Vec<Vec<usize>> {
    let spots = nodes.iter().map(|&name| Spot { name, weight: 8.0, zone: "", stays: true });
    let rendezvous = Rendezvous::new(spots);
    hashes(0..BLOCKS).chunks(GROUP).map(|group| rendezvous.homes(group[0], copies)).collect()
}

/// A client whose view stays what it is now.
fn late(cluster: &Cluster) -> (Client, watch::Sender<Arc<View>>) {
    let (sender, receiver) = watch::channel(cluster.hub().registry().view().borrow().clone());
    (cluster.client_with(u64::from(BLOCKS), Config::default(), receiver), sender)
}

fn blocks(nodes: &[&TestNode]) -> Vec<u64> {
    nodes.iter().map(|node| node.node.usage().blocks).collect()
}

/// Reads every group by itself: how many blocks there are, and how many groups had an error.
async fn read_groups(client: &Client, blocks: &[(BlockHash, u64)]) -> (usize, usize) {
    let (mut found, mut errors) = (0, 0);
    for group in blocks.chunks(GROUP) {
        let report = client.read(group).await;
        assert!(client.has(&group[..report.blocks]), "wrong bytes");
        found += report.blocks;
        errors += usize::from(report.error.is_some());
    }
    (found, errors)
}

#[tokio::test]
async fn a_writer_that_knows_the_members_late_writes_where_others_look() {
    let cluster = Cluster::new();
    let zero = cluster.node("kv-0", |_| {}).await;
    let (client, _view) = late(&cluster);
    let one = cluster.node("kv-1", |_| {}).await;
    assert!(client.store.epoch() < cluster.epoch());
    let all = client.prepare(0, &hashes(0..BLOCKS));
    let report = client.write(&all).await;
    assert!(report.error.is_none(), "{report:?}");
    assert_eq!((report.written, report.skipped), (200, 0));
    let of_one = homes(&["kv-0", "kv-1"], 1).iter().filter(|homes| homes[0] == 1).count() * GROUP;
    assert_eq!(blocks(&[&zero, &one]), [200 - of_one as u64, of_one as u64]);
    assert_eq!(client.store.epoch(), cluster.epoch(), "it knows now");
    assert_eq!(cluster.client(200).read(&all).await.blocks, 200);
}

#[tokio::test]
async fn a_reader_that_knows_the_members_late_finds_what_is_there() {
    let cluster = Cluster::new();
    let _zero = cluster.node("kv-0", |_| {}).await;
    let (late, _view) = late(&cluster);
    let _one = cluster.node("kv-1", |_| {}).await;
    let writer = cluster.client(200);
    assert_eq!(writer.write(&writer.prepare(0, &hashes(0..BLOCKS))).await.written, 200);
    let all = late.places(0, &hashes(0..BLOCKS));
    let report = late.read(&all).await;
    assert!(report.error.is_none(), "{report:?}");
    assert_eq!(report.blocks, 200);
    assert!(late.has(&all));
    assert_eq!(late.store.epoch(), cluster.epoch());
    assert_eq!(late.store.nodes(), 2);
}

#[tokio::test]
async fn a_node_that_joins_takes_its_share_and_what_is_on_the_others_is_found_while_it_is_new() {
    let cluster = Cluster::new();
    let (zero, one) = (cluster.node("kv-0", |_| {}).await, cluster.node("kv-1", |_| {}).await);
    let client = cluster.client(200);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    client.write(&all).await;
    let before = blocks(&[&zero, &one]);
    let two = cluster.node("kv-2", |config| config.warm_ms = 600_000).await;
    eventually("the client knows", || client.store.nodes() == 3).await;
    assert_eq!(read_groups(&client, &all).await, (200, 0));
    assert_eq!(client.read(&all).await.blocks, 200, "in one go, too");
    assert_eq!(blocks(&[&zero, &one]), before, "nothing was dropped");
    // Written again, only its share goes to it.
    let of_two = homes(&["kv-0", "kv-1", "kv-2"], 1).iter().filter(|homes| homes[0] == 2).count() * GROUP;
    let report = client.write(&all).await;
    assert_eq!((report.written, report.present), (of_two, 200 - of_two));
    assert_eq!(blocks(&[&two]), [of_two as u64]);
}

#[tokio::test]
async fn of_a_node_that_is_gone_only_its_share_is_missed() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let names = ["kv-0", "kv-1", "kv-2"];
    let mut nodes = Vec::new();
    for name in names {
        nodes.push(cluster.node(name, |_| {}).await);
    }
    let client = cluster.client(200);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    client.write(&all).await;
    drop(nodes.remove(1));
    eventually("the client knows", || client.store.nodes() == 2).await;
    let lost = homes(&names, 1).iter().filter(|homes| homes[0] == 1).count() * GROUP;
    assert_eq!(read_groups(&client, &all).await, (200 - lost, 0));
    let report = client.write(&all).await;
    assert_eq!((report.written, report.present), (lost, 200 - lost));
}

#[tokio::test]
async fn a_node_that_is_about_to_leave_gets_nothing_new_and_still_gives_what_it_has() {
    let cluster = Cluster::new();
    let (zero, one) = (cluster.node("kv-0", |_| {}).await, cluster.node("kv-1", |_| {}).await);
    let client = cluster.client(400);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    client.write(&all).await;
    let before = blocks(&[&zero, &one]);
    zero.say_draining().await;
    eventually("the client knows", || client.store.nodes() == 1).await;
    assert_eq!(read_groups(&client, &all).await, (200, 0));
    assert_eq!(client.read(&all).await.blocks, 200);
    assert_eq!(client.write(&client.prepare(200, &hashes(1000..1200))).await.written, 200);
    assert_eq!(blocks(&[&zero, &one]), [before[0], before[1] + 200]);
    // With nobody left to take anything, it is still read from.
    drop(one);
    eventually("the client knows", || client.store.nodes() == 0).await;
    let (found, _) = read_groups(&client, &all).await;
    assert_eq!(found as u64, before[0]);
}

#[tokio::test]
async fn copies_are_in_different_zones_and_one_zone_is_enough() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let mut nodes = Vec::new();
    for (name, zone) in [("kv-0", "a"), ("kv-1", "a"), ("kv-2", "b"), ("kv-3", "b")] {
        let change = |config: &mut crate::Config| (config.zone, config.replicas) = (zone.to_owned(), 2);
        nodes.push(cluster.node(name, change).await);
    }
    let near = Config { zone: "b".into(), ..Config::default() };
    let client = cluster.client_with(200, near, cluster.hub().registry().view());
    let all = client.prepare(0, &hashes(0..BLOCKS));
    let report = client.write(&all).await;
    assert!(report.error.is_none(), "{report:?}");
    assert_eq!((report.written, report.bytes), (200, 200 * BLOCK));
    let counts = blocks(&nodes.iter().collect::<Vec<_>>());
    assert_eq!((counts[0] + counts[1], counts[2] + counts[3]), (200, 200));
    assert!(counts.iter().all(|&count| count > 0), "{counts:?}");

    let read_from = |node: &TestNode| node.node.engine().stats().owner.of(TransportKind::Tcp).read_bytes;
    assert_eq!(client.read(&all).await.blocks, 200);
    // The owner counts what it has sent a moment after it was there.
    eventually("each was read from one copy", || nodes.iter().map(read_from).sum::<u64>() == 200 * BLOCK).await;
    assert_eq!(read_from(&nodes[0]) + read_from(&nodes[1]), 0, "the near one");

    // The near zone dies: the other one has everything.
    nodes[2].kill();
    nodes[3].kill();
    assert_eq!(read_groups(&client, &all).await.0, 200);
    let report = client.write(&client.prepare(0, &hashes(1000..1200))).await;
    assert_eq!(report.written, 200, "one copy is one: {report:?}");
    assert!(report.error.is_some());
}

#[tokio::test]
async fn a_killed_primary_is_replaced_by_its_copy_and_its_next_life_by_it_too() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let (mut zero, one) = (
        cluster.node("kv-0", |config| config.replicas = 2).await,
        cluster.node("kv-1", |config| config.replicas = 2).await,
    );
    let client = cluster.client(200);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    client.write(&all).await;
    assert_eq!(blocks(&[&zero, &one]), [200, 200]);
    zero.kill();
    assert_eq!(client.read(&all).await.blocks, 200);
    drop(zero);
    let _next = cluster.node("kv-0", |config| (config.replicas, config.warm_ms) = (2, 600_000)).await;
    assert_eq!(read_groups(&client, &all).await, (200, 0), "it is empty, and the copy is not");
}

#[tokio::test]
async fn readers_spread_over_the_copies() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let mut nodes = Vec::new();
    for name in ["kv-0", "kv-1", "kv-2"] {
        nodes.push(cluster.node(name, |config| config.replicas = 3).await);
    }
    let client = cluster.client(GROUP as u64);
    let group = client.prepare(0, &hashes(0..GROUP as u32));
    client.write(&group).await;
    for _ in 0..60 {
        assert_eq!(client.read(&group).await.blocks, GROUP);
    }
    let reads =
        |node: &TestNode| node.node.engine().stats().owner.of(TransportKind::Tcp).read_bytes / (GROUP as u64 * BLOCK);
    eventually("all reads are counted", || nodes.iter().map(reads).sum::<u64>() == 60).await;
    for node in &nodes {
        let read = reads(node);
        // Binomial: mean 20, standard deviation 3.7; what is drawn is the same each time.
        assert!((8..=32).contains(&read), "{read} of 60 reads from {}", node.member.id);
    }
}

/// What a node says once it is drained.
async fn drained(node: &mut v1::store_client::StoreClient<tonic::transport::Channel>) -> v1::StoreStatusResponse {
    let start = std::time::Instant::now();
    loop {
        let status = node.store_status(v1::StoreStatusRequest {}).await.unwrap().into_inner();
        if status.leaving == "drained" {
            break status;
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(10), "{status:?}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_a_drained_node_had_is_found_after_it_is_gone() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let mut nodes = Vec::new();
    for name in ["kv-0", "kv-1", "kv-2"] {
        nodes.push(cluster.node(name, |config| config.handover.mib_per_s = 1000).await);
    }
    let client = cluster.client(200);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    client.write(&all).await;
    let had = blocks(&[&nodes[0]])[0];
    assert!(had > 0);
    let mut raw = nodes[0].raw().await;
    let status = raw.store_status(v1::StoreStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.leaving, "no");
    raw.drain(v1::DrainRequest {}).await.unwrap();
    let status = drained(&mut raw).await;
    assert_eq!((status.handed_over_blocks_total, status.handover_groups_left), (had, 0));
    eventually("no lease is left", || nodes[0].node.usage().pinned == 0).await;
    drop(nodes.remove(0));
    eventually("the client knows", || client.store.nodes() == 2).await;
    let reader = cluster.client(200);
    let places = reader.places(0, &hashes(0..BLOCKS));
    assert_eq!(read_groups(&reader, &places).await, (200, 0));
}

#[tokio::test]
async fn a_drained_node_says_what_nobody_took() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(200);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    assert_eq!(client.write(&all).await.written, BLOCKS as usize);
    let mut raw = node.raw().await;
    raw.drain(v1::DrainRequest {}).await.unwrap();
    let status = drained(&mut raw).await;
    let told = (status.handed_over_blocks_total, status.not_handed_over_blocks, status.handover_groups_left);
    assert_eq!(told, (0, u64::from(BLOCKS), 0), "there is nobody else");
}

#[tokio::test]
async fn a_node_that_joins_is_given_its_share_by_those_who_had_it() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let zero = cluster.node("kv-0", |config| config.handover.mib_per_s = 1000).await;
    let one = cluster.node("kv-1", |config| config.handover.mib_per_s = 1000).await;
    let client = cluster.client(200);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    client.write(&all).await;
    let before = blocks(&[&zero, &one]);
    let two = cluster.node("kv-2", |_| {}).await;
    let of_two = homes(&["kv-0", "kv-1", "kv-2"], 1).iter().filter(|homes| homes[0] == 2).count() * GROUP;
    eventually("its share is there", || two.node.usage().blocks == of_two as u64).await;
    assert_eq!(read_groups(&client, &all).await, (200, 0));
    assert_eq!(blocks(&[&zero, &one]), before, "the others keep theirs until room is wanted");
}

#[tokio::test]
async fn a_node_that_is_stopped_hands_over_in_its_grace() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let (one, net) = (cluster.node("kv-1", |_| {}).await, kvasir_transfer::LocalNet::new());
    let (context, registry) = (kvasir_runtime::Context::detached("kv-0"), cluster.hub().registry());
    let mut config = crate::Config { id: Some("kv-0".into()), capacity_bytes: 16 << 20, ..Default::default() };
    (config.group_blocks, config.weight) = (GROUP as u32, Some(8.0));
    config.transfer.transports = kvasir_types::Transports::Named(vec![TransportKind::Tcp]);
    let running = Box::pin(crate::run(config, context.clone(), registry, net));
    let client = cluster.client(200);
    let all = client.prepare(0, &hashes(0..BLOCKS));
    let using = async {
        eventually("it is there", || client.store.nodes() == 2).await;
        assert_eq!(client.write(&all).await.written, 200);
        assert!(one.node.usage().blocks < 200);
        context.shutdown.trigger();
    };
    let (end, ()) = futures_util::future::join(running, using).await;
    end.unwrap();
    assert_eq!(one.node.usage().blocks, 200);
    assert_eq!(read_groups(&client, &all).await, (200, 0));
}

#[tokio::test]
async fn a_hot_group_is_read_from_copies_that_nobody_asked_for() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let mut nodes = Vec::new();
    for name in ["kv-0", "kv-1", "kv-2"] {
        let change = |config: &mut crate::Config| {
            config.replication = crate::ReplicationConfig { hot_lookups_per_s: 2.0, max_copies: 2 };
        };
        nodes.push(cluster.node(name, change).await);
    }
    let client = cluster.client(GROUP as u64);
    let group = client.prepare(0, &hashes(0..GROUP as u32));
    client.write(&group).await;
    let names = ["kv-0", "kv-1", "kv-2"];
    let home = homes(&names, 2)[0].clone();
    assert_eq!(blocks(&[&nodes[home[0]], &nodes[home[1]]]), [GROUP as u64, 0]);
    for _ in 0..40 {
        assert_eq!(client.read(&group).await.blocks, GROUP);
    }
    let start = std::time::Instant::now();
    while nodes[home[1]].node.usage().blocks < GROUP as u64 {
        assert!(start.elapsed() < std::time::Duration::from_secs(10), "it has no copy");
        // Who reads by the node's index tells it now and then.
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        assert_eq!(client.read(&group).await.blocks, GROUP);
    }
    let read = |node: &TestNode| node.node.engine().stats().owner.of(TransportKind::Tcp).read_bytes;
    let start = std::time::Instant::now();
    while read(&nodes[home[1]]) == 0 {
        assert!(start.elapsed() < std::time::Duration::from_secs(10), "nobody reads from it");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        assert_eq!(client.read(&group).await.blocks, GROUP);
        assert!(client.has(&group));
    }
    assert!(nodes.iter().map(|node| node.node.usage().blocks).sum::<u64>() == 2 * GROUP as u64);
}
