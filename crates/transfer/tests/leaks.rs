//! Nothing is left of an engine that was shut down, nor of a connection. A binary of its own: it counts what the process has.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "an error here is a failed test")]

use std::{
    fs,
    net::TcpStream,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use kvasir_transfer::{Access, Batch, Config, GrantRange, LocalNet, Op, Range, TransferEngine, Transports};
use kvasir_types::{Deadline, TransportKind};

const LEN: usize = 8 << 20;

/// One at a time: what one test opens the other would count.
static COUNTING: Mutex<()> = Mutex::new(());

fn threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .filter(|name| name.starts_with("transfer-"))
        .count()
}

fn sockets() -> usize {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().flatten();
    descriptors
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"))
        .count()
}

#[test]
fn shutdown_joins_every_thread_and_closes_every_socket() {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let before = sockets();
    let net = LocalNet::new();
    let clients = [0, 1].map(|_| TransferEngine::new(Config::default(), net.clone(), LEN).unwrap());
    let owner = TransferEngine::new(Config::default(), LocalNet::new(), LEN).unwrap();
    let ranges = vec![GrantRange { offset: 0, len: LEN as u64, access: Access::Write }];
    let grant = owner.grant(ranges).unwrap();
    for client in &clients {
        let ranges = vec![Range { local: 0, remote: 0, len: LEN as u64 }];
        let deadline = Deadline::after(Duration::from_secs(30));
        let transfer = client.submit(Batch::new(Op::Write, owner.descriptor(), grant.key(), ranges, deadline));
        transfer.wait().unwrap();
    }
    let tcp = owner.descriptor().transports.into_iter().find(|offer| offer.kind == TransportKind::Tcp).unwrap();
    let silent = TcpStream::connect(tcp.address).unwrap();
    assert!(threads() >= 9 && sockets() > before + 8, "{} threads, {} sockets", threads(), sockets());

    clients[0].shutdown(); // one by word, the others by dropping the last handle
    drop(clients);
    drop(grant); // a grant outlives nothing, and keeps no thread
    drop(owner);
    drop(silent);
    assert_eq!(threads(), 0);
    assert_eq!(sockets(), before);
}

/// Descriptors of any kind, and mappings of shared memory.
fn descriptors_and_mappings() -> (usize, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    (fs::read_dir("/proc/self/fd").unwrap().count(), maps.lines().filter(|line| line.contains("memfd:")).count())
}

#[test]
fn a_thousand_shm_connections_leave_no_descriptor_and_no_mapping() {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let config = || Config { transports: Transports::Named(vec![TransportKind::Shm]), ..Config::default() };
    let new = || TransferEngine::new(config(), LocalNet::new(), 4096).unwrap();
    let read = |client: &TransferEngine, owner: &TransferEngine, grant: &kvasir_transfer::Grant| {
        let deadline = Deadline::after(Duration::from_secs(30));
        let ranges = vec![Range { local: 0, remote: 0, len: 4096 }];
        client.submit(Batch::new(Op::Read, owner.descriptor(), grant.key(), ranges, deadline)).wait().unwrap();
    };
    let all = || vec![GrantRange { offset: 0, len: 4096, access: Access::Read }];
    // Half of them: one owner, ever new clients. The other half: one client, ever new owners.
    let (owner, client) = (new(), new());
    let grant = owner.grant(all()).unwrap();
    let before = descriptors_and_mappings();
    for _ in 0..500 {
        read(&new(), &owner, &grant);
        let other = new();
        let theirs = other.grant(all()).unwrap();
        read(&client, &other, &theirs);
    }
    let until = Instant::now() + Duration::from_secs(30);
    while descriptors_and_mappings() != before {
        assert!(Instant::now() < until, "{before:?} became {:?}", descriptors_and_mappings());
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((owner.stats().accepted_connections, client.stats().open_connections), (0, 0));
}
