//! Peers that break the protocol, on either side, by hand: these messages are the protocol, said at the wrong time or with
//! the wrong contents. And users that are not let in.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use kvasir_types::{
    Deadline, GrantKey, Incarnation, PROTOCOL_VERSION, RegionInfo, SegmentDescriptor, SegmentId, TransportAddress,
    TransportKind, Transports,
};

use super::{
    address::Host,
    control::OwnerControl,
    mapping::shared_memory,
    messages::{Declined, MAX_MESSAGE, ToClient, ToOwner, Verdict, encode_ranges},
    socket::Socket,
};
use crate::{
    Access, Batch, Config, Error, Grant, GrantRange, LocalNet, Op, Range, ShmConfig, Transfer, TransferEngine,
    owner::random_u64,
};

const LEN: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(30);
const NOBODY: u32 = 65_534;

fn config() -> Config {
    Config {
        transports: Transports::Named(vec![TransportKind::Shm]),
        fence_grace: Duration::from_millis(50),
        ..Config::default()
    }
}

fn engine(config: Config) -> TransferEngine {
    TransferEngine::new(config, LocalNet::new(), LEN as usize).unwrap()
}

fn grant(owner: &TransferEngine, offset: u64, len: u64, access: Access) -> Grant {
    owner.grant(vec![GrantRange { offset, len, access }]).unwrap()
}

fn submit(client: &TransferEngine, target: &SegmentDescriptor, key: GrantKey) -> Transfer {
    let ranges = vec![Range { local: 0, remote: 0, len: 100 }];
    client.submit(Batch::new(Op::Read, target.clone(), key, ranges, Deadline::after(LONG)))
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A socket and what comes out of it.
struct Raw(Socket);

impl Raw {
    fn connect(target: &SegmentDescriptor) -> Self {
        let name = Host::this().unwrap().resolve(&target.transports[0].address).unwrap();
        Self(Socket::connect(&name).unwrap())
    }

    /// Connected and welcome.
    fn welcome(target: &SegmentDescriptor) -> Self {
        let raw = Self::connect(target);
        assert_eq!(raw.hello(PROTOCOL_VERSION, target.segment, target.incarnation), Verdict::Welcome);
        raw
    }

    fn hello(&self, version: u32, segment: SegmentId, incarnation: Incarnation) -> Verdict {
        self.send(&ToOwner::Hello { version, segment, incarnation }.encode());
        self.verdict()
    }

    fn verdict(&self) -> Verdict {
        let (message, fds) = self.receive().expect("a welcome");
        match ToClient::decode(&message) {
            Ok(ToClient::Welcome { version, verdict }) => {
                assert_eq!((version, fds.len()), (PROTOCOL_VERSION, if verdict == Verdict::Welcome { 2 } else { 0 }));
                verdict
            }
            other => panic!("{other:?}"),
        }
    }

    fn send(&self, message: &[u8]) {
        self.send_with(message, &[]);
    }

    fn send_with(&self, message: &[u8], fds: &[BorrowedFd<'_>]) {
        self.0.send(message, fds).unwrap();
    }

    /// The next message; `None` when the other side has ended.
    fn receive(&self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let until = Instant::now() + LONG;
        loop {
            match self.0.receive(&mut buffer) {
                Ok(received) if received.len == 0 => return None,
                Ok(received) => return Some((buffer[..received.len].to_vec(), received.fds)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}"),
            }
            assert!(Instant::now() < until, "nothing came");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn hears_the_end(&self) {
        while self.receive().is_some() {}
    }
}

#[test]
fn babble_costs_the_babbler_its_connection_and_nobody_else() {
    let (owner, client) = (engine(config()), engine(config()));
    let target = owner.descriptor();
    let read = grant(&owner, 0, 100, Access::Read);
    submit(&client, &target, read.key()).wait().unwrap();
    let file = std::fs::File::open("/proc/self/comm").unwrap();
    let hello = ToOwner::Hello { version: 1, segment: target.segment, incarnation: target.incarnation }.encode();
    let babble: [(&str, bool, &[u8]); 7] = [
        ("no protocol", false, b"GET / HTTP/1.1\r\n"),
        ("a question before the hello", false, &ToOwner::Open { key: read.key() }.encode()),
        ("a second hello", true, &hello),
        ("no message", true, &[9; 33]),
        ("a short one", true, &[2]),
        ("no slot", true, &ToOwner::Left { slot: u32::MAX }.encode()),
        ("beyond the bound", true, &[0; MAX_MESSAGE + 1]),
    ];
    for (index, (what, greeted, message)) in babble.into_iter().enumerate() {
        let raw = if greeted { Raw::welcome(&target) } else { Raw::connect(&target) };
        raw.send(message);
        raw.hears_the_end();
        assert_eq!(owner.stats().refused.malformed, index as u64 + 1, "{what}");
    }
    let raw = Raw::welcome(&target);
    raw.send_with(&ToOwner::Open { key: read.key() }.encode(), &[file.as_fd()]);
    raw.hears_the_end();
    drop(raw);
    wait_until("the babblers are gone", || owner.stats().accepted_connections == 1);
    submit(&client, &target, read.key()).wait().unwrap();
    assert_eq!(client.stats().retries, 0);
}

#[test]
fn who_is_sent_away_from_inside_a_grant_keeps_it_fenced_until_its_socket_ends() {
    let owner = engine(config());
    let target = owner.descriptor();
    let write = grant(&owner, 0, 100, Access::Write);
    let raw = Raw::connect(&target);
    raw.send(
        &ToOwner::Hello { version: PROTOCOL_VERSION, segment: target.segment, incarnation: target.incarnation }
            .encode(),
    );
    let (_, pages) = raw.receive().unwrap();
    let control = super::control::ClientControl::new(&pages[0], &pages[1]).unwrap();
    raw.send(&ToOwner::Open { key: write.key() }.encode());
    let (nonce, slot) = loop {
        let (message, _) = raw.receive().unwrap();
        if let Ok(ToClient::Opened { nonce, slot, .. }) = ToClient::decode(&message) {
            break (nonce, slot);
        }
    };
    let inside = control.enter(slot, nonce, |_| {}).unwrap();
    raw.send(b"babble babble");
    raw.hears_the_end();
    let revoking = thread::spawn(move || write.revoke().wait());
    wait_until("the fence is held", || owner.stats().held_fences == 1);
    assert!(!revoking.is_finished());
    assert_eq!(owner.stats().accepted_connections, 1);
    drop(inside);
    drop(raw);
    revoking.join().unwrap();
    wait_until("it is gone", || owner.stats().accepted_connections == 0);
}

#[test]
fn hellos_of_another_version_or_life_are_told_so() {
    let owner = engine(config());
    let SegmentDescriptor { segment, incarnation, .. } = owner.descriptor();
    let (other, earlier) = (SegmentId(segment.0 ^ 1), Incarnation(incarnation.0 ^ 1));
    for (version, segment, incarnation, verdict) in [
        (PROTOCOL_VERSION + 1, segment, incarnation, Verdict::Version),
        (PROTOCOL_VERSION, other, incarnation, Verdict::Stale),
        (PROTOCOL_VERSION, segment, earlier, Verdict::Stale),
    ] {
        let raw = Raw::connect(&owner.descriptor());
        assert_eq!(raw.hello(version, segment, incarnation), verdict);
        raw.hears_the_end();
    }
    let refused = owner.stats().refused;
    assert_eq!((refused.version, refused.stale), (1, 2));
}

#[test]
fn who_connects_and_says_nothing_is_dropped_in_time() {
    let owner = engine(Config { io_timeout: Duration::from_millis(50), ..config() });
    let raw = Raw::connect(&owner.descriptor());
    raw.hears_the_end();
    wait_until("it is gone", || owner.stats().accepted_connections == 0);
}

#[test]
fn one_connection_too_many_is_told_so_unless_one_can_be_spared() {
    let owner = engine(Config { max_accepted_connections: 2, ..config() });
    let target = owner.descriptor();
    let read = grant(&owner, 0, 100, Access::Read);
    let using: Vec<_> = (0..2).map(|_| engine(config())).collect();
    for client in &using {
        submit(client, &target, read.key()).wait().unwrap();
    }
    let error = submit(&engine(config()), &target, read.key()).wait().unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    assert_eq!(owner.stats().refused.busy, 1);
    // When nothing is open any more, the connections are only kept for the case that something will be.
    read.revoke().wait();
    let read = grant(&owner, 0, 100, Access::Read);
    submit(&engine(config()), &target, read.key()).wait().unwrap();
    // The one that was closed is made anew, now that there is room again.
    wait_until("the last one has gone", || owner.stats().accepted_connections == 1);
    for client in &using {
        submit(client, &target, read.key()).wait().unwrap();
    }
}

#[test]
fn the_connections_to_all_owners_are_bounded_and_idle_ones_give_way() {
    let client = engine(Config { max_open_connections: 2, ..config() });
    let owners: Vec<_> = (0..5).map(|_| engine(config())).collect();
    let grants: Vec<_> = owners.iter().map(|owner| grant(owner, 0, 100, Access::Read)).collect();
    for _ in 0..2 {
        for (owner, grant) in owners.iter().zip(&grants) {
            submit(&client, &owner.descriptor(), grant.key()).wait().unwrap();
            assert!(client.stats().open_connections <= 2);
        }
    }
    wait_until("those given up are closed", || {
        owners.iter().map(|owner| owner.stats().accepted_connections).sum::<u64>() == 2
    });
}

#[test]
fn a_region_that_left_its_segment_is_unmapped_by_its_peers() {
    let (owner, client) = (engine(config()), engine(config()));
    let region = owner.register(crate::Memory::Allocate(crate::Allocation::new(3 << 20))).unwrap();
    let base = region.base();
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains("memfd:kvasir-transfer")).count()
    };
    let first = grant(&owner, 0, 100, Access::Read);
    submit(&client, &owner.descriptor(), first.key()).wait().unwrap();
    let before = mapped();
    let read = grant(&owner, base, 100, Access::Read);
    let ranges = vec![Range { local: 0, remote: base, len: 100 }];
    let deadline = Deadline::after(LONG);
    client.submit(Batch::new(Op::Read, owner.descriptor(), read.key(), ranges, deadline)).wait().unwrap();
    assert_eq!(mapped(), before + 1);
    drop(read);
    region.unregister().wait();
    wait_until("it is unmapped on both sides", || mapped() == before - 1);
    submit(&client, &owner.descriptor(), first.key()).wait().unwrap();
}

// Owners that lie.

/// A segment served by hand.
fn fake_owner() -> (Socket, SegmentDescriptor) {
    let name = format!("kvasir-fake-{:016x}", random_u64());
    let listener = Socket::listen(&PathBuf::from(format!("\0{name}"))).unwrap();
    let ours = engine(config()).descriptor().transports[0].address.clone();
    let address = format!("{}/{name}", ours.rsplit_once('/').unwrap().0);
    let target = SegmentDescriptor {
        name: String::new(),
        segment: SegmentId(1),
        incarnation: Incarnation(2),
        len: LEN,
        regions: vec![RegionInfo { base: 0, len: LEN, shared: true }],
        transports: vec![TransportAddress { kind: TransportKind::Shm, address }],
    };
    (listener, target)
}

/// Accepts a client, hears its hello and its question, and answers the hello.
fn asked(listener: &Socket) -> (Raw, OwnerControl) {
    let until = Instant::now() + LONG;
    let raw = loop {
        match listener.accept() {
            Ok(socket) => break Raw(socket),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        assert!(Instant::now() < until, "nobody came");
        thread::sleep(Duration::from_millis(1));
    };
    let (hello, _) = raw.receive().unwrap();
    assert!(matches!(ToOwner::decode(&hello), Ok(ToOwner::Hello { .. })));
    let (question, _) = raw.receive().unwrap();
    assert_eq!(ToOwner::decode(&question), Ok(ToOwner::Open { key: GrantKey(7) }));
    let (control, pages) = OwnerControl::new().unwrap();
    let welcome = ToClient::Welcome { version: PROTOCOL_VERSION, verdict: Verdict::Welcome };
    raw.send_with(&welcome.encode(), &[pages[0].as_fd(), pages[1].as_fd()]);
    (raw, control)
}

fn region(len: u64) -> Vec<u8> {
    ToClient::Region { base: 0, len, fd_offset: 0, writable: true }.encode()
}

fn opened(slot: u32, nonce: u64, readable: u32) -> Vec<u8> {
    ToClient::Opened { key: GrantKey(7), nonce, slot, readable, writable: 0 }.encode()
}

#[test]
fn memory_that_could_be_pulled_away_is_not_mapped() {
    let unsealed = std::fs::File::open("/proc/self/exe").unwrap();
    let (_, short) = shared_memory(c"test", 4096, false).unwrap();
    let (_, read_only) = shared_memory(c"test", LEN, true).unwrap();
    for fd in [unsealed.as_fd(), short.as_fd(), read_only.as_fd()] {
        let (listener, target) = fake_owner();
        let client = engine(config());
        let transfer = submit(&client, &target, GrantKey(7));
        let (raw, _control) = asked(&listener);
        raw.send_with(&region(LEN), &[fd]);
        let error = transfer.wait().unwrap_err();
        assert!(matches!(error, Error::TransportUnavailable { .. }), "{error}");
        raw.hears_the_end();
    }
}

#[test]
fn a_lying_owner_is_not_believed() {
    let (_, memory) = shared_memory(c"test", LEN, false).unwrap();
    let ranges = |ranges: &[(u64, u64)]| encode_ranges(ranges).next().unwrap();
    let lies: [(&str, Vec<Vec<u8>>); 9] = [
        ("a range in no region", vec![opened(0, 1, 1), ranges(&[(0, LEN + 1)])]),
        ("a range beyond 64 bits", vec![opened(0, 1, 1), ranges(&[(u64::MAX - 5, u64::MAX)])]),
        ("more ranges than said", vec![opened(0, 1, 1), ranges(&[(0, 1), (2, 3)])]),
        ("ranges of no grant", vec![ranges(&[(0, 1)])]),
        ("no such slot", vec![opened(8192, 1, 1)]),
        ("no nonce", vec![opened(0, 0, 1)]),
        ("a grant in a grant", vec![opened(0, 1, 1), opened(1, 2, 1)]),
        ("no such question", vec![ToClient::Declined { key: GrantKey(8), why: Declined::Busy }.encode()]),
        ("no such notice", vec![ToClient::Noticed { id: 3, result: Ok(()) }.encode()]),
    ];
    for (what, messages) in lies {
        let (listener, target) = fake_owner();
        let client = engine(Config { retries: 0, ..config() });
        let transfer = submit(&client, &target, GrantKey(7));
        let (raw, _control) = asked(&listener);
        raw.send_with(&region(LEN), &[memory.as_fd()]);
        messages.iter().for_each(|message| raw.send(message));
        let error = transfer.wait().unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{what}: {error}");
        raw.hears_the_end();
    }
}

#[test]
fn an_owner_that_ends_is_tried_again_and_one_that_never_answers_is_given_up() {
    let (listener, target) = fake_owner();
    let client = engine(Config { io_timeout: Duration::from_millis(100), retries: 2, ..config() });
    let (_, memory) = shared_memory(c"test", LEN, false).unwrap();
    let transfer = submit(&client, &target, GrantKey(7));
    drop(asked(&listener));
    let _silent = asked(&listener);
    let (raw, control) = asked(&listener);
    control.open(3, 9);
    raw.send_with(&region(LEN), &[memory.as_fd()]);
    raw.send(&opened(3, 9, 1));
    raw.send(&encode_ranges(&[(0, LEN)]).next().unwrap());
    transfer.wait().unwrap();
    assert_eq!(client.stats().retries, 2);
}

// Users.

/// Runs `body` as another user: only this thread becomes that user (the system call is each thread's own).
fn as_nobody<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: changes this thread's credentials and touches no memory; the thread ends with the closure.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
            assert_eq!(result, 0);
            body()
        });
        thread.join().unwrap()
    })
}

fn may_become_somebody_else() -> bool {
    // SAFETY: always succeeds.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn a_process_of_another_user_is_refused_unless_it_is_allowed() {
    if !may_become_somebody_else() {
        return; // only root can
    }
    let strict = engine(config());
    let target = strict.descriptor();
    let verdict = as_nobody(|| Raw::connect(&target).verdict());
    assert_eq!(verdict, Verdict::Forbidden);
    assert_eq!(strict.stats().refused.forbidden, 1);

    let shm = ShmConfig { allowed_uids: vec![NOBODY], ..ShmConfig::default() };
    let open = engine(Config { shm, ..config() });
    let target = open.descriptor();
    drop(as_nobody(|| Raw::welcome(&target)));
}

#[test]
fn an_owner_of_another_user_is_not_trusted() {
    if !may_become_somebody_else() {
        return; // only root can
    }
    let (_, mut target) = fake_owner();
    let name = format!("kvasir-fake-{:016x}", random_u64());
    let listener = as_nobody(|| Socket::listen(Path::new(&format!("\0{name}"))).unwrap());
    let address = &mut target.transports[0].address;
    *address = format!("{}/{name}", address.rsplit_once('/').unwrap().0);
    let error = submit(&engine(config()), &target, GrantKey(7)).wait().unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let raw = Raw(listener.accept().unwrap());
    assert!(raw.receive().is_none(), "it was told nothing");
}
