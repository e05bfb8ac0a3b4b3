//! One connection to a peer, from the submitting side: what has been sent on it, and what comes back.
//!
//! A frame is noted as pending before its first byte is sent and leaves that list exactly once: with its answer, or when
//! the connection is lost. Whoever notices the loss first (sending thread, receiving thread, shutdown) takes the list.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use kvasir_types::TransportKind;

use super::{
    client::Client,
    frame::{ANSWER_BYTES, Answer, RANGE_BYTES, REQUEST_BYTES, Request, Span, Verb},
    lane::Lane,
    link::{Link, Pieces},
};
use crate::{
    batch::{Frame, Op},
    counters::{Counters, add_one, sub_one},
    error::Error,
    grant::Cut,
};

/// A frame on its way over a lane; counts in the lane's load while it lives.
pub(super) struct Job {
    pub(super) frame: Frame,
    retried: AtomicU32,
    load: Mutex<Option<Arc<AtomicU64>>>,
    sending: Mutex<Sending>,
}

/// A frame must not go out on the next connection while a thread still sends it on the one before, from the same memory.
#[derive(Default)]
struct Sending {
    active: bool,
    /// Its connection died meanwhile, and why: the sending thread gives it back when it is done.
    died: Option<Arc<str>>,
}

impl Job {
    pub(super) fn new(frame: Frame) -> Arc<Self> {
        Arc::new(Self { frame, retried: AtomicU32::new(0), load: Mutex::default(), sending: Mutex::default() })
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it weighs in a lane's load: a frame without bytes (a notice) weighs something, too.
    fn weight(&self) -> u64 {
        self.frame.bytes().max(1)
    }

    /// Counts it in the load of this lane, and of no other any more.
    pub(super) fn charge(&self, lane: &Lane) {
        lane.load.fetch_add(self.weight(), Ordering::Relaxed);
        self.discharge(Some(Arc::clone(&lane.load)));
    }

    fn discharge(&self, next: Option<Arc<AtomicU64>>) {
        let before = std::mem::replace(&mut *self.load.lock().unwrap_or_else(PoisonError::into_inner), next);
        if let Some(before) = before {
            before.fetch_sub(self.weight(), Ordering::Relaxed);
        }
    }

    /// Whether it may be tried once more; counted.
    pub(super) fn may_retry(&self, limit: u32, counters: &Counters) -> bool {
        if self.frame.is_settled() || self.retried.fetch_add(1, Ordering::Relaxed) >= limit {
            return false;
        }
        add_one(&counters.retries);
        true
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.discharge(None);
    }
}

/// An established connection.
pub(super) struct Connection {
    link: Arc<Link>,
    client: Arc<Client>,
    lane: Arc<Lane>,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    lost: bool,
    next_id: u64,
    jobs: HashMap<u64, Arc<Job>>,
}

impl Connection {
    /// Starts the receiving thread.
    pub(super) fn start(link: Arc<Link>, client: Arc<Client>, lane: Arc<Lane>) -> Result<Arc<Self>, Error> {
        let connection = Arc::new(Self { link, client, lane, pending: Mutex::default() });
        let receiving = Arc::clone(&connection);
        connection.client.threads.spawn("transfer-recv", move || receiving.receive_all())?;
        add_one(&connection.client.counters.open_connections);
        Ok(connection)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_alive(&self) -> bool {
        !self.pending().lost
    }

    /// Whether every frame sent has been answered.
    pub(super) fn is_idle(&self) -> bool {
        let pending = self.pending();
        !pending.lost && pending.jobs.is_empty()
    }

    /// Sends a frame: by whoever holds the lane's connection, one after another.
    pub(super) fn send(&self, job: &Arc<Job>) {
        job.sending().active = true;
        match self.note(job) {
            Some(id) => self.send_noted(job, id),
            None => job.sending().died = Some("closed".into()),
        }
        let died = {
            let mut sending = job.sending();
            sending.active = false;
            sending.died.take()
        };
        if let Some(reason) = died {
            self.give_back(job, &reason);
        }
    }

    fn send_noted(&self, job: &Arc<Job>, id: u64) {
        let (frame, batch) = (&job.frame, job.frame.batch());
        let mut head = Vec::with_capacity(REQUEST_BYTES + frame.ranges().len() * RANGE_BYTES);
        let (ranges, payload) = (frame.ranges().len() as u16, frame.bytes() as u32);
        let request = Request { verb: Verb::Move(batch.op), ranges, payload, id, key: batch.key };
        if let Some(notice) = frame.notice() {
            Request { verb: Verb::Notice, payload: notice.len() as u32, ..request }.encode(&mut head);
            head.extend_from_slice(notice);
            return self.sent(self.link.send_bytes(&head));
        }
        request.encode(&mut head);
        for range in frame.ranges() {
            Span { offset: range.remote, len: range.len as u32 }.encode(&mut head);
        }
        let sent = match batch.op {
            Op::Read => self.link.send_bytes(&head),
            Op::Write => {
                let Some(touch) = frame.touch(Arc::clone(&self.link) as Arc<dyn Cut>) else {
                    self.pending().jobs.remove(&id);
                    return; // aborted before a byte of it was sent
                };
                let mut pieces = Pieces::default();
                for range in frame.ranges() {
                    pieces.push(frame.local(range), range.len as usize);
                }
                // SAFETY: the pieces lie in the batch's regions, kept mapped by `job`.
                let sent = unsafe { self.link.send(&head, &mut pieces) };
                drop(touch);
                sent
            }
        };
        self.sent(sent);
    }

    fn sent(&self, result: io::Result<()>) {
        if let Err(error) = result {
            self.lost(&error.to_string());
        }
    }

    /// Lists a frame as pending; `None` if the connection is lost.
    fn note(&self, job: &Arc<Job>) -> Option<u64> {
        let mut pending = self.pending();
        if pending.lost {
            return None;
        }
        if pending.jobs.is_empty() {
            self.link.note_progress(); // the wait for an answer begins
        }
        let id = pending.next_id;
        pending.next_id += 1;
        pending.jobs.insert(id, Arc::clone(job));
        Some(id)
    }

    /// Closes the connection and sees to what was pending on it. Only the first call does anything.
    pub(super) fn lost(&self, reason: &str) {
        let jobs = {
            let mut pending = self.pending();
            if std::mem::replace(&mut pending.lost, true) {
                return;
            }
            std::mem::take(&mut pending.jobs)
        };
        self.link.cut();
        sub_one(&self.client.counters.open_connections);
        tracing::debug!(peer = self.lane.address(), pending = jobs.len(), reason, "transfer connection lost");
        let mut jobs: Vec<_> = jobs.into_iter().collect();
        jobs.sort_unstable_by_key(|(id, _)| *id); // again in the order of submission
        jobs.into_iter().for_each(|(_, job)| self.give_back(&job, reason));
    }

    /// A frame whose connection died under it: once more, or failed.
    fn give_back(&self, job: &Arc<Job>, reason: &str) {
        {
            let mut sending = job.sending();
            if sending.active {
                sending.died = Some(reason.into());
                return;
            }
        }
        let lost = || Error::Disconnected { peer: self.lane.address().to_owned(), reason: reason.into() };
        self.client.retry(job, &self.lane, lost);
    }

    /// The receiving thread's body.
    fn receive_all(&self) {
        let reason = match self.receive_answers() {
            Ok(()) => "closed by the peer".to_owned(),
            Err(error) => error.to_string(),
        };
        self.lost(&reason);
        // What was pending waits in a lane again. If none of it does in this one, it has no reason to stay.
        self.lane.queue.look();
    }

    fn receive_answers(&self) -> io::Result<()> {
        let mut pieces = Pieces::default();
        let mut head = [0; ANSWER_BYTES];
        // Idle is fine, waiting in vain for an answer is not.
        let may_wait = || self.pending().jobs.is_empty() || !self.link.is_stalled();
        while self.link.receive_head(&mut head, may_wait)?.is_some() {
            let answer = Answer::decode(&head).map_err(invalid)?;
            let job = self.pending().jobs.remove(&answer.id).ok_or_else(|| invalid("answer to no request"))?;
            if let Err(error) = self.take(&job, answer, &mut pieces) {
                let reason = error.to_string();
                // In this order: while the connection counts as alive, the second attempt would go out on it.
                self.lost(&reason);
                self.give_back(&job, &reason);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes one answer in and finishes its frame; an error leaves the frame to another attempt.
    fn take(&self, job: &Job, answer: Answer, pieces: &mut Pieces) -> io::Result<()> {
        let (frame, batch) = (&job.frame, job.frame.batch());
        let expected = match (batch.op, answer.result) {
            (Op::Read, Ok(())) => frame.bytes(), // a notice has none
            (Op::Write, _) | (_, Err(_)) => 0,
        };
        if u64::from(answer.payload) != expected {
            return Err(invalid("answer of another length than asked for"));
        }
        if let Err(refusal) = answer.result {
            frame.finish(Err(Error::Refused { segment: batch.segment, refusal }));
            return Ok(());
        }
        if frame.notice().is_some() {
            frame.finish(Ok(()));
            return Ok(());
        }
        if batch.op == Op::Read {
            let Some(touch) = frame.touch(Arc::clone(&self.link) as Arc<dyn Cut>) else {
                return self.link.discard(expected); // cancelled meanwhile
            };
            pieces.clear();
            for range in frame.ranges() {
                pieces.push(frame.local(range), range.len as usize);
            }
            // SAFETY: the pieces lie in the batch's regions, kept mapped by `job`; nobody holds references into them.
            let received = unsafe { self.link.receive(pieces) };
            drop(touch);
            received?;
        }
        self.link.note_exchange(frame.bytes());
        let ops = frame.ranges().len() as u64;
        self.client.counters.client_moved(TransportKind::Tcp, batch.op, frame.bytes(), ops);
        frame.finish(Ok(()));
        Ok(())
    }
}

fn invalid(what: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}
