//! The live counters behind [`Stats`]: plain atomics, written by every thread of the engine, read by `stats()`.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use kvasir_types::TransportKind;

use crate::{
    batch::Op,
    error::{CAUSES, Error, Refusal},
    histogram::LiveHistogram,
    stats::{Refused, Side, Stats, Traffic},
};

#[derive(Debug, Default)]
struct TrafficCounters {
    read_bytes: AtomicU64,
    read_ops: AtomicU64,
    written_bytes: AtomicU64,
    written_ops: AtomicU64,
}

impl TrafficCounters {
    fn add(&self, op: Op, bytes: u64, ops: u64) {
        let (byte_count, op_count) = match op {
            Op::Read => (&self.read_bytes, &self.read_ops),
            Op::Write => (&self.written_bytes, &self.written_ops),
        };
        byte_count.fetch_add(bytes, Relaxed);
        op_count.fetch_add(ops, Relaxed);
    }

    fn get(&self) -> Traffic {
        Traffic {
            read_bytes: self.read_bytes.load(Relaxed),
            read_ops: self.read_ops.load(Relaxed),
            written_bytes: self.written_bytes.load(Relaxed),
            written_ops: self.written_ops.load(Relaxed),
        }
    }
}

#[derive(Debug, Default)]
struct SideCounters {
    local: TrafficCounters,
    shm: TrafficCounters,
    ucx: TrafficCounters,
    tcp: TrafficCounters,
}

impl SideCounters {
    fn of(&self, kind: TransportKind) -> &TrafficCounters {
        match kind {
            TransportKind::Local => &self.local,
            TransportKind::Shm => &self.shm,
            TransportKind::Ucx => &self.ucx,
            TransportKind::Tcp => &self.tcp,
        }
    }

    fn get(&self) -> Side {
        Side { local: self.local.get(), shm: self.shm.get(), ucx: self.ucx.get(), tcp: self.tcp.get() }
    }
}

/// See [`Stats`] for what each one counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    client: SideCounters,
    owner: SideCounters,
    latency: [LiveHistogram; 4],
    failures: [AtomicU64; CAUSES.len()],
    pub(crate) in_flight_bytes: AtomicU64,
    unknown_grant: AtomicU64,
    access: AtomicU64,
    bounds: AtomicU64,
    full: AtomicU64,
    pub(crate) stale: AtomicU64,
    pub(crate) version: AtomicU64,
    pub(crate) untrusted: AtomicU64,
    pub(crate) busy: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) forbidden: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) fenced_connections: AtomicU64,
    pub(crate) held_fences: AtomicU64,
    pub(crate) open_connections: AtomicU64,
    pub(crate) accepted_connections: AtomicU64,
}

impl Counters {
    pub(crate) fn client_moved(&self, kind: TransportKind, op: Op, bytes: u64, ops: u64) {
        self.client.of(kind).add(op, bytes, ops);
    }

    pub(crate) fn owner_moved(&self, kind: TransportKind, op: Op, bytes: u64, ops: u64) {
        self.owner.of(kind).add(op, bytes, ops);
    }

    pub(crate) fn completed(&self, kind: TransportKind, elapsed: Duration) {
        self.latency[kind as usize].add(elapsed);
    }

    pub(crate) fn failed(&self, error: &Error) {
        if let Some(at) = CAUSES.iter().position(|&cause| cause == error.cause()) {
            add_one(&self.failures[at]);
        }
    }

    pub(crate) fn refused(&self, refusal: Refusal) {
        let counter = match refusal {
            Refusal::UnknownGrant => &self.unknown_grant,
            Refusal::Access => &self.access,
            Refusal::Bounds => &self.bounds,
            Refusal::Full => &self.full,
        };
        add_one(counter);
    }

    pub(crate) fn snapshot(&self) -> Stats {
        Stats {
            client: self.client.get(),
            owner: self.owner.get(),
            refused: Refused {
                unknown_grant: self.unknown_grant.load(Relaxed),
                access: self.access.load(Relaxed),
                bounds: self.bounds.load(Relaxed),
                full: self.full.load(Relaxed),
                stale: self.stale.load(Relaxed),
                version: self.version.load(Relaxed),
                untrusted: self.untrusted.load(Relaxed),
                busy: self.busy.load(Relaxed),
                malformed: self.malformed.load(Relaxed),
                forbidden: self.forbidden.load(Relaxed),
            },
            latency: TransportKind::ALL.map(|kind| self.latency[kind as usize].get()),
            failures: std::array::from_fn(|at| (CAUSES[at], self.failures[at].load(Relaxed))),
            in_flight_bytes: self.in_flight_bytes.load(Relaxed),
            retries: self.retries.load(Relaxed),
            fenced_connections: self.fenced_connections.load(Relaxed),
            held_fences: self.held_fences.load(Relaxed),
            open_connections: self.open_connections.load(Relaxed),
            accepted_connections: self.accepted_connections.load(Relaxed),
        }
    }
}

pub(crate) fn add_one(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

pub(crate) fn sub_one(counter: &AtomicU64) {
    counter.fetch_sub(1, Relaxed);
}
