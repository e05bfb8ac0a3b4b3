//! Nothing is left of an engine that was shut down. A binary of its own: it counts threads and sockets of the process.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "an error here is a failed test")]

use std::{fs, net::TcpStream, time::Duration};

use kvasir_transfer::{Access, Batch, Config, GrantRange, LocalNet, Op, Range, TransferEngine};
use kvasir_types::{Deadline, TransportKind};

const LEN: usize = 8 << 20;

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
