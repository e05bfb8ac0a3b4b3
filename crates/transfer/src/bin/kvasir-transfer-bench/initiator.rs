//! The side that submits: threads that keep batches in progress through a working set, timed, and checked if asked for.
//!
//! The working set is cut into batches, the batches among the threads; each thread goes round its share. A pass through all
//! of it comes first and is not counted: it makes the connections and touches every page on both sides. Processor time of
//! both sides is taken around what is timed.

use std::{
    collections::VecDeque,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvasir_transfer::{Batch, Op, Range, TransferEngine};
use kvasir_types::{Deadline, GrantKey, SegmentDescriptor, TransportKind};

use crate::{
    cli::{self, Direction, size_name},
    control::{Answer, Ask, Line, unexpected},
    engine::Buffer,
    measure::{Histogram, cpu_seconds},
    output::{Found, Output},
    pattern::Walk,
};

/// No batch takes as long; one that does is lost, and the run fails rather than hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures what was asked for, in turn.
pub fn run(options: &cli::Initiator) -> Result<()> {
    let loads = options.load.block.iter().flat_map(|&block| options.op.iter().map(move |&op| (block, op)));
    let loads: Vec<_> = loads.map(|(block, op)| Ok((op, Plan::new(options, block)?))).collect::<Result<_>>()?;
    let buffer = Buffer::new(&options.engine, options.load.working_set)?;
    let mut line = Line::connect(&options.control)?;
    let mut output = Output::new(options.load.json);
    for (op, plan) in loads {
        output.show(&measure(options, &buffer, &mut line, op, &plan)?)?;
    }
    Ok(())
}

/// How the working set is cut.
pub struct Plan {
    pub block: u64,
    pub batch: u64,
    /// Batches in the working set.
    pub batches: u64,
    pub threads: u64,
    pub outstanding: usize,
    pub walk: Walk,
}

impl Plan {
    fn new(options: &cli::Initiator, block: u64) -> Result<Self> {
        let (batch, threads, outstanding) =
            (options.batch.into(), options.threads.into(), options.outstanding as usize);
        Self::cut(&options.load, block, batch, threads, outstanding)
    }

    /// Cuts; batches in progress never share a byte, so there must be enough of them.
    pub fn cut(load: &cli::Load, block: u64, batch: u64, threads: u64, outstanding: usize) -> Result<Self> {
        let batches = load.working_set / (block * batch);
        let wanted = threads * outstanding as u64;
        ensure!(
            batches >= wanted,
            "a working set of {} holds {batches} batches of {batch} x {}, but {wanted} are to be in progress at once",
            size_name(load.working_set),
            size_name(block),
        );
        Ok(Self { block, batch, batches, threads, outstanding, walk: Walk::new(batches * batch, load.sequential) })
    }

    /// Bytes that one pass moves.
    pub fn pass_bytes(&self) -> u64 {
        self.batches * self.batch * self.block
    }

    /// The batches of a thread.
    fn share(&self, thread: u64) -> std::ops::Range<u64> {
        self.batches * thread / self.threads..self.batches * (thread + 1) / self.threads
    }

    /// (near offset, far offset) of every block of a batch.
    pub fn blocks(&self, batch: u64) -> impl Iterator<Item = (u64, u64)> {
        let first = batch * self.batch;
        (first..first + self.batch).map(|block| (block * self.block, self.walk.far(block) * self.block))
    }
}

/// Where batches go.
#[derive(Clone)]
pub struct Far {
    pub descriptor: SegmentDescriptor,
    pub key: GrantKey,
    pub base: u64,
}

/// What threads share in one run.
pub struct Job<'a> {
    pub engine: &'a TransferEngine,
    pub near_base: u64,
    pub far: &'a Far,
    pub op: Op,
    pub plan: &'a Plan,
}

/// How long a run goes on.
#[derive(Clone, Copy)]
pub enum Until {
    /// Every batch once.
    Pass,
    /// So long, round and round.
    After(Duration),
}

/// What a run moved.
#[derive(Default)]
pub struct Tally {
    pub latencies: Histogram,
    pub seconds: f64,
    pub over: Option<TransportKind>,
}

impl Job<'_> {
    /// Moves batches on all threads.
    pub fn run(&self, until: Until) -> Result<Tally> {
        let barrier = Arc::new(Barrier::new(self.plan.threads as usize));
        let started = Instant::now();
        let tallies: Vec<Result<Tally>> = thread::scope(|scope| {
            let thread = |thread| {
                let barrier = Arc::clone(&barrier);
                scope.spawn(move || {
                    barrier.wait();
                    self.run_thread(thread, until)
                })
            };
            let threads: Vec<_> = (1..self.plan.threads).map(thread).collect();
            // The first share on this very thread: with one thread, none is started.
            barrier.wait();
            let first = self.run_thread(0, until);
            let rest = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?);
            std::iter::once(first).chain(rest).collect()
        });
        let mut all = Tally { seconds: started.elapsed().as_secs_f64(), ..Tally::default() };
        for tally in tallies {
            let tally = tally?;
            all.latencies.merge(&tally.latencies);
            all.over = all.over.or(tally.over);
        }
        Ok(all)
    }

    fn run_thread(&self, thread: u64, until: Until) -> Result<Tally> {
        let share = self.plan.share(thread);
        let mut batches = share.clone().cycle();
        let mut left = match until {
            Until::Pass => share.end - share.start,
            Until::After(_) => u64::MAX,
        };
        let started = Instant::now();
        let may_go_on = |left: u64| match until {
            Until::Pass => left > 0,
            Until::After(time) => started.elapsed() < time,
        };
        let mut tally = Tally::default();
        let mut in_progress = VecDeque::with_capacity(self.plan.outstanding);
        loop {
            while in_progress.len() < self.plan.outstanding && may_go_on(left) {
                let batch = self.batch(batches.next().context("a share has batches")?);
                left -= 1;
                in_progress.push_back((Instant::now(), self.engine.submit(batch)));
            }
            let Some((submitted, transfer)) = in_progress.pop_front() else { break };
            let report = transfer.wait()?;
            // One at a time: as its caller sees it, waking up included. Several: it may have ended while an earlier
            // one was waited for, so the engine's own figure.
            let alone = self.plan.outstanding == 1;
            tally.latencies.record(if alone { submitted.elapsed() } else { report.elapsed });
            tally.over = Some(report.transport);
        }
        Ok(tally)
    }

    fn batch(&self, batch: u64) -> Batch {
        let block = self.plan.block;
        let ranges = self.plan.blocks(batch).map(|(near, far)| Range {
            local: self.near_base + near,
            remote: self.far.base + far,
            len: block,
        });
        let deadline = Deadline::after(PATIENCE);
        Batch::new(self.op, self.far.descriptor.clone(), self.far.key, ranges.collect(), deadline)
    }
}

fn measure(options: &cli::Initiator, buffer: &Buffer, line: &mut Line, op: Direction, plan: &Plan) -> Result<Found> {
    let far = match line.ask(&Ask::Open { op, bytes: options.load.working_set })? {
        Answer::Opened { descriptor, key, base } => Far { descriptor, key: GrantKey(key), base },
        other => return Err(unexpected(&other)),
    };
    let job = Job { engine: &buffer.engine, near_base: buffer.base, far: &far, op: op.op(), plan };
    job.run(Until::Pass)?;
    let time = Duration::from_secs_f64(options.load.duration);
    let mut sum = Tally::default();
    let (mut near_cpu, mut far_cpu, mut verified) = (0.0, 0.0, 0);
    let mut seed = 1;
    loop {
        if options.verify {
            prepare(buffer, line, op, plan, seed)?;
        }
        let before = (cpu_seconds(), ask_cpu(line)?);
        let tally = job.run(if options.verify { Until::Pass } else { Until::After(time) })?;
        let after = (ask_cpu(line)?, cpu_seconds());
        near_cpu += after.1 - before.0;
        far_cpu += after.0 - before.1;
        sum.latencies.merge(&tally.latencies);
        sum.seconds += tally.seconds;
        sum.over = tally.over;
        if options.verify {
            verify(buffer, line, op, plan, seed)?;
            verified += plan.pass_bytes();
        }
        seed += 1;
        if sum.seconds >= time.as_secs_f64() {
            break;
        }
    }
    let batches = sum.latencies.taken();
    let bytes = batches * plan.batch * plan.block;
    let gib = bytes as f64 / f64::from(1 << 30);
    Ok(Found {
        over: sum.over.map_or_else(|| "nothing".to_owned(), |kind| kind.to_string()),
        op,
        block_bytes: plan.block,
        batch_blocks: options.batch,
        threads: options.threads,
        outstanding: options.outstanding,
        working_set_bytes: plan.pass_bytes(),
        seconds: sum.seconds,
        bytes,
        batches,
        gb_per_s: bytes as f64 / sum.seconds / 1e9,
        latency_us: sum.latencies.latency(),
        cpu_s_per_gib: near_cpu / gib,
        far_cpu_s_per_gib: Some(far_cpu / gib),
        verified_bytes: options.verify.then_some(verified),
    })
}

fn ask_cpu(line: &mut Line) -> Result<f64> {
    match line.ask(&Ask::Cpu)? {
        Answer::Cpu { seconds } => Ok(seconds),
        other => Err(unexpected(&other)),
    }
}

/// Puts what is to be moved where it comes from, and something else where it goes to.
fn prepare(buffer: &Buffer, line: &mut Line, op: Direction, plan: &Plan, seed: u64) -> Result<()> {
    let far_seed = match op {
        Direction::Read => Some(seed),
        Direction::Write => None,
    };
    let near_seed = if op == Direction::Write { seed } else { u64::MAX };
    for (near, far) in (0..plan.batches).flat_map(|batch| plan.blocks(batch)) {
        buffer.fill_for(near_seed, far, near, plan.block)?;
    }
    match line.ask(&Ask::Fill { seed: far_seed, bytes: plan.pass_bytes() })? {
        Answer::Filled => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Fails unless every byte has arrived.
fn verify(buffer: &Buffer, line: &mut Line, op: Direction, plan: &Plan, seed: u64) -> Result<()> {
    if op == Direction::Write {
        return match line.ask(&Ask::Check { seed, bytes: plan.pass_bytes() })? {
            Answer::Checked { first_wrong: None } => Ok(()),
            Answer::Checked { first_wrong: Some(at) } => {
                bail!("the byte at {at:#x} of the target is wrong after a write")
            }
            other => Err(unexpected(&other)),
        };
    }
    for (near, far) in (0..plan.batches).flat_map(|batch| plan.blocks(batch)) {
        if let Some(at) = buffer.first_wrong(seed, far, near, plan.block)? {
            bail!("the byte at {at:#x} of the initiator is wrong after a read");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use clap::Parser;

    use super::*;

    fn options(arguments: &[&str]) -> cli::Initiator {
        let program = ["kvasir-transfer-bench", "initiator", "here"];
        let cli = cli::Cli::parse_from(program.iter().chain(arguments));
        let cli::Command::Initiator(options) = cli.command else { panic!("asked for an initiator") };
        options
    }

    #[test]
    fn threads_share_all_batches_and_batches_all_blocks() {
        let options = options(&["--working-set", "1MiB", "--batch", "3", "--threads", "4", "--outstanding", "5"]);
        let plan = Plan::new(&options, 4096).unwrap();
        assert_eq!(plan.batches, 85);
        let batches: Vec<_> = (0..4).flat_map(|thread| plan.share(thread)).collect();
        assert!(batches.iter().copied().eq(0..85));
        let (near, far): (HashSet<_>, HashSet<_>) = batches.iter().flat_map(|&batch| plan.blocks(batch)).unzip();
        assert_eq!((near.len(), far.len()), (255, 255));
        assert_eq!(near.iter().chain(&far).max(), Some(&(254 * 4096)));
    }

    #[test]
    fn batches_that_would_overlap_are_refused() {
        let options = options(&["--working-set", "1MiB", "--batch", "16", "--threads", "4", "--outstanding", "5"]);
        assert!(Plan::new(&options, 4096).is_err_and(|error| error.to_string().contains("holds 16 batches")));
    }
}
