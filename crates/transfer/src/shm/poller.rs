//! The one thread that listens to all sockets of an engine's shm transport, and how messages leave.
//!
//! A handler is called when its socket has something to say, and twice a second; never under a lock of the poller, and
//! always on this thread. It must not block. Everything here is level-triggered: what a handler leaves for later is said again.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, ErrorKind},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::socket::Socket;

/// Time between two ticks: the grain of timeouts here.
const TICK: Duration = Duration::from_millis(500);
/// Messages that may wait for room in a socket; one more ends the connection.
const MAX_OUTBOX: usize = 16 << 10;
/// What wakes the thread.
const WAKE: u64 = 0;

/// Whether a socket is still of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Stay,
    Leave,
}

/// What sits behind a socket.
pub(super) trait Handler: Send + Sync {
    /// There is something to receive (or the end of it), or room to send.
    fn ready(&self) -> Next;
    /// Half a second has passed.
    fn tick(&self, now: Instant) -> Next;
    /// Whether it needs to be called when nothing happens.
    fn wants_ticks(&self) -> bool {
        true
    }
    /// Whether somebody's memory can't be given back before this socket has ended.
    fn holds_memory(&self) -> bool;
    /// The poller is done with it: it left, or the poller stopped. Called once.
    fn ended(&self);
}

/// The sockets and their handlers. Any thread adds; the one thread in [`Poller::run`] calls.
pub(super) struct Poller {
    epoll: OwnedFd,
    wake: OwnedFd,
    handlers: Mutex<Handlers>,
    next_token: AtomicU64,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Handlers {
    by_token: HashMap<u64, Arc<dyn Handler>>,
    /// The thread has ended: nobody would call another one.
    closed: bool,
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made by a call that returned it, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Poller {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        // SAFETY: makes a descriptor and touches no memory.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: as above.
        let wake = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let next_token = AtomicU64::new(WAKE + 1);
        let poller = Self { epoll, wake, handlers: Mutex::default(), next_token, stopping: AtomicBool::new(false) };
        poller.control(libc::EPOLL_CTL_ADD, poller.wake.as_raw_fd(), WAKE, libc::EPOLLIN)?;
        Ok(Arc::new(poller))
    }

    fn handlers(&self) -> MutexGuard<'_, Handlers> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self, what: i32, fd: RawFd, token: u64, interest: i32) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest as u32, u64: token };
        // SAFETY: the event is only read during the call.
        let result = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), what, fd, &mut event) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// A name for a socket that is to be added.
    fn token(&self) -> u64 {
        self.next_token.fetch_add(1, Ordering::Relaxed)
    }

    /// Begins to call `handler` for what happens on `wire`.
    pub(super) fn add(&self, wire: &Wire, handler: Arc<dyn Handler>) -> io::Result<()> {
        {
            let mut handlers = self.handlers();
            if handlers.closed {
                return Err(ErrorKind::NotConnected.into());
            }
            handlers.by_token.insert(wire.token, handler);
        }
        if let Err(error) = self.control(libc::EPOLL_CTL_ADD, wire.socket.as_raw_fd(), wire.token, libc::EPOLLIN) {
            self.handlers().by_token.remove(&wire.token);
            return Err(error);
        }
        self.wake(); // it may be waiting without a tick
        Ok(())
    }

    /// Stops calling the wire's handler; whether it still did.
    pub(super) fn remove(&self, wire: &Wire) -> bool {
        let handler = self.handlers().by_token.remove(&wire.token);
        if handler.is_some() {
            // Fails only if the socket is gone from it already.
            let _ = self.control(libc::EPOLL_CTL_DEL, wire.socket.as_raw_fd(), wire.token, 0);
        }
        handler.is_some()
    }

    fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of ours. A full counter wakes as well.
        unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Ends the thread: at once, or, while a handler holds memory, within `grace` of the call to `run` noticing.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// The thread's body; returns after [`Poller::stop`].
    pub(super) fn run(&self, grace: Duration) {
        let mut ticked = Instant::now();
        let mut stop_at = None;
        loop {
            if self.stopping.load(Ordering::SeqCst) {
                let at = *stop_at.get_or_insert_with(|| Instant::now() + grace);
                let handlers: Vec<_> = self.handlers().by_token.values().cloned().collect();
                if Instant::now() >= at || !handlers.iter().any(|handler| handler.holds_memory()) {
                    break;
                }
            }
            let wait = match (stop_at, self.handlers().by_token.values().any(|handler| handler.wants_ticks())) {
                (Some(_), _) => Some(Duration::from_millis(5)),
                (None, false) => None,
                (None, true) => Some(TICK.saturating_sub(ticked.elapsed())),
            };
            self.wait(wait);
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                let handlers: Vec<_> =
                    self.handlers().by_token.iter().map(|(token, handler)| (*token, Arc::clone(handler))).collect();
                handlers.iter().for_each(|(token, handler)| self.after(*token, handler.tick(ticked)));
            }
        }
        let handlers = {
            let mut handlers = self.handlers();
            handlers.closed = true;
            std::mem::take(&mut handlers.by_token)
        };
        handlers.values().for_each(|handler| handler.ended());
    }

    fn wait(&self, wait: Option<Duration>) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        // Rounded up: half a millisecond must not become a spin.
        let timeout = wait.map_or(-1, |wait| wait.as_millis() as i32 + 1);
        // SAFETY: the kernel writes at most as many events as there is room for.
        let count =
            unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, timeout) };
        for event in events.iter().take(usize::try_from(count).unwrap_or(0)) {
            let token = event.u64;
            if token == WAKE {
                let mut count = [0u8; 8];
                // SAFETY: eight bytes of ours.
                unsafe { libc::read(self.wake.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
                continue;
            }
            let handler = self.handlers().by_token.get(&token).cloned();
            if let Some(handler) = handler {
                self.after(token, handler.ready());
            }
        }
    }

    fn after(&self, token: u64, next: Next) {
        if next == Next::Leave {
            let handler = self.handlers().by_token.remove(&token);
            if let Some(handler) = handler {
                handler.ended();
            }
        }
    }
}

type Message = (Vec<u8>, Vec<OwnedFd>);

/// Which end of a connection a [`Wire`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Who connected: always listens, or both could wait for the other to listen.
    Client,
    /// Who was connected to: while its answers find no room, it takes no more questions.
    Owner,
}

/// A socket under a poller, with messages that wait for room.
pub(super) struct Wire {
    pub(super) socket: Socket,
    poller: Arc<Poller>,
    token: u64,
    end: End,
    outbox: Mutex<VecDeque<Message>>,
}

impl Wire {
    pub(super) fn new(socket: Socket, poller: &Arc<Poller>, end: End) -> Self {
        Self { socket, poller: Arc::clone(poller), token: poller.token(), end, outbox: Mutex::default() }
    }

    fn outbox(&self) -> MutexGuard<'_, VecDeque<Message>> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message now or as soon as there is room, in the order of the calls. Never blocks.
    pub(super) fn send(&self, message: Vec<u8>, fds: Vec<OwnedFd>) -> io::Result<()> {
        let mut outbox = self.outbox();
        if outbox.len() >= MAX_OUTBOX {
            return Err(io::Error::new(ErrorKind::TimedOut, "the other side takes nothing more"));
        }
        outbox.push_back((message, fds));
        if outbox.len() > 1 {
            return Ok(()); // behind others that wait
        }
        if Self::drain(&self.socket, &mut outbox)? {
            return Ok(());
        }
        self.interest(match self.end {
            End::Client => libc::EPOLLIN | libc::EPOLLOUT,
            End::Owner => libc::EPOLLOUT,
        })
    }

    /// Sends what waited; whether nothing waits any more.
    pub(super) fn flush(&self) -> io::Result<bool> {
        let mut outbox = self.outbox();
        if outbox.is_empty() {
            return Ok(true);
        }
        let empty = Self::drain(&self.socket, &mut outbox)?;
        if empty {
            self.interest(libc::EPOLLIN)?;
        }
        Ok(empty)
    }

    fn drain(socket: &Socket, outbox: &mut VecDeque<Message>) -> io::Result<bool> {
        while let Some((message, fds)) = outbox.front() {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match socket.send(message, &fds) {
                Ok(()) => drop(outbox.pop_front()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Waits for nothing but the next tick; the end of the connection is told all the same.
    pub(super) fn pause(&self) -> io::Result<()> {
        self.interest(0)
    }

    /// After [`Wire::pause`].
    pub(super) fn resume(&self) -> io::Result<()> {
        self.interest(libc::EPOLLIN)
    }

    fn interest(&self, interest: i32) -> io::Result<()> {
        self.poller.control(libc::EPOLL_CTL_MOD, self.socket.as_raw_fd(), self.token, interest)
    }
}
