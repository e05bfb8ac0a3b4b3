//! Settings of one engine: every field public, checked once in [`crate::Builder::build`].

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use kvasir_types::Transports;

use crate::{error::Error, tcp::MAX_PAYLOAD};

/// How an engine listens, connects, cuts and gives up. `Config::default()` serves loopback.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the tcp transport listens; port 0 takes a free one. Default `127.0.0.1:0`.
    pub tcp_bind: SocketAddr,
    /// `host` or `host:port` that peers are told to connect to; `None`: the address bound. A name without a port gets the
    /// port that was bound. Needed when `tcp_bind` is `0.0.0.0`. Several, separated by commas, are rails: a peer's
    /// connections are spread over them.
    pub tcp_advertise: Option<String>,
    /// Connections kept to each peer, 1 to 16; the slices of a large batch spread over them. Default 2: one thread
    /// copying into a socket is slower than memory, more than the cores only take turns.
    pub connections_per_peer: usize,
    /// Most connections kept to all peers together, at least 1; beyond it the one that was idle longest is closed, and if
    /// none is idle the transfer is refused as busy. Default 512.
    pub max_open_connections: usize,
    /// How often a frame is sent again after the connection under it died, each time over another connection if there is
    /// one. Default 3.
    pub retries: u32,
    /// Pause before the first retry; it doubles with each, up to a second. Default 20 ms.
    pub retry_pause: Duration,
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
    /// Threads that copy for the local and shm transports, 1 to 64. Small batches are copied by whoever submits them, and who
    /// blocks in [`crate::Transfer::wait`] helps. Default 1.
    pub copy_threads: usize,
    /// Which transports may be used. Default auto.
    pub transports: Transports,
    /// A description of this machine's devices ([`crate::Topology`], JSON) in place of the detected one: says which RDMA
    /// devices the ucx transport takes, where `ucx.net_devices` doesn't.
    pub topology: Option<PathBuf>,
    /// The shm transport.
    pub shm: ShmConfig,
    /// The ucx transport.
    pub ucx: UcxConfig,
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

/// Settings of the shm transport.
#[derive(Clone, Debug, Default)]
pub struct ShmConfig {
    /// Where its Unix socket lies: a directory that processes in several containers of one host share. `None`: a socket
    /// without a file, which processes of one network namespace can reach.
    pub dir: Option<PathBuf>,
    /// Users, besides our own, whose processes may map our memory.
    pub allowed_uids: Vec<u32>,
}

/// Settings of the ucx transport. UCX's own environment variables apply where nothing is set here.
#[derive(Clone, Debug)]
pub struct UcxConfig {
    /// Where it listens for peers; port 0 takes a free one. Default `127.0.0.1:0`. With UCX 1.13 a port that was just
    /// in use can't be had again for up to a minute.
    pub bind: SocketAddr,
    /// `host` or `host:port` that peers are told to connect to; `None`: the address bound.
    pub advertise: Option<String>,
    /// UCX's transports, as in `UCX_TLS`. `None`: all from whose lanes a peer can be kept away by closing its endpoint,
    /// that is not shared memory, `dc` and `cuda_ipc`. Where one of those is named, a peer that is stopped in the
    /// middle of an RMA write keeps a revoked grant's ranges reserved until it goes on or dies.
    pub tls: Option<String>,
    /// Its devices, as in `UCX_NET_DEVICES`; `None`: UCX's choice.
    pub net_devices: Option<String>,
    /// Whether memory is reached by RMA, without the owner's part; else bytes travel in messages that the owner checks.
    /// `None`: if this machine has an RDMA device and UCX is newer than 1.13. Both sides must agree, or messages are used.
    /// Without a device UCX only emulates RMA: slower than messages, open to every peer that can connect, and with UCX
    /// 1.13 (where it is refused) a peer's death aborts the process.
    pub rma: Option<bool>,
    /// Most writes handed to libucp at once for a peer: puts, or pieces of 64 KiB where messages are used. Default 8.
    /// What waits behind them can still be overtaken by a higher priority.
    pub max_outstanding_puts: usize,
    /// As `max_outstanding_puts`, for reads. Default 8.
    pub max_outstanding_gets: usize,
}

impl Default for UcxConfig {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            tls: None,
            net_devices: None,
            rma: None,
            max_outstanding_puts: 8,
            max_outstanding_gets: 8,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tcp_bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tcp_advertise: None,
            connections_per_peer: 2,
            max_open_connections: 512,
            retries: 3,
            retry_pause: Duration::from_millis(20),
            max_accepted_connections: 1024,
            slice_bytes: 1 << 20,
            max_inflight_bytes: 256 << 20,
            io_timeout: Duration::from_secs(10),
            fence_grace: Duration::from_millis(200),
            copy_threads: 1,
            transports: Transports::Auto,
            topology: None,
            shm: ShmConfig::default(),
            ucx: UcxConfig::default(),
            tls: None,
        }
    }
}

impl Config {
    /// Names the first setting that no engine can run with.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let bad = |setting, reason: String| Err(Error::Config { setting, reason });
        if !(4 << 10..=MAX_PAYLOAD as usize).contains(&self.slice_bytes) {
            return bad("slice_bytes", format!("{} is not in 4096 to {MAX_PAYLOAD}", self.slice_bytes));
        }
        for (setting, value, limit) in [
            ("connections_per_peer", self.connections_per_peer, 16),
            ("max_open_connections", self.max_open_connections, 65_536),
            ("max_accepted_connections", self.max_accepted_connections, 65_536),
            ("copy_threads", self.copy_threads, 64),
            ("ucx.max_outstanding_puts", self.ucx.max_outstanding_puts, 1024),
            ("ucx.max_outstanding_gets", self.ucx.max_outstanding_gets, 1024),
        ] {
            if !(1..=limit).contains(&value) {
                return bad(setting, format!("{value} is not in 1 to {limit}"));
            }
        }
        if self.io_timeout < Duration::from_millis(10) {
            return bad("io_timeout", format!("{:?} is less than 10 ms", self.io_timeout));
        }
        if let Transports::Named(named) = &self.transports {
            for (index, kind) in named.iter().enumerate() {
                if named[..index].contains(kind) {
                    return bad("transports", format!("{kind} is listed twice"));
                }
            }
            if named.is_empty() {
                return bad("transports", "must name at least one of local, shm, ucx, tcp".into());
            }
        }
        Ok(())
    }
}
