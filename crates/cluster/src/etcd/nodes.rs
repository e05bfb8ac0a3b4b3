//! Connections to etcd's nodes, in the clear or by TLS.
//!
//! ```text
//!   a call ──▶ the node in use ──▶ its connection (made when first used, and again whenever it is gone)
//!                 ▲ the next one, as soon as one fails
//! ```
//!
//! All calls go to one node while it answers: every node of etcd gives the same answers, and what is slow or cut off is
//! left at once. Certificates are read anew for each connection, so whatever is exchanged on disk counts from the next one on.

use std::{
    error::Error as StdError,
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use etcd_client::Channel as EtcdChannel;
use http::Uri;
use hyper_util::rt::TokioIo;
use kvasir_rpc::files;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    task::spawn_blocking,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, CertificateError, ClientConfig, RootCertStore, client::WebPkiServerVerifier, crypto::ring,
        pki_types::ServerName,
    },
};
use tonic::transport::{Channel, Endpoint};
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};

use crate::{Error, EtcdConfig, EtcdTls};

/// etcd closes connections that ping more often than every 5 s (its `--grpc-keepalive-min-time`).
const PING_INTERVAL: Duration = Duration::from_secs(6);
/// What is spoken inside of TLS.
const PROTOCOL: &[u8] = b"h2";
const ENDPOINTS: &str = "registry.etcd.endpoints";

/// All nodes. Cheap to clone; clones are the same.
#[derive(Clone)]
pub(super) struct Nodes {
    channels: Arc<[Channel]>,
    /// Counts up; the node in use is the remainder.
    used: Arc<AtomicUsize>,
}

type Request = http::Request<tonic::body::Body>;
type Response = http::Response<tonic::body::Body>;
type Answer = Pin<Box<dyn Future<Output = Result<Response, tower::BoxError>> + Send>>;

impl Nodes {
    /// Prepares the connections; nothing is sent yet. Certificates are looked at, so that one that is none is told at once.
    pub(super) async fn new(config: &EtcdConfig) -> Result<Self, Error> {
        let limit = Duration::from_millis(config.request_timeout_ms);
        if let Some(tls) = config.tls.clone() {
            show(tls).await.map_err(|(key, reason)| Error::Config { key, reason })?;
        }
        let channel = |endpoint: &String| {
            let address = address(endpoint, config.tls.is_some())?;
            let node = Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
            if node.uri().host().is_none() || node.uri().port().is_none() {
                return Err("expected `host:port`".to_owned());
            }
            let node = node
                .connect_timeout(limit)
                .tcp_nodelay(true)
                .keep_alive_while_idle(true)
                .http2_keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(limit);
            Ok(match config.tls.clone() {
                None => node.connect_lazy(),
                Some(tls) => {
                    node.connect_with_connector_lazy(tower::service_fn(move |uri| secured(tls.clone(), uri, limit)))
                }
            })
        };
        let channels = config.endpoints.iter().map(|endpoint| {
            let wrong = |reason| Error::Config { key: ENDPOINTS, reason: format!("{endpoint:?}: {reason}") };
            channel(endpoint).map_err(wrong)
        });
        let channels = channels.collect::<Result<_, _>>()?;
        // Processes begin with different nodes.
        let first = std::process::id() as usize;
        Ok(Self { channels, used: Arc::new(AtomicUsize::new(first)) })
    }

    /// As etcd's client wants it.
    pub(super) fn channel(&self) -> EtcdChannel {
        EtcdChannel::Custom(BoxCloneSyncService::new(self.clone()))
    }

    /// Which node is in use.
    pub(super) fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// That node has failed: the next one, unless somebody was faster.
    pub(super) fn leave(&self, failed: usize) {
        let _ = self.used.compare_exchange(failed, failed.wrapping_add(1), Relaxed, Relaxed);
    }
}

impl Service<Request> for Nodes {
    type Response = Response;
    type Error = tower::BoxError;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Answer {
        let node = self.channels[self.used() % self.channels.len()].clone();
        Box::pin(async move { Ok(node.oneshot(request).await?) })
    }
}

/// An endpoint without what it is called by, which must be what is configured.
fn address(endpoint: &str, tls: bool) -> Result<&str, String> {
    match (endpoint.strip_prefix("https://"), endpoint.strip_prefix("http://")) {
        (Some(_), _) if !tls => Err("https needs registry.etcd.tls".to_owned()),
        (_, Some(_)) if tls => Err("registry.etcd.tls is set, and this is http: write host:port".to_owned()),
        (Some(address), _) | (_, Some(address)) => Ok(address),
        (None, None) => Ok(endpoint),
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Connects by TLS, to speak gRPC.
async fn secured(tls: EtcdTls, uri: Uri, limit: Duration) -> io::Result<TokioIo<Box<dyn Stream>>> {
    Ok(TokioIo::new(connected(tls, uri, PROTOCOL, limit).await?))
}

/// A page of one of the nodes by HTTP, its head included, at most 16 KiB; the node is called as it is for everything else. For
/// whoever wants to know how it is: what it keeps is asked for by gRPC.
///
/// # Errors
/// It can't be reached, is not what is configured, or takes longer than `request_timeout_ms`.
pub async fn page(config: &EtcdConfig, endpoint: &str, path: &str) -> io::Result<String> {
    const MOST: u64 = 16 << 10;
    let limit = Duration::from_millis(config.request_timeout_ms);
    let address = address(endpoint, config.tls.is_some()).map_err(io::Error::other)?;
    let ask = async {
        let mut stream: Box<dyn Stream> = match config.tls.clone() {
            None => Box::new(TcpStream::connect(address).await?),
            Some(tls) => connected(tls, address.parse().map_err(io::Error::other)?, b"http/1.1", limit).await?,
        };
        stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n").as_bytes()).await?;
        let mut page = Vec::new();
        // Go's servers close TLS without a word now and then; what has come by then is the page.
        match stream.take(MOST).read_to_end(&mut page).await {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
            _ => Ok(String::from_utf8_lossy(&page).into_owned()),
        }
    };
    tokio::time::timeout(limit, ask).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Connects by TLS, to speak that.
async fn connected(tls: EtcdTls, uri: Uri, speaks: &[u8], limit: Duration) -> io::Result<Box<dyn Stream>> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = tls.server_name.clone().unwrap_or_else(|| host.clone());
    let name = ServerName::try_from(name).map_err(io::Error::other)?;
    let connecting = async {
        let stream = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(2379))).await?;
        stream.set_nodelay(true)?;
        let mut shown = show(tls).await.map_err(|(key, reason)| io::Error::other(format!("{key}: {reason}")))?;
        shown.alpn_protocols = vec![speaks.to_vec()];
        TlsConnector::from(Arc::new(shown)).connect(name, stream).await.map_err(|error| match error.kind() {
            // What a server does that hears a greeting it can't read.
            io::ErrorKind::UnexpectedEof => {
                io::Error::other(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType))
            }
            _ => error,
        })
    };
    let silent = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "no connection in time"));
    Ok(Box::new(tokio::time::timeout(limit, connecting).await.unwrap_or_else(silent)?))
}

/// What the files hold now; or which setting is wrong, and why.
async fn show(tls: EtcdTls) -> Result<ClientConfig, (&'static str, String)> {
    let read = spawn_blocking(move || read(&tls)).await;
    read.unwrap_or_else(|error| Err(("registry.etcd.tls", error.to_string())))
}

fn read(tls: &EtcdTls) -> Result<ClientConfig, (&'static str, String)> {
    const AUTHORITY: &str = "registry.etcd.tls.authority";
    const CERTIFICATE: &str = "registry.etcd.tls.certificate";
    const KEY: &str = "registry.etcd.tls.key";
    let told = |path: &Path, reason: &dyn ToString| format!("{}: {}", path.display(), reason.to_string());
    let untrusted = |reason: &dyn ToString| (AUTHORITY, told(&tls.authority, reason));
    let mut roots = RootCertStore::empty();
    for root in files::certificates(&tls.authority).map_err(|reason| untrusted(&reason))? {
        roots.add(root).map_err(|error| untrusted(&error))?;
    }
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| untrusted(&error))?
        .with_webpki_verifier(verifier.map_err(|error| untrusted(&error))?);
    let client = match (&tls.certificate, &tls.key) {
        (Some(certificate), Some(key)) => {
            let chain = files::certificates(certificate).map_err(|why| (CERTIFICATE, told(certificate, &why)))?;
            let secret = files::private_key(key).map_err(|why| (KEY, told(key, &why)))?;
            let mismatch = |error| (KEY, told(key, &format!("not the certificate's: {error}")));
            client.with_client_auth_cert(chain, secret).map_err(mismatch)?
        }
        (None, None) => client.with_no_client_auth(),
        (Some(_), None) => return Err((KEY, "not set, and the certificate is: they belong together".to_owned())),
        (None, Some(_)) => return Err((CERTIFICATE, "not set, and the key is: they belong together".to_owned())),
    };
    Ok(client)
}

/// How etcd is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spoken {
    Clear,
    /// By TLS, and whether it is shown a certificate.
    Tls {
        certificate: bool,
    },
}

/// Why a connection is not there, in words that say what to do, where it is known.
pub(super) fn explained(error: &(dyn StdError + 'static), spoken: Spoken) -> Option<String> {
    let certificate = spoken == Spoken::Tls { certificate: true };
    let mut chain = vec![error];
    let mut next = error.source();
    while let Some(source) = next.filter(|_| chain.len() < 16) {
        chain.push(source);
        next = source.source();
    }
    let ios = chain.iter().filter_map(|error| error.downcast_ref::<io::Error>());
    let inner = ios.clone().filter_map(io::Error::get_ref);
    if let Some(error) = inner.clone().find_map(|inner| inner.downcast_ref::<rustls::Error>()) {
        return Some(distrust(error, certificate));
    }
    if let Some(error) = chain.iter().find_map(|error| error.downcast_ref::<rustls::Error>()) {
        return Some(distrust(error, certificate));
    }
    if let Some(error) = ios.clone().next() {
        // In TLS 1.3 a client hears only after the handshake that it is not accepted, and HTTP/2 passes on the words alone.
        if let Some((_, alert)) = error.to_string().split_once("received fatal alert: ") {
            return Some(unwanted(alert, certificate));
        }
        let lost = matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
        return Some(if lost { format!("{error}: {}", spoken.perhaps()) } else { error.to_string() });
    }
    // Connected, and what came was no HTTP/2, or the end.
    let strange = chain.iter().any(|error| error.is::<tonic::transport::Error>());
    strange.then(|| spoken.perhaps().to_owned())
}

impl Spoken {
    /// What it may be if the connection is closed without a word (or before the word is heard).
    fn perhaps(self) -> &'static str {
        match self {
            Self::Clear => {
                "the connection was closed without a word: if etcd is to be called by TLS, set registry.etcd.tls"
            }
            Self::Tls { certificate: false } => {
                "the connection was closed without a word: if etcd wants to see a certificate, set \
                 registry.etcd.tls.certificate and key; if it is called without TLS, leave out registry.etcd.tls"
            }
            Self::Tls { certificate: true } => {
                "the connection was closed without a word: perhaps etcd does not accept this process's certificate \
                 (registry.etcd.tls.certificate); if it is called without TLS, leave out registry.etcd.tls"
            }
        }
    }
}

fn distrust(error: &rustls::Error, certificate: bool) -> String {
    use rustls::Error as Tls;
    match error {
        Tls::InvalidMessage(_) => {
            "it does not speak TLS: leave out registry.etcd.tls, or is it another port?".to_owned()
        }
        Tls::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is not from one of registry.etcd.tls.authority".to_owned()
        }
        Tls::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => {
            "its certificate does not bear the endpoint's name: set registry.etcd.tls.server_name to one that it bears"
                .to_owned()
        }
        Tls::InvalidCertificate(reason) => format!("its certificate is not accepted: {reason}"),
        Tls::AlertReceived(alert) => unwanted(&format!("{alert:?}"), certificate),
        other => format!("no TLS with it: {other}"),
    }
}

/// What etcd says of a client that it does not let in.
fn unwanted(alert: &str, certificate: bool) -> String {
    if certificate {
        format!(
            "it does not accept this process's certificate ({alert}): registry.etcd.tls.certificate must be from an authority \
             that etcd has (--trusted-ca-file), for clients, and not out of date"
        )
    } else {
        format!("it wants to see a certificate ({alert}): set registry.etcd.tls.certificate and key")
    }
}

/// Reads a password, off the async threads.
pub(super) async fn password(path: PathBuf) -> Result<String, String> {
    const MOST: u64 = 4096;
    let read = spawn_blocking(move || {
        use io::Read as _;
        let mut text = String::new();
        let file = std::fs::File::open(&path).and_then(|file| file.take(MOST + 1).read_to_string(&mut text));
        match file {
            Err(error) => Err(format!("{}: {error}", path.display())),
            Ok(_) if text.len() as u64 > MOST => Err(format!("{}: over {MOST} bytes", path.display())),
            // Editors end files with a line's end, and no password does.
            Ok(_) => Ok(text.trim_end_matches(['\r', '\n']).to_owned()),
        }
    });
    read.await.unwrap_or_else(|error| Err(error.to_string()))
}
