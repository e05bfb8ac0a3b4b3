//! Connections: bounded in number, in silence and in patience.
//!
//! Around each connection is a guard that ends it when the client says nothing at the beginning, or reads nothing while
//! there is something to send: a client that stops reading would hold its places (and its worker) for ever otherwise.
//! A slow client that does read goes on until its requests' deadlines.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll, ready},
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{
        conn::auto,
        graceful::{GracefulShutdown, Watcher},
    },
    service::TowerToHyperService,
};
use kvasir_runtime::{Context, Kind};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, Sleep},
};
use tokio_rustls::TlsAcceptor;
use tracing::{Span, warn};

use crate::config::Limits;

/// After an accept that failed (no file descriptors left, say): long enough not to spin, short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Requests of one HTTP/2 connection that were given up before they were looked at, until the connection is closed: behind a
/// proxy's are many clients, who may leave together (h2's own bound is 20).
const GIVEN_UP: usize = 1024;
/// An HTTP/2 connection is asked this often whether its client lives.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// The HTTP server.
pub(crate) struct Server {
    /// Where it listens.
    pub(crate) listener: TcpListener,
    /// What it serves.
    pub(crate) routes: axum::Router,
    /// How many connections, and how patient.
    pub(crate) limits: Limits,
    /// For HTTPS.
    pub(crate) tls: Option<TlsAcceptor>,
}

impl Server {
    /// Serves until shutdown and for the notice after it, then lets requests under way finish; both within `grace`.
    pub(crate) async fn run(self, context: &Context, grace: impl Fn() -> Duration) {
        let Self { listener, routes, limits, tls } = self;
        let builder = builder(&limits);
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(limits.max_connections));
        // Who connects has not heard yet that this router leaves; who is connected hears it with the next answer (`identify`).
        let notice = || limits.notice().min(grace());
        let closing = async {
            context.shutdown.wait().await;
            tokio::time::sleep(notice()).await;
        };
        let mut closing = std::pin::pin!(closing);
        loop {
            // Losing either future loses nothing: a connection that was not accepted stays in the listener's queue.
            let accepted = tokio::select! {
                accepted = accept(&listener, &places) => accepted,
                () = &mut closing => break,
            };
            let (stream, place) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if stream.set_nodelay(true).is_err() {
                continue; // it is gone already
            }
            let guarded = Guarded::new(stream, limits.header_timeout(), limits.write_stall());
            let (builder, routes, watcher) = (builder.clone(), routes.clone(), graceful.watcher());
            let (tls, patience) = (tls.clone(), limits.header_timeout());
            context.tasks.spawn_in(Kind::Request, "http connection", Span::none(), async move {
                let _place = place;
                match tls {
                    None => serve(&builder, guarded, routes, watcher).await,
                    Some(tls) => {
                        let stream = tokio::time::timeout(patience, tls.accept(guarded)).await??;
                        serve(&builder, stream, routes, watcher).await
                    }
                }
            });
        }
        drop(listener);
        tokio::select! {
            () = graceful.shutdown() => {}
            _ = context.tasks.finish_requests(grace() - notice()) => {}
        }
    }
}

async fn serve(
    builder: &auto::Builder<TokioExecutor>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    routes: axum::Router,
    watcher: Watcher,
) -> anyhow::Result<()> {
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes)).into_owned();
    watcher.watch(connection).await.map_err(|error| anyhow::anyhow!(error))
}

fn builder(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout());
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(PING_INTERVAL).max_pending_accept_reset_streams(GIVEN_UP);
    builder
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

/// A connection that ends when its client does nothing for too long.
struct Guarded {
    stream: TcpStream,
    patience: Duration,
    /// Runs until the first byte comes: hyper's own timer begins with the protocol, which the first bytes tell.
    opening: Option<Pin<Box<Sleep>>>,
    /// Runs while there is something to send and the client does not take it.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Guarded {
    fn new(stream: TcpStream, opening: Duration, patience: Duration) -> Self {
        Self { stream, patience, opening: Some(Box::pin(tokio::time::sleep(opening))), stalled: None }
    }

    /// Passes a write's result on; the clock runs while it is pending.
    fn watch<T>(&mut self, cx: &mut TaskContext<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let until = Instant::now() + self.patience;
        let clock = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        ready!(clock.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client reads nothing")))
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        if read.is_ready() {
            this.opening = None;
        } else if let Some(clock) = &mut this.opening {
            ready!(clock.as_mut().poll(cx));
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client says nothing")));
        }
        read
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
