//! Frames that wait for a lane: those of higher priority first, each priority in order.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::connection::Job;
use crate::batch::Priority;

#[derive(Default)]
struct Inner {
    waiting: [VecDeque<Arc<Job>>; Priority::COUNT],
    closed: bool,
    /// The lane's thread is to look whether its connection is alive.
    look: bool,
}

/// What came out of a queue.
pub(super) enum Next {
    Job(Arc<Job>),
    /// Nothing came in time, or nothing is there and the connection was lost.
    Idle,
    Closed,
}

/// Any thread puts in, the lane's thread takes out.
#[derive(Default)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the job back if the queue is closed; dropping it fails its frame.
    #[must_use]
    pub(super) fn push(&self, job: Arc<Job>) -> Option<Arc<Job>> {
        let mut inner = self.lock();
        if inner.closed {
            return Some(job);
        }
        inner.waiting[job.frame.batch().priority as usize].push_back(job);
        drop(inner);
        self.changed.notify_one();
        None
    }

    /// The next frame, waiting for one no longer than `limit`.
    pub(super) fn pop(&self, limit: Duration) -> Next {
        let until = Instant::now() + limit;
        let mut inner = self.lock();
        loop {
            if inner.closed {
                return Next::Closed;
            }
            if let Some(job) = inner.waiting.iter_mut().rev().find_map(VecDeque::pop_front) {
                return Next::Job(job);
            }
            let left = until.saturating_duration_since(Instant::now());
            if std::mem::take(&mut inner.look) || left.is_zero() {
                return Next::Idle;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has the lane's thread, when nothing waits, look at its connection.
    pub(super) fn look(&self) {
        self.lock().look = true;
        self.changed.notify_one();
    }

    /// Everything that waits.
    pub(super) fn take_all(&self) -> Vec<Arc<Job>> {
        self.lock().waiting.iter_mut().rev().flat_map(std::mem::take).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().waiting.iter().all(VecDeque::is_empty)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Wakes the lane's thread for the last time.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Sleeps, unless the queue is closed first.
    pub(super) fn pause(&self, length: Duration) {
        let until = Instant::now() + length;
        let mut inner = self.lock();
        while !inner.closed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
