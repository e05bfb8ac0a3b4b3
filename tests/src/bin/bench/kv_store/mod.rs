//! The KV store beside Mooncake Store: values put and got, single and in batches, prompts looked up; and what a prompt costs
//! on one node and on more.
//!
//! Separate processes on loopback on either side: ours etcd, a store node and a client with an arena of its own; theirs the
//! master, a client that lends its memory and a client that puts and gets. Sides take turns within a repetition, and who
//! goes first changes; ratios are taken within a repetition. Everybody moves the same number of values of the same sizes,
//! into memory that was touched before the first figure counts; nobody is measured before a check that the bytes that come
//! back are those that were put. Ours verifies the checksum of every block it gets, and of every block that is put; Mooncake
//! has no checksums.
//!
//! Ours goes by the transport it would choose, which on one host is shared memory; by TCP, as Mooncake goes, it has rows of
//! its own, without a goal.
//!
//! Beside that: what a node's index takes in memory, what a prompt in the store saves another prefill worker than the one
//! that computed it, and what is hit and how evenly by simulation.

mod goals;
mod mooncake;
mod ours;
mod plan;
mod simulation;

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::{Value, json};

use self::{
    goals::middle,
    mooncake::Mooncake,
    ours::Ours,
    plan::{
        CALLERS, Figure, Found, Load, NODES, PROMPT, SIZES, SMOKE_WORKING_SET, SPREAD, Side, WORKING_SET, Way, batches,
    },
};
use crate::{
    Options,
    child::Child,
    report::{Report, Row},
    shared_prompt,
};

/// As many repetitions as keep a whole run below a quarter of an hour.
const REPETITIONS: usize = 5;
/// How long lookups are counted.
const LOOKUP_SECONDS: f64 = 1.0;
/// How many bytes one figure of the spread is made of: seconds' worth, because processor time is told in steps of
/// ten milliseconds.
const SPREAD_BYTES: u64 = 4 << 30;
/// Blocks of a large node's index, and of one that only shows that it works.
const INDEX_BLOCKS: u64 = 10_000_000;
const SMOKE_INDEX_BLOCKS: u64 = 1_000_000;

/// Measures, and says how far it is: a run takes minutes.
pub async fn run(options: &Options) -> Result<Report> {
    let repetitions = options.repetitions.min(REPETITIONS);
    let working_set = if options.smoke { SMOKE_WORKING_SET } else { WORKING_SET };
    let dir = tempfile::tempdir()?;
    let (mut found, started) = (Found::default(), Instant::now());
    // First what can fail in ways of its own: nothing long is lost then.
    let mut beside = Report::new("kv-store");
    beside.push(index(options.smoke)?);
    shared_prompt::add(options, &mut beside).await?;
    simulation::rows(options.smoke)?.into_iter().for_each(|row| beside.push(row));
    println!("{:>4} s  the index, a shared prompt, simulations", started.elapsed().as_secs());
    for block in SIZES {
        let mut sides = Sides::start(block, working_set, dir.path(), &mut found).await?;
        for repetition in 0..repetitions {
            sides.repetition(repetition, &mut found)?;
            println!(
                "{:>4} s  {} of {repetitions} with values of {} KiB",
                started.elapsed().as_secs(),
                repetition + 1,
                block >> 10
            );
            for load in sides.loads() {
                let all: Vec<_> = Side::ALL.map(|side| middle(&found, side, load)).into();
                println!("        {}: {}", load.name(), all.join(", "));
            }
        }
    }
    spread(repetitions, options.smoke, dir.path(), &mut found).await?;
    println!("{:>4} s  done", started.elapsed().as_secs());
    let mut report = Report::new("kv-store");
    goals::rows(&found).into_iter().chain(beside.rows).for_each(|row| report.push(row));
    Ok(report)
}

/// What the index of a node takes in memory, by a process that holds nothing else.
fn index(smoke: bool) -> Result<Row> {
    let blocks = if smoke { SMOKE_INDEX_BLOCKS } else { INDEX_BLOCKS };
    let program = workspace::profile_dir().join("examples/kvasir-index-bench");
    let output = Command::new(&program).arg(blocks.to_string()).output();
    let output = output.with_context(|| program.display().to_string())?;
    ensure!(output.status.success(), "the index: {}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout)?;
    let each = said["bytes_per_block"].as_f64().with_context(|| format!("no bytes_per_block in {said}"))?;
    Ok(Row::new(format!("index, {} million blocks", blocks / 1_000_000), each, "bytes a block").under(100.0))
}

/// All that is running while values of one size are measured. Fresh for each size: a store that is full of values of another
/// size measures its eviction, not its speed.
struct Sides {
    auto: Ours,
    tcp: Ours,
    mooncake: Option<Mooncake>,
    block: u64,
    values: u64,
    /// Names the values of one load: nobody has had them before.
    seed: u64,
}

impl Sides {
    async fn start(block: u64, working_set: u64, dir: &Path, found: &mut Found) -> Result<Self> {
        let auto = Ours::start("auto", json!("auto"), 1, working_set, dir).await?;
        let tcp = Ours::start("tcp", json!(["tcp"]), 1, working_set, dir).await?;
        let mooncake = if found.is_missing(Side::Mooncake) { None } else { rival(working_set, dir, found) };
        let mut sides = Self { auto, tcp, mooncake, block, values: working_set / block, seed: 0 };
        for side in Side::ALL {
            if let Err(error) = sides.warm_up(side) {
                ensure!(side == Side::Mooncake, "{}: {error:#}", side.name());
                say_missing(&error, found);
            }
        }
        Ok(sides)
    }

    /// All loads with values of this size.
    fn loads(&self) -> Vec<Load> {
        let block = self.block;
        let values = batches(block)
            .into_iter()
            .flat_map(|batch| [Way::Put, Way::Get].map(|way| Load::Values { way, block, batch }));
        let lookups = CALLERS.map(|callers| Load::Lookups { callers });
        values.chain(lookups.into_iter().filter(|_| block == SIZES[0])).collect()
    }

    fn client(&mut self, side: Side) -> Option<&mut Child> {
        match side {
            Side::Auto => Some(&mut self.auto.client),
            Side::Tcp => Some(&mut self.tcp.client),
            Side::Mooncake => self.mooncake.as_mut().map(|mooncake| &mut mooncake.client),
        }
    }

    /// Fills the store twice, so that all of its memory has been touched, and sees whether what comes back is what was put.
    fn warm_up(&mut self, side: Side) -> Result<()> {
        let batch = batches(self.block)[1];
        for round in 0..2 {
            self.seed += 1;
            let [fill, put, get, check] = ["fill", "put", "get", "check"].map(|what| self.ask(what, self.seed, batch));
            let spoil = self.ask("fill", 1 << 40, batch);
            let Some(client) = self.client(side) else { return Ok(()) };
            for ask in [&fill, &put, &spoil, &get] {
                client.ask(ask).with_context(|| format!("warming up, round {round}"))?;
            }
            ensure!(client.ask(&check)?["right"] == true, "other bytes came back than were put");
            self.clear(side)?;
        }
        Ok(())
    }

    fn ask(&self, what: &str, seed: u64, batch: u64) -> Value {
        json!({"do": what, "seed": seed, "block": self.block, "values": self.values, "batch": batch})
    }

    fn clear(&mut self, side: Side) -> Result<()> {
        match side {
            Side::Mooncake => self.mooncake.as_mut().map_or(Ok(()), Mooncake::clear),
            Side::Auto => self.auto.clear(),
            Side::Tcp => self.tcp.clear(),
        }
    }

    /// Measures every load once on every side.
    fn repetition(&mut self, repetition: usize, found: &mut Found) -> Result<()> {
        let mut turn = Side::ALL;
        turn.rotate_left(repetition % Side::ALL.len());
        for batch in batches(self.block) {
            self.seed += 1;
            for side in turn {
                if found.is_missing(side) {
                    continue;
                }
                match self.measure(side, batch) {
                    Ok(figures) => figures.into_iter().for_each(|(load, figure)| found.add(side, load, figure)),
                    // A rival may break; its row says how, and the others go on.
                    Err(error) if side == Side::Mooncake => say_missing(&error, found),
                    Err(error) => return Err(error.context(side.name())),
                }
            }
        }
        Ok(())
    }

    /// Puts all values, gets them back, and looks for them.
    fn measure(&mut self, side: Side, batch: u64) -> Result<Vec<(Load, Figure)>> {
        let (block, seed) = (self.block, self.seed);
        let [fill, put, get] = ["fill", "put", "get"].map(|what| self.ask(what, seed, batch));
        let mut lookup = self.ask("lookup", seed, batch);
        let lookups = if block == SIZES[0] && batch > 1 && side != Side::Tcp { CALLERS.as_slice() } else { &[] };
        let client = self.client(side).context("it was not started")?;
        client.ask(&fill)?;
        let mut figures = Vec::new();
        for (way, ask) in [(Way::Put, put), (Way::Get, get)] {
            figures.push((Load::Values { way, block, batch }, figure(&client.ask(&ask)?)?));
        }
        for &callers in lookups {
            lookup["keys"] = PROMPT.into();
            lookup["callers"] = callers.into();
            lookup["seconds"] = LOOKUP_SECONDS.into();
            figures.push((Load::Lookups { callers }, figure(&client.ask(&lookup)?)?));
        }
        self.clear(side)?;
        Ok(figures)
    }
}

fn rival(working_set: u64, dir: &Path, found: &mut Found) -> Option<Mooncake> {
    Mooncake::start(working_set, dir).inspect_err(|error| say_missing(error, found)).ok()
}

fn say_missing(error: &anyhow::Error, found: &mut Found) {
    println!("{} is left out: {error:#}", Side::Mooncake.name());
    found.miss(Side::Mooncake, &format!("{error:#}"));
}

fn figure(answer: &Value) -> Result<Figure> {
    let number = |name: &str| answer[name].as_f64().with_context(|| format!("{name} is missing in {answer}"));
    let seconds = number("seconds")?;
    Ok(Figure {
        gb_per_s: number("bytes")? / seconds / 1e9,
        calls_per_s: number("calls")? / seconds,
        p99_us: number("p99_us")?,
        p50_us: number("p50_us")?,
    })
}

/// The same prompts on one node and on more: what each costs in processor time, all processes together.
async fn spread(repetitions: usize, smoke: bool, dir: &Path, found: &mut Found) -> Result<()> {
    let (block, arena) = (SIZES[0], SMOKE_WORKING_SET);
    let values = arena / block;
    let ask = |what: &str, blocks: u64| {
        // The same values whatever the prompts: groups begin at the same blocks.
        json!({"do": what, "seed": 1, "block": block, "values": values, "batch": blocks})
    };
    let mut clusters = Vec::new();
    for nodes in NODES {
        let mut ours = Ours::start(&format!("{nodes}-nodes"), json!("auto"), nodes, arena, dir).await?;
        for what in ["fill", "put", "get"] {
            ours.client.ask(&ask(what, SPREAD[0]))?;
        }
        clusters.push((nodes, ours));
    }
    let rounds = if smoke { 1 } else { SPREAD_BYTES / arena };
    for repetition in 0..repetitions {
        clusters.rotate_left(repetition % NODES.len());
        for (nodes, ours) in &mut clusters {
            for blocks in SPREAD {
                let before = ours.cpu_seconds();
                for _ in 0..rounds {
                    ours.client.ask(&ask("get", blocks))?;
                }
                let prompts = (rounds * values / blocks) as f64;
                let each = (ours.cpu_seconds() - before) * 1e6 / prompts;
                found.spread.entry((blocks, *nodes)).or_default().push(each);
            }
        }
    }
    Ok(())
}
