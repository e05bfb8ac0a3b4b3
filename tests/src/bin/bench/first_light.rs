//! What the cluster costs: the same prompts through router, gRPC and handoff, and through the engine alone in this process.
//!
//! Both sides have the same model, the same threads and the same chunk size, and every prompt is new, so nothing comes
//! from a cache. Then: how long a person waits for the standalone binary's first token, and what each service weighs
//! when it has nothing to do.

use std::{process::Command, sync::mpsc, time::Instant};

use anyhow::{Context, Result, ensure};
use kvasir_engine::{Event, Handle, Mode, ModelRunner, Priority, Request};
use kvasir_model::{Folder, cpu::CpuBackend};
use kvasir_tests::{Addresses, Client, Cluster, Process, Service, workspace};
use kvasir_transfer::{LocalNet, TransferEngine};
use kvasir_types::{BlockHash, KvDtype, Sampling, TokenId};
use serde_json::{Value, json};

use crate::{
    Options,
    report::{Report, Row, median},
};

const PROMPT_TOKENS: usize = 512;
const OUTPUT_TOKENS: usize = 64;
const CHUNK_TOKENS: usize = 512;
const BLOCK_SIZE: u32 = 16;
const ARENA_BYTES: usize = 64 << 20;

/// Rounds of latency measured for one repetition asked for: a round takes a tenth of a second, and what is looked for is
/// a difference of a few percent.
const ROUNDS: usize = 5;

/// Token ids that are words of the demo model; below them are special tokens, bytes and scraps.
const WORDS: std::ops::Range<u32> = 300..1500;

/// What is timed of one request, in milliseconds.
#[derive(Clone, Copy, Default)]
struct Timing {
    first_ms: f64,
    per_token_ms: f64,
}

pub async fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("first-light");
    latency(options, &mut report).await?;
    cold_start(options, &mut report).await?;
    Ok(report)
}

async fn latency(options: &Options, report: &mut Report) -> Result<()> {
    let builder = || Cluster::builder().worker("engine.threads", 0).worker("engine.chunk_tokens", CHUNK_TOKENS);
    let remote = builder().start().await?;
    for node in remote.nodes() {
        let mib = node.process.resident_bytes() as f64 / f64::from(1 << 20);
        let row = Row::new(format!("idle memory of {}", node.id()), mib, "MiB");
        report.push(if node.service == Service::Router { row.under(50.0) } else { row });
    }
    // The same without a handoff tells what of the cost is the handoff's.
    let local = builder().set(Service::Decode, "decode.local_prefill_tokens", PROMPT_TOKENS).start().await?;
    let engine = LocalEngine::start()?;
    let (through_remote, through_local) = (Side::of(&remote), Side::of(&local));

    let mut rounds = Vec::new();
    for round in 0..=options.repetitions * ROUNDS {
        let mut measured = [Timing::default(); 3];
        // Who goes first changes, so that what one leaves behind (caches, clock rates) hits all alike.
        for side in (0..3).map(|turn| (round + turn) % 3) {
            let prompt = words((3 * round + side) as u64);
            measured[side] = match side {
                0 => through_remote.time(&prompt).await?,
                1 => through_local.time(&prompt).await?,
                _ => engine.time(&prompt)?,
            };
        }
        rounds.push(measured);
    }
    rounds.remove(0); // warms up: connections, page tables, code
    let each = |pick: fn(&[Timing; 3]) -> f64| median(rounds.iter().map(pick).collect());
    let alone = "same engine in process";
    let first = Row::new(format!("TTFT, {PROMPT_TOKENS} tokens, cluster"), each(|t| t[0].first_ms), "ms");
    report.push(first.beside(alone, each(|t| t[2].first_ms)));
    // Differences are taken within a round: the machine's moods cancel out.
    let added = each(|t| t[0].first_ms - t[2].first_ms);
    report.push(Row::new("TTFT added by router, gRPC, handoff", added, "ms").under(3.0));
    report.push(Row::new("TTFT added by router and gRPC alone", each(|t| t[1].first_ms - t[2].first_ms), "ms"));
    let token = Row::new("time per output token, cluster", each(|t| t[0].per_token_ms), "ms");
    report.push(token.beside(alone, each(|t| t[2].per_token_ms)));
    Ok(())
}

/// A cluster as its client sees it.
struct Side {
    client: Client,
    model: String,
}

impl Side {
    fn of(cluster: &Cluster) -> Self {
        Self { client: cluster.client(), model: cluster.model().to_owned() }
    }

    async fn time(&self, prompt: &[u32]) -> Result<Timing> {
        let start = Instant::now();
        let mut stream = self.client.stream("/v1/completions", &request(&self.model, prompt)).await?;
        let (mut first, mut tokens) = (None, 0);
        let mut last = start;
        while let Some(event) = stream.next().await? {
            if event == "[DONE]" {
                continue; // the connection can be used again only once the stream has been read to its end
            }
            let chunk: Value = serde_json::from_str(&event)?;
            ensure!(chunk["error"].is_null(), "the cluster answered {chunk}");
            if chunk["choices"][0]["text"].is_string() {
                last = Instant::now();
                first.get_or_insert(last);
            }
            tokens = chunk["usage"]["completion_tokens"].as_u64().unwrap_or(tokens);
        }
        ensure!(tokens == OUTPUT_TOKENS as u64, "asked for {OUTPUT_TOKENS} tokens, got {tokens}");
        Ok(timing(start, first.context("no token came")?, last))
    }
}

fn request(model: &str, prompt: &[u32]) -> Value {
    json!({
        "model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    })
}

fn timing(start: Instant, first: Instant, last: Instant) -> Timing {
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    Timing { first_ms: ms(start, first), per_token_ms: ms(first, last) / (OUTPUT_TOKENS - 1) as f64 }
}

/// The engine in this process, as a worker hosts it, with nothing around it.
struct LocalEngine {
    handle: Handle,
    root: BlockHash,
    _arena: TransferEngine,
}

impl LocalEngine {
    fn start() -> Result<Self> {
        let folder = Folder::open(&workspace::demo_model())?;
        let layout = folder.kv_layout(BLOCK_SIZE, KvDtype::F16);
        let arena = TransferEngine::new(kvasir_transfer::Config::default(), LocalNet::default(), ARENA_BYTES)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let backend = CpuBackend::new(&folder, layout, arena.memory(), threads)?;
        let config = kvasir_engine::Config { chunk_tokens: CHUNK_TOKENS, max_batch_tokens: 1024, ..Default::default() };
        let blocks = ARENA_BYTES / layout.block_bytes();
        let (handle, _thread) = kvasir_engine::spawn(config, layout, blocks, Box::new(ModelRunner::new(backend)));
        Ok(Self { handle, root: BlockHash::root(folder.fingerprint(), &layout, ""), _arena: arena })
    }

    fn time(&self, prompt: &[u32]) -> Result<Timing> {
        let (events, heard) = mpsc::channel();
        let request = Request {
            id: "bench".parse()?,
            prompt: prompt.iter().map(|&id| TokenId(id)).collect::<Vec<_>>().into(),
            root: self.root,
            sampling: Sampling { max_tokens: OUTPUT_TOKENS as u32, ignore_eos: true, ..Sampling::default() },
            mode: Mode::Generate,
            priority: Priority::Online,
            choices: 1,
        };
        let start = Instant::now();
        let sink = move |event: Event| drop(events.send((Instant::now(), event)));
        let seq = self.handle.admit(request, Box::new(sink)).map_err(|rejected| rejected.error)?;
        let (mut first, mut last) = (None, start);
        for (at, event) in heard {
            match event {
                Event::Admitted(_) => self.handle.compute(seq, None),
                Event::Token { .. } => {
                    last = at;
                    first.get_or_insert(at);
                }
                Event::Finished { .. } => break,
                Event::Failed(error) => return Err(error.into()),
            }
        }
        Ok(timing(start, first.context("no token came")?, last))
    }
}

/// From starting the standalone binary to the first token a client has in hand.
async fn cold_start(options: &Options, report: &mut Report) -> Result<()> {
    let mut seconds = Vec::new();
    for repetition in 0..options.repetitions {
        let dir = tempfile::tempdir()?;
        let ports = dir.path().join("ports.json");
        let start = Instant::now();
        let mut process = standalone(dir.path(), &ports)?;
        let addresses = Addresses::of(&mut process, &ports).await?;
        addresses.ready().await?;
        let body = request("demo", &words(1_000_000 + repetition as u64)[..16]);
        let mut stream = Client::new(&addresses.http).stream("/v1/completions", &body).await?;
        stream.chunk().await?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    report.push(Row::new("cold start of standalone to first token", median(seconds), "s").under(3.0));
    Ok(())
}

fn standalone(dir: &std::path::Path, ports: &std::path::Path) -> Result<Process> {
    let mut command = Command::new(workspace::binary("standalone")?);
    let set = |key: &str, value: &str| format!("{key}={value}");
    command.args(["--set", &set("model.path", &workspace::demo_model().to_string_lossy())]);
    command.args(["--set", &set("listen", "127.0.0.1:0"), "--set", &set("port_file", &ports.to_string_lossy())]);
    Process::spawn("standalone", command, dir)
}

/// A prompt of words that no other number gives: nothing of it can be in a cache.
fn words(number: u64) -> Vec<u32> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // xorshift64*: good enough to draw words, the same on every machine.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as u32
    };
    (0..PROMPT_TOKENS).map(|_| WORDS.start + next() % (WORDS.end - WORDS.start)).collect()
}
