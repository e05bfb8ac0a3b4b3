//! The tcp transport: plain sockets, straight from and into the arena.
//!
//! Read [`frame`] for what is on the wire, [`link`] for how a socket is used and cut, [`server`] for the side that owns the
//! memory, [`client`] and [`connection`] for the side that submits, [`tls`] for links that are
//! encrypted. A peer is **fenced** by cutting its connection on
//! the owning side: from then on its thread takes nothing more from the socket, and the grant waits until that thread has
//! left the memory.

mod client;
mod connection;
pub(crate) mod frame;
mod link;
mod server;
mod tls;

use std::{net::SocketAddr, sync::Arc};

use kvasir_types::{SegmentDescriptor, TransportAddress, TransportKind};

use self::{client::Client, server::Server, tls::Tls};
use crate::{batch::BatchState, config::Config, error::Error, owner::Owner, threads::Threads, transport::Transport};

pub(crate) use self::frame::MAX_PAYLOAD;

/// Listener and lanes of one engine.
pub(crate) struct TcpTransport {
    client: Arc<Client>,
    server: Arc<Server>,
    address: String,
}

impl TcpTransport {
    pub(crate) fn new(config: &Config, owner: &Arc<Owner>, threads: &Arc<Threads>) -> Result<Self, Error> {
        let tls = config.tls.as_ref().map(Tls::load).transpose()?.map(Arc::new);
        let client = Client::new(
            Arc::clone(threads),
            Arc::clone(&owner.counters),
            config.io_timeout,
            config.connections_per_peer,
            tls.clone(),
        );
        let server = Server::start(
            config.tcp_bind,
            Arc::clone(owner),
            Arc::clone(threads),
            config.io_timeout,
            config.max_accepted_connections,
            tls,
        )?;
        let address = advertised(config.tcp_advertise.as_deref(), server.bound());
        Ok(Self { client, server, address })
    }
}

/// What peers are told: the bound address, unless the operator names another host or port.
fn advertised(wanted: Option<&str>, bound: SocketAddr) -> String {
    match wanted {
        None => bound.to_string(),
        Some(address) if address.parse::<SocketAddr>().is_ok() => address.to_owned(),
        Some(host) => match host.parse::<std::net::IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, bound.port()).to_string(),
            Err(_) if host.contains(':') => host.to_owned(),
            Err(_) => format!("{host}:{}", bound.port()),
        },
    }
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn address(&self) -> TransportAddress {
        TransportAddress { kind: TransportKind::Tcp, address: self.address.clone() }
    }

    fn reaches(&self, _address: &str) -> bool {
        true // only trying tells
    }

    fn start(&self, batch: &Arc<BatchState>, target: &SegmentDescriptor, address: &str) {
        self.client.start(batch, target, address);
    }

    fn shutdown(&self) {
        self.client.shutdown();
        self.server.shutdown();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advertised_address_has_a_port() {
        let bound = "127.0.0.1:4000".parse().unwrap();
        for (wanted, address) in [
            (None, "127.0.0.1:4000"),
            (Some("10.0.0.7"), "10.0.0.7:4000"),
            (Some("10.0.0.7:5"), "10.0.0.7:5"),
            (Some("node-3"), "node-3:4000"),
            (Some("node-3:5"), "node-3:5"),
            (Some("::1"), "[::1]:4000"),
            (Some("[::1]:5"), "[::1]:5"),
        ] {
            assert_eq!(advertised(wanted, bound), address);
        }
    }
}
