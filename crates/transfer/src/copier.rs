//! The threads that copy what is too large for the submitting thread: shared by `local` and `shm`.
//!
//! `submit` must not hold up its caller (the engine's step loop) for milliseconds, so a frame above the inline size becomes
//! a job here. One queue for all: what is more urgent goes first, among equals what came first. A frame is at most a slice,
//! so an urgent one waits for at most one slice of another on each thread. A thread that blocks for a transfer helps
//! meanwhile ([`Copier::run_one`]).

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::{error::Error, threads::Threads};

/// Copies smaller than this are done by the submitting thread: 128 KiB take about 10 µs, no more than waking another one.
pub(crate) const INLINE_BYTES: u64 = 256 << 10;

/// The same for memory of another process: a page touched for the first time costs a fault, and a decode worker's blocks are
/// mostly such pages, so that a layer's push would hold up the engine's step by more than waking a thread does.
pub(crate) const SHM_INLINE_BYTES: u64 = 32 << 10;

type Work = Box<dyn FnOnce() + Send>;

struct Job<P> {
    priority: P,
    turn: Reverse<u64>,
    work: Work,
}

impl<P: Ord> Ord for Job<P> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (&self.priority, self.turn).cmp(&(&other.priority, other.turn))
    }
}

impl<P: Ord> PartialOrd for Job<P> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<P: Ord> PartialEq for Job<P> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<P: Ord> Eq for Job<P> {}

struct Queue<P> {
    jobs: BinaryHeap<Job<P>>,
    next_turn: u64,
    /// Threads that wait for a job: waking nobody costs a system call, too.
    asleep: usize,
    stopped: bool,
}

struct Shared<P> {
    queue: Mutex<Queue<P>>,
    changed: Condvar,
}

/// Handle to the queue. Any thread adds; the copying threads take out. Its bound is the engine's bound on bytes in progress.
pub(crate) struct Copier<P>(Arc<Shared<P>>);

impl<P> Clone for Copier<P> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<P> Shared<P> {
    fn lock(&self) -> MutexGuard<'_, Queue<P>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P: Ord + Send + 'static> Copier<P> {
    /// Starts `count` threads.
    pub(crate) fn start(threads: &Threads, count: usize) -> Result<Self, Error> {
        let queue = Queue { jobs: BinaryHeap::new(), next_turn: 0, asleep: 0, stopped: false };
        let copier = Self(Arc::new(Shared { queue: Mutex::new(queue), changed: Condvar::new() }));
        for _ in 0..count {
            let copying = copier.clone();
            threads.spawn("transfer-copy", move || copying.run())?;
        }
        Ok(copier)
    }

    /// Runs `work` on a copying thread, the greatest priority first; drops it unrun if the copier has been stopped.
    pub(crate) fn push(&self, priority: P, work: impl FnOnce() + Send + 'static) {
        let mut queue = self.0.lock();
        if queue.stopped {
            drop(queue); // what the work captured may take other locks when it is dropped
            return;
        }
        let turn = Reverse(queue.next_turn);
        queue.next_turn += 1;
        queue.jobs.push(Job { priority, turn, work: Box::new(work) });
        let asleep = queue.asleep > 0;
        drop(queue);
        if asleep {
            self.0.changed.notify_one();
        }
    }

    /// Ends the threads after the copies they are at, and drops what waits.
    pub(crate) fn stop(&self) {
        let waiting = {
            let mut queue = self.0.lock();
            queue.stopped = true;
            std::mem::take(&mut queue.jobs)
        };
        drop(waiting); // outside the lock, as above
        self.0.changed.notify_all();
    }

    /// Runs the job whose turn it is, on the calling thread; whether there was one.
    pub(crate) fn run_one(&self) -> bool {
        let job = self.0.lock().jobs.pop();
        let found = job.is_some();
        if let Some(job) = job {
            (job.work)();
        }
        found
    }

    fn run(&self) {
        let mut queue = self.0.lock();
        while !queue.stopped {
            queue = match queue.jobs.pop() {
                Some(job) => {
                    drop(queue);
                    (job.work)();
                    self.0.lock()
                }
                None => {
                    queue.asleep += 1;
                    let mut queue = self.0.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    queue.asleep -= 1;
                    queue
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_urgent_goes_first_and_equals_in_their_order() {
        let threads = Threads::default();
        let copier = Copier::start(&threads, 1).unwrap();
        let (sender, receiver) = mpsc::channel();
        let (open, gate) = mpsc::channel();
        copier.push(9, move || gate.recv().unwrap()); // holds the one thread until all are queued
        for (priority, name) in [(1, "a"), (3, "b"), (2, "c"), (3, "d"), (1, "e")] {
            let sender = sender.clone();
            copier.push(priority, move || sender.send(name).unwrap());
        }
        open.send(()).unwrap();
        assert_eq!(receiver.iter().take(5).collect::<Vec<_>>(), ["b", "d", "c", "a", "e"]);
        copier.stop();
        threads.join_all();
    }

    #[test]
    fn what_waits_when_it_stops_is_dropped_unrun() {
        let threads = Threads::default();
        let copier = Copier::start(&threads, 1).unwrap();
        let (begin, begun) = mpsc::channel();
        let (open, gate) = mpsc::channel::<()>();
        copier.push(0, move || {
            begin.send(()).unwrap();
            gate.recv().unwrap();
        });
        begun.recv().unwrap();
        let (sender, receiver) = mpsc::channel::<()>();
        copier.push(0, move || sender.send(()).unwrap());
        copier.stop();
        open.send(()).unwrap();
        assert!(receiver.recv().is_err());
        let (sender, receiver) = mpsc::channel::<()>();
        copier.push(0, move || sender.send(()).unwrap());
        assert!(receiver.recv().is_err());
        threads.join_all();
    }
}
