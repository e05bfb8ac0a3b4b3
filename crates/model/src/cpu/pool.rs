//! A fixed pool of threads for sections of a few microseconds.
//!
//! A step of a small model is some hundred parallel sections of 10 to 200 µs. A general pool wakes its threads through the
//! kernel for each (tens of microseconds); these ones look out for the next section for a while before they sleep.
//!
//! ```text
//! gate = [round: 32][open: 1][inside: 31]
//!
//! caller                                    each worker
//! write the job, open the gate ──────────▶  gate open, round new? enter (inside + 1)
//! take tasks from the counter               take tasks from the counter
//! close the gate                            leave (inside − 1)
//! wait until nobody is inside
//! ```
//!
//! Only who has entered can touch the job, and nobody enters a closed gate: so a section never waits for a thread that
//! sleeps or was scheduled away, only for those that hold a task. The caller computes, too: `threads` counts it.
//!
//! Looking out is bounded: [`SPIN`] without giving the core away, then yielding it until [`WATCH`], then asleep. Where
//! cores are shared that is what a step may take from others, per section.

use std::{
    any::Any,
    cell::UnsafeCell,
    io,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

/// How long a thread looks out for work without a system call: as long as a step's short serial parts take.
const SPIN: Duration = Duration::from_micros(15);
/// How long before it sleeps: longer than what lies between two sections of a step, shorter than between two steps.
const WATCH: Duration = Duration::from_micros(60);

const INSIDE: u64 = (1 << 31) - 1;
const OPEN: u64 = 1 << 31;
const ROUND: u64 = 1 << 32;

/// The threads beside the caller's.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    gate: AtomicU64,
    /// The open section; written while the gate is closed and nobody is inside, read by those inside.
    job: UnsafeCell<Job>,
    /// The next task nobody has taken.
    next: AtomicUsize,
    /// Which workers sleep, each set and cleared by itself.
    asleep: Vec<AtomicBool>,
    stop: AtomicBool,
    /// The first panic of a task in this section.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Tasks of a section. The pointer's lifetime is erased: it lives until [`Pool::run`] returns.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is the only field that is not `Sync` by itself; who may access it when is the gate's protocol (see `run` and
// `work`), and the closure it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `workers` threads beside the caller.
    pub(super) fn new(workers: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: UnsafeCell::new(Job { task: &|_| (), tasks: 0 }),
            next: AtomicUsize::new(0),
            asleep: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, workers: Vec::new() };
        for i in 0..workers {
            let shared = pool.shared.clone();
            // On an error the pool is dropped, which stops those already started.
            pool.workers.push(thread::Builder::new().name(format!("model-{i}")).spawn(move || shared.work(i))?);
        }
        Ok(pool)
    }

    /// Runs `task` for `0..tasks`, each once, on the caller and whoever of the workers comes in time. One caller at a time.
    ///
    /// # Panics
    /// With a task's panic, after all others that were begun have ended.
    pub(super) fn run(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by those inside the gate only, and this function does not
        // return, not even by a panic, before the gate is closed and nobody is inside.
        let task = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(task)
        };
        // SAFETY: the gate is closed and nobody is inside (the last `run` saw to it, and `&mut self` says there is no other),
        // so nobody else touches the job.
        unsafe { *shared.job.get() = Job { task, tasks } };
        shared.next.store(0, Relaxed);
        let round = (shared.gate.load(Relaxed) & !(INSIDE | OPEN)).wrapping_add(ROUND);
        shared.gate.store(round | OPEN, SeqCst); // publishes job and counter; before `asleep` is read (see `sleep`)
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers) {
            if asleep.load(SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.take_tasks(Job { task, tasks });
        shared.gate.fetch_and(!OPEN, AcqRel);
        wait_until(|| shared.gate.load(Acquire) & INSIDE == 0);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join(); // a worker catches its tasks' panics
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, me: usize) {
        let mut last = 0;
        while !self.stop.load(SeqCst) {
            let idle = Instant::now();
            let mut round = self.new_round(last);
            while round.is_none() && idle.elapsed() < WATCH && !self.stop.load(Relaxed) {
                if idle.elapsed() < SPIN {
                    (0..16).for_each(|_| std::hint::spin_loop());
                } else {
                    thread::yield_now();
                }
                round = self.new_round(last);
            }
            let Some(gate) = round else {
                self.sleep(me, last);
                continue;
            };
            // Enter, unless it was closed (or someone else entered) meanwhile.
            if self.gate.compare_exchange(gate, gate + 1, AcqRel, Relaxed).is_ok() {
                // SAFETY: inside an open gate the job is not written; entering acquired what `run` published.
                self.take_tasks(unsafe { *self.job.get() });
                self.gate.fetch_sub(1, Release);
                last = gate & !(INSIDE | OPEN);
            }
        }
    }

    /// The gate, if a section is open that this worker has not been in.
    fn new_round(&self, last: u64) -> Option<u64> {
        let gate = self.gate.load(SeqCst);
        (gate & OPEN != 0 && gate & !(INSIDE | OPEN) != last).then_some(gate)
    }

    /// Sleeps until the next section. Says so first and looks once more after: `run` opens the gate first and looks for
    /// sleepers after, so at least one of the two sees the other.
    fn sleep(&self, me: usize, last: u64) {
        self.asleep[me].store(true, SeqCst);
        while self.new_round(last).is_none() && !self.stop.load(SeqCst) {
            thread::park();
        }
        self.asleep[me].store(false, SeqCst);
    }

    /// Computes tasks until there are none left.
    fn take_tasks(&self, job: Job) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Relaxed);
                if task >= job.tasks {
                    break;
                }
                // SAFETY: the closure lives until nobody is inside, and this thread is (or is the caller itself).
                unsafe { (*job.task)(task) };
            }
        }));
        if let Err(panic) = outcome {
            self.next.store(job.tasks, Relaxed); // no more of this section
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }
}

/// Waits for others to finish what they have begun.
fn wait_until(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        if start.elapsed() < SPIN {
            (0..16).for_each(|_| std::hint::spin_loop());
        } else {
            thread::yield_now();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.workers.iter().map(JoinHandle::thread).map(Thread::name).collect();
        f.debug_tuple("Pool").field(&names).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_workers_do() {
        for workers in [0, 1, 3] {
            let mut pool = Pool::new(workers).unwrap();
            for round in 0..3_000usize {
                let tasks = round % 17;
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "round {round}");
                if round % 500 == 0 {
                    thread::sleep(Duration::from_millis(1)); // let them fall asleep
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let mut pool = Pool::new(1).unwrap();
        let asleep = |pool: &Pool| pool.shared.asleep[0].load(SeqCst);
        wait_until(|| asleep(&pool));
        // The caller's task ends only when the worker has had its own.
        let ran = AtomicUsize::new(0);
        pool.run(2, &|_| {
            ran.fetch_add(1, SeqCst);
            wait_until(|| ran.load(SeqCst) == 2);
        });
        assert_eq!(ran.into_inner(), 2);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2).unwrap();
        for _ in 0..50 {
            let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(20, &|i| assert!(i != 7, "seven"))));
            assert!(outcome.is_err());
            let done = AtomicUsize::new(0);
            pool.run(20, &|_| {
                done.fetch_add(1, Relaxed);
            });
            assert_eq!(done.into_inner(), 20);
        }
    }
}
