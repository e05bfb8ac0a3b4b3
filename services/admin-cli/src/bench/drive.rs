//! Sending: an open loop by the clock, a closed one by what comes back.
//!
//! ```text
//!   arrivals or trace ─▶ due? ─▶ a task for each request, at most `most_open` ─▶ tally
//!                          ▲                                                     │
//!                          └───────────── closed loop: one ended ────────────────┘
//! ```
//!
//! An open loop never waits for answers. What can't be sent when it is due (the bound on open requests, a busy core) is sent
//! as soon as it can be, and its latency counts from when it was due: a slow server can't slow its own measurement down.

use std::{io::IsTerminal as _, sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until},
};

use super::{
    arrivals::Arrivals,
    client::{Target, Told},
    tally::{Fate, Tally},
    work::Work,
};

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_millis(500);

/// When requests are sent.
pub(super) enum Loop {
    /// At these times.
    Open(Arrivals),
    /// So many at a time.
    Closed(usize),
    /// When their source says.
    Recorded,
}

/// How it goes on and when it ends.
pub(super) struct Course {
    pub(super) pace: Loop,
    /// Nothing is sent after so long.
    pub(super) duration: Option<Duration>,
    /// Nothing is sent after so many counted ones.
    pub(super) requests: Option<u64>,
    pub(super) warmup: Duration,
    pub(super) most_open: usize,
    pub(super) patience: Duration,
    pub(super) stream: bool,
    pub(super) path: &'static str,
}

/// What has been done.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) tally: Tally,
    /// Sent, and counted or to be counted.
    pub(super) sent: u64,
    /// Sent in the warm-up.
    pub(super) warm: u64,
    /// Due before the end, and not sent because it was reached first.
    pub(super) not_sent: u64,
    /// From the end of the warm-up to the last answer.
    pub(super) took: Duration,
    pub(super) most_open: usize,
    pub(super) interrupted: bool,
}

/// One that has ended.
struct Ended {
    told: Told,
    counts: bool,
}

/// Sends until it is over, or until `stop`: who stops it wants to see what there is, not to wait for answers.
pub(super) async fn drive(
    course: Course,
    mut work: Work,
    target: Target,
    tally: Tally,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<(Done, Work)> {
    let (target, begin) = (Arc::new(target), Instant::now());
    let mut stop = std::pin::pin!(stop);
    let Course { mut pace, duration, requests, warmup, most_open, patience, stream, path } = course;
    let end = duration.map(|duration| begin + warmup + duration);
    let limit = match pace {
        Loop::Closed(lanes) => lanes,
        Loop::Open(_) | Loop::Recorded => most_open,
    };
    let mut done = Done { tally, ..Done::default() };
    let mut open: JoinSet<Ended> = JoinSet::new();
    let mut progress = Progress::new(begin);
    // The next request and when it is due; none: nothing more is sent.
    let mut next = match prepare(&mut pace, &mut work, begin)? {
        Some(prepared) => Some(prepared),
        None => anyhow::bail!("there is nothing to send"),
    };
    let mut last_answer = begin + warmup;
    loop {
        // What is due, all of it.
        while let Some((due, _)) = &next
            && open.len() < limit
        {
            let (now, closed) = (Instant::now(), matches!(pace, Loop::Closed(_)));
            if *due > now && !closed {
                break;
            }
            let due = if closed { now } else { *due };
            let enough = requests.is_some_and(|requests| done.sent >= requests);
            if enough || end.is_some_and(|end| due >= end) {
                next = None;
                break;
            }
            let counts = due >= begin + warmup;
            let Some((_, body)) = next.take() else { break };
            let (target, request) = (Arc::clone(&target), target.request("POST", path, &body));
            open.spawn(async move { Ended { told: target.ask(&request, due, stream, patience).await, counts } });
            *(if counts { &mut done.sent } else { &mut done.warm }) += 1;
            done.most_open = done.most_open.max(open.len());
            next = prepare(&mut pace, &mut work, begin)?;
        }
        if next.is_none() && open.is_empty() {
            break;
        }
        let may_send = open.len() < limit;
        let due = next.as_ref().map(|(due, _)| *due).filter(|_| may_send);
        tokio::select! {
            // Answers first: they must be counted when they come. Nothing is lost when another branch goes on.
            biased;
            ended = open.join_next(), if !open.is_empty() => {
                if let Some(Ok(Ended { told, counts })) = ended && counts {
                    last_answer = Instant::now();
                    done.tally.add(told.fate);
                    told.gaps.into_iter().for_each(|gap| done.tally.itl.add(gap));
                }
            }
            () = sleep_until(due.unwrap_or(begin)), if due.is_some() => {}
            () = sleep_until(end.unwrap_or(begin)), if end.is_some() && next.is_some() && !may_send => {}
            () = &mut stop => {
                done.interrupted = true;
                break;
            }
            _ = progress.ticks.tick(), if progress.terminal => progress.show(&done, open.len()),
        }
        // An open loop that could not send by its end: those are told, not forgotten.
        if let (Some((due, _)), Some(end)) = (&next, end)
            && Instant::now() >= end
            && *due < end
            && open.len() >= limit
            && !matches!(pace, Loop::Closed(_))
        {
            while let Some((due, _)) = &next
                && *due < end
            {
                done.not_sent += 1;
                next = prepare(&mut pace, &mut work, begin)?;
            }
            next = None;
        }
    }
    progress.clear();
    (0..open.len()).for_each(|_| done.tally.add(Fate::CutOff));
    if !open.is_empty() {
        last_answer = Instant::now();
    }
    open.shutdown().await;
    done.took = last_answer.saturating_duration_since(begin + warmup);
    Ok((done, work))
}

fn prepare(pace: &mut Loop, work: &mut Work, begin: Instant) -> anyhow::Result<Option<(Instant, Vec<u8>)>> {
    let Some(ask) = work.next()? else { return Ok(None) };
    let due = match pace {
        Loop::Open(arrivals) => begin + arrivals.next(),
        Loop::Closed(_) => begin,
        Loop::Recorded => begin + ask.at.unwrap_or_default(),
    };
    Ok(Some((due, ask.body)))
}

/// A line that is written over and over, on a terminal.
struct Progress {
    ticks: tokio::time::Interval,
    begin: Instant,
    shown: bool,
    terminal: bool,
}

impl Progress {
    fn new(begin: Instant) -> Self {
        let mut ticks = interval_at(begin + PROGRESS, PROGRESS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Self { ticks, begin, shown: false, terminal: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, done: &Done, open: usize) {
        let tally = &done.tally;
        let seconds = self.begin.elapsed().as_secs();
        let (ttft, itl) = (tally.ttft.permille(500), tally.itl.permille(500));
        eprint!(
            "\r\x1b[K{seconds:>4} s  {} answered, {} failed, {open} open{}  TTFT p50 {ttft:.0} ms, ITL p50 {itl:.1} ms",
            tally.answered,
            tally.failed,
            if done.sent == 0 { format!(", {} in the warm-up", done.warm) } else { String::new() },
        );
        self.shown = true;
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
