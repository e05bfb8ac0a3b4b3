//! What every transport promises, as one suite run against each.

use std::{collections::HashSet, thread, time::Duration};

use futures_util::future::join_all;
use kvasir_transfer::{
    Access, Allocation, Config, Error, GrantRange, LocalNet, Memory, Op, Refusal, TransferEngine, Transports,
};
use kvasir_types::{Deadline, GrantKey, Incarnation, SegmentId, TransportKind};

mod parts;

use self::parts::*;
use crate::support::*;

macro_rules! contract {
    ($($law:ident)*) => {
        mod local {
            $(#[test] fn $law() { super::$law(super::TransportKind::Local); })*
        }
        mod shm {
            $(#[test] fn $law() { super::$law(super::TransportKind::Shm); })*
        }
        mod tcp {
            $(#[test] fn $law() { super::$law(super::TransportKind::Tcp); })*
        }
        mod tls {
            $(#[test] fn $law() { crate::tls::secured(|| super::$law(super::TransportKind::Tcp)); })*
        }
        mod ucx {
            $(#[test] fn $law() { super::$law(super::TransportKind::Ucx); })*
        }
        mod ucx_rma {
            $(#[test] fn $law() {
                if crate::ucx::has_rma() {
                    super::RMA.set(true);
                    super::$law(super::TransportKind::Ucx);
                }
            })*
        }
    };
}

contract! {
    what_is_written_is_read_back
    many_scattered_ranges_land_each_in_its_place
    empty_ranges_move_nothing
    one_byte_beyond_the_segment_is_seen_before_anything_is_sent
    one_byte_beyond_the_grant_is_refused_and_nothing_lands
    a_wrong_key_opens_nothing
    a_grant_to_read_does_not_let_write_nor_the_reverse
    a_revoked_grant_opens_nothing
    a_descriptor_of_an_earlier_life_is_stale
    a_large_batch_is_cut_into_slices_and_arrives_whole
    concurrent_batches_do_not_mix
    neighbouring_granted_blocks_can_be_written_as_one
    batches_beyond_the_limit_wait_and_complete
    a_passed_deadline_is_an_error
    a_cancelled_transfer_resolves
    a_dropped_transfer_completes
    a_shut_down_engine_answers_with_an_error
    an_engine_can_reach_itself
    every_region_is_reached_and_none_after_it_was_unregistered
    unregistering_ends_the_grants_over_a_region_and_waits_for_writers
    a_read_only_file_is_read_and_never_written
    borrowed_memory_is_reached_where_nothing_need_be_mapped
    a_notice_arrives_after_the_bytes_it_follows
    a_notice_needs_a_grant_and_no_bytes
    many_destinations_in_one_submit_fail_each_by_itself
    what_is_known_of_a_peer_is_counted
}

/// Whether the owner's side takes part in every operation, checks it and counts it. Over the others a peer asks once for
/// each grant, and checks itself from then on.
fn owner_takes_part(transport: TransportKind) -> bool {
    match transport {
        TransportKind::Local | TransportKind::Tcp => true,
        TransportKind::Shm => false,
        TransportKind::Ucx => !RMA.get(),
    }
}

fn refused(result: Result<kvasir_transfer::Report, Error>) -> Refusal {
    match result {
        Err(Error::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

fn what_is_written_is_read_back(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let sent = pattern(1, 10_000);
    client.write_bytes(100, &sent).unwrap();
    let write = grant(&owner, 5000, 10_000, Access::Write);
    let report =
        client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(100, 5000, 10_000)])).wait().unwrap();
    assert_eq!((report.bytes, report.ops, report.transport), (10_000, 1, transport));
    assert_eq!(bytes(&owner, 5000, 10_000), sent);
    assert_eq!(owner.checksum(5000, 10_000).unwrap(), client.checksum(100, 10_000).unwrap());
    assert_eq!(owner.checksum(5000, 10_000).unwrap(), blake3::hash(&sent).as_bytes()[..16]);

    let read = grant(&owner, 5000, 10_000, Access::Read);
    client.submit(batch(Op::Read, &owner.descriptor(), read.key(), &[(500_000, 5000, 10_000)])).wait().unwrap();
    assert_eq!(bytes(&client, 500_000, 10_000), sent);
    // The bytes around stay as they were.
    assert_eq!(bytes(&client, 499_999, 1), [0]);
    assert_eq!(bytes(&client, 510_000, 1), [0]);

    let ours = *client.stats().client.of(transport);
    assert_eq!((ours.written_bytes, ours.read_bytes, ours.written_ops), (10_000, 10_000, 1));
    if transport == TransportKind::Shm || owner_takes_part(transport) {
        wait_until("the owner has counted", || {
            let theirs = *owner.stats().owner.of(transport);
            (theirs.written_bytes, theirs.read_bytes, theirs.read_ops) == (10_000, 10_000, 1)
        });
    }
}

fn many_scattered_ranges_land_each_in_its_place(transport: TransportKind) {
    let (client, owner) = pair(transport, 4 * MIB);
    let ranges: Vec<_> = (0..1000).map(|i| (i * 4000, (999 - i) * 4000 + 7, 1 + i * 3)).collect();
    client.write_bytes(0, &pattern(2, 4 * MIB)).unwrap();
    let write = grant(&owner, 0, 4 * MIB as u64, Access::Write);
    let report = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &ranges)).wait().unwrap();
    assert_eq!(report.bytes, ranges.iter().map(|r| r.2).sum::<u64>());
    for &(local, remote, len) in &ranges {
        assert_eq!(bytes(&owner, remote, len as usize), bytes(&client, local, len as usize));
        assert_eq!(bytes(&owner, remote + len, 1), [0]);
    }
}

fn empty_ranges_move_nothing(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let report =
        client.submit(batch(Op::Write, &owner.descriptor(), GrantKey(0), &[(0, 0, 0), (MIB as u64, 5, 0)])).wait();
    assert_eq!(report.unwrap().bytes, 0);
    let write = grant(&owner, 0, 10, Access::Write);
    let mixed = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 0), (0, 0, 10), (9, 9, 0)]));
    assert_eq!(mixed.wait().unwrap().bytes, 10);
}

fn one_byte_beyond_the_segment_is_seen_before_anything_is_sent(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let end = MIB as u64;
    for ranges in [[(end - 9, 0, 10)], [(0, end - 9, 10)], [(0, u64::MAX, 10)]] {
        let result = client.submit(batch(Op::Read, &owner.descriptor(), GrantKey(0), &ranges)).wait();
        assert!(matches!(result, Err(Error::OutOfBounds { .. })), "{result:?}");
    }
    let range = GrantRange { offset: end - 9, len: 10, access: Access::Read };
    assert!(matches!(owner.grant(vec![range]), Err(Error::OutOfBounds { .. })));
    assert!(owner.write_bytes(end - 9, &[0; 10]).is_err());
    assert!(owner.read_bytes(end, &mut [0; 1]).is_err());
    assert!(owner.checksum(end - 9, 10).is_err());
    // A lying descriptor moves the check to the owner's side.
    let all = grant(&owner, 0, end, Access::Read);
    let everything = kvasir_types::RegionInfo { base: 0, len: u64::MAX, shared: true };
    let lying = kvasir_types::SegmentDescriptor { len: u64::MAX, regions: vec![everything], ..owner.descriptor() };
    for remote in [end - 9, u64::MAX - 10] {
        let result = client.submit(batch(Op::Read, &lying, all.key(), &[(0, remote, 10)])).wait();
        assert_eq!(refused(result), Refusal::Bounds);
    }
}

fn one_byte_beyond_the_grant_is_refused_and_nothing_lands(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    client.write_bytes(0, &[7; 200]).unwrap();
    let write = grant(&owner, 100, 100, Access::Write);
    for (remote, len) in [(99, 10), (191, 10), (99, 102)] {
        let result =
            client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 150, 1), (0, remote, len)]));
        assert_eq!(refused(result.wait()), Refusal::Bounds);
    }
    assert_eq!(bytes(&owner, 0, 300), [0; 300]);
    if owner_takes_part(transport) {
        assert_eq!(owner.stats().refused.bounds, 3);
    }
    client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 100, 100)])).wait().unwrap();
}

fn a_wrong_key_opens_nothing(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let write = grant(&owner, 0, 100, Access::Write);
    let wrong = GrantKey(write.key().0 ^ 1);
    for op in [Op::Read, Op::Write] {
        let result = client.submit(batch(op, &owner.descriptor(), wrong, &[(0, 0, 100)])).wait();
        assert_eq!(refused(result), Refusal::UnknownGrant);
    }
    assert_eq!(owner.stats().refused.unknown_grant, 2);
}

fn a_grant_to_read_does_not_let_write_nor_the_reverse(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    client.write_bytes(0, &[7; 100]).unwrap();
    for (access, op) in [(Access::Read, Op::Write), (Access::Write, Op::Read)] {
        let one = grant(&owner, 0, 100, access);
        let result = client.submit(batch(op, &owner.descriptor(), one.key(), &[(0, 0, 100)])).wait();
        assert_eq!(refused(result), Refusal::Access);
    }
    assert_eq!(bytes(&owner, 0, 100), [0; 100]);
    assert_eq!(bytes(&client, 0, 100), [7; 100]);
    if owner_takes_part(transport) {
        assert_eq!(owner.stats().refused.access, 2);
    }
}

fn a_revoked_grant_opens_nothing(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    client.write_bytes(0, &[7; 100]).unwrap();
    let (awaited, dropped) = (grant(&owner, 0, 100, Access::Write), grant(&owner, 0, 100, Access::Write));
    let keys = [awaited.key(), dropped.key()];
    block_on(awaited.revoke());
    drop(dropped);
    for key in keys {
        let result = client.submit(batch(Op::Write, &owner.descriptor(), key, &[(0, 0, 100)])).wait();
        assert_eq!(refused(result), Refusal::UnknownGrant);
    }
    assert_eq!(bytes(&owner, 0, 100), [0; 100]);
    // An ordinary refusal: the connection stays in use.
    let live = grant(&owner, 0, 100, Access::Write);
    client.submit(batch(Op::Write, &owner.descriptor(), live.key(), &[(0, 0, 100)])).wait().unwrap();
    assert_eq!((client.stats().retries, owner.stats().fenced_connections), (0, 0));
}

fn a_descriptor_of_an_earlier_life_is_stale(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let all = grant(&owner, 0, 100, Access::Read);
    let now = owner.descriptor();
    let mut earlier = now.clone();
    earlier.incarnation = Incarnation(now.incarnation.0 ^ 1);
    let mut other = now.clone();
    other.segment = SegmentId(now.segment.0 ^ 1);
    for target in [earlier, other] {
        let result = client.submit(batch(Op::Read, &target, all.key(), &[(0, 0, 100)])).wait();
        assert!(matches!(result, Err(Error::Stale { .. })), "{result:?}");
    }
    client.submit(batch(Op::Read, &now, all.key(), &[(0, 0, 100)])).wait().unwrap();
}

fn a_large_batch_is_cut_into_slices_and_arrives_whole(transport: TransportKind) {
    let (client, owner) = pair(transport, 64 * MIB);
    let all = 64 * MIB as u64;
    client.write_bytes(0, &pattern(3, 64 * MIB)).unwrap();
    let write = grant(&owner, 0, all, Access::Write);
    let report = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, all)])).wait().unwrap();
    assert_eq!((report.bytes, report.ops), (all, 64));
    assert_eq!(owner.checksum(0, all).unwrap(), client.checksum(0, all).unwrap());
    if transport == TransportKind::Tcp {
        assert_eq!(client.stats().open_connections, 2);
    }
    client.write_bytes(0, &vec![0; 64 * MIB]).unwrap();
    let read = grant(&owner, 0, all, Access::Read);
    client.submit(batch(Op::Read, &owner.descriptor(), read.key(), &[(0, 0, all)])).wait().unwrap();
    assert_eq!(owner.checksum(0, all).unwrap(), client.checksum(0, all).unwrap());
}

fn concurrent_batches_do_not_mix(transport: TransportKind) {
    const EACH: usize = 2 * MIB;
    let (client, owner) = pair(transport, 4 * EACH);
    let write = grant(&owner, 0, 4 * EACH as u64, Access::Write);
    let key = write.key();
    thread::scope(|scope| {
        for worker in 0..4u64 {
            let (client, target) = (&client, owner.descriptor());
            scope.spawn(move || {
                let start = worker * EACH as u64;
                client.write_bytes(start, &pattern(worker, EACH)).unwrap();
                // Eight batches in flight, each of 64 pieces that are neighbours on one side only.
                let transfers = (0..8u64).map(|part| {
                    let ranges: Vec<_> = (0..64u64)
                        .map(|i| (start + (part * 64 + i) * 4096, start + ((7 - part) * 64 + 63 - i) * 4096, 4096))
                        .collect();
                    client.submit(batch(Op::Write, &target, key, &ranges))
                });
                let reports = block_on(join_all(transfers.collect::<Vec<_>>()));
                assert!(reports.iter().all(|report| report.as_ref().is_ok_and(|r| r.bytes == 64 * 4096)));
            });
        }
    });
    for worker in 0..4u64 {
        let (start, sent) = (worker * EACH as u64, pattern(worker, EACH));
        for (index, piece) in sent.chunks(4096).enumerate() {
            assert_eq!(
                bytes(&owner, start + (511 - index as u64) * 4096, 4096),
                piece,
                "worker {worker}, piece {index}"
            );
        }
    }
}

fn neighbouring_granted_blocks_can_be_written_as_one(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    client.write_bytes(0, &[9; 300]).unwrap();
    let block = |index: u64| GrantRange { offset: index * 100, len: 100, access: Access::Write };
    let write = owner.grant(vec![block(2), block(0), block(1)]).unwrap();
    let ranges = [(0, 0, 100), (100, 100, 100), (200, 200, 100)];
    let report = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &ranges)).wait().unwrap();
    assert_eq!((report.bytes, report.ops), (300, 1));
    assert_eq!(bytes(&owner, 0, 300), [9; 300]);
}

fn batches_beyond_the_limit_wait_and_complete(transport: TransportKind) {
    let net = LocalNet::new();
    let small = Config { max_inflight_bytes: 600_000, ..config(transport) };
    let client = TransferEngine::new(small, net.clone(), MIB).unwrap();
    let owner = TransferEngine::new(config(transport), net, MIB).unwrap();
    client.write_bytes(0, &pattern(4, MIB)).unwrap();
    let write = grant(&owner, 0, MIB as u64, Access::Write);
    // The last one alone is larger than the limit.
    let sizes = std::iter::repeat_n(MIB as u64 / 4, 20).chain([MIB as u64]);
    let transfers: Vec<_> =
        sizes.map(|len| client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, len)]))).collect();
    for transfer in transfers {
        transfer.wait().unwrap();
    }
    assert_eq!(owner.checksum(0, MIB as u64).unwrap(), client.checksum(0, MIB as u64).unwrap());
}

fn a_passed_deadline_is_an_error(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let write = grant(&owner, 0, 100, Access::Write);
    let mut late = batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 100)]);
    late.deadline = Deadline::after(Duration::ZERO);
    assert!(matches!(client.submit(late).wait(), Err(Error::DeadlineExceeded)));
}

fn a_cancelled_transfer_resolves(transport: TransportKind) {
    let (client, owner) = pair(transport, 64 * MIB);
    let write = grant(&owner, 0, 64 * MIB as u64, Access::Write);
    let transfer = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 64 * MIB as u64)]));
    transfer.cancel();
    let result = within_limit("a cancelled transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    // The engine and the peer's connections are as good as before.
    client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 100)])).wait().unwrap();
}

fn a_dropped_transfer_completes(transport: TransportKind) {
    let (client, owner) = pair(transport, 8 * MIB);
    client.write_bytes(0, &pattern(5, 8 * MIB)).unwrap();
    let write = grant(&owner, 0, 8 * MIB as u64, Access::Write);
    drop(client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 8 * MIB as u64)])));
    wait_until("all has been written", || client.stats().client.of(transport).written_bytes == 8 * MIB as u64);
    assert_eq!(owner.checksum(0, 8 * MIB as u64).unwrap(), client.checksum(0, 8 * MIB as u64).unwrap());
}

fn a_shut_down_engine_answers_with_an_error(transport: TransportKind) {
    let (client, owner) = pair(transport, 64 * MIB);
    let write = grant(&owner, 0, 64 * MIB as u64, Access::Write);
    let request = || batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 64 * MIB as u64)]);
    let transfers: Vec<_> = (0..20).map(|_| client.submit(request())).collect();
    client.shutdown();
    client.shutdown();
    let results: HashSet<_> =
        transfers.into_iter().map(|t| t.wait().map_err(|e| e.to_string()).map(|r| r.bytes)).collect();
    let shut_down = Err(Error::Shutdown.to_string());
    assert!(results.contains(&shut_down), "{results:?}");
    assert!(results.iter().all(|result| *result == shut_down || *result == Ok(64 * MIB as u64)), "{results:?}");
    assert!(matches!(client.submit(request()).wait(), Err(Error::Shutdown)));
    assert!(matches!(client.grant(Vec::new()), Err(Error::Shutdown)));
}

fn an_engine_can_reach_itself(transport: TransportKind) {
    let (engine, _) = pair(transport, MIB);
    engine.write_bytes(0, &[3; 1000]).unwrap();
    let write = grant(&engine, 5000, 1000, Access::Write);
    engine.submit(batch(Op::Write, &engine.descriptor(), write.key(), &[(0, 5000, 1000)])).wait().unwrap();
    assert_eq!(bytes(&engine, 5000, 1000), [3; 1000]);
}

// What is particular to choosing among transports.

#[test]
fn local_is_chosen_within_a_net_shm_within_the_host_and_tcp_across() {
    let net = LocalNet::new();
    let client = TransferEngine::new(Config::default(), net.clone(), MIB).unwrap();
    let near = TransferEngine::new(Config::default(), net, MIB).unwrap();
    let far = engine(Config::default(), MIB);
    let mut elsewhere = far.descriptor();
    let shm = elsewhere.transports.iter_mut().find(|offer| offer.kind == TransportKind::Shm).unwrap();
    shm.address.insert_str(0, "another-boot-");
    for (owner, target, expected) in [
        (&near, near.descriptor(), TransportKind::Local),
        (&far, far.descriptor(), TransportKind::Shm),
        (&far, elsewhere, TransportKind::Tcp),
    ] {
        let read = grant(owner, 0, 10, Access::Read);
        let report = client.submit(batch(Op::Read, &target, read.key(), &[(0, 0, 10)])).wait().unwrap();
        assert_eq!(report.transport, expected);
    }
    let kinds: Vec<_> = client.descriptor().transports.iter().map(|t| t.kind).collect();
    assert_eq!(kinds, [TransportKind::Local, TransportKind::Shm, TransportKind::Tcp]);
}

#[test]
fn memory_of_this_host_that_cannot_be_mapped_is_reached_by_ucx() {
    let quiet = || Config {
        ucx: kvasir_transfer::UcxConfig {
            net_devices: Some("lo".into()),
            tls: Some("tcp".into()),
            ..Default::default()
        },
        ..Config::default()
    };
    let (client, owner, lender) = (engine(quiet(), MIB), engine(quiet(), MIB), engine(quiet(), MIB));
    let offered = |engine: &TransferEngine| engine.descriptor().transports.iter().any(|t| t.kind == TransportKind::Ucx);
    assert!(!offered(&owner), "not started before it is wanted");
    let region = owner.register(Memory::Borrowed(lender.memory())).unwrap();
    assert!(offered(&owner));
    lender.write_bytes(0, &pattern(4, 5000)).unwrap();
    let read = grant(&owner, region.base(), 5000, Access::Read);
    let ranges = [(100, region.base(), 5000)];
    let report = client.submit(batch(Op::Read, &owner.descriptor(), read.key(), &ranges)).wait().unwrap();
    assert_eq!(report.transport, TransportKind::Ucx);
    assert_eq!(bytes(&client, 100, 5000), pattern(4, 5000));
    let why = &client.peers()[0].reason;
    assert!(why.starts_with("same host, memory that can't be mapped"), "{why}");
}

#[test]
fn bytes_are_copied_between_regions_of_a_segment_and_nowhere_else() {
    let owner = engine(Config::default(), MIB);
    let beside = owner.register(Memory::Allocate(Allocation::new(8192))).unwrap();
    owner.write_bytes(100, &pattern(1, 5000)).unwrap();
    owner.copy_within(100, beside.base() + 10, 5000).unwrap();
    assert_eq!(bytes(&owner, beside.base() + 10, 5000), pattern(1, 5000));
    owner.copy_within(beside.base() + 10, 5000, 5000).unwrap();
    assert_eq!(bytes(&owner, 5000, 5000), pattern(1, 5000));
    for (from, to) in [(100, beside.base() + 8000), (MIB as u64 - 10, 0), (u64::MAX - 10, 0)] {
        let error = owner.copy_within(from, to, 5000).unwrap_err();
        assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
    }
}

#[test]
fn no_transport_in_common_is_an_error_that_names_both_sides() {
    let (client, owner) = (engine(config(TransportKind::Local), MIB), engine(config(TransportKind::Tcp), MIB));
    let error = client.submit(batch(Op::Read, &owner.descriptor(), GrantKey(1), &[(0, 0, 10)])).wait().unwrap_err();
    assert!(matches!(error, Error::NoTransport { .. }));
    let told = "it offers tcp, allowed here are local (local: the peer doesn't offer it)";
    assert!(error.to_string().ends_with(told), "{error}");
}

#[test]
fn a_transport_we_lack_is_passed_over_in_a_peer() {
    let (client, owner) = pair(TransportKind::Tcp, MIB);
    let mut newer = owner.descriptor();
    let ucx = kvasir_types::TransportAddress { kind: TransportKind::Ucx, address: "who knows".into() };
    newer.transports.insert(0, ucx);
    let read = grant(&owner, 0, 10, Access::Read);
    client.submit(batch(Op::Read, &newer, read.key(), &[(0, 0, 10)])).wait().unwrap();
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let bad = [
        (Config { slice_bytes: 100, ..Config::default() }, "slice_bytes"),
        (Config { connections_per_peer: 0, ..Config::default() }, "connections_per_peer"),
        (Config { transports: Transports::Named(Vec::new()), ..Config::default() }, "transports"),
    ];
    for (config, name) in bad {
        let error = TransferEngine::new(config, LocalNet::new(), MIB).unwrap_err();
        assert!(error.to_string().starts_with(&format!("transfer setting {name}: ")), "{error}");
    }
    let taken = engine(config(TransportKind::Tcp), MIB);
    let bind = taken.descriptor().transports[0].address.parse().unwrap();
    let config = Config { tcp_bind: bind, ..config(TransportKind::Tcp) };
    let error = TransferEngine::new(config, LocalNet::new(), MIB).unwrap_err();
    assert!(matches!(error, Error::Listen { .. }), "{error}");
}
