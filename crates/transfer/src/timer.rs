//! One thread that does small things later: deadlines of batches, the end of a fence's grace.
//!
//! What runs here must be short and must not block: it aborts a batch or shuts a socket down. Most deadlines never come,
//! because what they are for is over before: such entries are swept out now and then, or a busy engine would collect those
//! of half a minute.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fmt,
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    time::Instant,
};

/// Entries below which no sweep is worth its time.
const SWEEP_FROM: usize = 1024;

/// Something with a deadline. It is forgotten when nobody else holds it any more.
pub(crate) trait Expire: Send + Sync {
    /// The deadline has passed.
    fn expire(self: Arc<Self>);
}

enum Action {
    Run(Box<dyn FnOnce() + Send>),
    Expire(Weak<dyn Expire>),
}

impl Action {
    fn run(self) {
        match self {
            Self::Run(action) => action(),
            Self::Expire(weak) => {
                if let Some(expired) = weak.upgrade() {
                    expired.expire();
                }
            }
        }
    }

    fn is_pending(&self) -> bool {
        match self {
            Self::Run(_) => true,
            Self::Expire(weak) => weak.strong_count() > 0,
        }
    }
}

struct Entry {
    at: Instant,
    action: Action,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

#[derive(Default)]
struct Queue {
    entries: BinaryHeap<Reverse<Entry>>,
    /// How many entries there were after the last sweep.
    swept: usize,
    stopped: bool,
}

/// Handle to the timer thread's queue. Any thread adds; the one thread in [`Timer::run`] takes out.
#[derive(Clone, Default)]
pub(crate) struct Timer(Arc<(Mutex<Queue>, Condvar)>);

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Timer")
    }
}

impl Timer {
    /// Runs `action` on the timer thread once `at` has come; never, if the timer is stopped first.
    pub(crate) fn at(&self, at: Instant, action: impl FnOnce() + Send + 'static) {
        self.add(at, Action::Run(Box::new(action)));
    }

    /// Expires `what` on the timer thread once `at` has come, if anybody holds it then.
    pub(crate) fn deadline(&self, at: Instant, what: Weak<dyn Expire>) {
        self.add(at, Action::Expire(what));
    }

    fn add(&self, at: Instant, action: Action) {
        let (queue, changed) = &*self.0;
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.stopped {
            return;
        }
        if queue.entries.len() >= SWEEP_FROM.max(2 * queue.swept) {
            queue.entries.retain(|Reverse(entry)| entry.action.is_pending());
            queue.swept = queue.entries.len();
        }
        let earliest = queue.entries.peek().is_none_or(|Reverse(first)| at < first.at);
        queue.entries.push(Reverse(Entry { at, action }));
        if earliest {
            changed.notify_one();
        }
    }

    /// The thread's body; returns after [`Timer::stop`].
    pub(crate) fn run(&self) {
        let (queue, changed) = &*self.0;
        let mut guard = queue.lock().unwrap_or_else(PoisonError::into_inner);
        while !guard.stopped {
            let now = Instant::now();
            let wait = guard.entries.peek().map(|Reverse(first)| first.at.saturating_duration_since(now));
            guard = match wait {
                Some(wait) if wait.is_zero() => {
                    let due = guard.entries.pop();
                    drop(guard); // actions take other locks
                    if let Some(Reverse(entry)) = due {
                        entry.action.run();
                    }
                    queue.lock().unwrap_or_else(PoisonError::into_inner)
                }
                Some(wait) => changed.wait_timeout(guard, wait).unwrap_or_else(PoisonError::into_inner).0,
                None => changed.wait(guard).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Ends the thread and forgets what was planned.
    pub(crate) fn stop(&self) {
        let (queue, changed) = &*self.0;
        let forgotten = {
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.stopped = true;
            std::mem::take(&mut queue.entries)
        };
        drop(forgotten); // outside the lock: dropping an action may drop what it captured
        changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn deadlines_of_what_is_over_are_swept_out() {
        struct Over(mpsc::Sender<()>);
        impl Expire for Over {
            fn expire(self: Arc<Self>) {
                self.0.send(()).unwrap();
            }
        }
        let timer = Timer::default();
        let (sender, receiver) = mpsc::channel();
        let later = Instant::now() + Duration::from_secs(3600);
        let lasting: Arc<dyn Expire> = Arc::new(Over(sender.clone()));
        timer.deadline(Instant::now(), Arc::downgrade(&lasting));
        for _ in 0..100 * SWEEP_FROM {
            let over: Arc<dyn Expire> = Arc::new(Over(sender.clone()));
            timer.deadline(later, Arc::downgrade(&over));
        }
        assert!(timer.0.0.lock().unwrap().entries.len() <= SWEEP_FROM);
        let thread = thread::spawn({
            let timer = timer.clone();
            move || timer.run()
        });
        receiver.recv().unwrap();
        timer.stop();
        thread.join().unwrap();
    }

    #[test]
    fn actions_run_in_the_order_of_their_time_not_of_their_submission() {
        let timer = Timer::default();
        let (sender, receiver) = mpsc::channel();
        let now = Instant::now();
        for ms in [30u64, 10, 20] {
            let sender = sender.clone();
            timer.at(now + Duration::from_millis(ms), move || sender.send(ms).unwrap());
        }
        let thread = thread::spawn({
            let timer = timer.clone();
            move || timer.run()
        });
        let order: Vec<u64> = receiver.iter().take(3).collect();
        assert_eq!(order, [10, 20, 30]);
        timer.at(Instant::now() + Duration::from_secs(3600), || unreachable!("stopped before"));
        timer.stop();
        thread.join().unwrap();
    }
}
