//! `kvasir-replay`: request traces against a KV store. See `--help`.

#![forbid(unsafe_code)]

use std::{
    fs::File,
    io::{BufReader, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::Parser;
use kvasir_kv_cache::POLICIES;
use kvasir_replay::{
    CONVERSATION, generate,
    live::{self, LiveArgs},
    report::{self, Row},
    simulate::{Plan, simulate},
    size::Size,
    trace::Trace,
};

/// Replays request traces against a KV store, simulated or running, or against a whole cluster, and says what share of what
/// was asked for was there.
///
/// A trace is a file in Mooncake's format (JSON lines with timestamp, input_length, output_length and hash_ids, one id for
/// each block of the prompt; equal ids mean equal prefixes), or the name of one that comes with the program: conversation
/// (one hour of an online service, recorded), chat, agents, documents, batch, shift (made up from --seed).
///
/// A hit is a block of the longest run that is there from the prompt's start. The bound is what a store without limit hits.
#[derive(Debug, Parser)]
#[command(
    name = "kvasir-replay",
    after_help = "Examples:
  # which policy for a store as large as 5, 10 and 30 % of what is asked for?
  kvasir-replay --simulate conversation --memory 5% --memory 10% --memory 30%

  # does the load spread over many nodes?
  kvasir-replay --simulate conversation --nodes 4 --nodes 64 --nodes 256 --policy hit-density

  # own trace, blocks of 4 MiB, 64 GiB of memory and 1 TiB of disk in all
  kvasir-replay --simulate my.jsonl --block-bytes 4194304 --memory 64GiB --disk 1TiB --json out.json

  # write a made-up trace to look at
  kvasir-replay --generate agents --seed 7 > agents.txt

  # the store nodes of a running cluster, twice: what does the second find?
  kvasir-replay --store conversation --limit 2000 --repeat 2 --etcd 127.0.0.1:2379 --json out.json

  # the same at ten times the trace's own pace, 2 MiB for each block of the trace, put into the store in 32 blocks of 64 KiB
  kvasir-replay --store conversation --limit 2000 --speed 10 --block-bytes 2097152 --split 32

  # a whole cluster, through its router
  kvasir-replay --router http://127.0.0.1:8000 chat --limit 200 --concurrency 4

Exit status: 0 replayed; 1 not, or blocks came back with wrong bytes, or no request was answered; 2 wrong usage"
)]
struct Args {
    /// Files, or names of traces that come with the program.
    #[arg(value_name = "TRACE", required_unless_present = "generate")]
    traces: Vec<String>,

    /// Simulate a store: its own placement and eviction, in this process, without bytes.
    #[arg(long, conflicts_with = "generate")]
    simulate: bool,

    /// Write a made-up trace to standard output: chat, agents, documents, batch or shift.
    #[arg(long, value_name = "NAME", conflicts_with = "traces")]
    generate: Option<String>,

    /// What made-up traces are made from.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// How many nodes share the load, 1 to 256; may be given several times.
    #[arg(long, default_values_t = [1])]
    nodes: Vec<usize>,

    /// Eviction policy of the memory: lru, s3-fifo or hit-density; may be given several times. All of them if none is given.
    #[arg(long)]
    policy: Vec<String>,

    /// Eviction policy of the disk.
    #[arg(long, value_name = "POLICY", default_value = "lru")]
    disk_policy: String,

    /// How often simulated nodes hear what the others have learned, in milliseconds of the trace; 0: never.
    #[arg(long, value_name = "MS", default_value_t = 15_000)]
    exchange_ms: u64,

    /// Memory of all nodes together: 5% (of the trace's distinct blocks), 5000 (blocks) or 10GiB; may be given several times.
    #[arg(long, value_name = "SIZE", default_values = ["5%", "10%", "30%"])]
    memory: Vec<Size>,

    /// Disk of all nodes together, in the same units.
    #[arg(long, value_name = "SIZE", default_value = "0")]
    disk: Size,

    /// Bytes of one block of the trace: for sizes in bytes [default: 1048576], and of what --store moves [default: 65536].
    #[arg(long)]
    block_bytes: Option<u64>,

    /// Consecutive blocks of the trace that are placed together. Mooncake's traces have blocks of 512 tokens: as many as
    /// one placement group of 32 blocks of 16 tokens.
    #[arg(long, default_value_t = 1)]
    group_blocks: usize,

    /// Also write everything to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    #[command(flatten)]
    live: LiveArgs,
}

/// Bytes of a block in sizes, unless asked otherwise.
const BLOCK_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    match run_as_told(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_as_told(args: &Args) -> anyhow::Result<()> {
    if let Some(name) = &args.generate {
        let trace = generate::generate(name, args.seed)
            .with_context(|| format!("there is no trace {name:?} to make; there are {}", generate::NAMES.join(", ")))?;
        return std::io::stdout().write_all(trace.to_text().as_bytes()).context("the trace could not be written");
    }
    if args.live.wanted() {
        return replay(args);
    }
    if !args.simulate {
        bail!("say --simulate, --store or --router URL");
    }
    let mut rows = Vec::new();
    for name in &args.traces {
        run(args, name, &load(name, args.seed)?, &mut rows)?;
    }
    print!("{}", report::table(&rows));
    if let Some(path) = &args.json {
        let failed = || format!("{} could not be written", path.display());
        serde_json::to_writer_pretty(File::create(path).with_context(failed)?, &rows).with_context(failed)?;
    }
    Ok(())
}

/// Replays against what runs. Whatever it says of the run, the rows are written.
fn replay(args: &Args) -> anyhow::Result<()> {
    // Before the run, which may take long: a file that can't be written is said at once.
    let failed = |path: &PathBuf| format!("{} could not be written", path.display());
    let json = args.json.as_ref().map(|path| File::create(path).with_context(|| failed(path))).transpose()?;
    let load = |name: &String| anyhow::Ok((short(name).to_owned(), Arc::new(load(name, args.seed)?)));
    let traces = args.traces.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let rows = live::run(&args.live, args.block_bytes, &traces)?;
    if let (Some(file), Some(path)) = (json, &args.json) {
        serde_json::to_writer_pretty(file, &rows).with_context(|| failed(path))?;
    }
    live::verdict(&rows)
}

/// A trace's name without its folder.
fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn load(name: &str, seed: u64) -> anyhow::Result<Trace> {
    if name == "conversation" {
        return Ok(Trace::read(CONVERSATION.as_bytes())?);
    }
    if let Some(trace) = generate::generate(name, seed) {
        return Ok(trace);
    }
    let file = File::open(name).with_context(|| format!("trace {name} can't be opened"))?;
    Trace::read(BufReader::new(file)).with_context(|| format!("trace {name} can't be used"))
}

fn run(args: &Args, name: &str, trace: &Trace, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    let (requests, blocks) = (trace.requests.len(), trace.references);
    eprintln!(
        "{name}: {requests} requests for {blocks} blocks, {} distinct: bound {:.4}",
        trace.distinct,
        trace.bound()
    );
    let policies: Vec<&str> = match args.policy.as_slice() {
        [] => POLICIES.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    let on_terminal = std::io::stderr().is_terminal();
    for &nodes in &args.nodes {
        for &memory in &args.memory {
            for &policy in &policies {
                let plan = Plan {
                    policy: policy.to_owned(),
                    disk_policy: args.disk_policy.clone(),
                    exchange_ms: args.exchange_ms,
                    nodes,
                    group_blocks: args.group_blocks,
                    memory_blocks: memory.blocks(trace.distinct, args.block_bytes.unwrap_or(BLOCK_BYTES)),
                    disk_blocks: args.disk.blocks(trace.distinct, args.block_bytes.unwrap_or(BLOCK_BYTES)),
                };
                let counts = simulate(trace, &plan, |done| {
                    if on_terminal {
                        eprint!("\r{policy}, {memory}, {nodes} nodes: {:>3} %", done * 100 / requests.max(1));
                    }
                })?;
                if on_terminal {
                    eprint!("\r\x1b[K");
                }
                rows.push(Row {
                    trace: short(name).to_owned(),
                    policy: policy.to_owned(),
                    nodes,
                    memory: memory.to_string(),
                    memory_blocks: plan.memory_blocks,
                    disk_blocks: plan.disk_blocks,
                    hit_rate: counts.hit_rate(),
                    memory_hit_rate: counts.memory_hits as f64 / counts.asked.max(1) as f64,
                    bound: trace.bound(),
                    imbalance: counts.imbalance(),
                    counts,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_belong_to_their_mode() {
        Args::command().debug_assert();
        let parse = |line: &str| Args::try_parse_from(line.split(' ')).map(|args| args.live.wanted());
        assert!(!parse("kvasir-replay --simulate chat").unwrap());
        assert!(parse("kvasir-replay chat --store --concurrency 3 --speed 2 --etcd a:1").unwrap());
        assert!(parse("kvasir-replay --router http://a:1 chat --block-tokens 32").unwrap());
        for wrong in [
            "--store",
            "chat --store --router http://a:1",
            "chat --store --simulate",
            "chat --model demo",
            "chat --simulate --speed 2",
            "chat --store --model demo",
            "chat --router http://a:1 --etcd a:1",
            "chat --store --concurrency 0",
        ] {
            assert!(parse(&format!("kvasir-replay {wrong}")).is_err(), "{wrong}");
        }
    }
}
