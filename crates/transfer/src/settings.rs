//! The `transfer` section of a service's configuration: what an operator can set, and the [`Config`] that comes of it.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use kvasir_types::Transports;
use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, ShmConfig, TlsConfig, UcxConfig},
    memory::{Allocation, HugePages},
};

/// Moving KV blocks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where the tcp transport listens. Default 127.0.0.1:0.
    pub listen: SocketAddr,
    /// `host:port`, or a host alone, that others reach it at; several, with commas between them, are rails that a peer's
    /// connections are spread over. Default: the address it listens on; for a wildcard, the host at which the gRPC server is
    /// reached.
    pub advertise: Option<String>,
    /// Transports that may be used: `auto`, one name, or a list, best first, of local, shm, ucx, tcp. Default auto.
    pub transports: Transports,
    /// Connections to each peer. Default 2.
    pub connections_per_peer: usize,
    /// Connections to all peers together. Default 512.
    pub max_open_connections: usize,
    /// Connections accepted from peers. Default 1024.
    pub max_accepted_connections: usize,
    /// Largest piece that is sent at once, in bytes. Default 1048576.
    pub slice_bytes: usize,
    /// Bytes that may be on their way at once; more wait their turn. Default 268435456.
    pub max_inflight_bytes: usize,
    /// How often a piece is sent again when its connection died. Default 3.
    pub retries: u32,
    /// A connection with work on it but no progress for so long is given up, in milliseconds. Default 10000.
    pub io_timeout_ms: u64,
    /// How long operations may take to end by themselves when their request is over, before their connection is cut, in
    /// milliseconds. Default 200.
    pub fence_grace_ms: u64,
    /// Huge pages for the memory of KV blocks: never, try or require. Default try.
    pub huge_pages: Pages,
    /// The NUMA node whose memory is preferred for them. Default: the kernel's choice.
    pub numa_node: Option<u32>,
    /// Certificates, if connections of the tcp transport are to be encrypted and both ends to prove who they are. Default
    /// none: plain connections, to a network that is trusted.
    pub tls: Option<TlsSettings>,
    /// A file that describes this machine's network devices and which memory prefers which, as `kvasir-transfer-bench
    /// topology --output json` prints it. Default: what is detected.
    pub topology: Option<PathBuf>,
    /// Copies within the host.
    pub shm: ShmSettings,
    /// libucp.
    pub ucx: UcxSettings,
}

/// Whether huge pages are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// Pages of the ordinary size.
    Never,
    /// Where the kernel gives them.
    #[default]
    Try,
    /// From the reserved pool, or the service does not start.
    Require,
}

/// Encryption and authentication of the tcp transport. Files are PEM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// This process's certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The authorities, one of which every peer's certificate must come from.
    pub authority: PathBuf,
    /// The name that peers' certificates must bear. Default: the host, name or address, that is connected to.
    #[serde(default)]
    pub server_name: Option<String>,
}

/// The shm transport.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShmSettings {
    /// A directory that the containers of one host share, for its socket. Default: a socket without a file, within one
    /// network namespace.
    pub dir: Option<PathBuf>,
    /// Users, besides our own, whose processes may map this one's KV blocks. Default none.
    pub allowed_uids: Vec<u32>,
    /// Threads that copy large pieces. Default 1.
    pub copy_threads: Option<usize>,
}

/// The ucx transport.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UcxSettings {
    /// Where it listens. Default: the host of `transfer.listen`, a free port.
    pub listen: Option<SocketAddr>,
    /// `host:port`, or a host alone, that others reach it at. Default as for `transfer.advertise`.
    pub advertise: Option<String>,
    /// UCX's transports, as in UCX_TLS. Default: UCX's choice.
    pub tls: Option<String>,
    /// Its devices, as in UCX_NET_DEVICES. Default: UCX's choice.
    pub net_devices: Option<String>,
    /// Whether memory is reached by RMA; else blocks travel in messages that their owner checks. Default: where this
    /// machine has an RDMA device and libucp is newer than 1.13.
    pub rma: Option<bool>,
}

impl Default for Settings {
    fn default() -> Self {
        let config = Config::default();
        Self {
            listen: config.tcp_bind,
            advertise: None,
            transports: config.transports,
            connections_per_peer: config.connections_per_peer,
            max_open_connections: config.max_open_connections,
            max_accepted_connections: config.max_accepted_connections,
            slice_bytes: config.slice_bytes,
            max_inflight_bytes: config.max_inflight_bytes,
            retries: config.retries,
            io_timeout_ms: config.io_timeout.as_millis() as u64,
            fence_grace_ms: config.fence_grace.as_millis() as u64,
            huge_pages: Pages::default(),
            numa_node: None,
            tls: None,
            topology: None,
            shm: ShmSettings::default(),
            ucx: UcxSettings::default(),
        }
    }
}

impl Settings {
    /// The engine's configuration; `reachable` is the host at which others find this process.
    pub fn config(&self, reachable: &str) -> Config {
        // A wildcard is no address to tell others: they find it where they find the rest of this process.
        let elsewhere = |listen: SocketAddr| listen.ip().is_unspecified().then(|| reachable.to_owned());
        let defaults = Config::default();
        let ucx_listen = self.ucx.listen.unwrap_or_else(|| SocketAddr::new(self.listen.ip(), 0));
        Config {
            tcp_bind: self.listen,
            tcp_advertise: self.advertise.clone().or_else(|| elsewhere(self.listen)),
            connections_per_peer: self.connections_per_peer,
            max_open_connections: self.max_open_connections,
            max_accepted_connections: self.max_accepted_connections,
            slice_bytes: self.slice_bytes,
            max_inflight_bytes: self.max_inflight_bytes,
            retries: self.retries,
            io_timeout: Duration::from_millis(self.io_timeout_ms),
            fence_grace: Duration::from_millis(self.fence_grace_ms),
            copy_threads: self.shm.copy_threads.unwrap_or(defaults.copy_threads),
            transports: self.transports.clone(),
            tls: self.tls.as_ref().map(|tls| TlsConfig {
                certificate: tls.certificate.clone(),
                key: tls.key.clone(),
                authority: tls.authority.clone(),
                server_name: tls.server_name.clone(),
            }),
            topology: self.topology.clone(),
            shm: ShmConfig { dir: self.shm.dir.clone(), allowed_uids: self.shm.allowed_uids.clone() },
            ucx: UcxConfig {
                bind: ucx_listen,
                advertise: self.ucx.advertise.clone().or_else(|| elsewhere(ucx_listen)),
                tls: self.ucx.tls.clone(),
                net_devices: self.ucx.net_devices.clone(),
                rma: self.ucx.rma,
                ..defaults.ucx
            },
            ..defaults
        }
    }

    /// Memory for KV blocks.
    pub fn arena(&self, bytes: usize) -> Allocation {
        let huge_pages = match self.huge_pages {
            Pages::Never => HugePages::Never,
            Pages::Try => HugePages::Try,
            Pages::Require => HugePages::Require,
        };
        Allocation { bytes, huge_pages, numa_node: self.numa_node }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_is_advertised_as_the_host_where_the_process_is_reached() {
        let settings = Settings { listen: "0.0.0.0:7000".parse().unwrap(), ..Settings::default() };
        let config = settings.config("node-7");
        assert_eq!(config.tcp_advertise.as_deref(), Some("node-7"));
        assert_eq!(config.ucx.bind, "0.0.0.0:0".parse().unwrap());
        assert_eq!(config.ucx.advertise.as_deref(), Some("node-7"));
        let loopback = Settings::default().config("node-7");
        assert_eq!((loopback.tcp_advertise, loopback.ucx.advertise), (None, None));
    }
}
