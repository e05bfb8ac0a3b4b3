//! Connections: made for those who call, accepted for those who are called; in the clear or by TLS.
//!
//! ```text
//! connect:  address ─▶ TCP ─────────────▶ TLS as client, the cluster's name is expected ─▶ HTTP/2 (tonic)
//! accept:   TCP ─▶ first byte: TLS? ─ yes ─▶ TLS as server, a certificate is demanded ───▶ HTTP/2 (tonic)
//!                                    └ no ──▶ told in HTTP/2's own words to use TLS, and closed
//! ```
//!
//! Handshakes are bounded in number and time, and go on beside one another: one who connects and says nothing keeps nobody
//! else out.

use std::{
    fmt,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream::FuturesUnordered};
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{Instant, Sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tonic::transport::server::Connected;
use tower::Service;

use crate::{
    operator::Peer,
    tls::{Tls, explained},
};

/// Handshakes at a time; who comes then waits to be accepted.
const HANDSHAKES: usize = 256;
/// For one handshake.
const PATIENCE: Duration = Duration::from_secs(10);
/// After an accept that failed (no file descriptors left, say): long enough not to spin, short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Between two lines in the log about callers that were turned away: who misconfigured something sees it, who tries on and on
/// does not fill the disk.
const TELL: Duration = Duration::from_secs(10);
/// How a TLS handshake begins.
const TLS_RECORD: u8 = 0x16;

/// One connection.
pub struct Connection(Inner);

enum Inner {
    Clear(TcpStream),
    Secured(Box<TlsStream<TcpStream>>),
}

/// What tonic connects with.
pub(crate) fn connector(
    tls: Arc<Tls>,
) -> impl Service<Uri, Response = TokioIo<Connection>, Error = io::Error, Future: Send> + Send + 'static {
    tower::service_fn(move |uri| connect(Arc::clone(&tls), uri))
}

async fn connect(tls: Arc<Tls>, uri: Uri) -> io::Result<TokioIo<Connection>> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(80))).await?;
    stream.set_nodelay(true)?;
    let connector = TlsConnector::from(tls.shown().client);
    let secured = connector.connect(tls.name().clone(), stream).await.map_err(explained)?;
    Ok(TokioIo::new(Connection(Inner::Secured(Box::new(secured.into())))))
}

/// The connections to a listener.
pub struct Incoming {
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    handshakes: FuturesUnordered<Pin<Box<dyn Future<Output = Handshake> + Send>>>,
    pause: Pin<Box<Sleep>>,
    told: Option<Instant>,
    turned_away: u64,
}

type Handshake = (SocketAddr, io::Result<Connection>);

impl Incoming {
    pub(crate) fn new(listener: TcpListener, tls: Option<Arc<Tls>>) -> Self {
        let pause = Box::pin(tokio::time::sleep(Duration::ZERO));
        Self { listener, tls, handshakes: FuturesUnordered::new(), pause, told: None, turned_away: 0 }
    }

    fn turned_away(&mut self, caller: SocketAddr, error: &io::Error) {
        self.turned_away += 1;
        if self.told.is_none_or(|told| told.elapsed() >= TELL) {
            self.told = Some(Instant::now());
            tracing::warn!(%caller, %error, in_all = self.turned_away, "a caller was turned away");
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            match this.handshakes.poll_next_unpin(cx) {
                Poll::Ready(Some((_, Ok(connection)))) => return Poll::Ready(Some(Ok(connection))),
                Poll::Ready(Some((caller, Err(error)))) => {
                    this.turned_away(caller, &error);
                    continue;
                }
                Poll::Ready(None) | Poll::Pending => {}
            }
            if this.handshakes.len() >= HANDSHAKES {
                return Poll::Pending;
            }
            ready!(this.pause.as_mut().poll(cx));
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, caller)) => {
                    if stream.set_nodelay(true).is_err() {
                        continue; // it is gone already
                    }
                    match &this.tls {
                        None => return Poll::Ready(Some(Ok(Connection(Inner::Clear(stream))))),
                        Some(tls) => {
                            let accepting = accept(Arc::clone(tls), stream);
                            this.handshakes.push(Box::pin(async move { (caller, accepting.await) }));
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    this.pause.as_mut().reset(Instant::now() + ACCEPT_PAUSE);
                }
            }
        }
    }
}

async fn accept(tls: Arc<Tls>, mut stream: TcpStream) -> io::Result<Connection> {
    let handshake = async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if first[0] != TLS_RECORD {
            use_tls(&mut stream).await?;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not speak TLS: rpc.tls must be set there"));
        }
        let secured = TlsAcceptor::from(tls.shown().server).accept(stream).await.map_err(explained)?;
        Ok(Connection(Inner::Secured(Box::new(secured.into()))))
    };
    let silent = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "no handshake in time"));
    timeout(PATIENCE, handshake).await.unwrap_or_else(silent)
}

/// Tells a client that speaks HTTP/2 in the clear what to do: settings, which must be first, and `GOAWAY` with the reason.
async fn use_tls(stream: &mut TcpStream) -> io::Result<()> {
    const WHY: &[u8] = b"this service takes calls by TLS only: set rpc.tls";
    const INADEQUATE_SECURITY: u8 = 0xc;
    let mut frames = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    frames.extend_from_slice(&[0, 0, 8 + WHY.len() as u8, 7, 0, 0, 0, 0, 0]);
    frames.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, INADEQUATE_SECURITY]);
    frames.extend_from_slice(WHY);
    stream.write_all(&frames).await?;
    stream.shutdown().await?;
    // What it has sent is read first: bytes that nobody reads would have the answer thrown away at its side.
    let mut rest = [0; 4096];
    let mut most = 64;
    while most > 0 && stream.read(&mut rest).await? > 0 {
        most -= 1;
    }
    Ok(())
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let address = match &self.0 {
            Inner::Clear(stream) => stream.peer_addr(),
            Inner::Secured(stream) => stream.get_ref().0.peer_addr(),
        };
        Peer(address.ok())
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Inner::Clear(_) => "Connection(clear)",
            Inner::Secured(_) => "Connection(secured)",
        })
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::Clear(stream) => Pin::new(stream).poll_read(cx, buf),
            // In TLS 1.3 a client hears only now, as an alert, that the server has not accepted it.
            Inner::Secured(stream) => Pin::new(stream).poll_read(cx, buf).map_err(explained),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Inner::Clear(stream) => Pin::new(stream).poll_write(cx, bytes),
            Inner::Secured(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Inner::Clear(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Inner::Secured(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.0 {
            Inner::Clear(stream) => stream.is_write_vectored(),
            Inner::Secured(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::Clear(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Secured(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::Clear(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Secured(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
