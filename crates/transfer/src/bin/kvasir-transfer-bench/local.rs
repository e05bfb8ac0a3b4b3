//! What nothing between two processes can beat: a memcpy, and the engine within one process.
//!
//! Both copy the same blocks in the same order, in turn, so that what else the machine does hits both alike.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::Result;
use kvasir_transfer::{Access, Config, GrantRange, LocalNet, Op};

use crate::{
    cli::{self, Direction, Pages},
    engine::Buffer,
    initiator::{Far, Job, Plan, Tally, Until},
    measure::{Histogram, cpu_seconds},
    output::{Found, Output},
    pattern,
};

/// How often the two take turns.
const TURNS: u32 = 5;

/// Measures every block size.
pub fn run(options: &cli::Local) -> Result<()> {
    let load = &options.load;
    let plans: Vec<_> =
        load.block.iter().map(|&block| Plan::cut(load, block, options.batch.into(), 1, 1)).collect::<Result<_>>()?;
    let net = LocalNet::new();
    let near = Buffer::with(Config::default(), net.clone(), options.memory, load.working_set)?;
    let far = Buffer::with(Config::default(), net, options.memory, load.working_set)?;
    let grant = far.engine.grant(vec![GrantRange { offset: far.base, len: load.working_set, access: Access::Read }])?;
    let opened = Far { descriptor: far.engine.descriptor(), key: grant.key(), base: far.base };
    let mut plain = Plain::new(usize::try_from(load.working_set)?, options.memory.huge_pages);
    let mut output = Output::new(load.json);
    for plan in &plans {
        let job = Job { engine: &near.engine, near_base: near.base, far: &opened, op: Op::Read, plan };
        job.run(Until::Pass)?;
        plain.copy(plan, Until::Pass);
        let turn = Until::After(Duration::from_secs_f64(load.duration / f64::from(TURNS)));
        let (mut memcpy, mut local) = (Sum::default(), Sum::default());
        for _ in 0..TURNS {
            memcpy.add(|| Ok(plain.copy(plan, turn)))?;
            local.add(|| job.run(turn))?;
        }
        output.show(&memcpy.found("memcpy", options, plan))?;
        output.show(&local.found("local", options, plan))?;
    }
    grant.revoke().wait();
    Ok(())
}

/// Two buffers of this process and no engine.
struct Plain {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Plain {
    fn new(len: usize, pages: Pages) -> Self {
        let mut from = vec![0; len];
        let mut into = vec![0; len];
        if pages != Pages::Never {
            // What the engine's memory gets, a memcpy's gets, too.
            prefer_huge_pages(&mut from);
            prefer_huge_pages(&mut into);
        }
        pattern::fill(0, 0, &mut from);
        pattern::fill(1, 0, &mut into);
        Self { from, into }
    }

    fn copy(&mut self, plan: &Plan, until: Until) -> Tally {
        let mut tally = Tally::default();
        let started = Instant::now();
        for batch in (0..plan.batches).cycle() {
            let done = match until {
                Until::Pass => tally.latencies.taken() == plan.batches,
                Until::After(time) => started.elapsed() >= time,
            };
            if done {
                break;
            }
            let begun = Instant::now();
            for (near, far) in plan.blocks(batch) {
                let [near, far, len] = [near, far, plan.block].map(|bytes| bytes as usize);
                self.into[near..near + len].copy_from_slice(&self.from[far..far + len]);
            }
            black_box(&mut self.into);
            tally.latencies.record(begun.elapsed());
        }
        tally.seconds = started.elapsed().as_secs_f64();
        tally
    }
}

/// Asks for transparent huge pages for memory that has not been touched yet. A wish: there may be none.
fn prefer_huge_pages(bytes: &mut [u8]) {
    // The system call wants a page's start; the page before may hold something else, which it does not hurt.
    let start = bytes.as_ptr().addr() & !0xfff;
    let len = bytes.as_ptr().addr() + bytes.len() - start;
    // SAFETY: the advice changes what pages the kernel maps there, never what they hold.
    unsafe { libc::madvise(bytes.as_mut_ptr().with_addr(start).cast(), len, libc::MADV_HUGEPAGE) };
}

/// The turns of one of the two.
#[derive(Default)]
struct Sum {
    latencies: Histogram,
    seconds: f64,
    cpu: f64,
}

impl Sum {
    fn add(&mut self, turn: impl FnOnce() -> Result<Tally>) -> Result<()> {
        let before = cpu_seconds();
        let tally = turn()?;
        self.cpu += cpu_seconds() - before;
        self.latencies.merge(&tally.latencies);
        self.seconds += tally.seconds;
        Ok(())
    }

    fn found(&self, over: &str, options: &cli::Local, plan: &Plan) -> Found {
        let batches = self.latencies.taken();
        let bytes = batches * plan.batch * plan.block;
        Found {
            over: over.to_owned(),
            op: Direction::Read,
            block_bytes: plan.block,
            batch_blocks: options.batch,
            threads: 1,
            outstanding: 1,
            working_set_bytes: plan.pass_bytes(),
            seconds: self.seconds,
            bytes,
            batches,
            gb_per_s: bytes as f64 / self.seconds / 1e9,
            latency_us: self.latencies.latency(),
            cpu_s_per_gib: self.cpu * f64::from(1 << 30) / bytes as f64,
            far_cpu_s_per_gib: None,
            verified_bytes: None,
        }
    }
}
