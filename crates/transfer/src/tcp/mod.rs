//! The tcp transport: plain sockets, straight from and into the arena.
//!
//! Read [`frame`] for what is on the wire, [`link`] for how a socket is used and cut, [`server`] for the side that owns the
//! memory, [`client`], [`lane`] and [`connection`] for the side that submits, [`tls`] for links that are encrypted. A peer
//! is **fenced** by cutting its connection on the owning side: from then on its thread takes nothing more from the socket,
//! and the grant waits until that thread has left the memory.

mod client;
mod connection;
pub(crate) mod frame;
mod handshake;
mod lane;
mod link;
mod queue;
mod server;
mod tls;

use std::{net::SocketAddr, sync::Arc};

use kvasir_types::{TransportAddress, TransportKind};

use self::{client::Client, server::Server, tls::Tls};
use crate::{
    batch::Frame,
    config::Config,
    error::Error,
    owner::Owner,
    threads::Threads,
    transport::{Target, Transport},
};

pub(crate) use self::frame::MAX_PAYLOAD;

/// Listener and lanes of one engine.
pub(crate) struct TcpTransport {
    client: Arc<Client>,
    server: Arc<Server>,
    addresses: Vec<String>,
}

impl TcpTransport {
    pub(crate) fn new(config: &Config, owner: &Arc<Owner>, threads: &Arc<Threads>) -> Result<Self, Error> {
        let tls = config.tls.as_ref().map(Tls::load).transpose()?.map(Arc::new);
        let client = Client::new(Arc::clone(threads), Arc::clone(&owner.counters), config, tls.clone());
        let server = Server::start(
            config.tcp_bind,
            Arc::clone(owner),
            Arc::clone(threads),
            config.io_timeout,
            config.max_accepted_connections,
            tls,
        )?;
        let addresses = advertised(config.tcp_advertise.as_deref(), server.bound());
        Ok(Self { client, server, addresses })
    }
}

/// What peers are told: the bound address, unless the operator names others (separated by commas), with or without a port.
pub(crate) fn advertised(wanted: Option<&str>, bound: SocketAddr) -> Vec<String> {
    let full = |wanted: &str| match (wanted.parse::<SocketAddr>(), wanted.parse::<std::net::IpAddr>()) {
        (Ok(_), _) => wanted.to_owned(),
        (_, Ok(ip)) => SocketAddr::new(ip, bound.port()).to_string(),
        _ if wanted.contains(':') => wanted.to_owned(),
        _ => format!("{wanted}:{}", bound.port()),
    };
    match wanted {
        None => vec![bound.to_string()],
        Some(list) => list.split(',').map(|wanted| full(wanted.trim())).collect(),
    }
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn addresses(&self) -> Vec<TransportAddress> {
        let address = |address: &String| TransportAddress { kind: TransportKind::Tcp, address: address.clone() };
        self.addresses.iter().map(address).collect()
    }

    fn reaches(&self, _address: &str) -> Result<(), String> {
        Ok(()) // only trying tells
    }

    fn start(&self, frames: Vec<Frame>, target: &Arc<Target>) {
        self.client.start(frames, target);
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
            (Some("10.0.0.7, node-1:5"), "10.0.0.7:4000 node-1:5"),
            (Some("10.0.0.7:5"), "10.0.0.7:5"),
            (Some("node-3"), "node-3:4000"),
            (Some("node-3:5"), "node-3:5"),
            (Some("::1"), "[::1]:4000"),
            (Some("[::1]:5"), "[::1]:5"),
        ] {
            assert_eq!(advertised(wanted, bound).join(" "), address);
        }
    }
}
