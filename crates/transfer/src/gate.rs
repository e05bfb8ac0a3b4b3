//! Bounded work in progress: batches beyond the limit wait their turn, higher priorities first, each in order.
//!
//! So that what is urgent finds room, batches of low priority take up no more than half of the limit, and those of high
//! priority may exceed it by half.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    batch::{BatchState, Priority},
    error::Error,
};

/// Most batches that wait; one more is refused as busy. Each waits for memory its caller holds, so this is far away.
const MAX_WAITING: usize = 65_536;

/// A batch and how to hand it to its transport.
pub(crate) struct Launch {
    pub(crate) batch: Arc<BatchState>,
    pub(crate) start: Start,
}

type Start = Box<dyn FnOnce(&Arc<BatchState>) + Send>;

#[derive(Default)]
struct Inner {
    in_progress: u64,
    waiting: [VecDeque<Launch>; Priority::COUNT],
    /// A thread is launching: it will see what changes meanwhile. Keeps launch → end → launch from recursing.
    launching: bool,
    closed: bool,
}

/// Counts the cost of batches in progress. Submitting threads add, the threads that end batches take away.
pub(crate) struct Gate {
    limit: u64,
    inner: Mutex<Inner>,
}

impl Gate {
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Launches the batch now or in its turn.
    pub(crate) fn submit(self: &Arc<Self>, launch: Launch) {
        let mut inner = self.lock();
        let queue = launch.batch.priority as usize;
        let refused = match (inner.closed, inner.waiting[queue].len() >= MAX_WAITING) {
            (true, _) => Error::Shutdown,
            (_, true) => Error::Busy { who: "this engine".into(), what: "too many transfers wait" },
            _ => {
                inner.waiting[queue].push_back(launch);
                return self.launch(inner);
            }
        };
        drop(inner);
        launch.batch.abort(refused);
    }

    /// Fails what waits and whatever comes.
    pub(crate) fn close(&self) {
        let waiting = {
            let mut inner = self.lock();
            inner.closed = true;
            std::mem::take(&mut inner.waiting)
        };
        waiting.iter().flatten().for_each(|launch| launch.batch.abort(Error::Shutdown));
    }

    fn launch<'a>(self: &'a Arc<Self>, mut inner: MutexGuard<'a, Inner>) {
        if inner.launching {
            return;
        }
        inner.launching = true;
        while let Some(queue) = (0..Priority::COUNT).rev().find(|&queue| !inner.waiting[queue].is_empty()) {
            let Some(next) = inner.waiting[queue].front() else { break };
            let cost = next.batch.cost();
            let limit = match next.batch.priority {
                Priority::Low => self.limit / 2,
                Priority::Normal => self.limit,
                Priority::High => self.limit.saturating_add(self.limit / 2),
            };
            let fits = inner.in_progress == 0 || inner.in_progress.saturating_add(cost) <= limit;
            // One that was aborted while it waited costs nothing.
            let over = next.batch.is_over();
            if !fits && !over {
                break;
            }
            let Some(Launch { batch, start }) = inner.waiting[queue].pop_front() else { break };
            if over {
                continue;
            }
            inner.in_progress += cost;
            drop(inner);
            let gate = Arc::clone(self);
            batch.on_end(move |_| {
                let mut inner = gate.lock();
                inner.in_progress -= cost;
                gate.launch(inner);
            });
            start(&batch);
            inner = self.lock();
        }
        inner.launching = false;
    }
}
