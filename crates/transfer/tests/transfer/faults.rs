//! Peers that stall, vanish, lie and babble: nothing lands late, nothing hangs, nothing leaks.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use kvasir_transfer::{Access, Batch, Config, Error, Op, Priority, TransferEngine};
use kvasir_types::{Deadline, GrantKey, PROTOCOL_VERSION, SegmentDescriptor, TransportAddress, TransportKind::Tcp};
use proptest::prelude::*;

use crate::support::*;

const LEN: u32 = 1 << 20;

/// An owner and a peer that has sent a write's header and half of its payload.
fn half_written(config: Config) -> (TransferEngine, kvasir_transfer::Grant, RawPeer) {
    let owner = engine(config, 2 * MIB);
    let write = grant(&owner, 0, LEN.into(), Access::Write);
    let mut peer = RawPeer::welcomed(&owner.descriptor());
    peer.request(1, 1, write.key(), &[(0, LEN)]);
    peer.0.write_all(&vec![1; LEN as usize / 2]).unwrap();
    wait_until("the first half has landed", || bytes(&owner, u64::from(LEN) / 2 - 1, 1) == [1]);
    (owner, write, peer)
}

/// The peer wakes up and sends the rest: it finds the connection closed, and nothing lands.
fn late_bytes_do_not_land(owner: &TransferEngine, mut peer: RawPeer) {
    owner.write_bytes(0, &vec![9; LEN as usize]).unwrap(); // the block is somebody else's now
    let _ = peer.0.write_all(&vec![1; LEN as usize / 2]);
    assert!(peer.is_closed());
    wait_until("the connection is gone", || owner.stats().accepted_connections == 0);
    assert_eq!(bytes(owner, 0, LEN as usize), vec![9; LEN as usize]);
}

#[test]
fn a_stalled_write_is_fenced_off_after_the_grace_and_no_byte_lands_later() {
    let (owner, write, peer) = half_written(config(Tcp));
    let start = Instant::now();
    within_limit("the revocation", move || block_on(write.revoke()));
    assert!(start.elapsed() >= Duration::from_millis(50), "the grace was not given");
    assert_eq!(owner.stats().fenced_connections, 1);
    late_bytes_do_not_land(&owner, peer);
}

#[test]
fn dropping_a_grant_fences_a_stalled_write_at_once() {
    let (owner, write, peer) = half_written(Config { fence_grace: LONG, ..config(Tcp) });
    within_limit("the drop", move || drop(write));
    assert_eq!(owner.stats().fenced_connections, 1);
    late_bytes_do_not_land(&owner, peer);
}

#[test]
fn dropping_an_unfinished_revocation_fences_at_once() {
    let (owner, write, peer) = half_written(Config { fence_grace: LONG, ..config(Tcp) });
    within_limit("the drop", move || {
        let mut revoke = Box::pin(write.revoke());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(revoke.as_mut().poll(&mut context).is_pending());
    });
    late_bytes_do_not_land(&owner, peer);
}

#[test]
fn a_write_in_flight_may_end_within_the_grace_of_its_revocation() {
    let (owner, write, mut peer) = half_written(Config { fence_grace: LONG, ..config(Tcp) });
    let revoked = thread::spawn(move || write.revoke().wait());
    peer.0.write_all(&vec![1; LEN as usize / 2]).unwrap();
    assert_eq!(peer.answer(), (0, 0, 1));
    revoked.join().unwrap();
    assert_eq!(bytes(&owner, 0, LEN as usize), vec![1; LEN as usize]);
    assert_eq!(owner.stats().fenced_connections, 0);
}

#[test]
fn a_reader_that_does_not_take_its_bytes_is_fenced_off() {
    let owner = engine(config(Tcp), 64 * MIB);
    let read = grant(&owner, 0, 64 * MIB as u64, Access::Read);
    let mut peer = RawPeer::welcomed(&owner.descriptor());
    for id in 0..8 {
        peer.request(0, id, read.key(), &[(0, 16 << 20)]); // far more than kernel buffers hold
    }
    thread::sleep(Duration::from_millis(20));
    within_limit("the revocation", move || read.revoke().wait());
    assert_eq!(owner.stats().fenced_connections, 1);
}

#[test]
fn a_write_that_makes_no_progress_is_given_up_without_a_revocation() {
    let (owner, write, mut peer) = half_written(Config { io_timeout: Duration::from_millis(100), ..config(Tcp) });
    assert!(peer.is_closed());
    write.revoke().wait();
    assert_eq!(owner.stats().fenced_connections, 0);
}

#[test]
fn an_idle_connection_outlives_the_timeout() {
    let owner = engine(Config { io_timeout: Duration::from_millis(40), ..config(Tcp) }, MIB);
    let read = grant(&owner, 0, 8, Access::Read);
    let mut peer = RawPeer::welcomed(&owner.descriptor());
    thread::sleep(Duration::from_millis(200));
    peer.request(0, 5, read.key(), &[(0, 8)]);
    assert_eq!(peer.answer(), (0, 8, 5));
}

#[test]
fn a_peer_that_dies_in_mid_write_frees_the_grant() {
    let (owner, write, peer) = half_written(Config { fence_grace: LONG, ..config(Tcp) });
    drop(peer);
    within_limit("the revocation", move || write.revoke().wait());
    assert_eq!(owner.stats().fenced_connections, 0);
}

#[test]
fn a_refused_write_is_answered_before_its_connection_is_closed() {
    let owner = engine(config(Tcp), 2 * MIB);
    let write = grant(&owner, 0, 100, Access::Write);
    let mut peer = RawPeer::welcomed(&owner.descriptor());
    peer.request(1, 3, write.key(), &[(1, 100)]);
    peer.0.write_all(&[1; 100]).unwrap();
    assert_eq!(peer.answer(), (3, 0, 3));
    assert!(peer.is_closed());
    assert_eq!(bytes(&owner, 0, 200), [0; 200]);
}

#[test]
fn hellos_of_another_version_or_life_are_told_so() {
    let owner = engine(config(Tcp), MIB);
    let target = owner.descriptor();
    let (segment, incarnation) = (target.segment.0, target.incarnation.0);
    let hello = |version, segment, incarnation| RawPeer::connect(&target).hello(version, segment, incarnation);
    assert_eq!(hello(PROTOCOL_VERSION, segment, incarnation), 0);
    assert_eq!(hello(PROTOCOL_VERSION + 1, segment, incarnation), 1);
    assert_eq!(hello(PROTOCOL_VERSION, segment, incarnation ^ 1), 2);
    assert_eq!(hello(PROTOCOL_VERSION, segment ^ 1, incarnation), 2);
    assert_eq!((owner.stats().refused.version, owner.stats().refused.stale), (1, 2));
}

#[test]
fn one_connection_too_many_is_told_so() {
    let owner = engine(Config { max_accepted_connections: 2, ..config(Tcp) }, MIB);
    let target = owner.descriptor();
    let first = RawPeer::welcomed(&target);
    let _second = RawPeer::welcomed(&target);
    assert_eq!(RawPeer::connect(&target).verdict(), 3);
    let client = engine(config(Tcp), MIB);
    let busy = client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 10)])).wait();
    assert!(matches!(busy, Err(Error::Busy { .. })), "{busy:?}");
    drop(first);
    wait_until("there is room again", || owner.stats().accepted_connections == 1);
    RawPeer::welcomed(&target);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn babble_closes_its_own_connection_and_nothing_else(
        babble in prop::collection::vec(any::<u8>(), 1..600), welcomed: bool, op in 0u8..3, ranges in 0u16..300, payload: u32,
    ) {
        let owner = engine(config(Tcp), MIB);
        let target = owner.descriptor();
        let mut peer = if welcomed { RawPeer::welcomed(&target) } else { RawPeer::connect(&target) };
        if welcomed {
            let mut header = vec![op, 0];
            header.extend_from_slice(&ranges.to_le_bytes());
            header.extend_from_slice(&payload.to_le_bytes());
            header.extend_from_slice(&[5; 16]);
            let _ = peer.0.write_all(&header);
        }
        let _ = peer.0.write_all(&babble);
        let _ = peer.0.shutdown(Shutdown::Write);
        let mut answers = Vec::new();
        let _ = peer.0.read_to_end(&mut answers);
        wait_until("the babbler is gone", || owner.stats().accepted_connections == 0);
        let read = grant(&owner, 0, 8, Access::Read);
        let mut good = RawPeer::welcomed(&target);
        good.request(0, 1, read.key(), &[(0, 8)]);
        prop_assert_eq!(good.answer(), (0, 8, 1));
        prop_assert_eq!(bytes(&owner, 0, 4096), vec![0; 4096]);
    }
}

// From here on the faulty peer is the owner: a listener of ours that behaves badly.

fn fake_owner() -> (TcpListener, SegmentDescriptor) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut descriptor = engine(config(Tcp), MIB).descriptor();
    descriptor.len = 1 << 30;
    descriptor.regions.clear();
    descriptor.transports = vec![TransportAddress { kind: Tcp, address: listener.local_addr().unwrap().to_string() }];
    (listener, descriptor)
}

/// The next connection, with a limit to the wait.
fn accept(listener: &TcpListener) -> TcpStream {
    let listener = listener.try_clone().unwrap();
    within_limit("the accept", move || listener.accept().unwrap().0)
}

/// Accepts one connection and welcomes it.
fn welcome(listener: &TcpListener) -> TcpStream {
    let mut stream = accept(listener);
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.read_exact(&mut [0; 32]).unwrap();
    let mut bytes = b"kvasirRX".to_vec();
    bytes.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    stream.write_all(&bytes).unwrap();
    stream
}

#[test]
fn cancelling_a_write_to_a_stalled_owner_resolves_and_frees_the_source() {
    let (listener, target) = fake_owner();
    let client = engine(config(Tcp), 64 * MIB);
    let transfer = client.submit(batch(Op::Write, &target, GrantKey(1), &[(0, 0, 64 * MIB as u64)]));
    let _streams = [welcome(&listener), welcome(&listener)]; // and never a read
    thread::sleep(Duration::from_millis(50)); // until the kernel's buffers are full
    transfer.cancel();
    let result = within_limit("the cancelled transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
}

#[test]
fn cancelling_a_read_whose_answer_stalls_half_way_lets_no_byte_land_later() {
    let (listener, target) = fake_owner();
    let client = engine(config(Tcp), MIB);
    let transfer = client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 1000)]));
    let mut stream = welcome(&listener);
    stream.read_exact(&mut [0; 36]).unwrap();
    let mut answer = vec![0; 4];
    answer.extend_from_slice(&1000u32.to_le_bytes());
    answer.extend_from_slice(&0u64.to_le_bytes());
    answer.extend_from_slice(&[1; 500]);
    stream.write_all(&answer).unwrap();
    wait_until("the first half has landed", || bytes(&client, 499, 1) == [1]);
    transfer.cancel();
    let result = within_limit("the transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    client.write_bytes(0, &[9; 1000]).unwrap();
    let _ = stream.write_all(&[1; 500]);
    wait_until("the connection is gone", || client.stats().open_connections == 0);
    assert_eq!(bytes(&client, 0, 1000), [9; 1000]);
}

#[test]
fn a_deadline_ends_a_transfer_whose_owner_is_silent() {
    let (_listener, target) = fake_owner(); // the kernel accepts, nobody answers
    let client = engine(config(Tcp), MIB);
    let mut request = batch(Op::Read, &target, GrantKey(1), &[(0, 0, 1000)]);
    request.deadline = Deadline::after(Duration::from_millis(100));
    let transfer = client.submit(request);
    let result = within_limit("the transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::DeadlineExceeded)), "{result:?}");
}

#[test]
fn a_late_answer_to_a_cancelled_read_is_thrown_away_and_the_connection_goes_on() {
    let (listener, target) = fake_owner();
    let client = engine(Config { connections_per_peer: 1, ..config(Tcp) }, MIB);
    let answer = |id: u64, byte: u8| {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&100u32.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
        bytes.extend_from_slice(&[byte; 100]);
        bytes
    };
    let cancelled = client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 100)]));
    let mut stream = welcome(&listener);
    stream.read_exact(&mut [0; 36]).unwrap();
    cancelled.cancel();
    assert!(matches!(cancelled.wait(), Err(Error::Cancelled)));
    client.write_bytes(0, &[9; 100]).unwrap();
    stream.write_all(&answer(0, 1)).unwrap();
    let next = client.submit(batch(Op::Read, &target, GrantKey(1), &[(500, 0, 100)]));
    let mut second = [0; 36];
    stream.read_exact(&mut second).unwrap();
    stream.write_all(&answer(1, 2)).unwrap();
    next.wait().unwrap();
    assert_eq!(bytes(&client, 0, 100), [9; 100]);
    assert_eq!(bytes(&client, 500, 100), [2; 100]);
}

#[test]
fn an_owner_that_never_answers_is_given_up() {
    let (listener, target) = fake_owner();
    let client = engine(Config { io_timeout: Duration::from_millis(100), retries: 1, ..config(Tcp) }, MIB);
    let transfer = client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 100)]));
    let _first = welcome(&listener);
    let _second = welcome(&listener); // the one retry
    let result = within_limit("the transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::Disconnected { .. })), "{result:?}");
    assert_eq!(client.stats().retries, 1);
}

#[test]
fn a_lying_answer_is_not_believed() {
    for (what, answer) in [
        ("another length", [0u8, 0, 0, 0, 99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("to no request", [0, 0, 0, 0, 100, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]),
        ("an unknown status", [77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("beyond every bound", [0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        let (listener, target) = fake_owner();
        let client = engine(Config { retries: 1, ..config(Tcp) }, MIB);
        let transfer = client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 100)]));
        for _ in 0..2 {
            let mut stream = welcome(&listener);
            stream.read_exact(&mut [0; 36]).unwrap();
            stream.write_all(&answer).unwrap();
            let _ = stream.write_all(&[1; 100]);
        }
        let result = within_limit(what, move || transfer.wait());
        assert!(matches!(result, Err(Error::Disconnected { .. })), "{what}: {result:?}");
        assert_eq!(bytes(&client, 0, 100), [0; 100], "{what}");
    }
}

#[test]
fn a_frame_whose_connection_dies_while_it_is_sent_goes_over_another_that_is_idle() {
    // Its sender must have left it before the other lane sends it; the spinning threads make the sender slow to leave.
    const SLICE: usize = 16 * MIB;
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&done); // also when an assertion fails
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop()
                }
            });
        }
        for _ in 0..5 {
            let (listener, target) = fake_owner();
            let client = engine(Config { slice_bytes: SLICE, ..config(Tcp) }, 2 * SLICE);
            let mut request = batch(Op::Write, &target, GrantKey(1), &[(0, 0, 2 * SLICE as u64)]);
            request.deadline = Deadline::after(Duration::from_secs(10));
            let transfer = client.submit(request);
            let (mut dying, mut good) = (welcome(&listener), welcome(&listener));
            let mut take = |id: u8| {
                good.read_exact(&mut [0; 36]).unwrap();
                std::io::copy(&mut Read::by_ref(&mut good).take(SLICE as u64), &mut std::io::sink()).unwrap();
                good.write_all(&[0, 0, 0, 0, 0, 0, 0, 0, id, 0, 0, 0, 0, 0, 0, 0]).unwrap();
            };
            take(0);
            wait_until("that lane is idle", || client.stats().client.tcp.written_bytes == SLICE as u64);
            dying.write_all(&[77; 16]).unwrap(); // no answer of ours
            take(1);
            let result = transfer.wait();
            assert!(result.is_ok(), "{result:?}");
        }
    });
}

#[test]
fn a_connection_lost_once_costs_a_retry_and_no_error() {
    let (listener, mut target) = fake_owner();
    let owner = engine(config(Tcp), MIB);
    let real = owner.descriptor();
    (target.segment, target.incarnation, target.len) = (real.segment, real.incarnation, real.len);
    owner.write_bytes(0, &[5; 100]).unwrap();
    let read = grant(&owner, 0, 100, Access::Read);
    let client = engine(config(Tcp), MIB);
    let transfer = client.submit(batch(Op::Read, &target, read.key(), &[(0, 0, 100)]));
    drop(welcome(&listener));
    // The second connection is passed through to the real owner.
    let near = accept(&listener);
    let far = TcpStream::connect(&real.transports[0].address).unwrap();
    for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
        thread::spawn(move || std::io::copy(&mut from, &mut to));
    }
    transfer.wait().unwrap();
    assert_eq!(bytes(&client, 0, 100), [5; 100]);
    assert_eq!(client.stats().retries, 1);
}

#[test]
fn when_the_owner_has_gone_its_clients_hear_it_promptly_and_find_the_next_one() {
    let client = engine(config(Tcp), MIB);
    let owner = engine(config(Tcp), MIB);
    let gone = owner.descriptor();
    let read = grant(&owner, 0, 100, Access::Read);
    client.submit(batch(Op::Read, &gone, read.key(), &[(0, 0, 100)])).wait().unwrap();
    owner.shutdown();
    let result = client.submit(batch(Op::Read, &gone, read.key(), &[(0, 0, 100)])).wait();
    assert!(matches!(result, Err(Error::Unreachable { .. } | Error::Disconnected { .. })), "{result:?}");
    // Restarted at the same address, in another life.
    let bind = gone.transports[0].address.parse().unwrap();
    let restarted = engine(Config { tcp_bind: bind, ..config(Tcp) }, MIB);
    let result = client.submit(batch(Op::Read, &gone, read.key(), &[(0, 0, 100)])).wait();
    assert!(matches!(result, Err(Error::Stale { .. })), "{result:?}");
    let read = grant(&restarted, 0, 100, Access::Read);
    client.submit(batch(Op::Read, &restarted.descriptor(), read.key(), &[(0, 0, 100)])).wait().unwrap();
}

#[test]
fn of_five_destinations_only_the_dead_one_fails() {
    let client = engine(config(Tcp), MIB);
    let owners: Vec<_> = (0..5).map(|_| engine(config(Tcp), MIB)).collect();
    let grants: Vec<_> = owners.iter().map(|owner| grant(owner, 0, 100, Access::Write)).collect();
    owners[2].shutdown();
    let transfers: Vec<_> = owners
        .iter()
        .zip(&grants)
        .map(|(owner, grant)| client.submit(batch(Op::Write, &owner.descriptor(), grant.key(), &[(0, 0, 100)])))
        .collect();
    let results: Vec<_> = transfers.into_iter().map(|transfer| transfer.wait().is_ok()).collect();
    assert_eq!(results, [true, true, false, true, true]);
}

#[test]
pub fn a_revocation_in_the_storm_leaves_no_late_byte() {
    // Batches keep coming while grants end under them: after each revocation the owner's bytes are its own again.
    let (client, owner) = pair(Tcp, 4 * MIB);
    for round in 0..30u8 {
        let write = grant(&owner, 0, 4 * MIB as u64, Access::Write);
        client.write_bytes(0, &vec![round; 4 * MIB]).unwrap();
        let transfers: Vec<_> = (0..4)
            .map(|_| client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 4 * MIB as u64)])))
            .collect();
        thread::sleep(Duration::from_micros(u64::from(round) * 150));
        if round % 2 == 0 {
            write.revoke().wait();
        } else {
            drop(write);
        }
        owner.write_bytes(0, &vec![0xee; 4 * MIB]).unwrap();
        for transfer in transfers {
            let result = transfer.wait();
            assert!(matches!(result, Ok(_) | Err(Error::Refused { .. } | Error::Disconnected { .. })), "{result:?}");
        }
        assert_eq!(bytes(&owner, 0, 4 * MIB), vec![0xee; 4 * MIB], "round {round}");
    }
}

#[test]
fn a_frame_is_sent_again_as_often_as_is_set_and_over_every_address() {
    let (first, mut target) = fake_owner();
    let (second, other) = fake_owner();
    target.transports.extend(other.transports);
    let client = engine(Config { retries: 3, connections_per_peer: 1, ..config(Tcp) }, MIB);
    let transfer = client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 100)]));
    for listener in [&first, &second, &first, &second] {
        drop(welcome(listener));
    }
    let result = within_limit("the transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::Disconnected { .. })), "{result:?}");
    assert_eq!(client.stats().retries, 3);
}

#[test]
fn of_two_addresses_one_that_is_dead_costs_retries_only() {
    let owner = engine(config(Tcp), MIB);
    owner.write_bytes(0, &[5; 100]).unwrap();
    let mut target = owner.descriptor();
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    target.transports.insert(0, TransportAddress { kind: Tcp, address: dead });
    let read = grant(&owner, 0, 100, Access::Read);
    let client = engine(config(Tcp), MIB);
    client.submit(batch(Op::Read, &target, read.key(), &[(0, 0, 100)])).wait().unwrap();
    assert_eq!(bytes(&client, 0, 100), [5; 100]);
}

#[test]
fn the_connections_to_all_peers_are_bounded_and_idle_ones_give_way() {
    let client = engine(Config { max_open_connections: 3, connections_per_peer: 1, ..config(Tcp) }, MIB);
    let owners: Vec<_> = (0..8).map(|_| engine(config(Tcp), MIB)).collect();
    for owner in owners.iter().chain(&owners) {
        let read = grant(owner, 0, 100, Access::Read);
        client.submit(batch(Op::Read, &owner.descriptor(), read.key(), &[(0, 0, 100)])).wait().unwrap();
        wait_until("there is room again", || client.stats().open_connections <= 3);
    }
    // All in use: the next peer is refused, and nobody's transfer is disturbed.
    let silent: Vec<_> = (0..3).map(|_| fake_owner()).collect();
    let busy: Vec<_> = silent
        .iter()
        .enumerate()
        .map(|(at, (_, target))| client.submit(batch(Op::Read, target, GrantKey(1), &[(at as u64, 0, 1)])))
        .collect();
    let read = grant(&owners[0], 0, 100, Access::Read);
    let refused = client.submit(batch(Op::Read, &owners[0].descriptor(), read.key(), &[(500, 0, 100)])).wait();
    assert!(matches!(refused, Err(Error::Busy { .. })), "{refused:?}");
    busy.iter().for_each(kvasir_transfer::Transfer::cancel);
}

#[test]
fn what_is_urgent_overtakes_what_waits() {
    let (listener, target) = fake_owner();
    let client = engine(Config { connections_per_peer: 1, ..config(Tcp) }, 4 * MIB);
    let submit =
        |priority, local| client.submit(Batch { priority, ..batch(Op::Write, &target, GrantKey(1), &[(local, 0, 8)]) });
    // While the lane connects, these queue up behind the first.
    let transfers =
        [submit(Priority::Low, 1), submit(Priority::Low, 2), submit(Priority::Normal, 3), submit(Priority::High, 4)];
    for at in 1..=4u8 {
        client.write_bytes(at.into(), &[at; 1]).unwrap();
    }
    let mut stream = welcome(&listener);
    let mut order = Vec::new();
    for _ in 0..4 {
        let mut request = [0; 24 + 12 + 8];
        stream.read_exact(&mut request).unwrap();
        order.push(request[36]);
    }
    // One was taken before all had come, whichever that was; the others are in order.
    let mut urgent_first = vec![4, 3, 1, 2];
    urgent_first.retain(|&at| at != order[0]);
    assert_eq!(order[1..], urgent_first, "{order:?}");
    transfers.iter().for_each(kvasir_transfer::Transfer::cancel);
}

#[test]
fn a_peer_that_keeps_failing_rests_and_is_tried_again() {
    let client = engine(Config { retries: 0, ..config(Tcp) }, MIB);
    let (listener, target) = fake_owner();
    let address = listener.local_addr().unwrap();
    drop(listener); // refuses connections from now on
    let read = || client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 1)])).wait().unwrap_err();
    for _ in 0..3 {
        assert!(matches!(read(), Error::Unreachable { .. }));
    }
    assert!(matches!(read(), Error::Resting { .. }), "no connection is tried");
    assert_eq!(client.peers()[0].failures_in_a_row, 3);
    let _back = TcpListener::bind(address).unwrap();
    wait_until("it is tried again", || {
        let transfer = client.submit(batch(Op::Read, &target, GrantKey(1), &[(0, 0, 1)]));
        thread::sleep(Duration::from_millis(5));
        transfer.cancel();
        matches!(transfer.wait(), Err(Error::Cancelled))
    });
}
