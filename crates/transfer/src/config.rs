//! Settings of one engine: every field public, checked once in [`crate::TransferEngine::new`].

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use kvasir_types::TransportKind;

/// How an engine listens, connects, cuts and gives up. `Config::default()` serves loopback.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the tcp transport listens; port 0 takes a free one. Default `127.0.0.1:0`.
    pub tcp_bind: SocketAddr,
    /// `host` or `host:port` that peers are told to connect to; `None`: the address bound. A name without a port gets the
    /// port that was bound. Needed when `tcp_bind` is `0.0.0.0`.
    pub tcp_advertise: Option<String>,
    /// Connections kept to each peer, 1 to 16; the slices of a large batch spread over them. Default 2: one thread
    /// copying into a socket is slower than memory, more than the cores only take turns.
    pub connections_per_peer: usize,
    /// Most connections accepted from peers at once; one more is refused as busy. Default 1024.
    pub max_accepted_connections: usize,
    /// Most payload bytes in one frame, 4 KiB to 16 MiB; larger batches are cut. Default 1 MiB.
    pub slice_bytes: usize,
    /// Bytes of submitted batches in progress at once; batches beyond it wait their turn in order (one batch larger
    /// than it goes alone). Default 256 MiB.
    pub max_inflight_bytes: usize,
    /// A connection with work on it but no progress for this long is given up. An idle one is not. Default 10 s.
    pub io_timeout: Duration,
    /// How long operations in progress may take to end by themselves when their grant is revoked, or their transfer
    /// cancelled, before their connection is cut. Default 200 ms.
    pub fence_grace: Duration,
    /// Transports that may be used, best first: the first one that a peer offers too is taken. Asking for one that this
    /// build lacks is an error, not a silent detour. Default local, then tcp.
    pub transports: Vec<TransportKind>,
    /// Encryption of tcp connections and proof of who is at either end; an engine with it has nothing to do with engines
    /// without. Default `None`: for networks that nobody else is on.
    pub tls: Option<TlsConfig>,
}

/// How tcp connections are secured: TLS 1.3, with certificates on both sides. Files in PEM form, read when the engine starts.
///
/// Each engine is server to some peers and client to others, so a certificate that limits its use (`extendedKeyUsage`) must
/// allow both. Whoever holds a certificate of the authority is let in: take an authority of the cluster's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// The engine's certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The authorities, one of which every peer's certificate must come from.
    pub authority: PathBuf,
    /// The name that peers' certificates must bear when this engine connects to them. `None`: the host, name or address,
    /// that it connects to.
    pub server_name: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tcp_bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tcp_advertise: None,
            connections_per_peer: 2,
            max_accepted_connections: 1024,
            slice_bytes: 1 << 20,
            max_inflight_bytes: 256 << 20,
            io_timeout: Duration::from_secs(10),
            fence_grace: Duration::from_millis(200),
            transports: vec![TransportKind::Local, TransportKind::Tcp],
            tls: None,
        }
    }
}
