//! Notices: small messages that follow a batch's writes.
//!
//! The sender attaches one to a batch; it leaves when every byte of the batch has been acknowledged, so who receives it
//! finds the bytes in place. The owner's queue is bounded: a notice that finds it full is refused as busy, never dropped in
//! silence.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use kvasir_types::GrantKey;

use crate::error::Refusal;

/// Most bytes in a notice.
pub const MAX_NOTICE_BYTES: usize = 4096;

/// Most notices that wait to be taken.
const MAX_WAITING: usize = 4096;

/// A message that came after the writes it follows.
#[derive(Clone, PartialEq, Eq)]
pub struct Notice {
    /// The grant under which it came: its owner knows to whom it gave that.
    pub grant: GrantKey,
    /// What the sender says, at most [`MAX_NOTICE_BYTES`].
    pub bytes: Box<[u8]>,
}

impl fmt::Debug for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notice").field("bytes", &self.bytes.len()).finish()
    }
}

#[derive(Default)]
struct Inner {
    queue: VecDeque<Notice>,
    waker: Option<Waker>,
    closed: bool,
}

/// The notices that came and were not taken yet. Clones share the queue; each notice goes to one of them.
#[derive(Clone, Default)]
pub struct Notices(Arc<(Mutex<Inner>, Condvar)>);

impl fmt::Debug for Notices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notices").field("waiting", &self.lock().queue.len()).finish()
    }
}

impl Notices {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, notice: Notice) -> Result<(), Refusal> {
        let waker = {
            let mut inner = self.lock();
            if inner.queue.len() >= MAX_WAITING || inner.closed {
                return Err(Refusal::Full);
            }
            inner.queue.push_back(notice);
            self.0.1.notify_one();
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    pub(crate) fn close(&self) {
        let waker = {
            let mut inner = self.lock();
            inner.closed = true;
            self.0.1.notify_all();
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The next notice; `None` once the engine is shut down and all were taken. One task may wait at a time.
    pub fn next(&self) -> NextNotice<'_> {
        NextNotice(self)
    }

    /// The next notice, waiting for it no longer than `limit`: for threads without an executor.
    pub fn next_within(&self, limit: Duration) -> Option<Notice> {
        let until = Instant::now() + limit;
        let mut inner = self.lock();
        loop {
            if let Some(notice) = inner.queue.pop_front() {
                return Some(notice);
            }
            let left = until.saturating_duration_since(Instant::now());
            if inner.closed || left.is_zero() {
                return None;
            }
            inner = self.0.1.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Future of [`Notices::next`].
#[must_use = "futures do nothing unless polled"]
#[derive(Debug)]
pub struct NextNotice<'a>(&'a Notices);

impl Future for NextNotice<'_> {
    type Output = Option<Notice>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Notice>> {
        let mut inner = self.0.lock();
        match inner.queue.pop_front() {
            Some(notice) => Poll::Ready(Some(notice)),
            None if inner.closed => Poll::Ready(None),
            None => {
                inner.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}
