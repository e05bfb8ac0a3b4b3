//! What holds over every transport when processes die, stop and come back.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use kvasir_transfer::{
    Access, Allocation, Batch, Config, Error, Grant, LocalNet, Memory, Op, Priority, Range, Refusal, Region, Report,
    TransferEngine,
};
use kvasir_types::{Deadline, GrantKey, HostMemory, SegmentDescriptor, TransportKind};

use crate::{
    peer::{Ask, FileDirectory, Setup},
    process::Process,
    support::{LONG, MIB, batch, block_on, bytes, config, engine, grant, pattern, wait_until, within_limit},
};

/// What a peer offers.
const AREA: usize = 16 * MIB;
/// Frames so large that no socket's buffers hold one: who stops sending stops in the middle of one.
const LARGE: usize = 16 * MIB;
/// What nobody but the test itself writes.
const OURS: u8 = 0xee;

/// The same bytes again and again, 16 GiB of them: whatever happens to it happens in the middle.
pub fn endless(local: u64) -> Vec<(u64, u64, u64)> {
    vec![(local, 0, AREA as u64); 1024]
}

/// An address that no other test listens at, and from which nobody connects: a port of it that was in use can be had again.
/// UCX listens only at the first address of a device.
fn own_address(kind: TransportKind) -> SocketAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    let host = if kind == TransportKind::Ucx { [127, 0, 0, 1] } else { [127, NEXT.fetch_add(1, Relaxed), high, low] };
    (host, 0).into()
}

/// Where a peer's next life listens: at the same address, where its clients look for it; a new one where that can't be had
/// for a minute (UCX does not ask for the reuse of a port).
fn again_at(target: &SegmentDescriptor, kind: TransportKind) -> SocketAddr {
    let address = target.transports[0].address.parse();
    if kind == TransportKind::Tcp { address.unwrap() } else { own_address(kind) }
}

fn moved(engine: &TransferEngine, kind: TransportKind) -> u64 {
    let traffic = *engine.stats().client.of(kind);
    traffic.read_bytes + traffic.written_bytes
}

/// The peer was lost on the way.
fn is_lost(result: &Result<Report, Error>) -> bool {
    matches!(result, Err(Error::Disconnected { .. } | Error::Unreachable { .. } | Error::Stale { .. }))
}

fn descriptor_is_refused(result: &Result<Report, Error>) -> bool {
    matches!(result, Err(Error::Stale { .. } | Error::Unreachable { .. } | Error::NoTransport { .. }))
}

/// Looks at and writes registered memory behind the engine's back, also after it was unregistered.
struct Bare(Arc<dyn HostMemory>);

impl Bare {
    fn fill(&self, byte: u8) {
        // SAFETY: the whole mapping, which we keep; the engine has promised not to touch it any more.
        unsafe { self.0.base().write_bytes(byte, self.0.len()) }
    }

    fn is_all(&self, byte: u8) -> bool {
        // Volatile: where a promise is broken, somebody else writes at the same time.
        // SAFETY: inside the mapping, which we keep.
        (0..self.0.len())
            .step_by(8)
            .all(|at| unsafe { self.0.base().add(at).cast::<u64>().read_volatile() == u64::from_ne_bytes([byte; 8]) })
    }
}

pub fn killed_target(op: Op, kind: TransportKind) {
    let write = op == Op::Write;
    let files = tempfile::tempdir().unwrap();
    let directory = Arc::new(FileDirectory(files.path().to_owned()));
    let mut peer = Process::spawn();
    let setup = Setup { bind: own_address(kind), ..Setup::new("target", kind, AREA) };
    let old = peer.start(setup.clone());
    peer.fill(0, AREA, 1);
    let old_key = peer.grant(0, AREA as u64, write);
    directory.publish("target", &old, old_key);

    let client = TransferEngine::builder().config(config(kind)).directory(directory.clone()).build().unwrap();
    let segment = block_on(client.open("target")).unwrap();
    let region = client.register(Memory::Allocate(Allocation::new(2 * AREA))).unwrap();
    let (first, second) = (region.base(), region.base() + AREA as u64);
    client.write_bytes(second, &pattern(3, AREA)).unwrap();
    let transfer = client.submit(batch(op, &old, GrantKey(old_key), &endless(first)));
    wait_until("bytes move", || moved(&client, kind) > 0 || transfer.result().is_some());
    assert!(transfer.result().is_none(), "{:?}", transfer.result());
    peer.kill();
    let result = within_limit("the transfer", move || transfer.wait());
    // A dead process's memory can be mapped on: then all of it was read.
    assert!(is_lost(&result) || kind == TransportKind::Shm && result.is_ok(), "{result:?}");
    client.write_bytes(first, &vec![OURS; AREA]).unwrap(); // ours again

    let mut peer = Process::spawn();
    let new = peer.start(Setup { bind: again_at(&old, kind), ..setup });
    peer.fill(0, AREA, 2);
    let new_key = peer.grant(0, AREA as u64, write);
    let all = |local| vec![(local, 0, AREA as u64)];
    let result = client.submit(batch(op, &old, GrantKey(old_key), &all(first))).wait();
    assert!(descriptor_is_refused(&result), "{result:?}");
    assert!(kind != TransportKind::Tcp || matches!(result, Err(Error::Stale { .. })), "it listens there: {result:?}");
    let result = client.submit(batch(op, &new, GrantKey(old_key), &all(first))).wait();
    assert!(matches!(result, Err(Error::Refused { refusal: Refusal::UnknownGrant, .. })), "{result:?}");
    assert_eq!(peer.sum(0, AREA), sum(&pattern(2, AREA)), "nothing landed under the old key");

    // By its name it is found, without a word from us.
    directory.publish("target", &new, new_key);
    let ranges = vec![Range { local: second, remote: 0, len: AREA as u64 }];
    let report = block_on(segment.transfer(op, ranges, Deadline::after(LONG), Priority::Normal)).unwrap();
    assert_eq!(report.bytes, AREA as u64);
    assert_eq!(segment.published().descriptor.incarnation, new.incarnation);
    let expected = sum(&pattern(if write { 3 } else { 2 }, AREA));
    assert_eq!(client.checksum(second, AREA as u64).unwrap(), expected);
    assert_eq!(peer.sum(0, AREA), expected);

    assert_eq!(bytes(&client, first, AREA), vec![OURS; AREA], "given back, and touched later");
    within_limit("the unregistration", move || region.unregister().wait());
}

fn sum(bytes: &[u8]) -> [u8; 16] {
    let engine = TransferEngine::new(config(TransportKind::Local), LocalNet::new(), bytes.len()).unwrap();
    engine.write_bytes(0, bytes).unwrap();
    engine.checksum(0, bytes.len() as u64).unwrap()
}

pub fn stopped_target(kind: TransportKind) {
    let mut peer = Process::spawn();
    let target = peer.start(Setup::new("target", kind, AREA));
    peer.fill(0, AREA, 1);
    let key = GrantKey(peer.grant(0, AREA as u64, false));
    let client = engine(Config { slice_bytes: LARGE, ..config(kind) }, 2 * AREA);
    let transfer = client.submit(Batch {
        deadline: Deadline::after(Duration::from_millis(700)),
        ..batch(Op::Read, &target, key, &endless(0))
    });
    wait_until("bytes move", || moved(&client, kind) > 0);
    peer.stop();
    let result = within_limit("the transfer", move || transfer.wait());
    let shm_ends_first = kind == TransportKind::Shm && result.is_ok(); // the owner takes no part in it
    assert!(matches!(result, Err(Error::DeadlineExceeded)) || shm_ends_first, "{result:?}");
    // A transfer that begins now finds a peer that is silent, not one that has gone.
    let deadline = Deadline::after(Duration::from_millis(200));
    let transfer = client.submit(Batch { deadline, ..batch(Op::Read, &target, key, &[(AREA as u64, 0, AREA as u64)]) });
    let result = within_limit("the second transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::DeadlineExceeded)) || kind == TransportKind::Shm, "{result:?}");

    client.write_bytes(0, &vec![OURS; 2 * AREA]).unwrap(); // ours again
    peer.resume();
    peer.fill(0, AREA, 2);
    // What it had been asked before the stop is answered first, so by the end of this all of that has come.
    let again = client.submit(batch(Op::Read, &target, key, &[(AREA as u64, 0, AREA as u64)]));
    within_limit("the next transfer", move || again.wait()).unwrap();
    assert_eq!(bytes(&client, AREA as u64, AREA), pattern(2, AREA));
    assert_eq!(bytes(&client, 0, AREA), vec![OURS; AREA], "given back, and touched later");
}

/// An owner whose memory a peer is writing, for as long as it may.
struct Written {
    _owner: TransferEngine,
    region: Option<Region>,
    memory: Bare,
    /// What the peer was asked.
    submit: Ask,
    peer: Process,
}

impl Written {
    fn new(kind: TransportKind) -> (Self, Grant) {
        let owner = TransferEngine::builder().config(config(kind)).build().unwrap();
        let region = owner.register(Memory::Allocate(Allocation::new(AREA))).unwrap();
        let memory = Bare(region.memory());
        let write = grant(&owner, region.base(), AREA as u64, Access::Write);
        let mut peer = Process::spawn();
        peer.start(Setup { slice_bytes: LARGE, ..Setup::new("writer", kind, AREA) });
        peer.fill(0, AREA, 1);
        let (target, key) = (owner.descriptor(), write.key().0);
        let deadline_ms = LONG.as_millis() as u64;
        let submit = Ask::Submit { write: true, target, key, ranges: endless(0), deadline_ms };
        peer.ask::<()>(&submit);
        wait_until("bytes land", || !memory.is_all(0));
        (Self { _owner: owner, region: Some(region), memory, submit, peer }, write)
    }

    /// The memory has been filled with [`OURS`]: it stays so, whatever the peer does.
    fn stays_ours(mut self) {
        let outcomes = self.peer.wait();
        let (cause, words) = outcomes[0].as_ref().expect_err("the writer was in the middle");
        assert!(["refused", "disconnected"].contains(&cause.as_str()), "{cause}: {words}");
        self.peer.ask::<()>(&self.submit);
        let outcomes = self.peer.wait();
        let (cause, words) = outcomes[0].as_ref().expect_err("nothing is granted any more");
        assert_eq!(cause, "refused", "{words}");
        assert!(self.memory.is_all(OURS), "a byte landed in memory that was given back");
    }
}

/// Ends the writer's right: by unregistering the memory, or by the grant alone.
fn end(region: Option<Region>, write: Grant) {
    match region {
        Some(region) => {
            within_limit("the unregistration", move || region.unregister().wait());
            std::mem::forget(write); // its drop would fence the writer off once more
        }
        None => within_limit("the revocation", move || block_on(write.revoke())),
    }
}

pub fn unregistered_under_a_writer(kind: TransportKind) {
    let (mut written, write) = Written::new(kind);
    end(written.region.take(), write);
    written.memory.fill(OURS);
    written.stays_ours();
}

pub fn stopped_writer(kind: TransportKind) {
    for unregister in [true, false] {
        let (mut written, write) = Written::new(kind);
        let region = written.region.take().filter(|_| unregister);
        written.peer.stop(); // in the middle of a frame
        if kind == TransportKind::Shm {
            // What a stopped thread is copying can't be taken from it: the end is told only when it has gone on.
            let ending = thread::spawn(move || end(region, write));
            written.peer.resume();
            ending.join().unwrap();
            written.memory.fill(OURS);
        } else {
            end(region, write);
            written.memory.fill(OURS);
            written.peer.resume();
        }
        written.stays_ours();
    }
}

pub fn one_of_five_dead(kind: TransportKind) {
    const DEAD: usize = 2;
    let mut peers: Vec<_> = (0..5).map(|_| Process::spawn()).collect();
    let targets: Vec<_> = peers
        .iter_mut()
        .enumerate()
        .map(|(at, peer)| {
            let target = peer.start(Setup::new(&format!("decode-{at}"), kind, 4 * MIB));
            (target, GrantKey(peer.grant(0, 4 * MIB as u64, true)))
        })
        .collect();
    let client = engine(Config { slice_bytes: 64 << 10, ..config(kind) }, 4 * MIB);
    client.write_bytes(0, &pattern(1, 4 * MIB)).unwrap();
    let push = |ranges: &[_]| {
        let batches = targets.iter().map(|(target, key)| batch(Op::Write, target, *key, ranges));
        client.submit_all(batches).wait()
    };
    // Each of them is known and connected, or it would not be the death that is noticed.
    push(&[(0, 0, 64)]).into_iter().for_each(|result| _ = result.unwrap());
    peers[DEAD].kill();
    let results = push(&[(0, 0, 4 * MIB as u64)]);
    for (at, (peer, result)) in peers.iter_mut().zip(&results).enumerate() {
        if at == DEAD {
            assert!(is_lost(result), "{result:?}");
            let words = result.as_ref().unwrap_err().to_string();
            let of_it = |way: &kvasir_types::TransportAddress| words.contains(&way.address);
            assert!(targets[at].0.transports.iter().any(of_it) || words.contains("decode-2"), "which one? {words}");
        } else {
            assert_eq!(result.as_ref().unwrap().bytes, 4 * MIB as u64);
            assert_eq!(peer.sum(0, 4 * MIB), client.checksum(0, 4 * MIB as u64).unwrap());
        }
    }
    let failed: Vec<_> =
        client.peers().into_iter().filter(|peer| peer.failed > 0).map(|peer| (peer.name, peer.failed)).collect();
    assert_eq!(failed, [("decode-2".to_owned(), 1)]);
}

pub fn killed_writer(kind: TransportKind) {
    // No help from the fence's grace nor from time: it is the death that frees. And there is room for one peer only.
    let settings = Config { fence_grace: 4 * LONG, io_timeout: 4 * LONG, max_accepted_connections: 2, ..config(kind) };
    let owner = engine(settings, AREA);
    let memory = Bare(owner.memory());
    for _ in 0..3 {
        memory.fill(0);
        let write = grant(&owner, 0, AREA as u64, Access::Write);
        let mut peer = Process::spawn();
        peer.start(Setup::new("writer", kind, AREA));
        peer.fill(0, AREA, 1);
        let (target, key) = (owner.descriptor(), write.key().0);
        let deadline_ms = LONG.as_millis() as u64;
        peer.ask::<()>(&Ask::Submit { write: true, target, key, ranges: endless(0), deadline_ms });
        wait_until("bytes land", || !memory.is_all(0));
        peer.kill();
        within_limit("the revocation", move || block_on(write.revoke()));
        memory.fill(OURS);
        wait_until("its place is free", || owner.stats().accepted_connections == 0);
        thread::sleep(Duration::from_millis(20)); // for what might come, not for what must
        assert!(memory.is_all(OURS), "a byte landed after the revocation");
    }
    assert_eq!(owner.stats().fenced_connections, 0);
    assert_eq!(owner.stats().refused.busy, 0);
}
