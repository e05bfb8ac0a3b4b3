//! What waits for the disk's threads, and which is next. Pure: `now` is an argument, no locks, no input or output.
//!
//! Reads go first: somebody waits for them, and for writes nobody does. Writes keep to their bandwidth and to half
//! of the threads. Neighbours that follow one another are taken together: blocks of one prompt are mostly written one after another,
//! and one request of a MiB costs less than sixteen of 64 KiB.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use kvasir_transfer::MemoryRange;

use super::{
    Checksum, Done, Failure,
    record::{DiskOffset, Record, slot_bytes},
};

/// Neighbours are taken together up to so many bytes: what the device takes at once, and no read waits long for.
const TOGETHER_BYTES: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read(Checksum),
    Write(Record),
    Forget,
}

/// One operation.
pub(super) struct Job {
    pub(super) kind: Kind,
    pub(super) slot: DiskOffset,
    /// The block's bytes in memory; of a slot to forget, only its size.
    pub(super) memory: MemoryRange,
    pub(super) done: Done,
}

impl Job {
    /// Whether `next` can be part of the same system call.
    fn is_followed_by(&self, next: &Self) -> bool {
        let same = match (self.kind, next.kind) {
            (Kind::Read(_), Kind::Read(_)) | (Kind::Write(_), Kind::Write(_)) => true,
            (Kind::Read(_) | Kind::Write(_) | Kind::Forget, _) => false,
        };
        let len = self.memory.len;
        same && len == next.memory.len && len == slot_bytes(len) && self.slot.0 + len == next.slot.0
    }
}

/// What a thread is to do.
pub(super) enum Next {
    /// These, which are one read, or one write, or something else alone. [`Queue::ended`] is owed.
    Run(Vec<Job>),
    /// Nothing before that moment, unless something is added or ends.
    Wait(Option<Instant>),
    /// End.
    Closed,
}

pub(super) struct Queue {
    reads: VecDeque<Job>,
    writes: VecDeque<Job>,
    bound: usize,
    closed: bool,
    /// Threads that write now, and how many may.
    writing: usize,
    writers: usize,
    bytes_per_s: Option<u64>,
    /// When the bandwidth allows the next write.
    next_write: Option<Instant>,
    slab_bytes: u64,
}

impl Queue {
    pub(super) fn new(bound: usize, threads: usize, bytes_per_s: Option<u64>, slab_bytes: u64) -> Self {
        let writers = (threads / 2).max(1);
        Self {
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            bound,
            closed: false,
            writing: 0,
            writers,
            bytes_per_s,
            next_write: None,
            slab_bytes,
        }
    }

    /// Whether there is room for the job.
    pub(super) fn would_admit(&self, job: &Job) -> Result<(), Failure> {
        if self.closed {
            return Err(Failure::Closed);
        }
        let queue = if matches!(job.kind, Kind::Read(_)) { &self.reads } else { &self.writes };
        if queue.len() < self.bound { Ok(()) } else { Err(Failure::Busy) }
    }

    /// Takes a job for which there is room.
    pub(super) fn push(&mut self, job: Job) {
        let queue = if matches!(job.kind, Kind::Read(_)) { &mut self.reads } else { &mut self.writes };
        queue.push_back(job);
    }

    pub(super) fn next(&mut self, now: Instant) -> Next {
        if self.closed {
            return Next::Closed;
        }
        if !self.reads.is_empty() {
            return Next::Run(take(&mut self.reads, self.slab_bytes));
        }
        if self.writes.is_empty() || self.writing >= self.writers {
            return Next::Wait(None);
        }
        if let Some(at) = self.next_write.filter(|&at| at > now) {
            return Next::Wait(Some(at));
        }
        let jobs = take(&mut self.writes, self.slab_bytes);
        self.writing += 1;
        let bytes: u64 = jobs.iter().filter(|job| matches!(job.kind, Kind::Write(_))).map(|job| job.memory.len).sum();
        self.next_write = self
            .bytes_per_s
            .map(|rate| now + Duration::from_nanos((bytes as u128 * 1_000_000_000 / rate as u128) as u64));
        Next::Run(jobs)
    }

    /// Jobs that [`Queue::next`] gave out have ended. Whether a thread may find work now that it had to leave before.
    pub(super) fn ended(&mut self, write: bool) -> bool {
        if write {
            self.writing -= 1;
        }
        write && !self.writes.is_empty()
    }

    /// Takes nothing more; what waits comes back.
    pub(super) fn close(&mut self) -> Vec<Job> {
        self.closed = true;
        self.reads.drain(..).chain(self.writes.drain(..)).collect()
    }

    /// Reads and writes that wait.
    pub(super) fn waiting(&self) -> (usize, usize) {
        (self.reads.len(), self.writes.len())
    }
}

/// The first, and its neighbours behind it.
fn take(queue: &mut VecDeque<Job>, slab_bytes: u64) -> Vec<Job> {
    let mut jobs: Vec<Job> = queue.pop_front().into_iter().collect();
    let mut bytes = jobs.first().map_or(0, |job| job.memory.len);
    while let (Some(last), Some(next)) = (jobs.last(), queue.front()) {
        bytes += next.memory.len;
        // Within a slab: their records are neighbours, too.
        let same_slab = last.slot.0 / slab_bytes == next.slot.0 / slab_bytes;
        if bytes > TOGETHER_BYTES || !same_slab || !last.is_followed_by(next) {
            break;
        }
        jobs.extend(queue.pop_front());
    }
    jobs
}

#[cfg(test)]
mod tests {
    use kvasir_types::BlockHash;

    use super::*;

    const SLAB: u64 = 16 << 20;

    fn record(bytes: u64) -> Record {
        let (hash, checksum) = (BlockHash([1; 16]), [2; 16]);
        Record { hash, bytes, checksum, position: 0, parent: 0, group: 0, origin: 0 }
    }

    fn job(kind: Kind, slot: u64, len: u64) -> Job {
        Job { kind, slot: DiskOffset(slot), memory: MemoryRange { offset: 0, len }, done: Box::new(|_| {}) }
    }

    fn read(slot: u64, len: u64) -> Job {
        job(Kind::Read([0; 16]), slot, len)
    }

    fn write(slot: u64, len: u64) -> Job {
        job(Kind::Write(record(len)), slot, len)
    }

    fn slots(next: Next) -> Vec<u64> {
        match next {
            Next::Run(jobs) => jobs.iter().map(|job| job.slot.0).collect(),
            Next::Wait(_) => Vec::new(),
            Next::Closed => panic!("closed"),
        }
    }

    #[test]
    fn reads_go_before_writes_and_a_thread_is_kept_for_them() {
        let (mut queue, now) = (Queue::new(10, 2, None, SLAB), Instant::now());
        for at in [0, 2, 4] {
            queue.push(write(at << 20, 4096));
        }
        queue.push(read(9 << 20, 4096));
        assert_eq!(slots(queue.next(now)), [9 << 20]);
        assert_eq!(slots(queue.next(now)), [0]);
        assert_eq!(slots(queue.next(now)), [0; 0], "the other thread is for reads");
        queue.push(read(8 << 20, 4096));
        assert_eq!(slots(queue.next(now)), [8 << 20]);
        assert!(queue.ended(true), "somebody may write");
        assert_eq!(slots(queue.next(now)), [2 << 20]);
        assert!(!queue.ended(false));
    }

    #[test]
    fn neighbours_are_taken_together_within_a_slab_and_up_to_a_mebibyte() {
        let (mut queue, now, kib) = (Queue::new(100, 1, None, SLAB), Instant::now(), 1024);
        for number in 0..20 {
            queue.push(read(number * 64 * kib, 64 * kib));
        }
        assert_eq!(slots(queue.next(now)).len(), 16);
        assert_eq!(slots(queue.next(now)).len(), 4);
        for slot in [SLAB - 4096, SLAB, SLAB + 8192, SLAB + 12288, SLAB + 4096] {
            queue.push(read(slot, 4096));
        }
        let groups: Vec<_> = std::iter::from_fn(|| Some(slots(queue.next(now))).filter(|it| !it.is_empty())).collect();
        assert_eq!(groups, [vec![SLAB - 4096], vec![SLAB], vec![SLAB + 8192, SLAB + 12288], vec![SLAB + 4096]]);
        // Between blocks that don't fill their slots there are bytes of nobody's.
        queue.push(read(0, 4000));
        queue.push(read(4096, 4000));
        assert_eq!(slots(queue.next(now)), [0]);
        assert_eq!(slots(queue.next(now)), [4096]);
        // What is written and what is forgotten are different things.
        queue.push(write(0, 4096));
        queue.push(job(Kind::Forget, 4096, 4096));
        assert_eq!(slots(queue.next(now)), [0]);
    }

    #[test]
    fn writes_keep_to_their_bandwidth_and_reads_do_not_wait_for_it() {
        let (mut queue, now) = (Queue::new(10, 2, Some(1 << 20), SLAB), Instant::now());
        for at in [0, 2] {
            queue.push(write(at << 20, 1 << 19));
        }
        assert_eq!(slots(queue.next(now)), [0]);
        queue.ended(true);
        assert!(matches!(queue.next(now), Next::Wait(Some(at)) if at == now + Duration::from_millis(500)));
        queue.push(read(4 << 20, 4096));
        assert_eq!(slots(queue.next(now)), [4 << 20]);
        assert_eq!(slots(queue.next(now + Duration::from_millis(500))), [2 << 20]);
    }

    #[test]
    fn the_queue_is_bounded_and_what_waits_comes_back() {
        let mut queue = Queue::new(2, 2, None, SLAB);
        for at in [0, 1] {
            queue.push(read(at << 20, 1));
            queue.push(write(at << 20, 1));
        }
        assert!(matches!(queue.would_admit(&read(0, 1)), Err(Failure::Busy)));
        assert!(matches!(queue.would_admit(&job(Kind::Forget, 0, 1)), Err(Failure::Busy)));
        assert_eq!(queue.waiting(), (2, 2));
        assert_eq!(queue.close().len(), 4);
        assert!(matches!(queue.would_admit(&read(0, 1)), Err(Failure::Closed)));
        assert!(matches!(queue.next(Instant::now()), Next::Closed));
    }
}
