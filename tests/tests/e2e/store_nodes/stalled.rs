//! Clients of a store node that stop in the middle: a writer that is killed between reserving and committing, and a reader
//! that is stopped until its lease has ended and its blocks' room belongs to others.
//!
//! Both are processes of their own: this very program, told by a variable of its environment to be one ([`other_process`]).
//! What it has come to it says in its log, and when it is to go on it sees by a file.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use kvasir_proto::v1::{self, slot};
use kvasir_store_client::Config;
use kvasir_tests::{Cluster, Process, Service, wait};
use kvasir_transfer::{Batch, Op, Range};
use kvasir_types::{Deadline, GrantKey, PROTOCOL_VERSION, SegmentDescriptor};
use serde::{Deserialize, Serialize};

use super::{
    client::{BLOCK, Client, SOON, conversation, names, raw},
    in_memory,
};

/// What the other process is to be, as JSON.
const ROLE: &str = "KVASIR_TEST_STORE_CLIENT";
/// All that the node has room for.
const ALL: u32 = 64;
const HALF: u32 = ALL / 2;

#[derive(Serialize, Deserialize)]
struct Role {
    /// Where the members are.
    etcd: String,
    /// The node.
    grpc: String,
    writes: bool,
    /// There once it may go on.
    go_on: PathBuf,
}

/// The other process.
struct Other {
    process: Process,
    go_on: PathBuf,
    _dir: tempfile::TempDir,
}

impl Other {
    fn start(cluster: &mut Cluster, writes: bool) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (etcd, go_on) = (cluster.etcd().endpoint().to_owned(), dir.path().join("go-on"));
        let grpc = cluster.node(Service::KvStore, 0).grpc().to_owned();
        let role = Role { etcd, grpc, writes, go_on: go_on.clone() };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", "store_nodes::stalled::other_process", "--ignored", "--nocapture"]);
        command.env(ROLE, serde_json::to_string(&role)?);
        let process = Process::spawn(if writes { "writer" } else { "reader" }, command, dir.path())?;
        Ok(Self { process, go_on, _dir: dir })
    }

    async fn until_it_says(&mut self, words: &str) -> Result<()> {
        let what = format!("the other process says '{words}'");
        let log = wait::until(&what, SOON, async || {
            let log = self.process.log();
            (log.contains(words) || self.process.ended().is_some()).then_some(log)
        })
        .await?;
        ensure!(log.contains(words), "it ended without '{words}':\n{log}");
        Ok(())
    }

    fn go_on(&self) -> Result<()> {
        Ok(std::fs::write(&self.go_on, "")?)
    }
}

#[tokio::test]
#[ignore = "not a test: the other process of those beside it: cargo nextest run -p kvasir-tests -E 'test(stalled)'"]
async fn other_process() -> Result<()> {
    let role: Role = serde_json::from_str(&std::env::var(ROLE)?)?;
    let client = Client::connect(&role.etcd, u64::from(ALL), Config::default()).await?;
    wait::until("the client knows the node", SOON, async || (client.store.nodes() == 1).then_some(())).await?;
    if role.writes { stop_in_the_middle(&client, &role).await } else { read_late(&client, &role).await }
}

/// Reserves all there is, writes half of it, and never says more.
async fn stop_in_the_middle(client: &Client, role: &Role) -> Result<()> {
    let hashes = conversation(0, ALL);
    let request = v1::ReserveRequest {
        protocol_version: PROTOCOL_VERSION,
        request_id: "dies".to_owned(),
        block_bytes: BLOCK,
        hashes: names(&hashes).into(),
        prompt_blocks: ALL,
        ..v1::ReserveRequest::default()
    };
    let reserved = raw(&role.grpc).await?.reserve(request).await?.into_inner();
    ensure!(reserved.slots.iter().all(|slot| slot.state() == slot::State::Reserved), "{reserved:?}");
    client.put(&Client::places(0, &hashes))?;
    let offsets: Vec<_> = reserved.slots.iter().take(HALF as usize).map(|slot| slot.offset).collect();
    let segment = reserved.segment.as_ref().context("a segment")?;
    transfer(client, Op::Write, segment, reserved.grant, &offsets).await?;
    println!("reserved {} blocks", reserved.slots.len());
    std::future::pending().await
}

/// Finds blocks in both ways, stops, and reads them when they are there no more.
async fn read_late(client: &Client, role: &Role) -> Result<()> {
    let hashes = conversation(0, HALF);
    let request = v1::LookupRequest {
        protocol_version: PROTOCOL_VERSION,
        request_id: "late".to_owned(),
        block_bytes: BLOCK,
        hashes: names(&hashes).into(),
        ..v1::LookupRequest::default()
    };
    let looked_up = raw(&role.grpc).await?.lookup(request).await?.into_inner();
    ensure!(looked_up.offsets.len() == hashes.len(), "{looked_up:?}");
    let (places, deadline) = (Client::places(0, &hashes), Deadline::after(SOON));
    let found = client.store.find(&"late".parse()?, places.clone(), 0, BLOCK, deadline).await;
    println!("found {} blocks", found.blocks());
    wait::until("it may go on", SOON * 2, async || role.go_on.exists().then_some(())).await?;

    // The bytes can be read, and they are others'; that is what the checksum is for.
    let segment = looked_up.segment.as_ref().context("a segment")?;
    transfer(client, Op::Read, segment, looked_up.grant, &looked_up.offsets).await?;
    for (at, (sum, &(_, place))) in looked_up.checksums.chunks(16).zip(&places).enumerate() {
        ensure!(client.engine.checksum(place, BLOCK)?[..] != *sum, "block {at} is where it was");
    }
    let late = client.store.fetch(&found, Deadline::after(SOON), |_| {}).await;
    client.check(&places[..late.blocks])?;
    client.store.release(found);
    let again = client.read(0, &hashes).await?;
    println!("got {} blocks late, and {} anew", late.blocks, again.blocks);
    Ok(())
}

/// Moves blocks between the client's first places and these offsets of a node.
async fn transfer(client: &Client, op: Op, segment: &v1::SegmentDescriptor, grant: u64, offsets: &[u64]) -> Result<()> {
    let ranges = offsets.iter().zip(0..).map(|(&remote, at)| Range { local: at * BLOCK, remote, len: BLOCK });
    let (segment, deadline) = (SegmentDescriptor::try_from(segment)?, Deadline::after(SOON));
    client.engine.submit(Batch::new(op, segment, GrantKey(grant), ranges.collect(), deadline)).await?;
    Ok(())
}

#[tokio::test]
async fn what_a_killed_writer_had_reserved_is_free_again_and_another_writes_the_same_blocks() -> Result<()> {
    in_memory(1)
        .set(Service::KvStore, "reservation_ms", 1000)
        .run(async |cluster| {
            let client = Client::new(cluster, u64::from(ALL)).await?;
            let mut writer = Other::start(cluster, true)?;
            writer.until_it_says(&format!("reserved {ALL} blocks")).await?;
            writer.process.kill();
            let run = conversation(0, ALL);
            ensure!(client.read(0, &run).await?.blocks == 0, "what nobody committed was read");
            wait::until("another writer gets in", SOON, async || {
                let report = client.write(0, &run).await.ok()?;
                assert!(report.error.is_none(), "a block that another writer is at is no error: {report:?}");
                (report.written == run.len()).then_some(())
            })
            .await?;
            ensure!(client.read(0, &run).await?.blocks == run.len(), "all that there is room for is there");
            let node = cluster.node(Service::KvStore, 0);
            let expired = node.metrics().await?;
            let expired = expired.sum_where("kvasir_kv_store_expired_total", &[("hold", "reservation")]);
            ensure!(expired == 1.0, "{expired} reservations expired");
            client.close();
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_reader_that_was_stopped_past_its_lease_misses_what_is_there_no_more() -> Result<()> {
    in_memory(1)
        .set(Service::KvStore, "lease_ms", 500)
        .set(Service::KvStore, "eviction.memory", "lru")
        .run(async |cluster| {
            let client = Client::new(cluster, u64::from(ALL)).await?;
            client.fill(&conversation(0, HALF)).await?;
            let mut reader = Other::start(cluster, false)?;
            reader.until_it_says(&format!("found {HALF} blocks")).await?;
            reader.process.pause();
            let mut n = 0;
            wait::until("all room is others'", SOON, async || {
                n += 1;
                let report = client.write(0, &conversation(n, ALL)).await.ok()?;
                (report.written == ALL as usize).then_some(())
            })
            .await?;
            reader.go_on()?;
            reader.process.resume();
            reader.until_it_says("got 0 blocks late, and 0 anew").await?;
            ensure!(reader.process.wait(SOON).await?.success(), "{}", reader.process.log());
            client.close();
            Ok(())
        })
        .await
}
