//! Peers that come and go, and what is left of them: nothing that grows.

use std::fs;

use kvasir_types::TransportKind;

use crate::{
    peer::{Ask, FileDirectory, Outcome, Setup},
    process::Process,
    support::wait_until,
};

const BYTES: usize = 64 << 10;

/// What a process holds.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    resident_kib: usize,
}

fn held(process: &Process) -> Held {
    let proc = |of: &str| format!("/proc/{}/{of}", process.id());
    let count = |of| fs::read_dir(proc(of)).unwrap().count();
    let status = fs::read_to_string(proc("status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident_kib = resident.trim().trim_end_matches(" kB").parse().unwrap();
    Held { descriptors: count("fd"), threads: count("task"), resident_kib }
}

pub fn a_thousand_lives(kind: TransportKind) {
    let files = tempfile::tempdir().unwrap();
    let directory = FileDirectory(files.path().to_owned());
    let mut client = Process::spawn();
    client.start(Setup { directory: Some(files.path().to_owned()), ..Setup::new("client", kind, BYTES) });
    let mut fetch = |name: &str| {
        let moved: Outcome = client.ask(&Ask::Fetch { name: name.into(), len: BYTES as u64 });
        assert_eq!(moved, Ok(BYTES as u64), "{name}");
        held(&client)
    };
    let mut live = |peer: &mut Process, life: usize| {
        let name = format!("peer-{}", life % 3); // names come again, with other lives
        let descriptor = peer.start(Setup::new(&name, kind, BYTES));
        let key = peer.grant(0, BYTES as u64, false);
        directory.publish(&name, &descriptor, key);
        fetch(&name)
    };
    let mut peer = Process::spawn();
    for life in 0..100 {
        live(&mut peer, life);
    }
    let before = live(&mut peer, 100);
    for life in 0..900 {
        if life % 60 == 0 {
            peer.kill(); // most leave in order, some don't
            peer = Process::spawn();
        }
        let now = live(&mut peer, life);
        // What the last few have left may not be cleared away yet.
        assert!(now.descriptors <= before.descriptors + 64, "life {life}: {now:?}, before {before:?}");
        assert!(now.threads <= before.threads + 64, "life {life}: {now:?}, before {before:?}");
    }
    // And one that stays, opened as often.
    let mut last = live(&mut peer, 0);
    for _ in 0..1000 {
        last = fetch("peer-0");
    }
    assert!(last.resident_kib <= before.resident_kib + (8 << 10), "{last:?}, before {before:?}");
    let idle = || held(&client);
    wait_until("what the dead have left is cleared away", || {
        let now = idle();
        now.descriptors <= before.descriptors + 2 && now.threads <= before.threads + 2
    });
}
