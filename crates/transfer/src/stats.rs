//! What moved, what was refused: counters of one engine, read as a snapshot.

use kvasir_types::TransportKind;

use crate::{error::CAUSES, histogram::Histogram};

/// Snapshot of an engine's counters since its start (the two `…_connections` gauges: now).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Moved by batches submitted here.
    pub client: Side,
    /// Moved in and out of this engine's memory by peers.
    pub owner: Side,
    /// How long batches submitted here took, by transport, in the order of [`TransportKind::ALL`].
    pub latency: [Histogram; 4],
    /// Batches submitted here that failed, by cause ([`crate::Error::cause`]).
    pub failures: [(&'static str, u64); CAUSES.len()],
    /// Bytes of batches submitted here that are not over.
    pub in_flight_bytes: u64,
    /// Operations and connections of peers that this engine refused.
    pub refused: Refused,
    /// Frames sent again on a fresh connection after theirs died.
    pub retries: u64,
    /// Connections cut on this side so that memory could be reused.
    pub fenced_connections: u64,
    /// Revoked grants whose ranges stayed fenced beyond the grace because a process of this host was inside and can't be
    /// cut (stopped, usually): until it leaves or ends.
    pub held_fences: u64,
    /// Connections open to peers now.
    pub open_connections: u64,
    /// Connections of peers open to us now.
    pub accepted_connections: u64,
}

/// Traffic by transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Within the process.
    pub local: Traffic,
    /// Through memory that both processes map. Seen from the owner: nothing, it takes no part.
    pub shm: Traffic,
    /// By libucp. Seen from the owner: nothing, it takes no part.
    pub ucx: Traffic,
    /// Over sockets.
    pub tcp: Traffic,
}

impl Side {
    /// One transport's part.
    pub fn of(&self, kind: TransportKind) -> &Traffic {
        match kind {
            TransportKind::Local => &self.local,
            TransportKind::Shm => &self.shm,
            TransportKind::Ucx => &self.ucx,
            TransportKind::Tcp => &self.tcp,
        }
    }
}

/// Traffic by direction, seen from the one who submitted the batch. An op is one range of a batch (a piece of it if it
/// was cut).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes read from the owner's memory.
    pub read_bytes: u64,
    /// Ranges read.
    pub read_ops: u64,
    /// Bytes written into the owner's memory.
    pub written_bytes: u64,
    /// Ranges written.
    pub written_ops: u64,
}

/// Refusals by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// No such key, or revoked: normal when a request is cancelled while its blocks arrive.
    pub unknown_grant: u64,
    /// A write under a read grant, or the reverse.
    pub access: u64,
    /// Outside the granted ranges.
    pub bounds: u64,
    /// Notices for which there was no room.
    pub full: u64,
    /// A hello for another segment or an earlier life.
    pub stale: u64,
    /// A hello in another protocol version.
    pub version: u64,
    /// Connections, to peers too, over which one side did not accept the other's certificate, or only one spoke TLS.
    pub untrusted: u64,
    /// One connection too many.
    pub busy: u64,
    /// Bytes that are no frame.
    pub malformed: u64,
    /// A process of a user that may not map our memory.
    pub forbidden: u64,
}
