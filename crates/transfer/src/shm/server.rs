//! The side that owns the memory: who may connect.
//!
//! What happens with those who were let in is [`super::connection`]'s.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_types::PROTOCOL_VERSION;

use super::{
    client::is_allowed,
    connection::{Connection, Serving},
    messages::{ToClient, Verdict},
    poller::{End, Handler, Next, Poller, Wire},
    socket::Socket,
};
use crate::{
    counters::{add_one, sub_one},
    owner::Owner,
};

/// The listener, and all that connections have in common.
pub(super) struct Server {
    pub(super) owner: Arc<Owner>,
    poller: Arc<Poller>,
    /// The poller has it, and closes it: what connects to a socket that nobody listens to waits in vain.
    listener: Weak<Wire>,
    limit: usize,
    pub(super) io_timeout: Duration,
    allowed_uids: Vec<u32>,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    next_connection: AtomicU64,
    next_nonce: AtomicU64,
}

impl Server {
    pub(super) fn start(
        listener: Socket,
        owner: Arc<Owner>,
        poller: Arc<Poller>,
        limit: usize,
        io_timeout: Duration,
        allowed_uids: Vec<u32>,
    ) -> io::Result<Arc<Self>> {
        let listener = Arc::new(Wire::new(listener, &poller, End::Owner));
        let server = Arc::new(Self {
            owner,
            listener: Arc::downgrade(&listener),
            poller,
            limit,
            io_timeout,
            allowed_uids,
            connections: Mutex::default(),
            next_connection: AtomicU64::new(0),
            next_nonce: AtomicU64::new(1),
        });
        server.poller.add(
            &listener,
            Arc::new(Listening {
                server: Arc::clone(&server),
                wire: Arc::clone(&listener),
                paused: AtomicBool::new(false),
            }),
        )?;
        Ok(server)
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(self: &Arc<Self>, socket: Socket) {
        let counters = &self.owner.counters;
        let turn_away = |verdict| {
            // A fresh socket has room for it; whoever has gone already need not hear it.
            let _ = socket.send(&ToClient::Welcome { version: PROTOCOL_VERSION, verdict }.encode(), &[]);
        };
        match socket.peer_uid() {
            Ok(uid) if is_allowed(uid, &self.allowed_uids) => {}
            Ok(uid) => {
                add_one(&counters.forbidden);
                tracing::warn!(uid, "refused a process of a user not in shm.allowed_uids");
                return turn_away(Verdict::Forbidden);
            }
            Err(_) => return, // gone already
        }
        if self.connections().len() >= self.limit && !self.evict_one() {
            add_one(&counters.busy);
            return turn_away(Verdict::Busy);
        }
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let connection = Connection::new(id, self, Wire::new(socket, &self.poller, End::Owner));
        self.connections().insert(id, Arc::clone(&connection));
        add_one(&counters.accepted_connections);
        if self.poller.add(&connection.wire, Arc::new(Serving(Arc::clone(&connection)))).is_err() {
            connection.end();
        }
    }

    /// Makes room for another connection by closing the one that was silent longest, of those that have nothing open.
    fn evict_one(&self) -> bool {
        let connections: Vec<_> = self.connections().values().cloned().collect();
        let idle = connections.iter().filter(|connection| connection.is_idle());
        let Some(oldest) = idle.min_by_key(|connection| connection.heard()) else { return false };
        self.poller.remove(&oldest.wire);
        oldest.end(); // the socket closes with its last holder: it has nothing to wait for
        true
    }

    /// A connection has ended.
    pub(super) fn forget(&self, id: u64) {
        if self.connections().remove(&id).is_some() {
            sub_one(&self.owner.counters.accepted_connections);
        }
    }

    /// A number never given before, not zero.
    pub(super) fn nonce(&self) -> u64 {
        self.next_nonce.fetch_add(1, Ordering::Relaxed)
    }

    /// Nobody new is let in.
    pub(super) fn shutdown(&self) {
        if let Some(listener) = self.listener.upgrade() {
            self.poller.remove(&listener);
        }
    }
}

struct Listening {
    server: Arc<Server>,
    wire: Arc<Wire>,
    /// Set while there are no descriptors to accept with.
    paused: AtomicBool,
}

impl Listening {
    fn accept_all(&self) {
        loop {
            match self.wire.socket.accept() {
                Ok(socket) => self.server.admit(socket),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of descriptors, usually: those in use will be closed; look again at the next tick.
                    tracing::warn!(%error, "cannot accept an shm connection");
                    self.paused.store(self.wire.pause().is_ok(), Ordering::Relaxed);
                    return;
                }
            }
        }
    }
}

impl Handler for Listening {
    fn ready(&self) -> Next {
        self.accept_all();
        Next::Stay
    }

    fn tick(&self, _now: Instant) -> Next {
        if self.paused.swap(false, Ordering::Relaxed) {
            let _ = self.wire.resume(); // fails only once the poller has let go of it
        }
        Next::Stay
    }

    fn wants_ticks(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    fn holds_memory(&self) -> bool {
        false
    }

    fn ended(&self) {}
}
