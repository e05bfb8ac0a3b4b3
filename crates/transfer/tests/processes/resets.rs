//! Connections that break in mid-frame, by a proxy on the way that resets them or goes silent.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use kvasir_transfer::{Config, Error, Op};
use kvasir_types::{GrantKey, SegmentDescriptor, TransportKind::Tcp};
use socket2::SockRef;

use crate::{
    peer::Setup,
    process::Process,
    support::{MIB, batch, bytes, config, engine, pattern, within_limit},
};

const AREA: usize = 32 * MIB;
/// Bytes that a connection carries, both ways together, before the fault: the middle of a frame.
const BEFORE: u64 = 5 * MIB as u64 + 12_345;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Both sides get a reset.
    Reset,
    /// Nothing moves any more, and nobody is told.
    Silence,
}

/// Passes connections on, and breaks some.
struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    target: SocketAddr,
    fault: Fault,
    /// How many connections are still to be broken.
    faults: AtomicU64,
    /// Broken by silence: kept open.
    silent: Mutex<Vec<Arc<Passage>>>,
    over: AtomicBool,
}

/// One connection through the proxy.
struct Passage {
    near: TcpStream,
    far: TcpStream,
    carried: AtomicU64,
    over: AtomicBool,
}

impl Proxy {
    fn new(target: &SegmentDescriptor, fault: Fault, faults: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: target.transports[0].address.parse().unwrap(),
            fault,
            faults: AtomicU64::new(faults),
            silent: Mutex::default(),
            over: AtomicBool::new(false),
        });
        let passing = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                if passing.over.load(SeqCst) {
                    return;
                }
                passing.pass(near);
            }
        });
        Self { address, shared }
    }

    /// The target, by way of the proxy.
    fn before(&self, target: &SegmentDescriptor) -> SegmentDescriptor {
        let mut target = target.clone();
        target.transports[0].address = self.address.to_string();
        target
    }

    fn faults_left(&self) -> u64 {
        self.shared.faults.load(SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, SeqCst);
        let _ = TcpStream::connect(self.address); // wakes the accept
    }
}

impl Shared {
    fn pass(self: &Arc<Self>, near: TcpStream) {
        let Ok(far) = TcpStream::connect(self.target) else { return };
        for stream in [&near, &far] {
            stream.set_nodelay(true).unwrap();
            // So that each direction sees soon when the other has met the fault.
            stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(5))).unwrap();
        }
        let passage = Arc::new(Passage { near, far, carried: AtomicU64::new(0), over: AtomicBool::new(false) });
        for towards_far in [true, false] {
            let (shared, passage) = (Arc::clone(self), Arc::clone(&passage));
            thread::spawn(move || {
                let (from, to) =
                    if towards_far { (&passage.near, &passage.far) } else { (&passage.far, &passage.near) };
                // An error is a connection that ended by itself: the other side is to see that.
                if shared.pump(&passage, from, to).is_err() {
                    passage.over.store(true, SeqCst);
                    let _ = to.shutdown(Shutdown::Both);
                }
            });
        }
    }

    fn pump(&self, passage: &Arc<Passage>, mut from: &TcpStream, mut to: &TcpStream) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        while !passage.over.load(SeqCst) {
            let got = match from.read(&mut buffer) {
                Ok(0) => return to.shutdown(Shutdown::Write),
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                got => got?,
            };
            let carried = passage.carried.fetch_add(got as u64, SeqCst);
            let broken = carried + got as u64 > BEFORE && self.takes_a_fault();
            let mut rest = &buffer[..if broken { got / 2 } else { got }];
            while !rest.is_empty() && !passage.over.load(SeqCst) {
                match to.write(rest) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    put => rest = &rest[put?..],
                }
            }
            if broken {
                if self.fault == Fault::Silence {
                    self.silent.lock().unwrap().push(Arc::clone(passage));
                }
                // Closed without lingering once neither direction holds them any more: that is a reset.
                for stream in [&passage.near, &passage.far] {
                    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
                }
                passage.over.store(true, SeqCst);
            }
        }
        Ok(())
    }

    fn takes_a_fault(&self) -> bool {
        self.faults.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok()
    }
}

/// A peer whose memory holds pattern 1 for reads, and the key to it.
fn target(op: Op) -> (Process, SegmentDescriptor, GrantKey) {
    let mut peer = Process::spawn();
    // The owner notices silence, too: it gives such connections up on its side.
    let target = peer.start(Setup { io_timeout_ms: 1000, ..Setup::new("target", Tcp, AREA) });
    peer.fill(0, AREA, 1);
    let key = GrantKey(peer.grant(0, AREA as u64, op == Op::Write));
    (peer, target, key)
}

fn as_many_faults_as_retries_are_survived(fault: Fault) {
    for op in [Op::Read, Op::Write] {
        let (mut peer, target, key) = target(op);
        let client = engine(Config { retries: 3, io_timeout: Duration::from_secs(1), ..config(Tcp) }, AREA);
        client.write_bytes(0, &pattern(2, AREA)).unwrap();
        let proxy = Proxy::new(&target, fault, 3);
        let transfer = client.submit(batch(op, &proxy.before(&target), key, &[(0, 0, AREA as u64)]));
        let report = within_limit("the transfer", move || transfer.wait()).unwrap();
        assert_eq!((report.bytes, proxy.faults_left()), (AREA as u64, 0), "{op:?}");
        assert!(client.stats().retries > 0);
        let expected = pattern(if op == Op::Read { 1 } else { 2 }, AREA);
        assert_eq!(bytes(&client, 0, AREA), expected, "{op:?}");
        assert_eq!(peer.sum(0, AREA), client.checksum(0, AREA as u64).unwrap(), "{op:?}");
        assert_eq!(client.stats().failures.iter().map(|failure| failure.1).sum::<u64>(), 0);
    }
}

#[test]
fn connections_reset_in_mid_frame_cost_retries_and_no_byte() {
    as_many_faults_as_retries_are_survived(Fault::Reset);
}

#[test]
fn connections_that_fall_silent_in_mid_frame_cost_retries_and_no_byte() {
    as_many_faults_as_retries_are_survived(Fault::Silence);
}

#[test]
fn a_way_that_resets_every_connection_is_an_error_and_works_when_it_is_mended() {
    for op in [Op::Read, Op::Write] {
        let (mut peer, target, key) = target(op);
        let client = engine(Config { slice_bytes: 16 << 20, ..config(Tcp) }, AREA);
        let proxy = Proxy::new(&target, Fault::Reset, u64::MAX);
        let through = proxy.before(&target);
        let transfer = client.submit(batch(op, &through, key, &[(0, 0, AREA as u64)]));
        let result = within_limit("the transfer", move || transfer.wait());
        assert!(matches!(result, Err(Error::Disconnected { .. })), "{op:?}: {result:?}");
        client.write_bytes(0, &pattern(2, AREA)).unwrap(); // ours again
        thread::sleep(Duration::from_millis(50)); // for what might come, not for what must
        assert_eq!(bytes(&client, 0, AREA), pattern(2, AREA), "{op:?}: given back, and touched later");
        proxy.shared.faults.store(0, SeqCst);
        let transfer = client.submit(batch(op, &through, key, &[(0, 0, AREA as u64)]));
        within_limit("the next transfer", move || transfer.wait()).unwrap();
        assert_eq!(peer.sum(0, AREA), client.checksum(0, AREA as u64).unwrap(), "{op:?}");
    }
}
