//! What a worker process holds for its whole life: model, arena, engine, transfer engine, store client.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use kvasir_cluster::{ModelInfo, Registry, View};
use kvasir_engine::{Handle, ModelRunner, Parts, Spill};
use kvasir_model::{Device, Folder, Options};
use kvasir_proto::convert;
use kvasir_rpc::Rpc;
use kvasir_runtime::{Context, Kind, Tasks, chain, story::Stories};
use kvasir_settings::{Live, Now};
use kvasir_store_client::StoreClient;
use kvasir_transfer::{LocalNet, TransferEngine};
use kvasir_types::{BlockHash, GroupKind, KvGroups, MemberId, Role, TokenId};
use tokio::sync::watch;
use tonic::Status;

use crate::{
    config::{Config, Speculation, WriteBackPolicy},
    directory::Members,
    duty::Duty,
    error::Error,
    metrics::{Metrics, Outcome, SpillMetrics},
    parts,
    pulse::Pulse,
    spill::Spills,
    stages::Stages,
    store::{self, Evictions, Store},
    watch::Rate,
};

/// Stories that are remembered.
const STORIES: usize = 2048;

/// One worker. Shared by all request tasks; everything in it is either immutable or its own lock.
pub(crate) struct Host {
    pub(crate) id: MemberId,
    /// What it is called; see `duty` for what it works as.
    pub(crate) role: Role,
    pub(crate) rpc: Rpc,
    pub(crate) duty: Duty,
    pub(crate) stages: Stages,
    /// What became of the last requests.
    pub(crate) stories: Stories,
    /// As it was at start. What may be changed since then is in `now`.
    pub(crate) config: Arc<Config>,
    live: Live<Config>,
    pub(crate) model: ModelInfo,
    pub(crate) groups: KvGroups,
    pub(crate) engine: Handle,
    pub(crate) pulse: Pulse,
    pub(crate) transfer: TransferEngine,
    /// Not of a model with sliding windows: only the last of a prompt's blocks are kept, so others could not go on from
    /// them. Such prompts are computed rather than fetched, and not offered to the store.
    pub(crate) store: Option<Arc<Store>>,
    pub(crate) spills: Option<Spills>,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: Tasks,
    pub(crate) started: Instant,
    vocab: usize,
    /// How fast hand-overs went lately. Written by their jobs at the end of each; read for the load; held for a copy.
    pushes: Mutex<Rate>,
    /// The others, as they were announced.
    members: watch::Receiver<Arc<View>>,
    ending: AtomicBool,
}

impl Host {
    /// Loads the model, takes the arena, starts the engine; `reachable` is the host at which others find this process.
    /// Blocks for as long as that takes.
    pub(crate) fn build(
        id: MemberId,
        role: Role,
        live: Live<Config>,
        context: &Context,
        registry: &dyn Registry,
        local: LocalNet,
        reachable: &str,
    ) -> anyhow::Result<Self> {
        let config = live.borrow().start();
        let (rpc, keeping) = Rpc::open(&config.rpc)?;
        context.tasks.spawn(Kind::Background, "certificates for calls", async move {
            keeping.await;
            Ok(())
        });
        let path = &config.model.path;
        let folder = Folder::open(path).with_context(|| format!("model.path {}", path.display()))?;
        let layout = folder.kv_layout(config.kv.block_size, config.kv.dtype).check().context("kv.block_size")?;
        let block_bytes = layout.block_bytes() as u64;
        let blocks = u32::try_from(config.kv.memory_bytes / block_bytes).unwrap_or(u32::MAX);
        ensure!(
            blocks >= 2,
            "kv.memory_bytes: {} bytes hold {blocks} blocks of {block_bytes} bytes, at least 2 are needed",
            config.kv.memory_bytes
        );

        let arena_bytes = blocks as usize * layout.block_bytes();
        let transfer = TransferEngine::builder()
            .name(id.to_string())
            .config(config.transfer.config(reachable))
            .local_net(local)
            .directory(Arc::new(Members::new(registry.view())))
            .arena(config.transfer.arena(arena_bytes))
            .build()
            .context("transfer")?;
        let threads = match config.engine.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let degree = config.engine.tensor_parallel;
        ensure!([1, 2, 4, 8].contains(&degree), "engine.tensor_parallel: {degree}: it is 1, 2, 4 or 8");
        let options = options(&config, threads);
        let backend = Device::open(&folder, layout, transfer.memory(), options)
            .with_context(|| format!("model.path {} on {}", path.display(), options.device))?;
        let model = ModelInfo {
            name: model_name(&config)?,
            fingerprint: folder.fingerprint_of(config.engine.compute),
            layout,
            max_model_len: folder.config().max_len as u32,
            tokenizer: parts::tokenizer_id(path)?,
        };
        let vocab = folder.config().vocab;
        let groups = folder.kv_groups();
        let whole = keep_whole_prompts(&groups);
        let client = (config.store.enabled && whole).then(|| {
            let store = kvasir_store_client::Config {
                lookup_timeout_ms: config.store.lookup_timeout_ms,
                rpc: rpc.clone(),
                ..Default::default()
            };
            StoreClient::new(store, registry.view(), transfer.clone())
        });
        let spill_metrics = SpillMetrics::new(&context.metrics);
        // A worker that may be moved has whatever either role needs.
        let decodes = role == Role::Decode || !config.pinned;
        let spills = match client.as_ref().filter(|_| decodes) {
            Some(client) => Spills::new(&config, layout, &transfer, client, &context.tasks, spill_metrics)?,
            None => None,
        };
        let evictions = Evictions::default();
        let parts = Parts {
            runner: Box::new(ModelRunner::new(backend)),
            constraints: parts::grammars(&folder, path)?,
            // Prefill workers write one token of each answer.
            proposer: if decodes { parts::proposer(&config, &folder, threads)? } else { None },
            spill: spills.clone().map(|spills| Box::new(spills) as Box<dyn Spill>),
            on_evict: (config.store.write_back.policy == WriteBackPolicy::OnEvict).then(|| evictions.hook()),
        };
        let (engine, _thread) = kvasir_engine::spawn(engine_config(&config), layout, blocks as usize, parts);
        let metrics = Metrics::new(&context.metrics, engine.clone(), transfer.clone(), &model, blocks as usize);
        metrics.works_as(role);
        let store = client.map(|client| {
            let (config, model, blocks, engine) = (&config, &model, blocks as usize, engine.clone());
            let (transfer, evictions) = (&transfer, &evictions);
            Store::new(store::Parts { client, config, model, blocks, engine, transfer, evictions, context })
        });
        let store = store.transpose()?;
        tracing::info!(
            model = model.name,
            fingerprint = %model.fingerprint,
            blocks,
            block_bytes,
            threads,
            "model loaded"
        );
        Ok(Self {
            id,
            role,
            rpc,
            duty: Duty::new(role, config.pinned),
            stages: Stages::new(),
            stories: Stories::new(STORIES),
            model,
            groups,
            engine,
            pulse: Pulse::new(),
            transfer,
            store,
            spills,
            metrics,
            tasks: context.tasks.clone(),
            started: Instant::now(),
            vocab,
            pushes: Mutex::default(),
            members: registry.view(),
            ending: AtomicBool::new(false),
            config,
            live,
        })
    }

    /// The configuration now.
    pub(crate) fn now(&self) -> Arc<Now<Config>> {
        Arc::clone(&self.live.borrow())
    }

    /// Has the engine do as the configuration says from now on; the rest looks at it each time.
    pub(crate) fn follow(&self, now: &Config) {
        self.engine.set_limits(engine_config(now).limits());
    }

    /// Tokens the model knows.
    pub(crate) fn vocab(&self) -> usize {
        self.vocab
    }

    /// Most tokens of prompt and answer together.
    pub(crate) fn max_len(&self) -> usize {
        self.model.max_model_len as usize
    }

    /// Whether a prompt's blocks are all there at its end, so that others can go on from any of them. Of a model with
    /// sliding windows only the last ones are: such prompts are computed rather than fetched, and not offered to the store.
    pub(crate) fn keeps_whole_prompts(&self) -> bool {
        keep_whole_prompts(&self.groups)
    }

    /// Where the chain of block hashes starts for a tenant's salt.
    pub(crate) fn root(&self, salt: &str) -> BlockHash {
        BlockHash::root(self.model.fingerprint, &self.model.layout, salt)
    }

    /// A hand-over wrote so many bytes, and its writes took so long altogether.
    pub(crate) fn pushed(&self, bytes: u64, took: Duration) {
        self.pushes.lock().unwrap_or_else(PoisonError::into_inner).add(bytes as f64, took);
    }

    /// How fast hand-overs went lately.
    pub(crate) fn pushes(&self) -> Rate {
        *self.pushes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether new work is refused.
    pub(crate) fn draining(&self) -> bool {
        self.ending() || self.stages.refuses()
    }

    /// Whether the process is about to end.
    pub(crate) fn ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// It is: new work is refused from now on.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Whether a worker is to be passed by, as far as it was announced: it is cordoned, or drained.
    pub(crate) fn passes_by(&self, member: &str) -> bool {
        let members = self.members.borrow();
        let mut named = members.members.iter().filter(|known| known.id.as_str() == member);
        named.any(|known| known.draining)
    }

    /// Counts a refusal and turns it into the caller's status.
    pub(crate) fn refuse(&self, error: &Error) -> Status {
        self.metrics.outcome(Outcome::of(error));
        tracing::debug!(error = chain(error), retry = ?error.retry(), "refused");
        error.to_status()
    }

    /// Refuses a request for another model.
    pub(crate) fn check_model(&self, fingerprint: &[u8]) -> Result<(), Error> {
        let (ours, theirs) = (self.model.fingerprint, convert::fingerprint(fingerprint)?);
        if ours == theirs { Ok(()) } else { Err(Error::Model { ours, theirs }) }
    }

    /// A prompt whose every token the model knows. Its length is for the engine to judge.
    pub(crate) fn check_prompt(&self, ids: &[u32]) -> Result<Arc<[TokenId]>, Error> {
        match ids.iter().position(|&id| id as usize >= self.vocab) {
            Some(position) => Err(Error::Token { token: TokenId(ids[position]), position, vocab: self.vocab }),
            None => Ok(convert::tokens(ids).into()),
        }
    }
}

/// How the model is computed. A step has at most the batch's tokens, and those that are guessed.
pub(crate) fn options(config: &Config, threads: usize) -> Options {
    let engine = &config.engine;
    let guessed = match engine.speculation.kind {
        Speculation::Off => 0,
        Speculation::Ngram | Speculation::Draft => engine.max_running * engine.speculation.tokens,
    };
    let max_tokens = engine.max_batch_tokens + guessed;
    let (device, compute, tensor_parallel) = (engine.device, engine.compute, engine.tensor_parallel);
    Options { device, compute, threads, tensor_parallel, max_tokens }
}

fn keep_whole_prompts(groups: &KvGroups) -> bool {
    groups.len() == 1 && groups[0].kind == GroupKind::Full
}

fn engine_config(config: &Config) -> kvasir_engine::Config {
    let engine = &config.engine;
    kvasir_engine::Config {
        max_batch_tokens: engine.max_batch_tokens,
        chunk_tokens: engine.chunk_tokens,
        max_running: engine.max_running,
        max_waiting: engine.max_waiting,
        max_waiting_offline: engine.max_waiting_offline,
        offline_patience: engine.offline_patience,
        prefix_cache: engine.prefix_cache,
        mask_threads: engine.mask_threads,
        draft_tokens: engine.speculation.tokens,
        ..kvasir_engine::Config::default()
    }
}

/// The configured name, else the folder's.
fn model_name(config: &Config) -> anyhow::Result<String> {
    let folder = || config.model.path.file_name().map(|name| name.to_string_lossy().into_owned());
    config
        .model
        .name
        .clone()
        .or_else(folder)
        .context("model.name: not set, and model.path has no last component to take it from")
}
