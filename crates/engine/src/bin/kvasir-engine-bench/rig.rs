//! An engine on this thread, and what it tells about each request.
//!
//! The engine is stepped here rather than on its own thread, so that what happens between two steps is exactly what a
//! scenario asks for: a request arrives after step n, not some time during it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use kvasir_engine::{
    Command, Config, Engine, Event, Mode, ModelRunner, NGrams, Parts, Priority, Progress, Proposer, Request,
};
use kvasir_model::{Cost, Device, Folder, Options, cpu::HostArena};
use kvasir_types::{BlockHash, KvLayout, Sampling, TokenId};

use crate::{cli, limits, measure::forget_peak_rss, source};

/// How often a long wait is explained.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// A model with its engine, ready for requests.
pub struct Rig {
    pub name: String,
    pub folder: Folder,
    pub cost: Cost,
    pub layout: KvLayout,
    pub config: Config,
    pub blocks: usize,
    pub threads: usize,
    /// Most blocks that sequences held at the end of a step, and most that held anything.
    pub blocks_used: usize,
    pub blocks_touched: usize,
    engine: Engine,
    root: BlockHash,
    seed: u64,
    sent: u64,
}

/// What a scenario asks of the engine.
pub struct Plan {
    /// Most sequences at once.
    pub running: usize,
    /// Tokens of every sequence that has blocks at the same time, prompt and answer.
    pub lengths: Vec<usize>,
    /// Tokens of a prompt in one step, where the scenario rather than the caller decides.
    pub chunk: Option<usize>,
    /// Whether finished blocks are kept for others.
    pub prefix_cache: bool,
    /// Whether n-grams guess how answers go on.
    pub ngram: bool,
}

impl Plan {
    /// So many sequences of the same length.
    pub fn even(running: usize, tokens: usize) -> Self {
        Self { running, lengths: vec![tokens; running], chunk: None, prefix_cache: false, ngram: false }
    }
}

impl Rig {
    /// Opens the model and builds an engine whose pool holds what the plan needs.
    pub fn build(setup: &cli::Setup, plan: &Plan) -> Result<Self> {
        forget_peak_rss();
        let (name, folder) = source::open(&setup.source, setup.seed, setup.weights)?;
        let layout = folder.kv_layout(setup.block_size, setup.kv.dtype());
        let longest = plan.lengths.iter().copied().max().unwrap_or(1);
        let max_len = folder.config().max_len;
        if longest > max_len {
            bail!("a sequence would have {longest} tokens; the model's context has {max_len}");
        }
        // One more block for each group and sequence: the answer's last token may begin one.
        let per_sequence = |&tokens: &usize| (layout.blocks_for(tokens) + 1) * folder.kv_groups().len();
        let needed: usize = plan.lengths.iter().map(per_sequence).sum();
        let blocks = setup.blocks.map_or(needed, |blocks| blocks as usize);
        let arena = HostArena::new(blocks * layout.block_bytes())
            .with_context(|| format!("{blocks} blocks of {} bytes", layout.block_bytes()))?;
        let threads = limits::threads(setup.threads);
        let usual = Config::default();
        let chunk = plan.chunk.or_else(|| setup.chunk_tokens()).unwrap_or(usual.chunk_tokens);
        let max_tokens = usual.max_batch_tokens.max(chunk + plan.running);
        let (device, compute, tensor_parallel) =
            (setup.device, setup.compute.compute(), setup.tensor_parallel as usize);
        let options = Options { device, compute, threads, tensor_parallel, max_tokens };
        let backend = Device::open(&folder, layout, arena, options)?;

        let config = Config {
            max_batch_tokens: max_tokens,
            chunk_tokens: chunk,
            max_running: plan.running,
            max_waiting: plan.lengths.len().max(1),
            prefix_cache: plan.prefix_cache,
            ..usual
        };
        let proposer = plan.ngram.then(|| Box::new(NGrams::default()) as Box<dyn Proposer>);
        let parts = Parts {
            runner: Box::new(ModelRunner::new(backend)),
            constraints: None,
            proposer,
            spill: None,
            on_evict: None,
        };
        let engine = Engine::new(config.clone(), layout, blocks, parts);
        let root = BlockHash::root(folder.fingerprint(), &layout, "");
        let (cost, seed) = (folder.cost(), setup.seed);
        let (blocks_used, blocks_touched, sent) = (0, 0, 0);
        Ok(Self {
            name,
            folder,
            cost,
            layout,
            config,
            blocks,
            threads,
            blocks_used,
            blocks_touched,
            engine,
            root,
            seed,
            sent,
        })
    }

    /// Tokens of a prompt of its own: the same seed, the same tokens, in any program that cares to compute them.
    pub fn prompt(&self, stream: u64, tokens: usize) -> Vec<TokenId> {
        prompt(self.seed, stream, tokens, self.folder.config().vocab)
    }

    /// Hands a request in: `output` tokens after `prompt`, greedily.
    pub fn send(&mut self, prompt: Vec<TokenId>, output: usize) -> Result<Sent> {
        self.sent += 1;
        let max_tokens = u32::try_from(output).context("an answer of that many tokens")?;
        let sampling = Sampling { max_tokens, ignore_eos: true, ..Sampling::default() };
        let id = format!("bench-{}", self.sent).parse()?;
        let sent = Sent { at: Instant::now(), prompt_tokens: prompt.len(), heard: Arc::default() };
        let request = Request {
            id,
            prompt: prompt.into(),
            root: self.root,
            sampling,
            mode: Mode::Generate,
            priority: Priority::Online,
            choices: 1,
        };
        let heard = Arc::clone(&sent.heard);
        let sink = move |event| heard.lock().unwrap_or_else(PoisonError::into_inner).event(event);
        let (seq, command) = self.engine.intake().admit(request, Box::new(sink)).map_err(|refused| refused.error)?;
        self.engine.apply(command);
        self.engine.apply(Command::Compute(seq, None));
        Ok(sent)
    }

    /// Steps until `done`, which is asked after every step. Says every few seconds how far it is.
    pub fn until(&mut self, sent: &[&Sent], mut done: impl FnMut() -> bool) -> Result<()> {
        let mut said = Instant::now();
        while !done() {
            let progress = self.step();
            for request in sent {
                request.check()?;
            }
            if progress == Progress::Idle && !done() {
                bail!("the engine has nothing more to do: {:?}", self.engine.stats());
            }
            if said.elapsed() > SAY_EVERY {
                said = Instant::now();
                let stats = self.engine.stats();
                eprintln!("{} prompt tokens computed, {} written", stats.prefilled_tokens, stats.sampled_tokens);
            }
        }
        Ok(())
    }

    /// One step.
    pub fn step(&mut self) -> Progress {
        let progress = self.engine.step();
        let blocks = self.engine.stats().blocks;
        self.blocks_used = self.blocks_used.max(blocks.in_use);
        self.blocks_touched = self.blocks_touched.max(blocks.in_use + blocks.cached);
        progress
    }

    /// The time to the first token of a prompt that nothing runs beside. Two tokens are written: blocks are counted between
    /// steps, and an answer of one gives them back within its step.
    pub fn alone(&mut self, prompt: Vec<TokenId>) -> Result<(Duration, usize)> {
        let request = self.send(prompt, 2)?;
        self.until(&[&request], || request.finished())?;
        Ok((request.ttft().context("an answer has a token")?, request.cached_tokens()))
    }

    /// What the engine says of itself.
    pub fn stats(&self) -> kvasir_engine::Stats {
        self.engine.stats()
    }
}

/// Token `i` of prompt `stream`.
fn prompt(seed: u64, stream: u64, tokens: usize, vocab: usize) -> Vec<TokenId> {
    let token = |i: u64| (seed.wrapping_mul(1_000_003) + stream * 104_729 + i * 7919) % vocab as u64;
    (0..tokens as u64).map(|i| TokenId(token(i) as u32)).collect()
}

/// A request that was handed in.
#[derive(Clone)]
pub struct Sent {
    pub at: Instant,
    pub prompt_tokens: usize,
    heard: Arc<Mutex<Heard>>,
}

/// What was told about it.
#[derive(Default)]
struct Heard {
    tokens: Vec<(Instant, TokenId)>,
    cached_tokens: usize,
    finished: bool,
    failed: Option<kvasir_engine::Error>,
}

impl Heard {
    fn event(&mut self, event: Event) {
        match event {
            Event::Admitted(admission) => self.cached_tokens = admission.cached_tokens,
            Event::Token { sampled, .. } => self.tokens.push((Instant::now(), sampled.token)),
            Event::Finished { .. } => self.finished = true,
            Event::Failed(error) => self.failed = Some(error),
        }
    }
}

impl Sent {
    fn read<T>(&self, read: impl FnOnce(&Heard) -> T) -> T {
        read(&self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn check(&self) -> Result<()> {
        self.read(|heard| heard.failed.clone()).map_or(Ok(()), |error| Err(error.into()))
    }

    /// How many tokens have come.
    pub fn count(&self) -> usize {
        self.read(|heard| heard.tokens.len())
    }

    /// Whether the answer is complete.
    pub fn finished(&self) -> bool {
        self.read(|heard| heard.finished)
    }

    /// The tokens that have come.
    pub fn tokens(&self) -> Vec<u32> {
        self.read(|heard| heard.tokens.iter().map(|(_, token)| token.0).collect())
    }

    /// Prompt tokens that the cache had.
    pub fn cached_tokens(&self) -> usize {
        self.read(|heard| heard.cached_tokens)
    }

    /// From the request to its first token.
    pub fn ttft(&self) -> Option<Duration> {
        self.read(|heard| heard.tokens.first().map(|(first, _)| *first - self.at))
    }

    /// Mean time per token after the first; none for an answer of one.
    pub fn tpot(&self) -> Option<Duration> {
        self.read(|heard| match heard.tokens.as_slice() {
            [(first, _), .., (last, _)] => Some((*last - *first) / (heard.tokens.len() - 1) as u32),
            _ => None,
        })
    }

    /// Times between tokens that follow one another, of those that came after `from`.
    pub fn gaps(&self, from: Instant) -> Vec<Duration> {
        self.read(|heard| {
            let pairs = heard.tokens.windows(2).filter(|pair| pair[1].0 > from);
            pairs.map(|pair| pair[1].0 - pair[0].0).collect()
        })
    }
}
