//! The disk's threads: take what is next, move the bytes, tell the caller and the disk's health.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    num::NonZeroU64,
    os::unix::fs::FileExt as _,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kvasir_transfer::{MemoryRange, TransferEngine};
use rustix::fs::{Advice, FallocateFlags, fallocate};

use super::{
    Failure,
    config::Settings,
    directory::Directory,
    health::{Health, State, Wish, is_full},
    queue::{Job, Kind, Next, Queue},
    record::{DiskOffset, PAGE, RECORD_BYTES, Record, Sequence, encode},
    recovery::Recovery,
};

/// How often it is looked whether the directory is still there.
const LOOK: Duration = Duration::from_secs(1);
/// Ranges written by way of the page cache are dropped from it once so many others have followed: by then they are clean.
const BEHIND: usize = 32;

/// What happened on a disk so far, and what waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Blocks read and found to be as recorded.
    pub reads: u64,
    /// Blocks written.
    pub writes: u64,
    /// Of the blocks read.
    pub read_bytes: u64,
    /// Of the blocks written.
    pub written_bytes: u64,
    /// Blocks read that were not as recorded.
    pub mismatches: u64,
    /// Blocks not written because the file system had no room.
    pub full: u64,
    /// Operations that failed otherwise.
    pub io_errors: u64,
    /// Operations refused because too many waited.
    pub busy: u64,
    /// Operations refused because the disk failed lately.
    pub resting: u64,
    /// Reads that wait.
    pub waiting_reads: usize,
    /// Writes that wait, and blocks to forget.
    pub waiting_writes: usize,
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    mismatches: AtomicU64,
    full: AtomicU64,
    io_errors: AtomicU64,
    busy: AtomicU64,
    resting: AtomicU64,
}

/// What callers and threads share. The lock is held for as long as it takes to queue or take a job, never while bytes move
/// or a callback runs.
pub(super) struct Shared {
    settings: Settings,
    engine: TransferEngine,
    directory: Directory,
    plan: Mutex<Plan>,
    /// Something was queued or ended, or the disk was closed.
    changed: Condvar,
    sequence: AtomicU64,
    counters: Counters,
    /// Ranges of the data file that were written by way of the page cache lately. Threads of the disk only.
    behind: Mutex<VecDeque<MemoryRange>>,
}

struct Plan {
    queue: Queue,
    health: Health,
    /// For each slab, how far it has been written at least.
    written: Vec<u64>,
    /// Bytes of the last block for which the file system had no room.
    no_room_for: u64,
    looked: Option<Instant>,
}

impl Plan {
    fn wish(&self, job: &Job, slab_bytes: u64) -> Wish {
        let end = job.slot.0 % slab_bytes + job.memory.len;
        let written = self.written.get((job.slot.0 / slab_bytes) as usize).copied().unwrap_or(0);
        if matches!(job.kind, Kind::Write(_)) && end > written { Wish::Grow } else { Wish::Reuse }
    }
}

impl Shared {
    pub(super) fn new(settings: Settings, engine: TransferEngine, directory: Directory, recovery: Recovery) -> Self {
        let Settings { queue, threads, write_bytes_per_s, slab_bytes, retry, .. } = settings;
        let plan = Plan {
            queue: Queue::new(queue, threads, write_bytes_per_s, slab_bytes),
            health: Health::new(retry),
            written: recovery.written,
            no_room_for: 0,
            looked: None,
        };
        Self {
            settings,
            engine,
            directory,
            plan: Mutex::new(plan),
            changed: Condvar::new(),
            sequence: AtomicU64::new(recovery.next.0),
            counters: Counters::default(),
            behind: Mutex::default(),
        }
    }

    pub(super) fn push(&self, job: Job, now: Instant) -> Result<(), Failure> {
        if self.directory.geometry.record_at(job.slot, job.memory.len).is_none() {
            return Err(Failure::NoSlot);
        }
        let result = {
            let mut plan = self.lock();
            let wish = plan.wish(&job, self.settings.slab_bytes);
            let admitted = plan.health.would_admit(wish, now).and_then(|()| plan.queue.would_admit(&job));
            // A job that is refused is dropped after the lock: its `done` may take others.
            if admitted.is_ok() {
                plan.queue.push(job);
            }
            admitted
        };
        match &result {
            Ok(()) => self.changed.notify_one(),
            Err(failure) => self.count_failure(failure),
        }
        result
    }

    pub(super) fn state(&self) -> State {
        self.lock().health.state()
    }

    pub(super) fn may_grow(&self, now: Instant) -> bool {
        self.lock().health.would_admit(Wish::Grow, now).is_ok()
    }

    pub(super) fn has_room_again(&self, now: Instant) -> bool {
        let (at, len) = {
            let plan = self.lock();
            let (slab_bytes, len) = (self.settings.slab_bytes, plan.no_room_for);
            // Behind what was written: whatever lies there, asking for room changes none of it.
            let free = plan.written.iter().position(|written| written + len <= slab_bytes);
            match free {
                Some(slab)
                    if plan.health.state() == State::Full && plan.health.would_admit(Wish::Grow, now).is_ok() =>
                {
                    (slab as u64 * slab_bytes + plan.written[slab], len)
                }
                _ => return false,
            }
        };
        let asked = fallocate(&self.directory.data, FallocateFlags::KEEP_SIZE, at, len).map_err(io::Error::from);
        if asked.as_ref().is_err_and(|error| !is_full(error)) {
            return false; // it can't be asked: the next block that is written tells
        }
        let change = self.lock().health.ended(Wish::Grow, asked.as_ref().map(|_| ()), Instant::now());
        change.inspect(|&state| self.announce(state, None)) == Some(State::Working)
    }

    pub(super) fn stats(&self) -> Stats {
        let (waiting_reads, waiting_writes) = self.lock().queue.waiting();
        let Counters { reads, writes, read_bytes, written_bytes, mismatches, full, io_errors, busy, resting } =
            &self.counters;
        Stats {
            reads: reads.load(Relaxed),
            writes: writes.load(Relaxed),
            read_bytes: read_bytes.load(Relaxed),
            written_bytes: written_bytes.load(Relaxed),
            mismatches: mismatches.load(Relaxed),
            full: full.load(Relaxed),
            io_errors: io_errors.load(Relaxed),
            busy: busy.load(Relaxed),
            resting: resting.load(Relaxed),
            waiting_reads,
            waiting_writes,
        }
    }

    pub(super) fn close(&self) {
        let left = self.lock().queue.close();
        self.changed.notify_all();
        for job in left {
            (job.done)(Err(Failure::Closed));
        }
    }

    /// The life of a thread.
    pub(super) fn run(&self) {
        while let Some((jobs, refused)) = self.next() {
            // Also of jobs that are refused, all of them: the queue counts who writes.
            let first = jobs.first().or_else(|| refused.first().map(|(job, _)| job));
            let write = first.is_some_and(|job| !matches!(job.kind, Kind::Read(_)));
            for (job, failure) in refused {
                self.end(job, Err(failure));
            }
            self.execute(jobs);
            if self.lock().queue.ended(write) {
                self.changed.notify_one();
            }
        }
    }

    /// Waits for work: what to do, and what health doesn't let through. `None` to end.
    #[expect(clippy::type_complexity, reason = "two lists, taken apart at once by the only caller")]
    fn next(&self) -> Option<(Vec<Job>, Vec<(Job, Failure)>)> {
        let mut plan = self.lock();
        loop {
            let now = Instant::now();
            plan = match plan.queue.next(now) {
                Next::Closed => return None,
                Next::Wait(None) => self.changed.wait(plan).expect("nothing panics under this lock"),
                Next::Wait(Some(at)) => {
                    let wait = at.saturating_duration_since(now);
                    self.changed.wait_timeout(plan, wait).expect("nothing panics under this lock").0
                }
                Next::Run(jobs) => return Some(self.admit(&mut plan, jobs, now)),
            };
        }
    }

    fn admit(&self, plan: &mut Plan, jobs: Vec<Job>, now: Instant) -> (Vec<Job>, Vec<(Job, Failure)>) {
        let (mut admitted, mut refused) = (Vec::with_capacity(jobs.len()), Vec::new());
        for job in jobs {
            let wish = plan.wish(&job, self.settings.slab_bytes);
            match plan.health.admit(wish, now) {
                // One that was refused leaves a gap that no system call can bridge.
                Ok(()) if refused.is_empty() => admitted.push(job),
                Ok(()) => refused.push((job, Failure::Busy)),
                Err(failure) => refused.push((job, failure)),
            }
        }
        (admitted, refused)
    }

    fn execute(&self, jobs: Vec<Job>) {
        if jobs.len() > 1 {
            match self.attempt(&jobs) {
                Ok(()) => return jobs.into_iter().for_each(|job| self.settle(job, Ok(()))),
                // Which of them it was shows when they are done one by one.
                Err(_) => return jobs.into_iter().for_each(|job| self.execute(vec![job])),
            }
        }
        let result = self.attempt(&jobs);
        for job in jobs {
            self.settle(job, result.clone());
        }
    }

    /// Moves the bytes of jobs that [`Queue::next`] put together.
    fn attempt(&self, jobs: &[Job]) -> Result<(), Failure> {
        let Some(first) = jobs.first() else { return Ok(()) };
        self.look()?;
        let ranges: Vec<_> = jobs.iter().map(|job| job.memory).collect();
        match first.kind {
            Kind::Read(_) => self.read(first.slot, &ranges),
            Kind::Write(_) => {
                self.write(first.slot, &ranges)?;
                let mut records = Vec::with_capacity(jobs.len() * RECORD_BYTES);
                for job in jobs {
                    if let Kind::Write(record) = &job.kind {
                        records.extend(self.encode(record, job.slot));
                    }
                }
                self.write_records(first, &records)
            }
            Kind::Forget => self.write_records(first, &[0; RECORD_BYTES]),
        }
    }

    fn encode(&self, record: &Record, slot: DiskOffset) -> [u8; RECORD_BYTES] {
        encode(record, slot, Sequence(self.sequence.fetch_add(1, Relaxed)))
    }

    fn read(&self, DiskOffset(at): DiskOffset, ranges: &[MemoryRange]) -> Result<(), Failure> {
        let result = self.on_file(ranges, |file| self.engine.read_file_at(file, at, ranges));
        match result {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.drop_pages(at, ranges.iter().map(|range| range.len).sum());
                Ok(())
            }
            // Cut off under our feet: the block is not there.
            Err(Failure::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Failure::Mismatch),
            Err(failure) => Err(failure),
        }
    }

    fn write(&self, DiskOffset(at): DiskOffset, ranges: &[MemoryRange]) -> Result<(), Failure> {
        if !self.on_file(ranges, |file| self.engine.write_file_at(file, at, ranges))? {
            let len = ranges.iter().map(|range| range.len).sum();
            self.drop_pages(at, len); // they are dirty yet: this only starts to write them
            let mut behind = self.behind.lock().expect("nothing panics under this lock");
            behind.push_back(MemoryRange { offset: at, len });
            if behind.len() > BEHIND
                && let Some(clean) = behind.pop_front()
            {
                drop(behind);
                self.drop_pages(clean.offset, clean.len);
            }
        }
        Ok(())
    }

    /// Past the page cache where the file system and the ranges allow it: whether it was.
    fn on_file(
        &self,
        ranges: &[MemoryRange],
        moving: impl Fn(&File) -> Result<(), kvasir_transfer::Error>,
    ) -> Result<bool, Failure> {
        let whole = ranges.iter().all(|range| range.offset.is_multiple_of(PAGE) && range.len.is_multiple_of(PAGE));
        if let Some(direct) = self.directory.direct.as_ref().filter(|_| whole) {
            match moving(direct).map_err(failure) {
                // A device that wants more than pages.
                Err(Failure::Io(error)) if error.kind() == io::ErrorKind::InvalidInput => {}
                result => return result.map(|()| true),
            }
        }
        moving(&self.directory.data).map_err(failure).map(|()| false)
    }

    fn write_records(&self, first: &Job, records: &[u8]) -> Result<(), Failure> {
        let at = self.directory.geometry.record_at(first.slot, first.memory.len).ok_or(Failure::NoSlot)?;
        self.directory.records.write_all_at(records, at).map_err(|error| Failure::Io(Arc::new(error)))
    }

    /// The node's memory is the cache: what the page cache kept beside it would be kept twice. A wish; it may stay.
    fn drop_pages(&self, at: u64, len: u64) {
        let _ = rustix::fs::fadvise(&self.directory.data, at, NonZeroU64::new(len), Advice::DontNeed);
    }

    /// Now and then, whether the files that are open here are the ones that a restart would find.
    fn look(&self) -> Result<(), Failure> {
        let now = Instant::now();
        {
            let mut plan = self.lock();
            let lately = plan.looked.is_some_and(|at| now.saturating_duration_since(at) < LOOK);
            if lately && plan.health.state() != State::Failing {
                return Ok(());
            }
            plan.looked = Some(now);
        }
        self.directory.check_in_place().map_err(|error| Failure::Io(Arc::new(error)))
    }

    /// Tells the disk's health what became of a job, and then its caller. A block read is compared with its checksum.
    fn settle(&self, job: Job, result: Result<(), Failure>) {
        let now = Instant::now();
        let told = match &result {
            Ok(()) | Err(Failure::Mismatch) => Some(Ok(())),
            Err(Failure::Io(error)) => Some(Err(&**error)),
            Err(_) => None,
        };
        let change = told.and_then(|told| {
            let mut plan = self.lock();
            let wish = plan.wish(&job, self.settings.slab_bytes);
            if result.is_ok() && wish == Wish::Grow {
                let (slab, within) = (job.slot.0 / self.settings.slab_bytes, job.slot.0 % self.settings.slab_bytes);
                plan.written[slab as usize] = within + job.memory.len;
            }
            if told.is_err_and(is_full) {
                plan.no_room_for = job.memory.len;
            }
            plan.health.ended(wish, told, now)
        });
        if let Some(state) = change {
            self.announce(state, result.as_ref().err());
        }
        let result = match (result, job.kind) {
            (Ok(()), Kind::Read(expected)) => match self.engine.checksum(job.memory.offset, job.memory.len) {
                Ok(sum) if sum == expected => Ok(()),
                Ok(_) => Err(Failure::Mismatch),
                Err(error) => Err(failure(error)),
            },
            (Err(Failure::Io(error)), _) if is_full(&error) => Err(Failure::Full),
            (result, _) => result,
        };
        self.end(job, result);
    }

    fn end(&self, job: Job, result: Result<(), Failure>) {
        let Counters { reads, writes, read_bytes, written_bytes, .. } = &self.counters;
        match (&result, job.kind) {
            (Ok(()), Kind::Read(_)) => {
                reads.fetch_add(1, Relaxed);
                read_bytes.fetch_add(job.memory.len, Relaxed);
            }
            (Ok(()), Kind::Write(_)) => {
                writes.fetch_add(1, Relaxed);
                written_bytes.fetch_add(job.memory.len, Relaxed);
            }
            (Ok(()), Kind::Forget) => {}
            (Err(failure), _) => self.count_failure(failure),
        }
        (job.done)(result);
    }

    fn announce(&self, state: State, why: Option<&Failure>) {
        let path = self.directory.path().display();
        let retry_ms = self.settings.retry.as_millis() as u64;
        let error = why.map(|failure| kvasir_runtime::chain(failure)).unwrap_or_default();
        match state {
            State::Working => tracing::info!(%path, "the disk works again"),
            State::Full => tracing::warn!(%path, error, retry_ms, "the disk is full: it takes no more new blocks"),
            State::Failing => tracing::warn!(%path, error, retry_ms, "the disk fails: serving from memory alone"),
        }
    }

    fn count_failure(&self, failure: &Failure) {
        let Counters { mismatches, full, io_errors, busy, resting, .. } = &self.counters;
        let counter = match failure {
            Failure::Mismatch => mismatches,
            Failure::Full => full,
            Failure::Io(_) | Failure::NoSlot => io_errors,
            Failure::Busy => busy,
            Failure::Resting => resting,
            Failure::Closed => return,
        };
        counter.fetch_add(1, Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().expect("nothing panics under this lock")
    }
}

fn failure(error: kvasir_transfer::Error) -> Failure {
    match error {
        kvasir_transfer::Error::File { source, .. } => Failure::Io(source),
        _ => Failure::NoSlot,
    }
}
