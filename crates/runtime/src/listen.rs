//! Where a service listens, and where it says it does.
//!
//! A service binds one address and tells the cluster another: behind a wildcard or a name service they differ. `advertise`
//! is `host:port`, or a host alone, which gets the port that was bound.

use std::{io, net::SocketAddr};

use tokio::net::TcpListener;

/// A listener could not be had, or nobody could be told of it.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The port is taken, or the address is not this machine's.
    #[error("{key}: cannot listen on {address}")]
    Bind {
        /// The configuration's key.
        key: &'static str,
        /// The address asked for.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A wildcard address is no address to tell others.
    #[error("advertise: not set, but {key} is {address}: nobody could be told where that is")]
    Nowhere {
        /// The configuration's key.
        key: &'static str,
        /// The wildcard.
        address: SocketAddr,
    },
}

/// A bound listener.
#[derive(Debug)]
pub struct Listening {
    /// The socket.
    pub listener: TcpListener,
    /// What it is bound to, port 0 resolved.
    pub bound: SocketAddr,
    /// `host:port` that others reach it at.
    pub advertised: String,
}

impl Listening {
    /// Binds `address`, the value of the configuration's `key`.
    pub async fn bind(key: &'static str, address: SocketAddr, advertise: Option<&str>) -> Result<Self, ListenError> {
        if advertise.is_none() && address.ip().is_unspecified() {
            return Err(ListenError::Nowhere { key, address });
        }
        let failed = |source| ListenError::Bind { key, address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let advertised = advertise.map_or_else(|| bound.to_string(), |name| with_port(name, bound.port()));
        Ok(Self { listener, bound, advertised })
    }

    /// Where others reach another listener of this process, which has no `advertise` of its own: at its own address, or,
    /// if that is a wildcard, at this one's host.
    pub fn beside(&self, other: SocketAddr) -> String {
        match self.host() {
            _ if !other.ip().is_unspecified() => other.to_string(),
            ipv6 if ipv6.contains(':') => format!("[{ipv6}]:{}", other.port()),
            host => format!("{host}:{}", other.port()),
        }
    }

    /// The host that others know; an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        let host = self.advertised.rsplit_once(':').map_or(self.advertised.as_str(), |(host, _)| host);
        host.trim_start_matches('[').trim_end_matches(']')
    }
}

/// `name` with a port, if it has none: `host`, `1.2.3.4` and `[::1]` get one, `host:1` and `[::1]:1` keep theirs.
fn with_port(name: &str, port: u16) -> String {
    let has_port = name.rsplit_once(':').is_some_and(|(_, tail)| tail.parse::<u16>().is_ok());
    if has_port { name.to_owned() } else { format!("{name}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
    const WILDCARD: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

    #[tokio::test]
    async fn what_is_bound_is_what_is_told_unless_there_is_another_name() {
        let here = Listening::bind("listen", LOOPBACK, None).await.unwrap();
        assert_eq!(here.advertised, here.bound.to_string());
        let named = Listening::bind("listen", WILDCARD, Some("worker-0.kvasir")).await.unwrap();
        assert_eq!(named.advertised, format!("worker-0.kvasir:{}", named.bound.port()));
        let mapped = Listening::bind("listen", WILDCARD, Some("[::1]:7000")).await.unwrap();
        assert_eq!((mapped.advertised.as_str(), mapped.host()), ("[::1]:7000", "::1"));
        assert_eq!(mapped.beside("0.0.0.0:9".parse().unwrap()), "[::1]:9");
        assert_eq!(mapped.beside("127.0.0.1:9".parse().unwrap()), "127.0.0.1:9");
    }

    #[tokio::test]
    async fn a_taken_port_and_a_wildcard_without_a_name_are_refused_by_key() {
        let taken = Listening::bind("listen", LOOPBACK, None).await.unwrap();
        let error = Listening::bind("listen", taken.bound, None).await.unwrap_err();
        assert_eq!(error.to_string(), format!("listen: cannot listen on {}", taken.bound));
        let error = Listening::bind("listen", WILDCARD, None).await.unwrap_err();
        assert!(error.to_string().starts_with("advertise: not set, but listen is 0.0.0.0:0"), "{error}");
    }
}
