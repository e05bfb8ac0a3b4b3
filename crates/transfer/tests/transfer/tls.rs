//! Encrypted connections: who is let in, and that faults end as they do without encryption. The contract runs over TLS, too
//! (`contract::tls`).

use std::{
    cell::RefCell,
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use kvasir_transfer::{Access, Config, Error, LocalNet, Op, TlsConfig, TransferEngine};
use kvasir_types::{Deadline, GrantKey, SegmentDescriptor, TransportKind::Tcp};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use crate::support::*;

/// Who signs certificates, and where the files are.
struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("authority.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { dir, issuer: Issuer::new(params, key) }
    }

    /// A certificate for one host.
    fn issue(&self, host: &str) -> TlsConfig {
        self.issue_with(host, |_| ())
    }

    fn issue_with(&self, host: &str, change: impl FnOnce(&mut CertificateParams)) -> TlsConfig {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        let path = |name: &str| self.dir.path().join(format!("{host}-{name}"));
        fs::write(path("certificate.pem"), signed.pem()).unwrap();
        fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        TlsConfig {
            certificate: path("certificate.pem"),
            key: path("key.pem"),
            authority: self.dir.path().join("authority.pem"),
            server_name: None,
        }
    }
}

thread_local! {
    static SECURED: RefCell<Option<(Authority, TlsConfig)>> = const { RefCell::new(None) };
}

/// Runs `body` with every [`config`] of this thread asking for TLS.
pub fn secured(body: impl FnOnce()) {
    let authority = Authority::new();
    let tls = authority.issue("127.0.0.1");
    SECURED.set(Some((authority, tls)));
    body();
    SECURED.set(None);
}

/// What [`config`] asks for.
pub fn wanted() -> Option<TlsConfig> {
    SECURED.with_borrow(|secured| secured.as_ref().map(|(_, tls)| tls.clone()))
}

fn over_tls(tls: &TlsConfig) -> TransferEngine {
    engine(Config { tls: Some(tls.clone()), ..config(Tcp) }, MIB)
}

/// The end of a small write from one to the other.
fn written(client: &TransferEngine, owner: &TransferEngine) -> Result<(), Error> {
    let write = grant(owner, 0, 100, Access::Write);
    let transfer = client.submit(batch(Op::Write, &owner.descriptor(), write.key(), &[(0, 0, 100)]));
    within_limit("the write", move || transfer.wait().map(drop))
}

fn untrusted(result: Result<(), Error>) -> String {
    match result {
        Err(Error::Untrusted { reason, .. }) => reason,
        other => panic!("trusted: {other:?}"),
    }
}

#[test]
fn engines_with_certificates_of_one_authority_trust_one_another() {
    let authority = Authority::new();
    let (client, owner) = (over_tls(&authority.issue("10.1.2.3")), over_tls(&authority.issue("127.0.0.1")));
    client.write_bytes(0, &[7; 100]).unwrap();
    written(&client, &owner).unwrap();
    assert_eq!(bytes(&owner, 0, 100), [7; 100]);
    assert_eq!((client.stats().refused.untrusted, owner.stats().refused.untrusted), (0, 0));
}

#[test]
fn a_certificate_for_another_host_is_not_accepted_unless_its_name_is_what_is_asked_for() {
    let authority = Authority::new();
    let (client, owner) = (authority.issue("127.0.0.1"), over_tls(&authority.issue("engines.kvasir")));
    let reason = untrusted(written(&over_tls(&client), &owner));
    assert!(reason.contains("not accepted here") && reason.contains("not valid for name"), "{reason}");
    written(&over_tls(&TlsConfig { server_name: Some("engines.kvasir".into()), ..client }), &owner).unwrap();
}

#[test]
fn an_authority_that_only_one_side_knows_is_refused_by_the_other() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mixed = TlsConfig { authority: theirs.issue("unused").authority, ..ours.issue("127.0.0.1") };
    // Both know only their own: the client finds out first.
    let (client, owner) = (over_tls(&ours.issue("127.0.0.1")), over_tls(&theirs.issue("127.0.0.1")));
    let reason = untrusted(written(&client, &owner));
    assert!(reason.contains("not accepted here"), "{reason}");
    assert_eq!(client.stats().refused.untrusted, 1);
    // The client knows the owner's, the owner does not know the client's.
    let client = over_tls(&mixed);
    let reason = untrusted(written(&client, &owner));
    assert!(reason.contains("does not accept this engine"), "{reason}");
    wait_until("the owner has counted", || owner.stats().refused.untrusted > 0);
    assert_eq!(bytes(&owner, 0, 100), [0; 100]);
    assert_eq!(client.stats().retries, 0, "trying again is of no use");
}

#[test]
fn a_certificate_out_of_date_is_refused_on_either_side() {
    let authority = Authority::new();
    let good = over_tls(&authority.issue("127.0.0.1"));
    let expired = over_tls(&authority.issue_with("127.0.0.1", |params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    }));
    let reason = untrusted(written(&good, &expired));
    assert!(reason.contains("expired"), "{reason}");
    let reason = untrusted(written(&expired, &good));
    assert!(reason.contains("CertificateExpired"), "{reason}");
    wait_until("the owner has counted", || good.stats().refused.untrusted == 2);
}

#[test]
fn one_side_without_tls_is_told_so_and_nothing_hangs() {
    let (plain, secure) = (engine(config(Tcp), MIB), over_tls(&Authority::new().issue("127.0.0.1")));
    let reason = untrusted(written(&plain, &secure));
    assert!(reason.contains("speaks only TLS"), "{reason}");
    let reason = untrusted(written(&secure, &plain));
    assert!(reason.contains("does not speak TLS"), "{reason}");
    for engine in [&plain, &secure] {
        wait_until("both have counted both", || engine.stats().refused.untrusted == 2);
        assert_eq!(bytes(engine, 0, 100), [0; 100]);
    }
}

#[test]
fn a_welcome_in_the_clear_is_not_believed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let secure = over_tls(&Authority::new().issue("127.0.0.1"));
    let target = at(&listener, &secure);
    let transfer = secure.submit(batch(Op::Write, &target, GrantKey(1), &[(0, 0, 100)]));
    let mut stream = listener.accept().unwrap().0;
    let mut welcome = b"kvasirRX".to_vec();
    welcome.extend_from_slice(&kvasir_types::PROTOCOL_VERSION.to_le_bytes());
    welcome.extend_from_slice(&[0; 4]);
    stream.write_all(&welcome[..5]).unwrap();
    stream.write_all(&welcome[5..]).unwrap();
    let reason = untrusted(within_limit("the write", move || transfer.wait().map(drop)));
    assert!(reason.contains("without having shown a certificate"), "{reason}");
}

#[test]
fn files_that_do_not_fit_are_named() {
    let authority = Authority::new();
    let (one, other) = (authority.issue("one"), authority.issue("other"));
    for (tls, setting) in [
        (TlsConfig { certificate: "/nowhere".into(), ..one.clone() }, "tls.certificate: /nowhere"),
        (TlsConfig { certificate: one.key.clone(), ..one.clone() }, "tls.certificate: "),
        (TlsConfig { key: other.key.clone(), ..one.clone() }, "tls.key: "),
        (TlsConfig { authority: one.key.clone(), ..one.clone() }, "tls.authority: "),
        (TlsConfig { server_name: Some("not a name".into()), ..one }, "tls.server_name: 'not a name'"),
    ] {
        let error = TransferEngine::new(Config { tls: Some(tls), ..config(Tcp) }, LocalNet::new(), MIB)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(&format!("transfer setting {setting}")), "{error}");
    }
}

/// The engine's descriptor, but reached by way of `listener`.
fn at(listener: &TcpListener, engine: &TransferEngine) -> SegmentDescriptor {
    let mut descriptor = engine.descriptor();
    descriptor.transports[0].address = listener.local_addr().unwrap().to_string();
    descriptor
}

/// Passes bytes on to `owner`, one connection after another, and all of them back. Of the first connection it passes `limit`
/// bytes, the last of them changed by `meddle`, and then waits until the sender is used or dropped.
fn relay(owner: &TransferEngine, limit: usize, meddle: fn(&mut u8)) -> (SegmentDescriptor, mpsc::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (far, near) = (owner.descriptor().transports[0].address.clone(), at(&listener, owner));
    let (go_on, wait) = mpsc::channel();
    thread::spawn(move || {
        let mut first = Some(wait);
        for mut client in listener.incoming().map_while(Result::ok) {
            let Ok(mut owner) = TcpStream::connect(&far) else { return };
            let (mut back, mut to) = (owner.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut to);
                to.shutdown(std::net::Shutdown::Both)
            });
            let stalled = first.take();
            thread::spawn(move || {
                if let Some(stalled) = stalled {
                    std::io::copy(&mut Read::by_ref(&mut client).take(limit as u64 - 1), &mut owner)?;
                    let mut last = [0];
                    client.read_exact(&mut last)?;
                    meddle(&mut last[0]);
                    owner.write_all(&last)?;
                    let _ = stalled.recv();
                }
                std::io::copy(&mut client, &mut owner)?;
                owner.shutdown(std::net::Shutdown::Both)
            });
        }
    });
    (near, go_on)
}

const LEN: u64 = MIB as u64;

#[test]
fn a_stalled_write_is_fenced_off_and_no_byte_lands_later() {
    secured(|| {
        let (client, owner) =
            (engine(Config { connections_per_peer: 1, ..config(Tcp) }, MIB), engine(config(Tcp), MIB));
        let (target, go_on) = relay(&owner, MIB / 2, |_| ());
        client.write_bytes(0, &vec![1; MIB]).unwrap();
        let write = grant(&owner, 0, LEN, Access::Write);
        let transfer = client.submit(batch(Op::Write, &target, write.key(), &[(0, 0, LEN)]));
        wait_until("a good part has landed", || bytes(&owner, LEN / 4, 1) == [1]);
        within_limit("the revocation", move || write.revoke().wait());
        assert_eq!(owner.stats().fenced_connections, 1);
        owner.write_bytes(0, &vec![9; MIB]).unwrap(); // the block is somebody else's now
        drop(go_on);
        let result = within_limit("the transfer", move || transfer.wait());
        assert!(matches!(result, Err(Error::Refused { .. } | Error::Disconnected { .. })), "{result:?}");
        assert_eq!(bytes(&owner, 0, MIB), vec![9; MIB]);
    });
}

#[test]
fn a_deadline_ends_a_stalled_write_and_frees_its_source() {
    secured(|| {
        let (client, owner) = (engine(config(Tcp), 32 * MIB), engine(config(Tcp), 32 * MIB));
        let (target, _stalled) = relay(&owner, MIB, |_| ());
        let write = grant(&owner, 0, 32 * LEN, Access::Write);
        let mut request = batch(Op::Write, &target, write.key(), &[(0, 0, 32 * LEN)]);
        request.deadline = Deadline::after(Duration::from_millis(200));
        let transfer = client.submit(request);
        let result = within_limit("the transfer", move || transfer.wait());
        assert!(matches!(result, Err(Error::DeadlineExceeded)), "{result:?}");
    });
}

#[test]
fn bytes_changed_on_the_way_do_not_land_and_cost_a_retry() {
    secured(|| {
        let (client, owner) =
            (engine(Config { connections_per_peer: 1, ..config(Tcp) }, MIB), engine(config(Tcp), MIB));
        let (target, go_on) = relay(&owner, MIB / 2, |byte| *byte ^= 1); // far behind the handshake
        go_on.send(()).unwrap();
        client.write_bytes(0, &pattern(6, MIB)).unwrap();
        let write = grant(&owner, 0, LEN, Access::Write);
        client.submit(batch(Op::Write, &target, write.key(), &[(0, 0, LEN)])).wait().unwrap();
        assert_eq!((client.stats().retries, owner.stats().refused.malformed), (1, 1));
        assert_eq!(bytes(&owner, 0, MIB), pattern(6, MIB));
    });
}

#[test]
fn a_peer_that_says_nothing_or_too_little_in_the_handshake_is_given_up() {
    secured(|| {
        let short = || Config { io_timeout: Duration::from_millis(100), ..config(Tcp) };
        // Silent owner.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = engine(short(), MIB);
        let transfer = client.submit(batch(Op::Read, &at(&listener, &client), GrantKey(1), &[(0, 0, 100)]));
        let result = within_limit("the transfer", move || transfer.wait());
        assert!(matches!(result, Err(Error::Disconnected { .. })), "{result:?}");
        // A client that sends a byte now and then, the start of a long record.
        let owner = engine(short(), MIB);
        let mut slow = RawPeer::connect(&owner.descriptor());
        let closed = within_limit("the handshake", move || {
            let mut record = [22u8, 3, 1, 0x20, 0].into_iter().chain(std::iter::repeat(0));
            while record.next().is_some_and(|byte| slow.0.write_all(&[byte]).is_ok()) {
                thread::sleep(Duration::from_millis(5));
            }
            slow.is_closed()
        });
        assert!(closed);
    });
}

#[test]
fn babble_is_counted_and_closes_its_own_connection_only() {
    secured(|| {
        let owner = engine(config(Tcp), MIB);
        for babble in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[22, 3, 3, 0, 4, 1, 2, 3, 4], &[23; 600], &[22, 3, 3, 255, 255]]
        {
            let mut peer = RawPeer::connect(&owner.descriptor());
            peer.0.write_all(babble).unwrap();
            let mut heard = Vec::new();
            let _ = peer.0.read_to_end(&mut heard);
            assert!(heard.len() <= 7, "an alert at most: {heard:?}");
        }
        wait_until("all were counted", || owner.stats().refused.malformed == 4);
        written(&engine(config(Tcp), MIB), &owner).unwrap();
    });
}

#[test]
fn a_revocation_in_the_storm_leaves_no_late_byte() {
    secured(crate::faults::a_revocation_in_the_storm_leaves_no_late_byte);
}
