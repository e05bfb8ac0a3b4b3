//! What other threads tell the progress thread, and how they wake it.
//!
//! The thread sleeps in poll(2) on UCX's event descriptor and on this mailbox's eventfd. A sender writes the eventfd
//! only if the thread has said that it is about to sleep, so a busy thread costs its callers no system call.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use super::messages::OpenId;
use crate::{batch::Frame, grant::InFlight, transport::Target};

/// What the progress thread is asked to do.
pub(super) enum Command {
    /// Move frames.
    Start { frames: Vec<Frame>, target: Arc<Target> },
    /// The address of a connection was looked up.
    Resolved { connection: u64, address: io::Result<SocketAddr> },
    /// Local memory is wanted back from a connection of ours: close it.
    CutClient { connection: u64 },
    /// A grant that a peer has opened is revoked: tell it, keep `in_flight` until it has left.
    Revoked { peer: u64, grant: OpenId, in_flight: InFlight },
    /// A peer did not leave in time: close its endpoint.
    CutPeer { peer: u64 },
    /// End.
    Stop,
}

/// The queue; written by every thread, taken by one.
pub(super) struct Mailbox {
    queue: Mutex<Queue>,
    /// Whether the thread is, or is about to be, asleep.
    asleep: AtomicBool,
    event: OwnedFd,
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    closed: bool,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: takes two numbers, makes a descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { queue: Mutex::default(), asleep: AtomicBool::new(false), event })
    }

    /// Queues a command and sees that the thread wakes. Once the thread has ended, the command is dropped, which fails
    /// the frames in it and lets go what is in flight.
    pub(super) fn send(&self, command: Command) {
        {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.closed {
                drop(queue);
                return drop(command);
            }
            queue.commands.push_back(command);
        }
        if self.asleep.swap(false, SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes to an eventfd of ours. It can only fail when its counter is full: then it is readable.
        unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Takes all commands; `into` must be empty and its room is reused.
    pub(super) fn take(&self, into: &mut VecDeque<Command>) {
        debug_assert!(into.is_empty());
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut queue.commands, into);
    }

    /// Announces sleep; `false` if there are commands to be taken first.
    pub(super) fn may_sleep(&self) -> bool {
        self.asleep.store(true, SeqCst);
        let empty = self.queue.lock().unwrap_or_else(PoisonError::into_inner).commands.is_empty();
        if !empty {
            self.asleep.store(false, SeqCst);
        }
        empty
    }

    /// Ends a sleep, whatever ended it.
    pub(super) fn awake(&self) {
        self.asleep.store(false, SeqCst);
        let mut count = [0u8; 8];
        // SAFETY: eight bytes from an eventfd of ours; non-blocking, so it may answer that there is nothing.
        unsafe { libc::read(self.event.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }

    /// The thread ends: what is queued and what comes later is dropped.
    pub(super) fn close(&self) {
        let commands = {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.closed = true;
            std::mem::take(&mut queue.commands)
        };
        drop(commands); // outside the lock: failing frames runs wakers
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn readable(mailbox: &Mailbox, timeout_ms: i32) -> bool {
        let mut poll = libc::pollfd { fd: mailbox.event_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid structure.
        unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
    }

    #[test]
    fn a_command_sent_to_a_sleeper_wakes_it_and_one_sent_before_keeps_it_awake() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        mailbox.send(Command::Stop);
        assert!(!readable(&mailbox, 0), "nobody slept: no system call");
        assert!(!mailbox.may_sleep());
        let mut taken = VecDeque::new();
        mailbox.take(&mut taken);
        assert_eq!(taken.len(), 1);
        assert!(mailbox.may_sleep());
        let sender = thread::spawn({
            let mailbox = Arc::clone(&mailbox);
            move || mailbox.send(Command::Stop)
        });
        assert!(readable(&mailbox, 60_000));
        mailbox.awake();
        assert!(!readable(&mailbox, 0));
        sender.join().unwrap();
    }

    #[test]
    fn what_is_sent_after_the_end_is_dropped() {
        let mailbox = Mailbox::new().unwrap();
        mailbox.send(Command::Stop);
        mailbox.close();
        mailbox.send(Command::Stop);
        let mut taken = VecDeque::new();
        mailbox.take(&mut taken);
        assert!(taken.is_empty());
    }
}
