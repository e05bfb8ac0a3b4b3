//! One socket that can be cut from any thread, and vectored I/O between it and raw memory.
//!
//! Sending and receiving go by `sendmsg` and `recvmsg` over addresses, not slices: the bytes may be arena memory, into which
//! no reference is ever formed. Both wait in ticks of the kernel's socket timeouts; a stretch of the wire that makes
//! no progress for `io_timeout` is given up.
//!
//! Buffer sizes are left to the kernel, which grows them as the connection needs (to several MiB). Asking for a size turns
//! that off and is clamped to `net.core.[rw]mem_max`, 208 KiB where nobody has raised it; asking for 4 MiB where it is
//! allowed made no measurable difference.
//!
//! Cutting sets a flag, then shuts the socket down both ways: a thread blocked in the kernel wakes, and one that is between
//! two calls sees the flag before its next. The flag is needed because Linux goes on delivering what has arrived on a
//! socket after it was shut down for reading.
//!
//! A header is received together with what has come behind it, up to [`AHEAD`] bytes: a small frame is one system call and a
//! copy within the first-level cache, of a large one the rest goes straight to where it belongs.
//!
//! A link may be secured (see [`super::tls`]): bytes then pass through bounded buffers on their way, and everything else
//! (ticks, timeouts, cutting) is the same.

use std::{
    io,
    os::fd::AsRawFd,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use socket2::{Socket, TcpKeepalive};

use super::tls::Secured;
use crate::grant::Cut;

/// Most bytes received beyond a header: a page of payload and its table.
const AHEAD: usize = (4 << 10) + 256;

/// Pieces of memory to send from or receive into, in order, consumed as the kernel takes them.
#[derive(Default)]
pub(crate) struct Pieces {
    pieces: Vec<libc::iovec>,
    next: usize,
}

// SAFETY: a list of addresses; what they point to is touched only in `Link::send` and `Link::receive`, whose callers answer
// for it.
unsafe impl Send for Pieces {}

impl Pieces {
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.next = 0;
    }

    /// Adds a stretch of memory, to be touched only when it is sent or received.
    pub(crate) fn push(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.pieces.push(libc::iovec { iov_base: base.cast(), iov_len: len });
        }
    }

    fn rest(&mut self) -> &mut [libc::iovec] {
        &mut self.pieces[self.next..]
    }

    fn advance(&mut self, mut done: usize) {
        while done > 0 {
            let piece = &mut self.pieces[self.next];
            let step = done.min(piece.iov_len);
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(step).cast();
            piece.iov_len -= step;
            done -= step;
            if piece.iov_len == 0 {
                self.next += 1;
            }
        }
    }
}

/// What has come behind a header and is not yet asked for, from `start` to `end`.
struct Ahead {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Ahead {
    /// Moves some of it to where the pieces say; how many bytes.
    ///
    /// # Safety
    /// The pieces' memory is mapped and writable, and nobody holds a reference into it.
    unsafe fn take(&mut self, pieces: &[libc::iovec]) -> usize {
        // SAFETY: the caller's promise; the buffer is our own.
        let taken = unsafe { scatter(&self.bytes[self.start..self.end], pieces) };
        self.start += taken;
        taken
    }
}

/// An exchange of at most so many bytes is a small one.
const SMALL_EXCHANGE: u64 = 16 << 10;
/// How long the next small exchange is looked out for.
const LOOK_OUT: Duration = Duration::from_micros(60);

/// A connected socket.
pub(crate) struct Link {
    socket: Socket,
    cut: AtomicBool,
    io_timeout: Duration,
    started: Instant,
    progress_ms: AtomicU64,
    secured: OnceLock<Secured>,
    /// Only the receiving thread uses it.
    ahead: Mutex<Ahead>,
    /// The last exchange was small: the next one is likely to follow at once.
    brisk: AtomicBool,
}

/// Which way pieces go.
#[derive(Clone, Copy)]
enum Way {
    Send,
    Receive,
}

impl Cut for Link {
    fn cut(&self) -> bool {
        let first = !self.cut.swap(true, Ordering::SeqCst);
        // Fails only if the peer has gone already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        first
    }
}

impl Link {
    /// Sets a connected socket up for bulk transfer.
    pub(crate) fn new(socket: Socket, io_timeout: Duration) -> io::Result<Arc<Self>> {
        let tick = (io_timeout / 4).clamp(Duration::from_millis(5), Duration::from_millis(2500));
        socket.set_nonblocking(false)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_read_timeout(Some(tick))?;
        socket.set_write_timeout(Some(tick))?;
        // An idle connection may last for hours; these probes find out when its peer's machine has gone.
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(30))
            .with_interval(Duration::from_secs(10))
            .with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
        let (cut, started) = (AtomicBool::new(false), Instant::now());
        let (progress_ms, secured) = (AtomicU64::new(0), OnceLock::new());
        let ahead = Mutex::new(Ahead { bytes: vec![0; AHEAD].into(), start: 0, end: 0 });
        let brisk = AtomicBool::new(false);
        Ok(Arc::new(Self { socket, cut, io_timeout, started, progress_ms, secured, ahead, brisk }))
    }

    /// From now on everything goes by TLS. Before anything is sent or received in frames, and once.
    pub(super) fn secure(&self, secured: Secured) {
        assert!(self.secured.set(secured).is_ok(), "a link is secured once");
    }

    /// Notes how much the exchange that just ended moved.
    pub(super) fn note_exchange(&self, bytes: u64) {
        self.brisk.store(bytes <= SMALL_EXCHANGE, Ordering::Relaxed);
    }

    /// After a small exchange, looks out for the next one for a moment before the thread goes to sleep: waking it takes
    /// longer than the exchange itself, several times as long on an idle machine. Others that can run are let run, and if
    /// nothing comes there is no second look.
    fn look_out(&self) {
        if !self.brisk.load(Ordering::Relaxed) || self.secured.get().is_some() {
            return;
        }
        let until = Instant::now() + LOOK_OUT;
        let mut entry = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        while Instant::now() < until && !self.is_cut() {
            // SAFETY: one entry, alive during the call, naming an open descriptor.
            if unsafe { libc::poll(&raw mut entry, 1, 0) } != 0 {
                return;
            }
            std::thread::yield_now();
        }
        self.brisk.store(false, Ordering::Relaxed);
    }

    pub(super) fn io_timeout(&self) -> Duration {
        self.io_timeout
    }

    /// The address at the other end, for people.
    pub(super) fn peer(&self) -> String {
        let address = self.socket.peer_addr().ok().and_then(|address| address.as_socket());
        address.map_or_else(|| "unknown".to_owned(), |address| address.to_string())
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// Notes that the wire moved (or that waiting begins now).
    pub(crate) fn note_progress(&self) {
        self.progress_ms.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether nothing has moved either way for the timeout.
    pub(crate) fn is_stalled(&self) -> bool {
        let last = Duration::from_millis(self.progress_ms.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last) >= self.io_timeout
    }

    /// Sends `head`, then all the pieces.
    ///
    /// # Safety
    /// The pieces' memory stays mapped until this returns.
    pub(crate) unsafe fn send(&self, head: &[u8], pieces: &mut Pieces) -> io::Result<()> {
        pieces.pieces.insert(0, libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        // SAFETY: sendmsg only reads; `head` is borrowed and the pieces are the caller's promise.
        unsafe { self.transfer(pieces, Way::Send) }
    }

    /// Sends plain bytes.
    pub(crate) fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: there are no pieces.
        unsafe { self.send(bytes, &mut Pieces::default()) }
    }

    /// Fills all the pieces.
    ///
    /// # Safety
    /// The pieces' memory stays mapped and writable until this returns, and nobody holds a reference into it.
    pub(crate) unsafe fn receive(&self, pieces: &mut Pieces) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.transfer(pieces, Way::Receive) }
    }

    /// Fills a buffer.
    pub(crate) fn receive_bytes(&self, into: &mut [u8]) -> io::Result<()> {
        let mut pieces = Pieces::default();
        pieces.push(into.as_mut_ptr(), into.len());
        // SAFETY: `into` is exclusively borrowed until this returns.
        unsafe { self.receive(&mut pieces) }
    }

    /// Fills `into` with the next header, waiting for its first byte for as long as `may_wait` says; `None` if the
    /// peer closed the connection before it.
    pub(crate) fn receive_head(&self, into: &mut [u8], may_wait: impl Fn() -> bool) -> io::Result<Option<()>> {
        let nothing_ahead = {
            let ahead = self.ahead();
            ahead.start == ahead.end
        };
        if nothing_ahead {
            self.look_out();
        }
        let first = loop {
            if self.is_cut() {
                return Err(cut_error());
            }
            match self.receive_some(into) {
                Ok(0) => return Ok(None),
                Ok(count) => break count,
                Err(error) if is_tick(&error) && may_wait() => {}
                Err(error) if is_tick(&error) => return Err(self.stall_error()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        self.note_progress();
        self.receive_bytes(&mut into[first..]).map(Some)
    }

    /// Some bytes of a header and, on a plain link, what has come behind it.
    fn receive_some(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut piece = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let mut ahead = self.ahead();
        if self.secured.get().is_some() || ahead.start < ahead.end {
            drop(ahead);
            // SAFETY: writes into `into` only, exclusively borrowed here.
            return unsafe { self.step(std::slice::from_mut(&mut piece), Way::Receive) };
        }
        let behind = libc::iovec { iov_base: ahead.bytes.as_mut_ptr().cast(), iov_len: ahead.bytes.len() };
        // SAFETY: recvmsg writes into `into` and the buffer, both exclusively borrowed here.
        let count = unsafe { call(&self.socket, &mut [piece, behind], 0, libc::recvmsg) }?;
        (ahead.start, ahead.end) = (0, count.saturating_sub(into.len()));
        Ok(count.min(into.len()))
    }

    /// Reads `bytes` bytes and throws them away.
    pub(crate) fn discard(&self, mut bytes: u64) -> io::Result<()> {
        let mut scratch = vec![0; bytes.min(64 << 10) as usize];
        while bytes > 0 {
            let step = bytes.min(scratch.len() as u64);
            self.receive_bytes(&mut scratch[..step as usize])?;
            bytes -= step;
        }
        Ok(())
    }

    /// Says that nothing more will be sent, then reads and throws away what still comes, until the peer closes or `limit`
    /// has passed. Closing with unread bytes would reset the connection and take the last answer with it.
    pub(crate) fn linger(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
        let mut scratch = [0; 64 << 10];
        while Instant::now() < until && !self.is_cut() {
            match self.receive_raw(&mut scratch) {
                Ok(0) => return,
                Err(error) if !is_tick(&error) => return,
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Sends or receives until every piece is done.
    ///
    /// # Safety
    /// As for `send` or `receive`.
    unsafe fn transfer(&self, pieces: &mut Pieces, way: Way) -> io::Result<()> {
        let mut last = Instant::now();
        while !pieces.rest().is_empty() {
            if self.is_cut() {
                return Err(cut_error());
            }
            // SAFETY: the caller's promise.
            match (unsafe { self.step(pieces.rest(), way) }, way) {
                (Ok(0), Way::Receive) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the peer in a frame"));
                }
                (Ok(done), _) => {
                    pieces.advance(done);
                    last = Instant::now();
                    self.note_progress();
                }
                (Err(error), _) if is_tick(&error) && last.elapsed() < self.io_timeout => {}
                (Err(error), _) if is_tick(&error) => return Err(self.stall_error()),
                (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => {}
                (Err(error), _) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends or receives some of the pieces' bytes and says how many. 0 means, sent: the wire has moved, no matter how far;
    /// received: the peer has closed the connection.
    ///
    /// # Safety
    /// As for `send` or `receive`.
    unsafe fn step(&self, pieces: &mut [libc::iovec], way: Way) -> io::Result<usize> {
        // SAFETY: the caller's promise; sendmsg only reads.
        unsafe {
            match (self.secured.get(), way) {
                (None, Way::Send) => call(&self.socket, pieces, libc::MSG_NOSIGNAL, send_message),
                (None, Way::Receive) => {
                    let taken = self.ahead().take(pieces);
                    if taken > 0 { Ok(taken) } else { call(&self.socket, pieces, 0, libc::recvmsg) }
                }
                (Some(secured), Way::Send) => secured.send(self, pieces),
                (Some(secured), Way::Receive) => secured.receive(self, pieces),
            }
        }
    }

    fn ahead(&self) -> MutexGuard<'_, Ahead> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One system call's worth of bytes as they are on the wire.
    pub(super) fn send_raw(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: sendmsg only reads, from a borrowed slice.
        let sent = unsafe { call(&self.socket, std::slice::from_mut(&mut piece), libc::MSG_NOSIGNAL, send_message) }?;
        self.note_progress();
        Ok(sent)
    }

    /// One system call's worth of bytes as they are on the wire; 0 if the peer has closed the connection.
    pub(super) fn receive_raw(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut piece = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        // SAFETY: recvmsg writes into `into` only, exclusively borrowed here.
        let received = unsafe { call(&self.socket, std::slice::from_mut(&mut piece), 0, libc::recvmsg) }?;
        self.note_progress();
        Ok(received)
    }

    fn stall_error(&self) -> io::Error {
        io::Error::new(io::ErrorKind::TimedOut, format!("no progress for {} ms", self.io_timeout.as_millis()))
    }
}

/// `sendmsg` with the signature of `recvmsg`.
unsafe extern "C" fn send_message(fd: libc::c_int, message: *mut libc::msghdr, flags: libc::c_int) -> libc::ssize_t {
    // SAFETY: the caller's promise; sendmsg reads only.
    unsafe { libc::sendmsg(fd, message, flags) }
}

type Syscall = unsafe extern "C" fn(libc::c_int, *mut libc::msghdr, libc::c_int) -> libc::ssize_t;

/// One `sendmsg` or `recvmsg` over `pieces`.
///
/// # Safety
/// What `syscall` does to the pieces' memory must be allowed.
unsafe fn call(socket: &Socket, pieces: &mut [libc::iovec], flags: libc::c_int, syscall: Syscall) -> io::Result<usize> {
    // SAFETY: msghdr is plain data for which all zeroes mean absent.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    // SAFETY: the header names `pieces`, alive and exclusively borrowed; their memory is the caller's promise.
    let count = unsafe { syscall(socket.as_raw_fd(), ptr::from_mut(&mut message), flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Whether the kernel's socket timeout passed: time to look around.
fn is_tick(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn cut_error() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "cut on this side")
}

/// Copies bytes to where the pieces say, as far as they reach, and says how much it was.
///
/// # Safety
/// The pieces' memory is mapped and writable, and nobody holds a reference into it.
pub(super) unsafe fn scatter(bytes: &[u8], pieces: &[libc::iovec]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let step = piece.iov_len.min(bytes.len() - done);
        // SAFETY: `step` bytes lie behind `done`, and are mapped and writable at the piece's address.
        unsafe { ptr::copy_nonoverlapping(bytes[done..].as_ptr(), piece.iov_base.cast(), step) };
        done += step;
    }
    done
}
