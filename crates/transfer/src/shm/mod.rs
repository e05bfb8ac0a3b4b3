//! The shm transport: processes of one host, where a peer's memory is mapped and a copy is a memcpy.
//!
//! An owner's regions are memfds. Who connects to its Unix socket gets their descriptors, maps them once, and from then on
//! reads and writes them without the owner's part:
//!
//! ```text
//! client                                              owner
//! Peer ── hello, open(key) ─────────────────────────▶ Connection ── GrantTable::open_remote
//!   ◀──── control pages, regions (descriptors), the grant's slot and ranges ──┘
//!   │ first operation under a key: one question. Every later one:
//!   └ enter the slot ▶ memcpy ▶ leave the slot        Opener::revoked: close the slot, look who is inside
//! ```
//!
//! - **Protection**: the key is checked by the owner when the grant is opened, ranges and direction by the client for each
//!   operation, against what the owner told it. A region registered read-only is mapped read-only. What a process may map it
//!   may also touch if it breaks these rules: so only processes of our own user, or of users in `shm.allowed_uids`, are let
//!   in, as the kernel names them (`SO_PEERCRED`), and those are trusted to run this code.
//! - **Fence**: [`control`] has the protocol and why no byte is late. A client inside a revoked grant is waited for: until it
//!   says that it has left, or until its socket ends, that is, it has died. It can't be cut: one that is stopped in mid-copy
//!   holds its ranges fenced for as long (counted as `held_fences`, logged). At shutdown the owner waits for the fence grace,
//!   then goes: what a stopped client writes later lands in memory that only holders of the region's handle still see.
//! - **Neither side believes the other**: [`messages`] is a total decoder with bounds; [`mapping`] refuses memory that could be
//!   pulled away; [`granted`] yields addresses only inside mappings. Babble costs the babbler its connection.
//!
//! A process that forks without exec hands its child the socket: the child keeps its parent's fences held after the parent
//! has died, though it can't write (mappings are not inherited). Exec closes it.

mod address;
mod client;
mod control;
mod granted;
mod mapping;
pub(crate) mod messages;
mod peer;
mod poller;
mod server;
mod socket;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use kvasir_types::{TransportAddress, TransportKind};

use self::{
    address::{Host, Place},
    client::{Client, Limits},
    poller::Poller,
    server::Server,
};
use crate::{
    batch::{Frame, Priority},
    config::Config,
    copier::Copier,
    error::Error,
    owner::Owner,
    threads::Threads,
    transport::{Target, Transport},
};

/// Listener, connections and thread of one engine.
pub(crate) struct ShmTransport {
    host: Host,
    place: Place,
    client: Arc<Client>,
    server: Arc<Server>,
    poller: Arc<Poller>,
}

impl ShmTransport {
    pub(crate) fn new(
        config: &Config,
        owner: &Arc<Owner>,
        copier: Copier<Priority>,
        threads: &Threads,
    ) -> Result<Self, Error> {
        let unavailable = |what: &str, error: std::io::Error| Error::TransportUnavailable {
            kind: TransportKind::Shm,
            reason: format!("{what}: {error}"),
        };
        let host = Host::this().map_err(|error| unavailable("cannot tell this host from others", error))?;
        let uids = &config.shm.allowed_uids;
        let (place, listener) = Place::listen(&host, config.shm.dir.as_deref(), !uids.is_empty())?;
        let poller = Poller::new().map_err(|error| unavailable("cannot wait for sockets", error))?;
        let limits = Limits {
            connections: config.max_open_connections,
            io_timeout: config.io_timeout,
            retries: config.retries,
            allowed_uids: uids.clone(),
        };
        let counters = Arc::clone(&owner.counters);
        let client = Client::new(host.clone(), limits, copier, counters, Arc::clone(&poller));
        let server = Server::start(
            listener,
            Arc::clone(owner),
            Arc::clone(&poller),
            config.max_accepted_connections,
            config.io_timeout,
            uids.clone(),
        )
        .map_err(|error| unavailable("cannot wait for peers", error))?;
        let (polling, grace) = (Arc::clone(&poller), config.fence_grace);
        threads.spawn("transfer-shm", move || polling.run(grace)).inspect_err(|_| server.shutdown())?;
        Ok(Self { host, place, client, server, poller })
    }
}

impl Transport for ShmTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }

    fn addresses(&self) -> Vec<TransportAddress> {
        vec![TransportAddress { kind: TransportKind::Shm, address: self.place.address.clone() }]
    }

    fn reaches(&self, address: &str) -> Result<(), String> {
        self.host.resolve(address).map(drop)
    }

    fn start(&self, frames: Vec<Frame>, target: &Arc<Target>) {
        self.client.start(frames, target);
    }

    fn shutdown(&self) {
        self.place.leave();
        self.server.shutdown();
        self.client.shutdown();
        self.poller.stop();
    }
}
