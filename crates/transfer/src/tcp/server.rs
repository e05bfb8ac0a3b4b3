//! The owner's side: a listener, and one thread for each accepted connection.
//!
//! One thread is enough: requests of a connection are handled one after another, in order, and the client always reads
//! (its receiving thread never waits for its sending one), so a blocked answer cannot lock the two up. For each request:
//!
//! ```text
//! header, table ─▶ bounded and well-formed? ─no─▶ count, close
//!                  └▶ grant entered? ─no, revoked──────────▶ refuse; throw a write's payload away; go on
//!                     │              ─no, lie about range──▶ refuse; after a write: close
//!                     └▶ payload straight into / out of the arena ─▶ grant left ─▶ answer
//! ```
//!
//! A revoked key is no lie: a cancelled request's pushes meet it every day, so it does not cost the other requests
//! on the connection anything. Between requests a connection may be idle for ever; within one, a peer that makes no
//! progress for `io_timeout` is given up, and a revoked grant cuts it sooner.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvasir_types::{PROTOCOL_VERSION, TransportKind};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    frame::{Answer, HELLO_BYTES, Hello, MAX_PAYLOAD, Malformed, REQUEST_BYTES, Request, Span, Verb, Verdict},
    link::{Link, Pieces},
    tls::{self, Tls},
};
use crate::{
    batch::Op,
    counters::{add_one, sub_one},
    error::{Error, Refusal},
    grant::Cut,
    owner::Owner,
    threads::Threads,
};

/// How long a peer whose write was refused gets to read the refusal before the connection is closed.
const LINGER: Duration = Duration::from_secs(1);

/// The listener and its connections.
pub(crate) struct Server {
    listener: Socket,
    bound: SocketAddr,
    owner: Arc<Owner>,
    threads: Arc<Threads>,
    io_timeout: Duration,
    limit: usize,
    tls: Option<Arc<Tls>>,
    stopping: AtomicBool,
    links: Mutex<HashMap<u64, Arc<Link>>>,
}

/// Why a connection ends.
enum End {
    Io(io::Error),
    Malformed(Malformed),
    Lied(Refusal),
    /// Who does not accept whom; or only one side speaks TLS.
    Untrusted(String),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Malformed> for End {
    fn from(error: Malformed) -> Self {
        Self::Malformed(error)
    }
}

impl Server {
    /// Binds and starts accepting.
    pub(crate) fn start(
        bind: SocketAddr,
        owner: Arc<Owner>,
        threads: Arc<Threads>,
        io_timeout: Duration,
        limit: usize,
        tls: Option<Arc<Tls>>,
    ) -> Result<Arc<Self>, Error> {
        let listen = || -> io::Result<(Socket, SocketAddr)> {
            let socket = Socket::new(Domain::for_address(bind), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.bind(&bind.into())?;
            socket.listen(128)?;
            let bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
            Ok((socket, bound))
        };
        let (listener, bound) = listen().map_err(|source| Error::Listen { address: bind, source: Arc::new(source) })?;
        let (stopping, links) = (AtomicBool::new(false), Mutex::default());
        let server = Arc::new(Self { listener, bound, owner, threads, io_timeout, limit, tls, stopping, links });
        let accepting = Arc::clone(&server);
        server.threads.spawn("transfer-accept", move || accepting.accept_all())?;
        Ok(server)
    }

    pub(crate) fn bound(&self) -> SocketAddr {
        self.bound
    }

    pub(crate) fn shutdown(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // On Linux this wakes a blocked accept. It goes by the descriptor, which stays open until the struct is dropped.
        let _ = self.listener.shutdown(std::net::Shutdown::Both);
        for link in self.links().values() {
            link.cut();
        }
    }

    fn links(&self) -> MutexGuard<'_, HashMap<u64, Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept_all(self: &Arc<Self>) {
        for id in 0.. {
            let accepted = self.listener.accept();
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            match accepted {
                Ok((socket, _)) => self.admit(id, socket),
                Err(error) => {
                    // Out of descriptors, usually: those in use will be closed; do not spin meanwhile.
                    tracing::warn!(fd = self.listener.as_raw_fd(), %error, "cannot accept a transfer connection");
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, id: u64, socket: Socket) {
        let Ok(link) = Link::new(socket, self.io_timeout) else { return }; // gone already
        {
            let mut links = self.links();
            if links.len() >= self.limit {
                drop(links);
                add_one(&self.owner.counters.busy);
                // A fresh socket's buffer takes these bytes without blocking.
                let _ = link.send_bytes(&Verdict::Busy.encode(PROTOCOL_VERSION));
                return;
            }
            links.insert(id, Arc::clone(&link));
        }
        if self.stopping.load(Ordering::SeqCst) {
            link.cut(); // shutdown may have looked at the links just before
        }
        add_one(&self.owner.counters.accepted_connections);
        let server = Arc::clone(self);
        let served = self.threads.spawn("transfer-serve", move || {
            let guard = Registered { server: &server, id };
            serve(&server.owner, server.tls.as_deref(), &link);
            drop(guard);
        });
        if served.is_err() {
            drop(Registered { server: self, id });
        }
    }
}

/// Takes the connection off the list on the way out, also by a panic.
struct Registered<'a> {
    server: &'a Server,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.server.links().remove(&self.id);
        sub_one(&self.server.owner.counters.accepted_connections);
    }
}

fn serve(owner: &Owner, tls: Option<&Tls>, link: &Arc<Link>) {
    match Connection::new(owner, link).run(tls) {
        Ok(()) => {}
        Err(End::Io(error)) if tls::is_tls(&error) => {
            add_one(&owner.counters.malformed);
            tracing::warn!(%error, "closed a transfer connection whose bytes are no TLS, or were changed on the way");
        }
        Err(End::Io(error)) => tracing::debug!(%error, "transfer connection of a peer ended"),
        Err(End::Malformed(error)) => {
            add_one(&owner.counters.malformed);
            tracing::warn!(%error, "closed a transfer connection that sent no valid frame");
        }
        Err(End::Lied(refusal)) => {
            tracing::warn!(%refusal, "closed a transfer connection after a write that was not granted");
            link.linger(LINGER);
        }
        Err(End::Untrusted(reason)) => {
            add_one(&owner.counters.untrusted);
            tracing::warn!(peer = %link.peer(), reason, "closed a transfer connection without trust");
            link.linger(LINGER);
        }
    }
    link.cut();
}

struct Connection<'a> {
    owner: &'a Owner,
    link: &'a Arc<Link>,
    // Reused from request to request.
    table: Vec<u8>,
    spans: Vec<Span>,
    pieces: Pieces,
}

impl<'a> Connection<'a> {
    fn new(owner: &'a Owner, link: &'a Arc<Link>) -> Self {
        Self { owner, link, table: Vec::new(), spans: Vec::new(), pieces: Pieces::default() }
    }

    fn run(&mut self, tls: Option<&Tls>) -> Result<(), End> {
        if let Some(tls) = tls {
            self.secure(tls)?;
        }
        if !self.shake_hands()? {
            return Ok(());
        }
        let mut head = [0; REQUEST_BYTES];
        while self.link.receive_head(&mut head, || true)?.is_some() {
            let request = Request::decode(&head)?;
            self.table.resize(request.table_bytes(), 0);
            self.link.receive_bytes(&mut self.table)?;
            request.decode_table(&self.table, &mut self.spans)?;
            self.handle(request)?;
            self.link.note_exchange(request.payload.into());
        }
        Ok(())
    }

    fn secure(&mut self, tls: &Tls) -> Result<(), End> {
        match tls.accept(self.link) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.link.send_bytes(&Verdict::Secured.encode(PROTOCOL_VERSION))?;
                Err(End::Untrusted("it does not speak TLS, and Config::tls is set here".into()))
            }
            Err(error) => Err(tls::distrust(&error).map_or(End::Io(error), End::Untrusted)),
        }
    }

    /// Whether the peer means this segment in this life and speaks our version; it is told.
    fn shake_hands(&mut self) -> Result<bool, End> {
        let mut bytes = [0; HELLO_BYTES];
        self.link.receive_bytes(&mut bytes)?;
        let hello = match Hello::decode(&bytes) {
            Err(Malformed::Secured) => {
                self.link.send_bytes(&Verdict::Plain.encode(PROTOCOL_VERSION))?;
                return Err(End::Untrusted(Malformed::Secured.to_string()));
            }
            hello => hello?,
        };
        let counters = &self.owner.counters;
        let verdict = if hello.version != PROTOCOL_VERSION {
            add_one(&counters.version);
            Verdict::Version
        } else if (hello.segment, hello.incarnation) != (self.owner.segment, self.owner.incarnation) {
            add_one(&counters.stale);
            Verdict::Stale
        } else {
            Verdict::Welcome
        };
        self.link.send_bytes(&verdict.encode(PROTOCOL_VERSION))?;
        Ok(verdict == Verdict::Welcome)
    }

    fn handle(&mut self, request: Request) -> Result<(), End> {
        match request.verb {
            Verb::Move(op) => self.handle_move(request, op),
            Verb::Notice => {
                // At most MAX_NOTICE_BYTES, as decoding has seen to.
                self.table.resize(request.payload as usize, 0);
                self.link.receive_bytes(&mut self.table)?;
                let result = self.owner.deliver(request.key, &self.table);
                Ok(self.link.send_bytes(&Answer { result, payload: 0, id: request.id }.encode())?)
            }
        }
    }

    fn handle_move(&mut self, request: Request, op: Op) -> Result<(), End> {
        let link: Arc<dyn Cut> = Arc::clone(self.link) as Arc<dyn Cut>;
        let spans = self.spans.iter().map(|span| (span.offset, u64::from(span.len)));
        let in_flight = match self.owner.grants.enter(request.key, op, spans, link) {
            Ok(in_flight) => in_flight,
            Err(refusal) => return self.refuse(request, op, refusal),
        };
        self.pieces.clear();
        for span in &self.spans {
            self.pieces.push(in_flight.at(span.offset, span.len.into()), span.len as usize);
        }
        let answer = Answer { result: Ok(()), payload: 0, id: request.id };
        match op {
            Op::Read => {
                let head = Answer { payload: request.payload, ..answer }.encode();
                // SAFETY: the pieces lie in granted regions, which `in_flight` keeps registered.
                unsafe { self.link.send(&head, &mut self.pieces) }?;
                drop(in_flight);
            }
            Op::Write => {
                // SAFETY: as above; nobody holds references into them.
                unsafe { self.link.receive(&mut self.pieces) }?;
                // Before the answer: once the writer knows, a revocation has nothing to wait for.
                drop(in_flight);
                self.link.send_bytes(&answer.encode())?;
            }
        }
        let (bytes, ops) = (request.payload.into(), request.ranges.into());
        self.owner.counters.owner_moved(TransportKind::Tcp, op, bytes, ops);
        Ok(())
    }

    fn refuse(&mut self, request: Request, op: Op, refusal: Refusal) -> Result<(), End> {
        debug_assert!(request.payload <= MAX_PAYLOAD);
        self.link.send_bytes(&Answer { result: Err(refusal), payload: 0, id: request.id }.encode())?;
        match (op, refusal) {
            (Op::Read, _) => Ok(()),
            (Op::Write, Refusal::UnknownGrant | Refusal::Full) => Ok(self.link.discard(request.payload.into())?),
            (Op::Write, Refusal::Access | Refusal::Bounds) => Err(End::Lied(refusal)),
        }
    }
}
