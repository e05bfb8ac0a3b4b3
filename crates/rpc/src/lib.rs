//! How Kvasir's processes call one another: the settings of gRPC connections, in one place for all who call and are called,
//! and mutual TLS ([`Rpc`]).
//!
//! Two processes share **one** HTTP/2 connection for all that goes on between them, so whatever ends it ends thousands of
//! answers at once. h2 has guards against hostile peers that do just that (`GOAWAY`, `ENHANCE_YOUR_CALM`), set for strangers
//! with a browser's habits. Our peers are our own processes, and they do in earnest what looks hostile:
//!
//! | guard of h2 | its default | what ours do | here |
//! | --- | --- | --- | --- |
//! | calls given up before they were accepted | 20 at a time | a thousand clients leave in one moment | [`GIVEN_UP`] |
//! | frames for calls given up and forgotten; 50 are remembered, for a second | 1024 in the connection's **life** | every answer given up had tokens under way | not counted; [`GIVEN_UP`] remembered |
//! | small frames that nobody has read yet | half the connection's window, at 256 bytes each | the tokens of a hundred clients that read slowly | [`ANSWERS`], [`QUESTIONS`] |
//!
//! What belongs to one request is told by headers ([`trace`]).
//!
//! What is left to bound memory is what bounds it anyway: each stream's own window, and how many calls a service admits.
#![forbid(unsafe_code)]

mod connection;
pub mod files;
pub mod operator;
mod tls;
pub mod trace;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tonic::transport::{Channel, Endpoint, Server};

pub use connection::{Connection, Incoming};
pub use tls::{Error, TlsConfig};

use tls::Tls;

/// Calls of one connection that were given up and are kept in mind all the same, by the one who is called until it accepts
/// them and by the caller for `REMEMBERED`. More than can be read from a socket before those read are accepted (a mebibyte,
/// at some thirty bytes each); a kilobyte each at most.
pub const GIVEN_UP: usize = 1 << 16;
/// How long a caller remembers: longer than frames are under way.
const REMEMBERED: Duration = Duration::from_secs(1);
/// Bytes of all answers of a connection that the caller has not read: as many as HTTP/2 can count, as windows of streams bound
/// them. Four million tokens may wait.
pub const ANSWERS: u32 = (1 << 31) - 1;
/// Bytes of all questions of a connection that the called has not read: thirty thousand small ones may wait.
pub const QUESTIONS: u32 = 16 << 20;

/// A server of ours, without services yet.
pub fn server() -> Server {
    Server::builder()
        .http2_max_pending_accept_reset_streams(Some(GIVEN_UP))
        .http2_max_local_error_reset_streams(None)
        .initial_connection_window_size(QUESTIONS)
}

/// A server of ours to be called, at `host:port`. Nothing is connected yet.
///
/// # Errors
/// That is no address.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .tcp_nodelay(true)
        .initial_connection_window_size(ANSWERS)
        .http2_max_concurrent_reset_streams(GIVEN_UP)
        .http2_reset_stream_duration(REMEMBERED)
        .http2_max_local_error_reset_streams(None))
}

/// How this process calls others and is called: the section `rpc` of every service's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Certificates, if calls are to be encrypted and both ends to prove that they are of this cluster; the same on all of it.
    /// Default none: plain connections, to a network that is trusted.
    pub tls: Option<TlsConfig>,
}

impl Config {
    /// From the variables that services read, too: `KVASIR_RPC__TLS__CERTIFICATE`, `…__KEY`, `…__AUTHORITY` and, if it is
    /// another one, `…__SERVER_NAME`. For tools, which have no configuration files.
    ///
    /// # Errors
    /// Some of the files are named, and others not.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let names = ["CERTIFICATE", "KEY", "AUTHORITY"].map(|name| format!("KVASIR_RPC__TLS__{name}"));
        let [certificate, key, authority] = names.each_ref().map(|name| variable(name));
        let set =
            |set: bool| names.iter().zip([&certificate, &key, &authority]).find(|(_, value)| value.is_some() == set);
        Ok(Self {
            tls: match (set(true), set(false)) {
                (None, _) => None,
                (Some((one, _)), Some((other, _))) => return Err(Error::Half(one.clone(), other.clone())),
                (Some(_), None) => {
                    let [certificate, key, authority] =
                        [certificate, key, authority].map(|path| path.unwrap_or_default().into());
                    let mut tls = TlsConfig::new(certificate, key, authority);
                    if let Some(name) = variable("KVASIR_RPC__TLS__SERVER_NAME") {
                        tls.server_name = name;
                    }
                    Some(tls)
                }
            },
        })
    }
}

/// How this process calls others and is called: in the clear, or by TLS. Cheap to clone; clones are the same.
#[derive(Clone, Default)]
pub struct Rpc {
    tls: Option<Arc<Tls>>,
}

impl Rpc {
    /// As configured, and what keeps the certificates new: a future that never ends.
    ///
    /// # Errors
    /// The certificates can't be read, or are none, or do not belong together.
    pub fn open(config: &Config) -> Result<(Self, impl Future<Output = ()> + Send + 'static + use<>), Error> {
        let opened = config.tls.as_ref().map(Tls::open).transpose()?;
        let (tls, files) = opened.map(|(tls, files)| (Arc::new(tls), files)).unzip();
        let kept = tls.clone().zip(files);
        let keeping = async move {
            match kept {
                Some((tls, files)) => tls.keep(files).await,
                None => std::future::pending().await,
            }
        };
        Ok((Self { tls }, keeping))
    }

    /// Connects when first used, and again whenever the connection is gone.
    pub fn lazy(&self, endpoint: &Endpoint) -> Channel {
        match &self.tls {
            None => endpoint.connect_lazy(),
            Some(tls) => endpoint.connect_with_connector_lazy(connection::connector(Arc::clone(tls))),
        }
    }

    /// Connects now.
    ///
    /// # Errors
    /// Nobody is there, or the ends do not trust one another.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
        match &self.tls {
            None => endpoint.connect().await,
            Some(tls) => endpoint.connect_with_connector(connection::connector(Arc::clone(tls))).await,
        }
    }

    /// The connections to a listener, for a [`server`].
    pub fn incoming(&self, listener: TcpListener) -> Incoming {
        Incoming::new(listener, self.tls.clone())
    }
}

impl fmt::Debug for Rpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls.is_some() { "Rpc(tls)" } else { "Rpc(clear)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_name_all_of_the_files_or_none() {
        let of = |set: &[(&str, &str)]| {
            let find = |name: &str| {
                let name = name.strip_prefix("KVASIR_RPC__TLS__")?;
                set.iter().find(|(set, _)| *set == name).map(|(_, value)| (*value).to_owned())
            };
            Config::from_variables(find)
        };
        assert_eq!(of(&[]).unwrap(), Config::default());
        let all = [("CERTIFICATE", "c"), ("KEY", "k"), ("AUTHORITY", "a")];
        let tls = TlsConfig::new("c".into(), "k".into(), "a".into());
        assert_eq!(tls.server_name, "kvasir");
        assert_eq!(of(&all).unwrap().tls, Some(tls.clone()));
        let named = TlsConfig { server_name: "us".to_owned(), ..tls };
        assert_eq!(of(&[&all[..], &[("SERVER_NAME", "us")]].concat()).unwrap().tls, Some(named));
        let half = of(&all[..2]).unwrap_err().to_string();
        assert!(half.contains("KVASIR_RPC__TLS__CERTIFICATE is set") && half.contains("AUTHORITY is not"), "{half}");
    }
}
