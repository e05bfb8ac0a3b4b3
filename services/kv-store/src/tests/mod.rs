//! A node and its clients over real sockets: what each promises the other, with peers that stall, lie and die.

mod ahead;
mod calls;
mod disk;
mod division;
mod exchange;
mod glance;
mod harness;

use std::time::{Duration, Instant};

use harness::{
    BLOCK, Cluster, commit_request, content, eventually, hashes, lookup_request, request, reserve_request, soon,
};
use kvasir_proto::v1;
use kvasir_store_client::Error;
use kvasir_transfer::Op;
use kvasir_types::{Role, TransportKind};
use tonic::Code;

#[tokio::test]
async fn what_is_written_is_read_back_bit_for_bit_over_every_transport() {
    for transport in [TransportKind::Local, TransportKind::Shm, TransportKind::Tcp] {
        let cluster = Cluster::with(&[transport]);
        let node = cluster.node("kv-0", |config| config.lease_ms = 600_000).await;
        let (writer, reader) = (cluster.client(100), cluster.client(100));
        let blocks = writer.prepare(0, &hashes(0..100));
        let report = writer.write(&blocks).await;
        assert!(report.error.is_none(), "{report:?}");
        assert_eq!((report.written, report.present, report.skipped, report.bytes), (100, 0, 0, 100 * BLOCK));

        let report = reader.read(&blocks).await;
        assert!(report.error.is_none(), "{report:?}");
        assert_eq!((report.blocks, report.bytes), (100, 100 * BLOCK));
        assert!(reader.has(&blocks));
        // The owner counts what it has sent a moment after it was there.
        eventually("the bytes are counted", || {
            let owner = node.node.engine().stats().owner;
            let moved = owner.of(transport);
            (moved.read_bytes, moved.written_bytes) == (100 * BLOCK, 100 * BLOCK)
        })
        .await;
        assert_eq!(node.node.usage().pinned, 100);
        assert_eq!(reader.read(&reader.places(0, &hashes(200..201))).await.blocks, 0);
        eventually("the lease was given back with the next lookup", || node.node.usage().pinned == 0).await;
    }
}

#[tokio::test]
async fn a_run_ends_at_the_first_block_that_is_not_there() {
    let cluster = Cluster::new();
    let _nodes = (cluster.node("kv-0", |_| {}).await, cluster.node("kv-1", |_| {}).await);
    let client = cluster.client(40);
    let all = client.prepare(0, &hashes(0..40));
    client.write(&all[..21]).await;
    client.write(&all[22..]).await;
    let report = client.read(&all).await;
    assert_eq!(report.blocks, 21);
    assert!(report.error.is_none(), "a miss is no error: {report:?}");
    assert_eq!(client.read(&all[21..]).await.blocks, 0);
    assert_eq!(client.read(&[]).await.blocks, 0);
}

#[tokio::test]
async fn the_rest_of_a_chain_is_found_wherever_it_begins() {
    let cluster = Cluster::new();
    let mut nodes = Vec::new();
    for id in ["kv-0", "kv-1", "kv-2"] {
        nodes.push(cluster.node(id, |_| {}).await);
    }
    let writer = cluster.client(30);
    writer.write(&writer.prepare(0, &hashes(0..30))).await;
    for have in 0..=30 {
        let reader = cluster.client(30);
        let blocks = reader.places(0, &hashes(0..30));
        let report = reader.read_on(&blocks, have).await;
        assert_eq!(report.blocks, 30 - have, "{report:?}");
        assert!(reader.has(&blocks[have..]));
        assert!(blocks[..have].iter().all(|&(_, offset)| reader.bytes(offset).iter().all(|&byte| byte == 0)));
    }
}

#[tokio::test]
async fn a_second_writer_is_told_that_the_blocks_are_there() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (one, two) = (cluster.client(10), cluster.client(10));
    let blocks = one.prepare(0, &hashes(0..10));
    one.write(&blocks[..6]).await;
    let report = two.write(&two.prepare(0, &hashes(0..10))).await;
    assert_eq!((report.written, report.present, report.skipped), (4, 6, 0));
    assert_eq!(node.node.usage().blocks, 10);
}

#[tokio::test]
async fn while_one_writes_another_is_told_to_leave_it() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(2);
    let blocks = client.prepare(0, &hashes(0..2));
    node.raw().await.reserve(reserve_request(&hashes(0..1))).await.unwrap();
    let report = client.write(&blocks).await;
    assert_eq!((report.written, report.present, report.skipped), (1, 0, 1));
    assert!(report.error.is_none(), "{report:?}");
    assert_eq!(client.read(&blocks).await.blocks, 0, "what is being written is not found");
}

#[tokio::test]
async fn corrupted_bytes_are_a_miss() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(10);
    let blocks = client.prepare(0, &hashes(0..10));
    client.write(&blocks).await;
    let mut raw = node.raw().await;
    let found = raw.lookup(lookup_request(&hashes(0..10))).await.unwrap().into_inner();
    raw.release(v1::ReleaseRequest { lease: found.lease }).await.unwrap();
    let flipped = found.offsets[7] + BLOCK - 1;
    let mut byte = [0];
    node.node.engine().read_bytes(flipped, &mut byte).unwrap();
    node.node.engine().write_bytes(flipped, &[byte[0] ^ 1]).unwrap();

    let report = client.read(&blocks).await;
    assert_eq!(report.blocks, 7);
    assert!(matches!(report.error, Some(Error::Checksum { hash, .. }) if hash == blocks[7].0), "{report:?}");
    assert!(client.has(&blocks[..7]));
    // It was told to the node, which gave the block up: the next reader finds it missing, the next writer writes it.
    eventually("the broken block is gone", || node.node.usage().blocks == 9).await;
    assert_eq!(client.write(&client.prepare(0, &hashes(0..10))).await.written, 1);
    assert_eq!(client.read(&blocks).await.blocks, 10);
}

#[tokio::test]
async fn a_writer_that_lies_about_its_bytes_is_not_believed() {
    // So few bytes that they are verified first, and so many that they are found meanwhile.
    for blocks in [1, 20] {
        let cluster = Cluster::new();
        let node = cluster.node("kv-0", |_| {}).await;
        let (client, mut raw) = (cluster.client(20), node.raw().await);
        let names = hashes(0..blocks);
        client.prepare(0, &names);
        let reserved = raw.reserve(reserve_request(&names)).await.unwrap().into_inner();
        client.touch(Op::Write, &node, reserved.grant, reserved.slots[0].offset).await.unwrap();
        let lies: Vec<_> = names.iter().map(|&hash| (hash, [6; 16])).collect();
        let committed = raw.commit(commit_request(reserved.reservation, &lies)).await.unwrap().into_inner().committed;
        assert_eq!(committed, if blocks == 1 { 0 } else { blocks });
        let reader = cluster.client(20);
        assert_eq!(reader.read(&reader.places(0, &names)).await.blocks, 0, "at no time");
        eventually("their room is free again", || node.node.usage().used_bytes == 0).await;
        assert!(raw.lookup(lookup_request(&names)).await.unwrap().into_inner().offsets.is_empty());
        assert_eq!(node.node.totals().1, u64::from(blocks), "and they are counted");
    }
}

#[tokio::test]
async fn a_committed_block_can_no_longer_be_written() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let (client, mut raw) = (cluster.client(2), node.raw().await);
    let blocks = client.prepare(0, &hashes(0..1));
    let reserved = raw.reserve(reserve_request(&hashes(0..1))).await.unwrap().into_inner();
    let (grant, offset) = (reserved.grant, reserved.slots[0].offset);
    client.touch(Op::Write, &node, grant, offset).await.unwrap();
    let commit = commit_request(reserved.reservation, &[(blocks[0].0, client.engine.checksum(0, BLOCK).unwrap())]);
    for _ in 0..2 {
        assert_eq!(raw.commit(commit.clone()).await.unwrap().into_inner().committed, 1, "again is the same");
    }
    client.engine.write_bytes(0, &vec![0; BLOCK as usize]).unwrap();
    client.touch(Op::Write, &node, grant, offset).await.unwrap_err();
    let places = client.places(1, &hashes(0..1));
    assert_eq!(client.read(&places).await.blocks, 1);
    assert!(client.has(&places));
}

#[tokio::test]
async fn a_reservation_that_nobody_commits_gives_its_room_back() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |config| config.reservation_ms = 50).await;
    let (client, mut raw) = (cluster.client(2), node.raw().await);
    let blocks = client.prepare(0, &hashes(0..2));
    let reserved = raw.reserve(reserve_request(&hashes(0..2))).await.unwrap().into_inner();
    assert_eq!(node.node.usage().reserved, 2);
    eventually("the room is free", || node.node.usage().used_bytes == 0).await;
    client.touch(Op::Write, &node, reserved.grant, reserved.slots[0].offset).await.unwrap_err();
    let sum = |&(hash, offset): &(_, u64)| (hash, client.engine.checksum(offset, BLOCK).unwrap());
    let commit = commit_request(reserved.reservation, &blocks.iter().map(sum).collect::<Vec<_>>());
    assert_eq!(raw.commit(commit).await.unwrap().into_inner().committed, 0, "too late");
    assert_eq!(client.write(&blocks).await.written, 2, "another writer gets it");
}

#[tokio::test]
async fn a_reader_that_stalls_past_its_lease_never_has_wrong_bytes_and_stops_nobody() {
    let cluster = Cluster::new();
    // Room for exactly 50 blocks: one slab.
    let node = cluster.node("kv-0", |config| (config.capacity_bytes, config.lease_ms) = (1 << 20, 50)).await;
    let client = cluster.client(102);
    client.write(&client.prepare(0, &hashes(0..51))).await;
    let old = node.raw().await.lookup(lookup_request(&hashes(0..50))).await.unwrap().into_inner();
    assert!(node.node.usage().pinned > 40);
    eventually("the lease has ended", || node.node.usage().pinned == 0).await;
    let report = client.write(&client.prepare(51, &hashes(100..151))).await;
    assert_eq!(report.written, 51, "its blocks may go: {report:?}");
    // All slots have been used again. What he reads now is somebody else's, and he can tell.
    for (&offset, checksum) in old.offsets.iter().zip(old.checksums.as_chunks::<16>().0) {
        client.touch(Op::Read, &node, old.grant, offset).await.unwrap();
        assert_ne!(&client.engine.checksum(0, BLOCK).unwrap(), checksum);
    }
    assert_eq!(client.read(&client.places(0, &hashes(100..150))).await.blocks, 50);
}

#[tokio::test]
async fn what_is_leased_is_not_evicted() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |config| config.capacity_bytes = 1 << 20).await;
    let (client, mut raw) = (cluster.client(60), node.raw().await);
    client.write(&client.prepare(0, &hashes(0..30))).await;
    let held = raw.lookup(lookup_request(&hashes(0..30))).await.unwrap().into_inner();
    let report = client.write(&client.prepare(0, &hashes(100..160))).await;
    assert_eq!((report.written, report.skipped), (21, 39), "{report:?}");
    for (&offset, hash) in held.offsets.iter().zip(hashes(0..30)) {
        client.touch(Op::Read, &node, held.grant, offset).await.unwrap();
        assert_eq!(client.bytes(0), content(hash));
    }
    raw.release(v1::ReleaseRequest { lease: held.lease }).await.unwrap();
    eventually("nobody is at them", || node.node.usage().pinned == 0).await;
    client.touch(Op::Write, &node, held.grant, held.offsets[0]).await.unwrap_err();
    assert_eq!(client.write(&client.prepare(0, &hashes(200..230))).await.written, 30);
}

#[tokio::test]
async fn blocks_spread_over_nodes_and_a_dead_node_is_a_miss_that_costs_little() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let (alive, mut dead) = (cluster.node("kv-0", |_| {}).await, cluster.node("kv-1", |_| {}).await);
    let client = cluster.client(200);
    let blocks = client.prepare(0, &hashes(0..200));
    assert_eq!(client.write(&blocks).await.written, 200);
    let share = alive.node.usage().blocks;
    assert!((40..160).contains(&share), "50 groups over two nodes, {share} blocks on one");
    assert_eq!(client.read(&blocks).await.blocks, 200);

    dead.kill();
    let start = Instant::now();
    let groups: Vec<_> = {
        let mut groups = Vec::new();
        for group in blocks.chunks(4) {
            groups.push(client.read(group).await);
        }
        groups
    };
    let found: usize = groups.iter().map(|report| report.blocks).sum();
    assert_eq!(found as u64, share, "what the living node has is found, the rest is a miss");
    assert!(groups.iter().all(|report| report.error.is_some() == (report.blocks == 0)));
    assert!(groups.iter().any(|report| matches!(report.error, Some(Error::Away { .. }))), "it is not asked each time");
    assert!(start.elapsed() < Duration::from_secs(2), "50 reads took {:?}", start.elapsed());
    assert!(client.write(&blocks).await.written == 0);
}

#[tokio::test]
async fn a_node_that_comes_back_is_used_again_at_once() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let mut first = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(8);
    let blocks = client.prepare(0, &hashes(0..8));
    assert_eq!(client.write(&blocks).await.written, 8);
    first.kill();
    assert_eq!(client.read(&blocks).await.blocks, 0);
    drop(first);
    let _second = cluster.node("kv-0", |_| {}).await;
    assert_eq!(client.read(&blocks).await.blocks, 0, "its memory is new");
    assert_eq!(client.write(&blocks).await.written, 8);
    assert_eq!(client.read(&blocks).await.blocks, 8);
}

#[tokio::test]
async fn a_node_that_never_answers_costs_one_caller_its_timeout_and_the_others_nothing() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    // Connections are taken by the system, and nobody reads them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut member = node.member.clone();
    drop(node);
    member.grpc = silent.local_addr().unwrap().to_string();
    let registry = cluster.hub().registry();
    registry.register(member).await.unwrap();
    let client = cluster.client(8);
    let blocks = client.places(0, &hashes(0..8));
    let start = Instant::now();
    assert!(matches!(client.read(&blocks).await.error, Some(Error::Timeout { .. } | Error::Call { .. })));
    assert!(start.elapsed() < Duration::from_secs(5));
    let start = Instant::now();
    for _ in 0..100 {
        assert!(matches!(client.read(&blocks).await.error, Some(Error::Away { .. })));
    }
    assert!(start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
}

#[tokio::test]
async fn after_a_dropped_read_nothing_lands_in_memory() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    let node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(200);
    let hashes = hashes(0..100);
    client.write(&client.prepare(0, &hashes)).await;
    let places = client.places(100, &hashes);
    let (zero, mark) = (vec![0; BLOCK as usize], vec![0xAA; BLOCK as usize]);
    let mut cut_short = 0;
    for attempt in 0..200 {
        places.iter().for_each(|&(_, offset)| client.engine.write_bytes(offset, &zero).unwrap());
        let patience = Duration::from_micros(attempt * 50);
        if tokio::time::timeout(patience, client.read(&places)).await.is_ok() {
            continue;
        }
        cut_short += usize::from(places.iter().any(|&(_, offset)| client.bytes(offset) != zero));
        places.iter().for_each(|&(_, offset)| client.engine.write_bytes(offset, &mark).unwrap());
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert!(places.iter().all(|&(_, offset)| client.bytes(offset) == mark), "a late byte, attempt {attempt}");
    }
    assert!(cut_short > 0, "no read was dropped while bytes were coming: the test tests nothing");
    assert!(node.node.usage().blocks == 100);
}

#[tokio::test]
async fn without_nodes_everything_is_a_miss_at_once() {
    let client = Cluster::new().client(4);
    let blocks = client.prepare(0, &hashes(0..4));
    let report = client.read(&blocks).await;
    assert_eq!((report.blocks, report.error.is_none()), (0, true));
    assert_eq!(client.write(&blocks).await.skipped, 4);
    assert_eq!(client.store.nodes(), 0);
}

#[tokio::test]
async fn a_passed_deadline_is_a_miss_and_no_fault_of_the_node() {
    let cluster = Cluster::new();
    let _node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(4);
    let blocks = client.prepare(0, &hashes(0..4));
    client.write(&blocks).await;
    let passed = kvasir_types::Deadline::after(Duration::ZERO);
    assert_eq!(client.store.read(&request(), &blocks, BLOCK, passed).await.blocks, 0);
    assert_eq!(
        client.store.write(&request(), &kvasir_store_client::Origin::default(), &blocks, BLOCK, passed).await.written,
        0
    );
    assert_eq!(client.store.read(&request(), &blocks, BLOCK, soon()).await.blocks, 4);
}

#[tokio::test]
async fn unacceptable_calls_are_refused_by_what_is_wrong() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |config| config.limits.max_leases = 1).await;
    let (client, mut raw) = (cluster.client(1), node.raw().await);
    let good = lookup_request(&hashes(0..1));
    for (code, part, bad) in [
        (Code::FailedPrecondition, "protocol version 99", v1::LookupRequest { protocol_version: 99, ..good.clone() }),
        (Code::InvalidArgument, "block_bytes", v1::LookupRequest { block_bytes: 0, ..good.clone() }),
        (
            Code::InvalidArgument,
            "hashes has 15 bytes",
            v1::LookupRequest { hashes: vec![1; 15].into(), ..good.clone() },
        ),
        (Code::InvalidArgument, "1025 values", lookup_request(&hashes(0..1025))),
    ] {
        let status = raw.lookup(bad).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(part), "{status:?}");
    }
    client.write(&client.prepare(0, &hashes(0..1))).await;
    raw.lookup(good.clone()).await.unwrap();
    assert_eq!(raw.lookup(good).await.unwrap_err().code(), Code::ResourceExhausted);
    // A block larger than any slab.
    let huge = v1::ReserveRequest { block_bytes: u64::MAX, ..reserve_request(&hashes(5..6)) };
    let reserved = raw.reserve(huge).await.unwrap().into_inner();
    assert_eq!((reserved.slots[0].state(), reserved.reservation), (v1::slot::State::Full, 0));
}

#[tokio::test]
async fn status_and_metrics_say_what_happened() {
    let cluster = Cluster::new();
    let node = cluster.node("kv-0", |_| {}).await;
    let client = cluster.client(10);
    let blocks = client.prepare(0, &hashes(0..10));
    client.write(&blocks[..8]).await;
    client.read(&blocks).await;
    let status = node.raw().await.store_status(v1::StoreStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.member.as_str(), status.blocks, status.used_bytes), ("kv-0", 8, 8 * BLOCK));
    assert_eq!((status.committed_blocks_total, status.hit_blocks_total), (8, 8));
    assert_eq!(status.incarnation, node.member.incarnation.0);
    let page = node.context.metrics.encode();
    for line in [
        "kvasir_kv_store_used_bytes 163840",
        "kvasir_kv_store_blocks{state=\"present\"} 8",
        "kvasir_kv_store_committed_blocks_total 8",
        "kvasir_kv_store_hit_blocks_total 8",
        "kvasir_kv_store_missed_blocks_total 2",
        "kvasir_kv_store_refused_total{reason=\"torn\"} 0",
        "kvasir_kv_store_call_seconds_count{call=\"reserve\"} 1",
    ] {
        assert!(page.lines().any(|found| found == line), "no {line:?} in\n{page}");
    }
}

#[tokio::test]
async fn a_node_announces_itself_and_takes_its_leave() {
    let cluster = Cluster::new();
    let (registry, view) = (cluster.hub().registry(), cluster.hub().registry().view());
    let (context, dir) = (kvasir_runtime::Context::detached("kv-9"), tempfile::tempdir().unwrap());
    let config = crate::Config {
        id: Some("kv-9".into()),
        capacity_bytes: 16 << 20,
        port_file: Some(dir.path().join("ports.json")),
        ..Default::default()
    };
    let port_file = config.port_file.clone().unwrap();
    let leaving = context.shutdown.clone();
    let (running, watching) =
        (crate::run(config, context.clone(), registry, kvasir_transfer::LocalNet::new()), async {
            eventually("ready", || context.health.ready().is_ok()).await;
            let member = view.borrow().role(Role::KvStore).next().cloned().unwrap();
            assert_eq!((member.id.as_str(), member.segment.unwrap().incarnation), ("kv-9", member.incarnation));
            let ports: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(port_file).unwrap()).unwrap();
            assert_eq!((ports["grpc"].as_str(), ports["admin"].as_str()), (Some(&*member.grpc), Some(&*member.admin)));
            leaving.trigger();
        });
    let (end, ()) = futures_util::future::join(Box::pin(running), watching).await;
    end.unwrap();
    assert_eq!(view.borrow().role(Role::KvStore).count(), 0);
    assert!(context.health.ready().is_err());
}

#[tokio::test]
async fn under_mixed_load_every_read_is_right_or_a_miss_and_nothing_leaks() {
    let cluster = Cluster::with(&[TransportKind::Tcp]);
    // Room for 50 of 96 blocks, and leases and reservations that end in the middle of things.
    let node = cluster
        .node("kv-0", |config| {
            (config.capacity_bytes, config.lease_ms, config.reservation_ms) = (1 << 20, 3, 3);
        })
        .await;
    let end = Instant::now() + Duration::from_millis(1500);
    let worker = async |seed: u32| {
        let (client, mut random, mut good) = (cluster.client(64), seed, 0);
        let mut next = |limit: u32| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 16) % limit
        };
        while Instant::now() < end {
            let start = next(6) * 16;
            let run = hashes(start..start + 1 + next(16));
            if next(3) == 0 {
                client.write(&client.prepare(0, &run)).await;
            } else {
                let places = client.places(32, &run);
                let report = client.read(&places).await;
                assert!(client.has(&places[..report.blocks]), "wrong bytes");
                good += report.blocks;
            }
        }
        good
    };
    let good = futures_util::future::join_all((0..4).map(worker)).await.into_iter().sum::<usize>();
    assert!(good > 100, "only {good} blocks were read: the test tests little");
    eventually("all holds have ended", || {
        let usage = node.node.usage();
        (usage.pinned, usage.reserved) == (0, 0) && usage.used_bytes == usage.blocks * BLOCK
    })
    .await;
    assert!(node.node.totals().0.evicted_blocks > 0);
}

#[tokio::test]
async fn many_who_ask_at_once_are_each_told_how_long_their_run_is() {
    let cluster = Cluster::new();
    let nodes = [cluster.node("kv-0", |_| {}).await, cluster.node("kv-1", |_| {}).await];
    let client = cluster.client(200);
    let blocks = client.prepare(0, &hashes(0..200));
    assert_eq!(client.write(&blocks).await.written, 200);
    // Some of them alone are more than one call takes; runs of all lengths, with a hash behind them that nobody has.
    let ask = |have: usize| {
        let prompt: Vec<_> = hashes(0..have as u32).into_iter().chain(hashes(900..901)).collect();
        let client = client.store.clone();
        async move { client.exists(&prompt, BLOCK, soon()).await }
    };
    let told = futures_util::future::join_all((0..200).map(ask)).await;
    for (have, (found, error)) in told.into_iter().enumerate() {
        assert!(error.is_none(), "{error:?}");
        assert_eq!(found, have);
    }
    eventually("nothing is held", || nodes.iter().all(|node| node.node.usage().pinned == 0)).await;
    let calls = nodes.iter().map(|node| node.node.totals().0.lookups).sum::<u64>();
    assert_eq!(calls, 0, "nor counted as used");
}
