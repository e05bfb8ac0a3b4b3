//! Frames on one connection where there is no RMA: cut into pieces, each a message that the owner checks and answers.
//!
//! Local memory is touched only while a piece's bytes are copied into a message or out of one, on this thread: nothing
//! of a frame is ever in UCX's hands, so a deadline or a cancellation ends it at once.

use std::{
    collections::{HashMap, VecDeque},
    ptr,
    sync::Arc,
};

use kvasir_types::TransportKind;

use super::{
    driver::Core,
    endpoint::Endpoint,
    flow::Work,
    messages::{MAX_PIECE, Message, PIECE_HEAD, RequestId, Span},
};
use crate::{
    batch::{Op, Priority, Range},
    counters::Counters,
    error::{Error, Refusal},
    grant::Cut,
};

/// Most pieces under way to one peer in each direction, whatever is configured.
pub(super) const MAX_WINDOW: usize = 64;

/// A frame on its way.
struct Job {
    work: Work,
    /// Range and offset in it at which the next piece begins.
    at: (usize, u64),
    /// Pieces that are not answered.
    outstanding: usize,
    /// It has failed; only answers are awaited.
    over: bool,
}

/// A piece that is not answered.
struct Piece {
    job: u64,
    op: Op,
    ranges: Vec<Range>,
}

#[derive(Default)]
pub(super) struct Courier {
    jobs: HashMap<u64, Job>,
    ready: [[VecDeque<u64>; Priority::COUNT]; 2],
    pieces: HashMap<RequestId, Piece>,
    outstanding: [usize; 2],
}

fn index(op: Op) -> usize {
    match op {
        Op::Read => 0,
        Op::Write => 1,
    }
}

/// A copy on this thread: there is nothing to stop.
struct Copying;

impl Cut for Copying {
    fn cut(&self) -> bool {
        false
    }
}

impl Courier {
    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    pub(super) fn push(&mut self, core: &mut Core, work: Work) {
        let id = core.number();
        let batch = work.frame.batch();
        self.ready[index(batch.op)][batch.priority as usize].push_back(id);
        self.jobs.insert(id, Job { work, at: (0, 0), outstanding: 0, over: false });
    }

    /// Sends what the caps allow, higher priorities first.
    pub(super) fn pump(&mut self, core: &mut Core, endpoint: &Endpoint) {
        for (op, cap) in [(Op::Read, core.limits.max_gets), (Op::Write, core.limits.max_puts)] {
            while self.outstanding[index(op)] < cap {
                let Some(queue) = self.ready[index(op)].iter_mut().rev().find(|queue| !queue.is_empty()) else { break };
                let Some(&id) = queue.front() else { break };
                let Some(job) = self.jobs.get_mut(&id) else {
                    queue.pop_front();
                    continue;
                };
                if job.over || job.work.frame.is_settled() {
                    queue.pop_front();
                    job.over = true;
                    if job.outstanding == 0 {
                        self.jobs.remove(&id);
                    }
                    continue;
                }
                let ranges = next_piece(job);
                if job.at.0 == job.work.frame.ranges().len() {
                    queue.pop_front();
                }
                let request = RequestId(core.number());
                if send(endpoint, &job.work, op, request, &ranges).is_some() {
                    job.outstanding += 1;
                    self.outstanding[index(op)] += 1;
                    self.pieces.insert(request, Piece { job: id, op, ranges });
                }
            }
        }
    }

    /// Bytes came; `None` if they were not asked for.
    pub(super) fn data(&mut self, counters: &Counters, request: RequestId, bytes: &[u8]) -> Option<()> {
        let piece = self.pieces.get(&request).filter(|piece| piece.op == Op::Read)?;
        if piece.ranges.iter().map(|range| range.len).sum::<u64>() != bytes.len() as u64 {
            return None;
        }
        if let Some(job) = self.jobs.get(&piece.job)
            && let Some(_touch) = job.work.frame.touch(Arc::new(Copying))
        {
            let mut rest = bytes;
            for range in &piece.ranges {
                let (part, more) = rest.split_at(range.len as usize);
                // SAFETY: the range lies in its region, which the frame's batch keeps in use, and may be touched now;
                // nobody holds references into registered memory; the message is ours.
                unsafe { ptr::copy_nonoverlapping(part.as_ptr(), job.work.frame.local(range), part.len()) };
                rest = more;
            }
        }
        self.answered(counters, request, Ok(()))
    }

    /// A write has arrived.
    pub(super) fn wrote(&mut self, counters: &Counters, request: RequestId) -> Option<()> {
        self.pieces.get(&request).filter(|piece| piece.op == Op::Write)?;
        self.answered(counters, request, Ok(()))
    }

    /// The owner has turned a piece down; its direction.
    pub(super) fn refused(&mut self, counters: &Counters, request: RequestId, refusal: Refusal) -> Option<Op> {
        let op = self.pieces.get(&request)?.op;
        self.answered(counters, request, Err(refusal))?;
        Some(op)
    }

    fn answered(&mut self, counters: &Counters, request: RequestId, result: Result<(), Refusal>) -> Option<()> {
        let piece = self.pieces.remove(&request)?;
        self.outstanding[index(piece.op)] -= 1;
        let job = self.jobs.get_mut(&piece.job)?;
        job.outstanding -= 1;
        let frame = Arc::clone(&job.work.frame);
        let all_sent = job.at.0 == frame.ranges().len();
        let (op, segment) = (piece.op, frame.batch().segment);
        if let Err(refusal) = result {
            job.over = true;
            frame.finish(Err(Error::Refused { segment, refusal }));
        }
        if job.outstanding > 0 || !(all_sent || job.over) {
            return Some(());
        }
        // Still queued if it is over early: the pump skips what it does not find.
        let complete = self.jobs.remove(&piece.job).is_some_and(|job| !job.over);
        if complete && !frame.is_settled() {
            counters.client_moved(TransportKind::Ucx, op, frame.bytes(), frame.ranges().len() as u64);
            frame.finish(Ok(()));
        }
        Some(())
    }

    /// What is left of it when its connection has been closed, in the order of submission.
    pub(super) fn into_work(self) -> Vec<Work> {
        let mut jobs: Vec<_> = self.jobs.into_iter().collect();
        jobs.sort_unstable_by_key(|(id, _)| *id);
        jobs.into_iter().map(|(_, Job { work, .. })| work).collect()
    }
}

/// The ranges of a frame's next piece; the job then stands behind them.
fn next_piece(job: &mut Job) -> Vec<Range> {
    let all = job.work.frame.ranges();
    let mut piece = Vec::new();
    let mut room = MAX_PIECE as u64;
    while let Some(range) = all.get(job.at.0)
        && room > 0
    {
        let done = job.at.1;
        let len = (range.len - done).min(room);
        piece.push(Range { local: range.local + done, remote: range.remote + done, len });
        room -= len;
        job.at = if done + len == range.len { (job.at.0 + 1, 0) } else { (job.at.0, done + len) };
    }
    piece
}

/// Sends a piece, unless the frame has been given up.
fn send(endpoint: &Endpoint, work: &Work, op: Op, request: RequestId, ranges: &[Range]) -> Option<()> {
    let key = work.frame.batch().key;
    let spans = ranges.iter().map(|range| Span { offset: range.remote, len: range.len as u32 }).collect();
    let payload: u64 = ranges.iter().map(|range| range.len).sum();
    match op {
        Op::Read => {
            let mut message = Vec::with_capacity(PIECE_HEAD);
            Message::Read { request, key, spans }.encode(&mut message);
            endpoint.send(message);
        }
        Op::Write => {
            let mut message = Vec::with_capacity(PIECE_HEAD + payload as usize);
            Message::Write { request, key, spans, bytes: &[] }.encode(&mut message);
            let touch = work.frame.touch(Arc::new(Copying))?;
            for range in ranges {
                // SAFETY: the range lies in its region, which the frame's batch keeps in use, and may be touched now.
                unsafe { append(&mut message, work.frame.local(range), range.len as usize) };
            }
            drop(touch);
            endpoint.send(message);
        }
    }
    Some(())
}

/// Copies registered bytes to the end of a message.
///
/// # Safety
/// `from` is valid for reading `len` bytes. They may change meanwhile; then what is copied is a mixture.
pub(super) unsafe fn append(message: &mut Vec<u8>, from: *const u8, len: usize) {
    message.reserve(len);
    let end = message.len();
    // SAFETY: there is room for `len` bytes behind the end; the source is not in our vector.
    unsafe { ptr::copy_nonoverlapping(from, message.as_mut_ptr().add(end), len) };
    // SAFETY: just initialised.
    unsafe { message.set_len(end + len) };
}
