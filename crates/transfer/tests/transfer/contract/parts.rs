//! Regions, notices, many destinations, peers: what every transport promises about these.

use std::{
    fs::File,
    io::Write,
    os::fd::{FromRawFd, OwnedFd},
    thread,
    time::Duration,
};

use kvasir_transfer::{Access, Allocation, Batch, Error, GrantRange, LocalNet, Memory, Op, Refusal, TransferEngine};
use kvasir_types::{GrantKey, TransportKind};

use super::refused;
use crate::support::*;

pub(super) fn every_region_is_reached_and_none_after_it_was_unregistered(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let second = owner.register(Memory::Allocate(Allocation::new(MIB))).unwrap();
    let base = second.base();
    assert!(base > MIB as u64);
    let ours = client.register(Memory::Allocate(Allocation::new(4096))).unwrap();
    client.write_bytes(ours.base(), &pattern(3, 4096)).unwrap();
    let write = grant(&owner, base + 100, 4096, Access::Write);
    let ranges = [(ours.base(), base + 100, 4096)];
    let before = owner.descriptor();
    client.submit(batch(Op::Write, &before, write.key(), &ranges)).wait().unwrap();
    assert_eq!(bytes(&owner, base + 100, 4096), pattern(3, 4096));
    block_on(second.unregister());
    let refused = client.submit(batch(Op::Write, &before, write.key(), &ranges)).wait();
    assert!(matches!(refused, Err(Error::Refused { refusal: Refusal::UnknownGrant, .. })), "{refused:?}");
    let gone = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &ranges)).wait();
    assert!(matches!(gone, Err(Error::OutOfBounds { .. })), "{gone:?}");
    assert!(owner.grant(vec![GrantRange { offset: base, len: 1, access: Access::Read }]).is_err());
}

pub(super) fn unregistering_ends_the_grants_over_a_region_and_waits_for_writers(transport: TransportKind) {
    let (client, owner) = pair(transport, 8 * MIB);
    for round in 0..20 {
        let region = owner.register(Memory::Allocate(Allocation::new(8 * MIB))).unwrap();
        let (base, memory) = (region.base(), region.memory());
        let write = grant(&owner, base, 8 * MIB as u64, Access::Write);
        client.write_bytes(0, &vec![1; 8 * MIB]).unwrap();
        let transfers: Vec<_> = (0..4)
            .map(|_| client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, base, 8 * MIB as u64)])))
            .collect();
        thread::sleep(Duration::from_micros(round * 200));
        region.unregister().wait();
        // SAFETY: unregistered: the memory is ours alone, and `memory` keeps it mapped.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.base(), memory.len()) };
        bytes.fill(0xee);
        for transfer in transfers {
            let result = transfer.wait();
            let expected = matches!(
                result,
                Ok(_) | Err(Error::Refused { refusal: Refusal::UnknownGrant, .. } | Error::Disconnected { .. })
            );
            assert!(expected, "{result:?}");
        }
        assert!(bytes.iter().all(|&byte| byte == 0xee), "round {round}: a byte landed after unregistering");
    }
}

pub(super) fn a_read_only_file_is_read_and_never_written(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let file = read_only_file(&pattern(9, 8192), transport == TransportKind::Shm);
    let region = owner.register(Memory::File { file, offset: 4096, len: 4096, writable: false }).unwrap();
    let base = region.base();
    let write = owner.grant(vec![GrantRange { offset: base, len: 10, access: Access::Write }]);
    assert!(matches!(write, Err(Error::ReadOnly { .. })));
    assert!(matches!(owner.write_bytes(base, &[1]), Err(Error::ReadOnly { .. })));
    let read = grant(&owner, base, 4096, Access::Read);
    client.submit(batch(Op::Read, &owner.descriptor(), read.key(), &[(0, base, 4096)])).wait().unwrap();
    assert_eq!(bytes(&client, 0, 4096), pattern(9, 8192)[4096..]);
    // Nor may a read land in it.
    let read = grant(&client, 0, 10, Access::Read);
    let landing = owner.submit(batch(Op::Read, &client.descriptor(), read.key(), &[(base, 0, 10)])).wait();
    assert!(matches!(landing, Err(Error::ReadOnly { .. })), "{landing:?}");
}

/// A file without a name that can't be written. Sealed against shrinking, other processes can map it.
fn read_only_file(contents: &[u8], sealed: bool) -> File {
    // SAFETY: makes a descriptor and touches no memory but the name, a constant.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_ALLOW_SEALING) };
    // SAFETY: just made, and nobody else's.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(contents).unwrap();
    if sealed {
        // SAFETY: a plain call on our own descriptor.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) }, 0);
    }
    File::open(format!("/proc/self/fd/{fd}")).unwrap()
}

pub(super) fn a_notice_arrives_after_the_bytes_it_follows(transport: TransportKind) {
    let (client, owner) = pair(transport, 16 * MIB);
    let notices = owner.notices();
    let write = grant(&owner, 0, 16 * MIB as u64, Access::Write);
    for round in 0..10u8 {
        client.write_bytes(0, &vec![round + 1; 16 * MIB]).unwrap();
        let follow = Some(Box::from([round]));
        let ranges = [(0, 0, 16 * MIB as u64)];
        let transfer =
            client.submit(Batch { notice: follow, ..batch(Op::Write, &owner.descriptor(), write.key(), &ranges) });
        let notice = notices.next_within(LONG).expect("the notice");
        assert_eq!((notice.grant, &*notice.bytes), (write.key(), &[round][..]));
        assert_eq!(bytes(&owner, 0, 16 * MIB), vec![round + 1; 16 * MIB]);
        transfer.wait().unwrap();
    }
    assert!(notices.next_within(Duration::ZERO).is_none());
    owner.shutdown();
    assert!(block_on(notices.next()).is_none());
}

pub(super) fn a_notice_needs_a_grant_and_no_bytes(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let notices = owner.notices();
    let any = grant(&owner, 0, 1, Access::Read);
    let alone = |key| Batch { notice: Some(vec![7; 4096].into()), ..batch(Op::Write, &owner.descriptor(), key, &[]) };
    client.submit(alone(any.key())).wait().unwrap();
    assert_eq!(&*block_on(notices.next()).unwrap().bytes, [7; 4096]);
    assert_eq!(refused(client.submit(alone(GrantKey(3))).wait()), Refusal::UnknownGrant);
    let long = Batch { notice: Some(vec![7; 4097].into()), ..alone(any.key()) };
    assert!(matches!(client.submit(long).wait(), Err(Error::Config { .. })));
    // A batch whose bytes are refused brings no notice.
    let write = [(0, 0, 1)];
    let failing = Batch { notice: Some([1].into()), ..batch(Op::Write, &owner.descriptor(), any.key(), &write) };
    assert_eq!(refused(client.submit(failing).wait()), Refusal::Access);
    assert!(notices.next_within(Duration::from_millis(10)).is_none());
    // More than the owner keeps: the sender is told, nothing is lost in silence.
    let mut taken = 0;
    while client.submit(alone(any.key())).wait().is_ok() {
        taken += 1;
    }
    assert_eq!(owner.stats().refused.full, 1);
    for _ in 0..taken {
        notices.next_within(LONG).expect("as many as were taken");
    }
    client.submit(alone(any.key())).wait().unwrap();
}

pub(super) fn many_destinations_in_one_submit_fail_each_by_itself(transport: TransportKind) {
    let net = LocalNet::new();
    let new = || TransferEngine::new(config(transport), net.clone(), MIB).unwrap();
    let client = new();
    let owners: Vec<_> = (0..5).map(|_| new()).collect();
    let grants: Vec<_> = owners.iter().map(|owner| grant(owner, 0, 100, Access::Write)).collect();
    let batches: Vec<_> = owners
        .iter()
        .zip(&grants)
        .map(|(owner, grant)| batch(Op::Write, &owner.descriptor(), grant.key(), &[(0, 0, 100)]))
        .collect();
    owners[2].shutdown();
    let transfers = client.submit_all(batches.clone());
    wait_until("each has an outcome", || transfers.iter().all(|transfer| transfer.result().is_some()));
    let outcomes: Vec<_> = block_on(transfers).iter().map(Result::is_ok).collect();
    assert_eq!(outcomes, [true, true, false, true, true]);
    assert_eq!(client.submit_all(batches).wait().iter().filter(|outcome| outcome.is_ok()).count(), 4);
}

pub(super) fn what_is_known_of_a_peer_is_counted(transport: TransportKind) {
    let net = LocalNet::new();
    let new = |name: &str| {
        let builder = TransferEngine::builder().name(name).config(config(transport)).local_net(net.clone());
        builder.arena(Allocation::new(MIB)).build().unwrap()
    };
    let (client, owner) = (new("client"), new("owner"));
    assert!(client.peers().is_empty());
    let read = grant(&owner, 0, 1000, Access::Read);
    for _ in 0..3 {
        client.submit(batch(Op::Read, &owner.descriptor(), read.key(), &[(0, 0, 1000)])).wait().unwrap();
    }
    client.submit(batch(Op::Read, &owner.descriptor(), read.key(), &[(0, 999, 2)])).wait().unwrap_err();
    let peers = client.peers();
    let peer = &peers[0];
    assert_eq!(
        (peer.name.as_str(), peer.transport, peer.reason.as_str()),
        ("owner", transport, "named in the settings")
    );
    assert_eq!((peer.read_bytes, peer.written_bytes, peer.completed, peer.failed), (3000, 0, 3, 1));
    assert_eq!((peer.in_flight_bytes, peer.latency.count()), (0, 3));
    let stats = client.stats();
    assert_eq!(stats.latency[transport as usize].count(), 3);
    assert_eq!(stats.failures.iter().find(|(cause, _)| *cause == "refused"), Some(&("refused", 1)));
}

pub(super) fn borrowed_memory_is_reached_where_nothing_need_be_mapped(transport: TransportKind) {
    let (client, owner) = pair(transport, MIB);
    let lender = engine(config(TransportKind::Local), MIB);
    let region = owner.register(Memory::Borrowed(lender.memory())).unwrap();
    client.write_bytes(0, &pattern(7, 9000)).unwrap();
    let write = grant(&owner, region.base() + 10, 9000, Access::Write);
    let ranges = [(0, region.base() + 10, 9000)];
    let written = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &ranges)).wait();
    if transport == TransportKind::Shm {
        let error = written.unwrap_err();
        assert!(error.to_string().contains("shm: the memory can't be mapped"), "{error}");
        return;
    }
    written.unwrap();
    assert_eq!(bytes(&lender, 10, 9000), pattern(7, 9000));
    region.unregister().wait();
    assert!(owner.grant(vec![GrantRange { offset: 0, len: 1, access: Access::Read }]).is_ok());
}
