//! A small engine on a scripted model, and clients that write down what they hear.

use std::{
    collections::HashSet,
    ops::Range,
    sync::{Arc, Mutex},
};

use kvasir_kv_cache::Geometry;
use kvasir_types::{
    BlockHash, BlockId, FinishReason, KvDtype, KvGroups, KvLayout, ModelFingerprint, RequestId, Sampling, TokenId,
};

use crate::{
    Admission, CacheBatch, CacheEvent, CacheSnapshot, Command, Config, Engine, Error, Event, EventSink, LayerDone,
    LayerSink, Mode, Parts, Priority, Progress, Rejected, Request, RunnerSpec, Script, ScriptedRunner, SeqId, Stats,
};

pub const BLOCK: usize = 4;
pub const LAYERS: usize = 3;
pub const MAX_LEN: usize = 48;
pub const EOS: TokenId = TokenId(0);

pub fn layout() -> KvLayout {
    KvLayout { block_size: BLOCK as u32, layers: LAYERS as u32, kv_heads: 1, k_dim: 2, v_dim: 2, dtype: KvDtype::Bf16 }
}

pub fn runner() -> ScriptedRunner {
    runner_of(KvGroups::full(LAYERS))
}

pub fn runner_of(groups: KvGroups) -> ScriptedRunner {
    ScriptedRunner::new(RunnerSpec { vocab: 61, max_len: MAX_LEN, eos: vec![EOS], groups }, &layout())
}

pub fn config() -> Config {
    Config {
        max_batch_tokens: 24,
        chunk_tokens: 8,
        max_running: 8,
        max_waiting: 4,
        mask_threads: 0,
        ..Config::default()
    }
}

/// `len` tokens that differ between names and never are the end token.
pub fn prompt(name: u32, len: usize) -> Vec<TokenId> {
    (0..len as u32).map(|i| TokenId(1 + (name * 7 + i * i + i) % 60)).collect()
}

pub fn greedy(max_tokens: u32) -> Sampling {
    Sampling { max_tokens, ignore_eos: true, ..Sampling::default() }
}

pub fn request(prompt: &[TokenId], sampling: Sampling, mode: Mode) -> Request {
    let root = BlockHash::root(ModelFingerprint([1; 16]), &layout(), "");
    Request {
        id: "test".parse::<RequestId>().unwrap(),
        prompt: prompt.into(),
        root,
        sampling,
        mode,
        priority: Priority::Online,
        choices: 1,
    }
}

/// Whoever asked: the events of one sequence.
#[derive(Clone, Default)]
pub struct Client {
    events: Arc<Mutex<Vec<Event>>>,
}

impl Client {
    pub fn sink(&self) -> Box<dyn EventSink> {
        let events = Arc::clone(&self.events);
        Box::new(move |event| events.lock().unwrap().push(event))
    }

    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    pub fn admission(&self) -> Option<Admission> {
        self.events().into_iter().find_map(|event| match event {
            Event::Admitted(admission) => Some(admission),
            _ => None,
        })
    }

    pub fn tokens(&self) -> Vec<TokenId> {
        let token = |event| match event {
            Event::Token { sampled, .. } => Some(sampled.token),
            _ => None,
        };
        self.events().into_iter().filter_map(token).collect()
    }

    pub fn choice(&self, choice: u32) -> Vec<TokenId> {
        let token = |event| match event {
            Event::Token { choice: of, sampled } if of == choice => Some(sampled.token),
            _ => None,
        };
        self.events().into_iter().filter_map(token).collect()
    }

    pub fn finished(&self) -> Option<FinishReason> {
        match self.events().last() {
            Some(Event::Finished { reason, left: 0, .. }) => Some(*reason),
            _ => None,
        }
    }

    pub fn failed(&self) -> Option<Error> {
        match self.events().last() {
            Some(Event::Failed(error)) => Some(error.clone()),
            _ => None,
        }
    }
}

/// Somebody who keeps a picture of the prefix cache by its events.
#[derive(Default)]
pub struct Follower {
    next: u64,
    pub known: HashSet<BlockHash>,
    pub snapshots: usize,
}

impl Follower {
    /// Catches up, and compares with everything there is.
    pub fn follow(&mut self, engine: &mut Engine) {
        let (batch, snapshot) = (Arc::<Mutex<CacheBatch>>::default(), Arc::<Mutex<CacheSnapshot>>::default());
        let (to_batch, to_snapshot) = (Arc::clone(&batch), Arc::clone(&snapshot));
        engine.apply(Command::CacheEvents(Box::new(move |told| *to_batch.lock().unwrap() = told)));
        engine.apply(Command::CacheSnapshot(Box::new(move |told| *to_snapshot.lock().unwrap() = told)));
        let (batch, snapshot) = (batch.lock().unwrap().clone(), snapshot.lock().unwrap().clone());
        let all: HashSet<BlockHash> = snapshot.blocks.iter().map(|stored| stored.hash).collect();
        if batch.gap {
            (self.known, self.next) = (all.clone(), snapshot.next);
            self.snapshots += 1;
        } else {
            assert_eq!(batch.first, self.next);
            self.next += batch.events.len() as u64;
            for event in batch.events {
                match event {
                    CacheEvent::Stored(stored) => assert!(self.known.insert(stored.hash)),
                    CacheEvent::Removed(hash) => assert!(self.known.remove(&hash)),
                }
            }
        }
        assert_eq!((&self.known, self.next), (&all, snapshot.next));
    }
}

/// Positions, index of the first block, blocks.
pub type Chunk = (Range<usize>, usize, Vec<BlockId>);

/// Writes down which chunks it saw, and that every layer of each came in order.
#[derive(Clone, Default)]
pub struct Watch {
    pub chunks: Arc<Mutex<Vec<Chunk>>>,
}

impl LayerSink for Watch {
    fn layer_done(&mut self, done: LayerDone<'_>) {
        assert_eq!(done.layers, LAYERS);
        let mut chunks = self.chunks.lock().unwrap();
        if done.layer == 0 {
            chunks.push((done.tokens.clone(), done.first_block, done.blocks.to_vec()));
        }
        let (tokens, ..) = chunks.last().unwrap();
        assert_eq!(tokens, &done.tokens);
    }
}

pub struct Rig {
    pub engine: Engine,
    pub script: Script,
    pub groups: KvGroups,
}

impl Rig {
    pub fn new(blocks: usize, config: Config) -> Self {
        Self::with_groups(blocks, config, KvGroups::full(LAYERS))
    }

    pub fn with_groups(blocks: usize, config: Config, groups: KvGroups) -> Self {
        Self::with_parts(blocks, config, groups, |_, _| {})
    }

    pub fn with_parts(blocks: usize, config: Config, groups: KvGroups, add: impl FnOnce(&Script, &mut Parts)) -> Self {
        let runner = runner_of(groups.clone());
        let script = runner.script();
        let mut parts = Parts::from(Box::new(runner));
        add(&script, &mut parts);
        Self { engine: Engine::new(config, layout(), blocks, parts), script, groups }
    }

    /// Blocks that a sequence of so many tokens needs.
    pub fn needed(&self, tokens: usize, chunk_tokens: usize) -> usize {
        Geometry::new(BLOCK, &self.groups).needed(tokens, (chunk_tokens / BLOCK).max(1) * BLOCK)
    }

    pub fn try_admit(&mut self, request: Request) -> Result<(SeqId, Client), Rejected> {
        let client = Client::default();
        let (seq, command) = self.engine.intake().admit(request, client.sink())?;
        self.engine.apply(command);
        Ok((seq, client))
    }

    /// Admits and lets the engine find blocks.
    pub fn admit(&mut self, prompt: &[TokenId], sampling: Sampling, mode: Mode) -> (SeqId, Client) {
        let admitted = self.try_admit(request(prompt, sampling, mode)).unwrap();
        self.engine.step();
        admitted
    }

    /// A greedy answer of `max_tokens`, computed here, under way.
    pub fn generate(&mut self, prompt: &[TokenId], max_tokens: u32) -> (SeqId, Client) {
        let (seq, client) = self.try_admit(request(prompt, greedy(max_tokens), Mode::Generate)).unwrap();
        self.engine.apply(Command::Compute(seq, None));
        (seq, client)
    }

    pub fn step(&mut self) -> Progress {
        let progress = self.engine.step();
        self.engine.check();
        progress
    }

    /// Steps until nothing is left to do.
    pub fn settle(&mut self) {
        for _ in 0..2000 {
            if self.step() == Progress::Idle {
                return;
            }
        }
        panic!("still busy after 2000 steps: {:?}", self.engine.stats());
    }

    pub fn stats(&self) -> Stats {
        self.engine.stats()
    }

    /// What a greedy request must answer.
    pub fn answer(&self, prompt: &[TokenId], count: usize) -> Vec<TokenId> {
        self.script.answer(prompt, &greedy(1), count)
    }

    /// The law at the end of every test: nothing runs, so nothing is held.
    pub fn assert_no_leak(&self) {
        let stats = self.stats();
        assert_eq!(stats.blocks.free + stats.blocks.cached, stats.blocks.total, "{stats:?}");
        assert_eq!((stats.waiting, stats.preempted, stats.held, stats.running, stats.parked), (0, 0, 0, 0, 0));
        assert_eq!(self.engine.intake().waiting(), 0);
    }
}
