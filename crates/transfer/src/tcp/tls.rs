//! Encryption of a link, and proof of who is at either end, by rustls: TLS 1.3 only, with certificates on both sides.
//!
//! ```text
//! send:     memory ──copy──▶ scratch ──encrypt──▶ records ─────▶ socket      under `outgoing`, which orders the sending
//!                                  under `session`
//! receive:  socket ─────▶ records ──decrypt──▶ plaintext ──copy──▶ memory    under `incoming`
//! ```
//!
//! Two threads use a link at once, one sends and one receives, but a TLS session is one state. So the session is locked only
//! to encrypt or decrypt a few records, never during a system call; and what it gives or takes goes through buffers of the
//! link, [`CHUNK`] bytes each way at most: rustls works on slices, and no reference is ever formed into registered memory.
//! That costs a copy each way which a plain link does not have. A record is delivered only after it was authenticated: bytes
//! that were tampered with end the connection and do not reach memory.
//!
//! The ends recognise one another's mistake: a hello without TLS is answered, in the clear, by [`Verdict::Secured`], a TLS
//! hello at an engine without TLS by [`Verdict::Plain`]; nothing else is ever said or believed in the clear. There are no
//! session tickets, so that each connection proves anew who it is, and the dates of certificates are looked at each time. A
//! closed connection need not say so by TLS (`close_notify`): every request has its answer, so nothing can be cut off unseen.

use std::{
    io, ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    client::{Resumption, WebPkiServerVerifier},
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};

#[cfg(doc)]
use super::frame::Verdict;
use super::{
    frame::WELCOME_BYTES,
    link::{Link, scatter},
};
use crate::{config::TlsConfig, error::Error};

/// Most bytes encrypted or received at once: four records, one system call.
const CHUNK: usize = 64 << 10;
/// Said in the TLS handshake, so that a certificate's holder can't be led to another service of its.
const PROTOCOL: &[u8] = b"kvasir-transfer";
/// How a hello or welcome in the clear begins. A TLS record begins with its type, 20 to 23.
const CLEAR: u8 = b'k';

/// What an engine shows to its peers and asks of them.
pub(super) struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    server_name: Option<ServerName<'static>>,
}

/// How a client's attempt at TLS ended.
pub(super) enum Connected {
    Secured,
    /// The peer answered in the clear.
    Clear([u8; WELCOME_BYTES]),
}

impl Tls {
    /// Reads the files and checks that they belong together.
    pub(super) fn load(config: &TlsConfig) -> Result<Self, Error> {
        fn bad(setting: &'static str, path: &std::path::Path) -> impl Fn(&dyn std::fmt::Display) -> Error {
            move |reason| Error::Config { setting, reason: format!("{}: {reason}", path.display()) }
        }
        let TlsConfig { certificate, key, authority, server_name } = config;
        let chain = certificates(certificate).map_err(|reason| bad("tls.certificate", certificate)(&reason))?;
        let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| bad("tls.key", key)(&error))?;
        let mut roots = RootCertStore::empty();
        let wrong = bad("tls.authority", authority);
        for root in certificates(authority).map_err(|reason| wrong(&reason))? {
            roots.add(root).map_err(|error| wrong(&error))?;
        }
        let roots = Arc::new(roots);
        let server_name =
            match server_name {
                None => None,
                Some(name) => Some(ServerName::try_from(name.clone()).map_err(|error| Error::Config {
                    setting: "tls.server_name",
                    reason: format!("'{name}': {error}"),
                })?),
            };
        let provider = Arc::new(ring::default_provider());
        let mismatch = |error: rustls::Error| bad("tls.key", key)(&error);
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| wrong(&error))?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| wrong(&error))?;
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(mismatch)?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain.clone(), secret.clone_key())
            .map_err(mismatch)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(mismatch)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, secret)
            .map_err(mismatch)?;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server), server_name })
    }

    /// Secures a link to the peer at `address`, `host:port`. An error that says who does not trust whom is told apart by
    /// [`distrust`].
    pub(super) fn connect(&self, link: &Link, address: &str) -> io::Result<Connected> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let name = match &self.server_name {
            Some(name) => name.clone(),
            None => ServerName::try_from(host.to_owned()).map_err(io::Error::other)?,
        };
        let session = ClientConnection::new(Arc::clone(&self.client), name).map_err(invalid)?;
        let (secured, clear) = Secured::shake_hands(link, session.into())?;
        if !clear {
            link.secure(secured);
            return Ok(Connected::Secured);
        }
        let incoming = secured.incoming.into_inner().unwrap_or_else(PoisonError::into_inner);
        let heard = &incoming.bytes[..incoming.end.min(WELCOME_BYTES)];
        let mut welcome = [0; WELCOME_BYTES];
        welcome[..heard.len()].copy_from_slice(heard);
        link.receive_bytes(&mut welcome[heard.len()..])?;
        Ok(Connected::Clear(welcome))
    }

    /// Secures a link that was accepted; `false`: the peer speaks in the clear.
    pub(super) fn accept(&self, link: &Link) -> io::Result<bool> {
        let session = ServerConnection::new(Arc::clone(&self.server)).map_err(invalid)?;
        let (secured, clear) = Secured::shake_hands(link, session.into())?;
        if !clear {
            link.secure(secured);
        }
        Ok(!clear)
    }
}

fn certificates(path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?.collect();
    match certificates.map_err(|error| error.to_string())? {
        none if none.is_empty() => Err("holds no certificate in PEM form".into()),
        some => Ok(some),
    }
}

/// Why one side does not trust the other, if that is what the error says. Any other error of TLS means that the bytes were
/// none, or were changed on the way.
pub(super) fn distrust(error: &io::Error) -> Option<String> {
    use rustls::{
        AlertDescription as Alert,
        Error::{AlertReceived, InvalidCertificate, NoApplicationProtocol, NoCertificatesPresented, PeerIncompatible},
    };
    Some(match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        InvalidCertificate(reason) => format!("its certificate is not accepted here: {reason}"),
        NoCertificatesPresented => "it shows no certificate".into(),
        NoApplicationProtocol | AlertReceived(Alert::NoApplicationProtocol) => {
            "it speaks TLS, but for another purpose".into()
        }
        PeerIncompatible(reason) => format!("no way of TLS in common: {reason:?}"),
        AlertReceived(reason @ (Alert::HandshakeFailure | Alert::ProtocolVersion)) => {
            format!("it finds no way of TLS in common: {reason:?}")
        }
        AlertReceived(
            reason @ (Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError // a signature that does not fit: an authority of the same name
            | Alert::CertificateRequired),
        ) => format!("it does not accept this engine's certificate: {reason:?}"),
        _ => return None,
    })
}

/// Whether the error is one of TLS: bytes that are no TLS, or were changed on the way.
pub(super) fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The TLS side of a link.
pub(super) struct Secured {
    session: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
}

/// Records received, from `start` to `end` not yet decrypted.
struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Records encrypted, up to `sent` in the socket; they carry `covers` bytes of plaintext.
#[derive(Default)]
struct Outgoing {
    scratch: Vec<u8>,
    records: Vec<u8>,
    sent: usize,
    covers: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Secured {
    /// The handshake, within the link's timeout as a whole; `true` with it: the peer speaks in the clear instead.
    fn shake_hands(link: &Link, mut session: Connection) -> io::Result<(Self, bool)> {
        let until = Instant::now() + link.io_timeout();
        let mut incoming = Incoming { bytes: vec![0; CHUNK].into(), start: 0, end: 0 };
        let mut heard = false;
        let clear = loop {
            flush(link, &mut session, until)?;
            if !session.is_handshaking() {
                break false;
            }
            if incoming.start == incoming.end {
                incoming.refill(link, Some(until))?;
                if !std::mem::replace(&mut heard, true) && incoming.bytes[0] == CLEAR {
                    break true;
                }
            }
            if let Err(error) = incoming.feed(&mut session) {
                let _ = flush(link, &mut session, until); // tells the peer why
                return Err(error);
            }
        };
        let (session, incoming) = (Mutex::new(session), Mutex::new(incoming));
        Ok((Self { session, incoming, outgoing: Mutex::default() }, clear))
    }

    /// Sends some of the pieces; how many bytes of them are done with (0: some of their records are in the socket).
    ///
    /// # Safety
    /// The pieces' memory is mapped.
    pub(super) unsafe fn send(&self, link: &Link, pieces: &[libc::iovec]) -> io::Result<usize> {
        let out = &mut *lock(&self.outgoing);
        if out.sent == out.records.len() {
            out.records.clear();
            out.sent = 0;
            // SAFETY: the caller's promise.
            out.covers = unsafe { gather(pieces, &mut out.scratch) };
            let mut session = lock(&self.session);
            io::Write::write_all(&mut session.writer(), &out.scratch)?;
            while session.wants_write() {
                session.write_tls(&mut out.records)?;
            }
        }
        out.sent += link.send_raw(&out.records[out.sent..])?;
        Ok(if out.sent == out.records.len() { out.covers } else { 0 })
    }

    /// Fills some of the pieces; 0 if the peer has closed the connection.
    ///
    /// # Safety
    /// The pieces' memory is mapped and writable, and nobody holds a reference into it.
    pub(super) unsafe fn receive(&self, link: &Link, pieces: &[libc::iovec]) -> io::Result<usize> {
        let incoming = &mut *lock(&self.incoming);
        loop {
            {
                let mut session = lock(&self.session);
                loop {
                    match session.reader().into_first_chunk() {
                        // Cut: nothing more reaches memory, although it has been decrypted.
                        Ok(_) if link.is_cut() => return Err(io::ErrorKind::ConnectionAborted.into()),
                        Ok(plaintext) => {
                            // SAFETY: the caller's promise; the plaintext is the session's own.
                            let taken = unsafe { scatter(plaintext, pieces) };
                            io::BufRead::consume(&mut session.reader(), taken);
                            return Ok(taken);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                    if incoming.start == incoming.end {
                        break;
                    }
                    incoming.feed(&mut session)?;
                }
            }
            match incoming.refill(link, None) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => other?,
            }
        }
    }
}

impl Incoming {
    /// Receives more records; for as long as the socket's tick, or `until`.
    fn refill(&mut self, link: &Link, until: Option<Instant>) -> io::Result<()> {
        (self.start, self.end) = (0, 0);
        loop {
            match (link.receive_raw(&mut self.bytes), until) {
                (Ok(0), _) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the peer")),
                (Ok(_), Some(until)) if Instant::now() >= until => return Err(io::ErrorKind::TimedOut.into()),
                (Ok(count), _) => {
                    self.end = count;
                    return Ok(());
                }
                (Err(error), Some(until)) => patient(link, error, until)?,
                (Err(error), None) => return Err(error),
            }
        }
    }

    /// Decrypts one record, or the part of it that has come.
    fn feed(&mut self, session: &mut Connection) -> io::Result<()> {
        let mut rest = &self.bytes[self.start..self.end];
        session.read_tls(&mut rest)?;
        self.start = self.end - rest.len();
        session.process_new_packets().map_err(invalid)?;
        Ok(())
    }
}

/// Sends what the session has to say in the handshake.
fn flush(link: &Link, session: &mut Connection, until: Instant) -> io::Result<()> {
    let mut records = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut records)?;
    }
    let mut rest = &records[..];
    while !rest.is_empty() {
        match link.send_raw(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) => patient(link, error, until)?,
        }
    }
    Ok(())
}

/// Whether to try again after an error: while the handshake has time and is wanted.
fn patient(link: &Link, error: io::Error, until: Instant) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted if link.is_cut() => {
            Err(io::ErrorKind::ConnectionAborted.into())
        }
        io::ErrorKind::WouldBlock if Instant::now() >= until => Err(io::ErrorKind::TimedOut.into()),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// Copies what the pieces hold, up to [`CHUNK`] bytes, to `scratch`, and says how much it was.
///
/// # Safety
/// The pieces' memory is mapped.
unsafe fn gather(pieces: &[libc::iovec], scratch: &mut Vec<u8>) -> usize {
    let total = pieces.iter().map(|piece| piece.iov_len).fold(0, usize::saturating_add).min(CHUNK);
    scratch.resize(total, 0);
    let mut done = 0;
    for piece in pieces {
        let step = piece.iov_len.min(total - done);
        // SAFETY: `step` bytes are mapped at the piece's address, as the caller promises, and fit behind `done`.
        unsafe { ptr::copy_nonoverlapping(piece.iov_base.cast(), scratch[done..].as_mut_ptr(), step) };
        done += step;
    }
    done
}
