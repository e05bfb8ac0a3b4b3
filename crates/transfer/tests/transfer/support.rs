//! Engines in pairs, short batches, a hand-driven peer, and waiting with a limit.

use std::{
    cell::Cell,
    io::{Read, Write},
    net::TcpStream,
    pin::pin,
    sync::{Arc, mpsc},
    task::{Context, Poll, Wake, Waker},
    thread,
    time::{Duration, Instant},
};

use kvasir_transfer::{
    Access, Batch, Config, Grant, GrantRange, LocalNet, Op, Range, TransferEngine, Transports, UcxConfig,
};
use kvasir_types::{Deadline, GrantKey, PROTOCOL_VERSION, SegmentDescriptor, TransportKind};

pub const MIB: usize = 1 << 20;
/// Longer than anything here takes on a busy machine.
pub const LONG: Duration = Duration::from_secs(30);

thread_local! {
    /// Whether engines made with [`config`] on this thread use RMA, where they are of the ucx transport.
    pub static RMA: Cell<bool> = const { Cell::new(false) };
}

pub fn config(transport: TransportKind) -> Config {
    Config {
        transports: Transports::Named(vec![transport]),
        fence_grace: Duration::from_millis(50),
        tls: crate::tls::wanted(),
        // On a machine of any kind: loopback sockets, which also are lanes that can be fenced.
        ucx: UcxConfig {
            tls: Some("tcp".into()),
            net_devices: Some("lo".into()),
            rma: Some(RMA.get()),
            ..UcxConfig::default()
        },
        ..Config::default()
    }
}

pub fn engine(config: Config, capacity: usize) -> TransferEngine {
    TransferEngine::new(config, LocalNet::new(), capacity).unwrap()
}

/// A client and an owner that reach one another over `transport` only.
pub fn pair(transport: TransportKind, capacity: usize) -> (TransferEngine, TransferEngine) {
    let net = LocalNet::new();
    let new = || TransferEngine::new(config(transport), net.clone(), capacity).unwrap();
    (new(), new())
}

pub fn grant(engine: &TransferEngine, offset: u64, len: u64, access: Access) -> Grant {
    engine.grant(vec![GrantRange { offset, len, access }]).unwrap()
}

pub fn batch(op: Op, target: &SegmentDescriptor, grant: GrantKey, ranges: &[(u64, u64, u64)]) -> Batch {
    let ranges = ranges.iter().map(|&(local, remote, len)| Range { local, remote, len }).collect();
    Batch::new(op, target.clone(), grant, ranges, Deadline::after(LONG))
}

/// Bytes that tell where they belong, different for each seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state >> 8).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn bytes(engine: &TransferEngine, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    engine.read_bytes(offset, &mut bytes).unwrap();
    bytes
}

pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `body` on a thread and fails if it takes for ever.
pub fn within_limit<T: Send + 'static>(what: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || drop(sender.send(body())));
    receiver.recv_timeout(LONG).unwrap_or_else(|_| panic!("{what} did not end"))
}

/// A minimal executor: the futures need no particular one.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// The wire format by hand: these bytes are the protocol, written down a second time on purpose.
pub struct RawPeer(pub TcpStream);

impl RawPeer {
    pub fn connect(target: &SegmentDescriptor) -> Self {
        let stream = TcpStream::connect(&target.transports[0].address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Self(stream)
    }

    /// Connected and welcomed.
    pub fn welcomed(target: &SegmentDescriptor) -> Self {
        let mut peer = Self::connect(target);
        assert_eq!(peer.hello(PROTOCOL_VERSION, target.segment.0, target.incarnation.0), 0);
        peer
    }

    /// The verdict on a hello.
    pub fn hello(&mut self, version: u32, segment: u64, incarnation: u64) -> u32 {
        let mut hello = b"kvasirTX".to_vec();
        hello.extend_from_slice(&version.to_le_bytes());
        hello.extend_from_slice(&[0; 4]);
        hello.extend_from_slice(&segment.to_le_bytes());
        hello.extend_from_slice(&incarnation.to_le_bytes());
        self.0.write_all(&hello).unwrap();
        self.verdict()
    }

    pub fn verdict(&mut self) -> u32 {
        let mut welcome = [0; 16];
        self.0.read_exact(&mut welcome).unwrap();
        assert_eq!(&welcome[..8], b"kvasirRX");
        assert_eq!(welcome[8..12], PROTOCOL_VERSION.to_le_bytes());
        u32::from_le_bytes(welcome[12..].try_into().unwrap())
    }

    /// A request's header and table, without payload. `op`: 0 read, 1 write.
    pub fn request(&mut self, op: u8, id: u64, key: GrantKey, ranges: &[(u64, u32)]) {
        let payload: u32 = ranges.iter().map(|range| range.1).sum();
        let mut bytes = vec![op, 0];
        bytes.extend_from_slice(&(ranges.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&payload.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
        bytes.extend_from_slice(&key.0.to_le_bytes());
        for (offset, len) in ranges {
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
        }
        self.0.write_all(&bytes).unwrap();
    }

    /// Status, payload length and id of the next answer.
    pub fn answer(&mut self) -> (u8, u32, u64) {
        let mut bytes = [0; 16];
        self.0.read_exact(&mut bytes).unwrap();
        let payload = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        (bytes[0], payload, u64::from_le_bytes(bytes[8..].try_into().unwrap()))
    }

    /// Whether the other side closes without another byte.
    pub fn is_closed(&mut self) -> bool {
        !matches!(self.0.read(&mut [0; 1]), Ok(1..))
    }
}
