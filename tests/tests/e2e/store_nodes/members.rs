//! Store nodes that join, leave and die while clients go on: only the share of the one concerned moves or is lost.
//!
//! Who has which blocks is known here in two ways that must agree: by the rendezvous over the members' names, and by
//! asking each node what it has.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Result, ensure};
use kvasir_store_client::rendezvous::{Rendezvous, Spot};
use kvasir_tests::{Builder, Cluster, Service, wait};
use kvasir_types::BlockHash;

use super::{
    client::{Client, GROUP, Random, SOON, conversation, has},
    in_memory,
};

/// Placement groups that are there from the start and are read all the while.
const GROUPS: u32 = 60;
/// Memory of a node, in MiB: room for all of them and for what is written besides.
const MIB: u64 = 16;

fn nodes() -> Builder {
    in_memory(3)
        .set(Service::KvStore, "capacity_bytes", MIB << 20)
        // Who is killed is missed by the others for so long at most.
        .set(Service::KvStore, "registry.etcd.lease_ttl_s", 2)
        // No copies but those that are meant here.
        .set(Service::KvStore, "replication.hot_lookups_per_s", 0)
}

fn group(n: u32) -> Vec<BlockHash> {
    conversation(n, GROUP as u32)
}

/// The groups whose home each of these nodes is.
fn shares(nodes: &[usize]) -> BTreeMap<usize, BTreeSet<u32>> {
    let names: Vec<_> = nodes.iter().map(|&node| Service::KvStore.id(node)).collect();
    let spots = names.iter().map(|name| Spot { name, weight: MIB as f64, zone: "", stays: true });
    let rendezvous = Rendezvous::new(spots);
    let mut shares: BTreeMap<_, BTreeSet<_>> = nodes.iter().map(|&node| (node, BTreeSet::new())).collect();
    for n in 0..GROUPS {
        let home = rendezvous.home(group(n)[0]).expect("there are nodes");
        shares.entry(nodes[home]).or_default().insert(n);
    }
    shares
}

/// The groups that a node has all blocks of.
async fn held(cluster: &Cluster, node: usize) -> Result<BTreeSet<u32>> {
    let all: Vec<_> = (0..GROUPS).flat_map(group).collect();
    let has = has(cluster.node(Service::KvStore, node), &all).await?;
    Ok((0..GROUPS).zip(has.chunks(GROUP)).filter(|(_, blocks)| blocks.iter().all(|&has| has)).map(|(n, _)| n).collect())
}

/// Clients that read and write until they are told to stop.
struct Load {
    over: Cell<bool>,
    reads: Cell<usize>,
    /// Groups that were not there as a whole when they were read, since somebody last asked.
    missed: RefCell<BTreeSet<u32>>,
}

impl Load {
    /// Reads the groups in any order.
    async fn reader(&self, client: &Client, seed: u64) -> Result<()> {
        let mut random = Random(seed);
        while !self.over.get() {
            let n = random.below(GROUPS.into()) as u32;
            let found = client.read(seed * GROUP as u64, &group(n)).await?.blocks;
            self.reads.set(self.reads.get() + 1);
            if found < GROUP {
                self.missed.borrow_mut().insert(n);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Writes others and reads them again, whatever has become of them.
    async fn writer(&self, client: &Client, place: u64) -> Result<()> {
        let mut n = GROUPS;
        while !self.over.get() {
            let run = conversation(GROUPS + n % 100, 2 * GROUP as u32);
            client.write(place, &run).await?;
            client.read(place, &run).await?;
            n += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// What was missed since this was called last, every group having been read since.
    async fn missed(&self) -> Result<BTreeSet<u32>> {
        let enough = self.reads.get() + 500;
        wait::until("clients have read more", SOON, async || (self.reads.get() >= enough).then_some(())).await?;
        Ok(self.missed.take())
    }
}

#[tokio::test]
async fn while_nodes_join_leave_and_die_only_their_share_moves_or_is_missed() -> Result<()> {
    nodes()
        .run(async |cluster| {
            let client = Client::patient(cluster, 64).await?;
            for n in 0..GROUPS {
                client.fill(&group(n)).await?;
            }
            let load = Load { over: Cell::default(), reads: Cell::default(), missed: RefCell::default() };
            let changes = async {
                let result = changes(cluster, &client, &load).await;
                load.over.set(true);
                result
            };
            let readers = futures_util::future::try_join3(
                load.reader(&client, 1),
                load.reader(&client, 2),
                load.writer(&client, 32),
            );
            futures_util::future::try_join(changes, readers).await?;
            client.close();
            Ok(())
        })
        .await
}

async fn changes(cluster: &mut Cluster, client: &Client, load: &Load) -> Result<()> {
    let three = shares(&[0, 1, 2]);
    for (&node, share) in &three {
        ensure!(share.len() > 5 && held(cluster, node).await? == *share, "node {node} has its share: {three:?}");
    }

    // One joins: its share comes to it, meanwhile it is found where it was, and nothing else moves.
    let joined = cluster.join(Service::KvStore).await?;
    let four = shares(&[0, 1, 2, joined]);
    wait::until("the new node has its share", SOON, async || {
        (held(cluster, joined).await.ok()? == four[&joined]).then_some(())
    })
    .await?;
    let missed = load.missed().await?;
    ensure!(missed.is_empty(), "{missed:?} were missed while a node joined");
    for (&node, share) in &three {
        ensure!(held(cluster, node).await? == *share, "node {node} has what it had");
    }
    ensure!(held(cluster, joined).await? == four[&joined], "nothing else came to the new one");

    // One is told to stop: what it has goes to those whose it is now, and only that is missed on the way.
    cluster.node_mut(Service::KvStore, 1).process.terminate();
    let status = cluster.node_mut(Service::KvStore, 1).process.wait(SOON).await?;
    ensure!(status.success(), "it ended with {status}");
    wait::until("clients know", SOON, async || (client.store.nodes() == 3).then_some(())).await?;
    let left = shares(&[0, 2, joined]);
    for (&node, share) in &left {
        let held = held(cluster, node).await?;
        let before = three.get(&node).into_iter().chain(four.get(&node)).flatten().copied().collect();
        let came: BTreeSet<_> = held.difference(&before).copied().collect();
        let due: BTreeSet<_> = share.difference(&before).copied().collect();
        ensure!(came == due, "{came:?} came to node {node}, and {due:?} are its now");
    }
    let missed = load.missed().await?;
    ensure!(missed.is_subset(&four[&1]), "{missed:?} were missed while a node left, its share was {:?}", four[&1]);
    let missed = load.missed().await?;
    ensure!(missed.is_empty(), "{missed:?} are missed since a node left");

    // One is killed: its share is gone but for what others had before, and nothing else is.
    cluster.node_mut(Service::KvStore, 2).process.kill();
    let missed = load.missed().await?;
    ensure!(!missed.is_empty() && missed.is_subset(&left[&2]), "{missed:?} were missed, its share was {:?}", left[&2]);
    wait::until("clients know", SOON, async || (client.store.nodes() == 2).then_some(())).await?;
    let missed = load.missed().await?;
    ensure!(missed.is_subset(&left[&2]), "{missed:?} were missed, its share was {:?}", left[&2]);

    // It is back, with nothing: what nobody has any more is written anew, and that is all that is.
    cluster.restart(Service::KvStore, 2).await?;
    wait::until("clients know", SOON, async || (client.store.nodes() == 3).then_some(())).await?;
    let mut written = BTreeSet::new();
    for n in 0..GROUPS {
        let report = client.write(0, &group(n)).await?;
        ensure!(report.error.is_none() && report.skipped == 0, "group {n}: {report:?}");
        if report.written > 0 {
            written.insert(n);
        }
    }
    ensure!(written.is_subset(&left[&2]), "{written:?} were written anew, its share was {:?}", left[&2]);
    load.missed().await?;
    let missed = load.missed().await?;
    ensure!(missed.is_empty(), "{missed:?} are missed still");
    Ok(())
}
