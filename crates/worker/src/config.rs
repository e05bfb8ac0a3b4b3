//! Configuration of a worker, the same for both roles: a worker's role may change while its configuration stays.

use std::{net::SocketAddr, path::PathBuf};

use kvasir_cluster::RegistryConfig;
use kvasir_model::{Device, cpu::Compute};
use kvasir_runtime::{AdminConfig, LogConfig, ShutdownConfig, TraceConfig};
use kvasir_types::{KvDtype, Transports};
use serde::{Deserialize, Serialize};

/// A prefill or decode worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name in the cluster, unique within the role. Default: the role and a random number.
    pub id: Option<String>,
    /// Where the gRPC server listens; port 0 takes a free one. Default 127.0.0.1:0.
    pub listen: SocketAddr,
    /// `host:port`, or a host alone, that others reach the gRPC server at. Default: the address it listens on.
    pub advertise: Option<String>,
    /// File to write the actual addresses to once the worker is ready (JSON).
    pub port_file: Option<PathBuf>,
    /// Threads of the async runtime. Default: 2, which carry bytes only; computing has its own (`engine.threads`).
    pub threads: Option<usize>,
    /// Health, readiness and metrics over HTTP.
    pub admin: AdminConfig,
    /// Logging.
    pub log: LogConfig,
    /// Spans of requests, for OpenTelemetry.
    pub trace: TraceConfig,
    /// Shutdown.
    pub shutdown: ShutdownConfig,
    /// Where the cluster's metadata is.
    pub registry: RegistryConfig,
    /// How processes call one another: certificates, if they are to prove who they are.
    pub rpc: kvasir_rpc::Config,
    /// Who may change what this process does, while it runs.
    pub operator: kvasir_rpc::operator::Config,
    /// Stays in its role whatever the routers' planner thinks (`planner` of a router's configuration). `kvasirctl worker`
    /// moves, pins and unpins workers while they run. Default false.
    pub pinned: bool,
    /// The model served.
    pub model: ModelConfig,
    /// Batching and threads.
    pub engine: EngineConfig,
    /// The KV cache.
    pub kv: KvConfig,
    /// Moving KV blocks.
    pub transfer: kvasir_transfer::Settings,
    /// The decode role.
    pub decode: DecodeConfig,
    /// The prefill role.
    pub prefill: PrefillConfig,
    /// The KV store.
    pub store: StoreConfig,
}

/// Which model.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A Hugging Face folder: config.json, *.safetensors, tokenizer.json. Required.
    pub path: PathBuf,
    /// Name in the cluster. Default: the folder's name.
    pub name: Option<String>,
}

/// Batching and threads.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// What computes: `cpu`; `cuda:N`, NVIDIA GPU number N of the machine, or the worker does not start; or `auto`, the first
    /// GPU where there is one whose memory has room for weights and blocks, else the CPU. Default cpu.
    pub device: Device,
    /// How many compute the model together, each a part of it: so many GPUs of the machine, from the one that `device` names
    /// on, by NCCL; or so many groups of the CPU's threads. 1, 2, 4 or 8; it must divide the model's KV heads. Workers with
    /// different numbers pair. A draft model is computed by one. Default 1.
    pub tensor_parallel: usize,
    /// Threads that compute, on a CPU. 0: one for every core. Default 0.
    pub threads: usize,
    /// How activations are multiplied with bf16 and 8-bit weights: `exact` (they stay f32) or `fast` (rounded to bf16, as
    /// PyTorch and llama.cpp do: up to twice the speed on processors with AVX-512 BF16). Workers of different kinds
    /// do not pair. Default exact.
    pub compute: Compute,
    /// Tokens of one prompt computed in one step, rounded to whole blocks. Default 512.
    pub chunk_tokens: usize,
    /// Tokens in one step over all sequences. Default 1024.
    pub max_batch_tokens: usize,
    /// Sequences that hold blocks at the same time. Default 64.
    pub max_running: usize,
    /// Online requests that wait for blocks; one more is refused. Default 256.
    pub max_waiting: usize,
    /// The same for offline requests (`service_tier: flex`), which get what online ones leave. Default 1024.
    pub max_waiting_offline: usize,
    /// Steps without a turn after which an offline request counts as an online one. Default 1000.
    pub offline_patience: u64,
    /// Whether finished blocks are kept for later prompts. Default true.
    pub prefix_cache: bool,
    /// Threads that compute which tokens a grammar allows, beside the model. Default 1.
    pub mask_threads: usize,
    /// For a step of the engine, in milliseconds: one with work that makes none for so long counts as stuck. Then the worker
    /// is not ready, and gives no more signs of life to routers, which have others go on. Default 60000.
    pub stuck_ms: u64,
    /// Guessing several tokens of an answer at a time, on decode workers. Answers are the same with and without.
    pub speculation: SpeculationConfig,
}

/// Who guesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speculation {
    /// Nobody.
    #[default]
    Off,
    /// The text itself: what followed the same words earlier, in prompt or answer.
    Ngram,
    /// A smaller model with the same tokens.
    Draft,
}

/// Speculative decoding.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpeculationConfig {
    /// off, ngram or draft. Default off.
    pub kind: Speculation,
    /// Most tokens guessed for a sequence in a step, 1 to 16; fewer where guesses have been wrong. Default 4.
    pub tokens: usize,
    /// The draft model's folder; required if `kind` is draft.
    pub model: PathBuf,
    /// Memory for the draft model's own KV blocks, in bytes. Default 67108864 (64 MiB).
    pub memory_bytes: u64,
}

/// The KV cache.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvConfig {
    /// Memory for KV blocks, in bytes, taken at start. Default 268435456 (256 MiB).
    pub memory_bytes: u64,
    /// Tokens in a block; the same on all workers of a model. Default 16.
    pub block_size: u32,
    /// Element type: f16, bf16 or f32; the same on all workers of a model. Default f16: as small as bf16 and eight times
    /// as fine; a value beyond its range (65,504) is kept as its largest.
    pub dtype: KvDtype,
}

/// The decode role.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecodeConfig {
    /// A prompt with at most this many tokens left to compute is computed by the decode worker itself: asking another
    /// worker would take longer. Default 8.
    pub local_prefill_tokens: usize,
    /// Prefill workers tried before the decode worker computes the prompt itself. Default 2.
    pub max_prefill_attempts: usize,
    /// How long a prefill worker may take to accept a connection, and how long it may leave a ping unanswered before it
    /// counts as dead (busy workers answer: computing has threads of its own). Default 2000.
    pub peer_timeout_ms: u64,
    /// For a prefill worker to say that it has taken a prompt, and between two signs of life of one that gives them, in
    /// milliseconds; then another is asked. Default 20000.
    pub prefill_silence_ms: u64,
    /// After a prefill worker failed, how long it is tried after the others, in milliseconds. Default 1000.
    pub peer_rest_ms: u64,
    /// Bound on a request's deadline, whatever the router asks for. Default 600000.
    pub max_request_ms: u64,
}

/// The prefill role.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefillConfig {
    /// Bound on a prompt's deadline, whatever the decode worker asks for. Default 600000.
    pub max_request_ms: u64,
    /// How long reading a prompt's known blocks from the decode worker may take before they are computed instead.
    /// Default 1000.
    pub fetch_timeout_ms: u64,
}

/// The KV store.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Whether to use the cluster's KV store nodes. Default true.
    pub enabled: bool,
    /// Whether blocks of a prompt are read from the store rather than computed: `measured` (where that is faster, judged by
    /// what reading and computing have taken lately), `always` (where the store has them) or `off`. Default measured.
    pub fetch: Fetch,
    /// How long a store node may take to say what it has, in milliseconds. A request waits for it, so a store that is gone
    /// costs so much, of one request in each second. Default 50.
    pub lookup_timeout_ms: u64,
    /// How long a request may wait for blocks from the store in all, in milliseconds; with `fetch: measured` never longer than
    /// computing them is expected to take, nor than a few times what reading them is. Default 5000.
    pub read_timeout_ms: u64,
    /// Which finished blocks go to the store, and how.
    pub write_back: WriteBackConfig,
    /// Keeping what preempted sequences have computed, on decode workers.
    pub spill: SpillConfig,
}

/// When blocks are read from the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fetch {
    /// Never.
    Off,
    /// Where it is expected to be faster than computing.
    #[default]
    Measured,
    /// Wherever there are some.
    Always,
}

/// Which finished blocks go to the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteBackPolicy {
    /// None.
    Off,
    /// Every block of a prompt and its answer.
    #[default]
    All,
    /// Those that a second request of this worker began with.
    ReusedOnce,
    /// Those that this worker's own cache has no more room for.
    OnEvict,
}

/// Blocks that are finished, a prompt's and its answer's, are written to the store in the background: after everything that
/// a request waits for, while they are in this worker's cache, and not for models whose layers form several groups (sliding
/// windows). Decode workers write what they compute themselves; without `engine.prefix_cache` that is nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WriteBackConfig {
    /// `all`, `reused-once` (what a second request of this worker began with), `on-evict` (what the worker's own cache has no more room for)
    /// or `off`. Default all.
    pub policy: WriteBackPolicy,
    /// Most that is written in a second, in MiB. 0: no limit. Default 0.
    pub mib_per_s: u64,
    /// Blocks that wait to be written; of more than these, those that have waited longest are not written. Default 4096.
    pub max_queued_blocks: usize,
    /// Memory for evicted blocks on their way to the store, in bytes, beside `kv.memory_bytes`; taken with `on-evict` only.
    /// What finds no room in it is not written. Default 67108864 (64 MiB).
    pub staging_bytes: u64,
    /// How long a few blocks (a sixteenth of this worker's, at most 64) may take; their memory is not to be had meanwhile.
    /// Default 5000.
    pub timeout_ms: u64,
}

/// Sequences that lose their blocks to others, because there are not enough for all, get them back later. What they had
/// computed is kept in the store meanwhile, if it has room, and read back rather than computed again. Not for models
/// whose layers form several groups (sliding windows), and not without `engine.prefix_cache`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpillConfig {
    /// Memory for blocks on their way to the store, in bytes, beside `kv.memory_bytes`. What finds no room in it is not
    /// kept. 0: off. Default 67108864 (64 MiB).
    pub staging_bytes: u64,
    /// How long a sequence's blocks may take to the store; they stay staged for so long. Default 5000.
    pub write_timeout_ms: u64,
    /// How long reading them back may take before the rest is computed. Default 1000.
    pub read_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            port_file: None,
            threads: Some(2),
            admin: AdminConfig::default(),
            log: LogConfig::default(),
            trace: TraceConfig::default(),
            shutdown: ShutdownConfig::default(),
            registry: RegistryConfig::default(),
            rpc: kvasir_rpc::Config::default(),
            operator: kvasir_rpc::operator::Config::default(),
            pinned: false,
            model: ModelConfig::default(),
            engine: EngineConfig::default(),
            kv: KvConfig::default(),
            transfer: kvasir_transfer::Settings::default(),
            decode: DecodeConfig::default(),
            prefill: PrefillConfig::default(),
            store: StoreConfig::default(),
        }
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        let engine = kvasir_engine::Config::default();
        Self {
            device: Device::default(),
            tensor_parallel: 1,
            threads: 0,
            compute: Compute::Exact,
            chunk_tokens: engine.chunk_tokens,
            max_batch_tokens: engine.max_batch_tokens,
            max_running: engine.max_running,
            max_waiting: engine.max_waiting,
            max_waiting_offline: engine.max_waiting_offline,
            offline_patience: engine.offline_patience,
            prefix_cache: engine.prefix_cache,
            mask_threads: engine.mask_threads,
            stuck_ms: 60_000,
            speculation: SpeculationConfig::default(),
        }
    }
}

impl Default for SpeculationConfig {
    fn default() -> Self {
        Self { kind: Speculation::Off, tokens: 4, model: PathBuf::new(), memory_bytes: 64 << 20 }
    }
}

impl Default for KvConfig {
    fn default() -> Self {
        Self { memory_bytes: 256 << 20, block_size: 16, dtype: KvDtype::F16 }
    }
}

impl Default for DecodeConfig {
    fn default() -> Self {
        Self {
            local_prefill_tokens: 8,
            max_prefill_attempts: 2,
            peer_timeout_ms: 2_000,
            prefill_silence_ms: 20_000,
            peer_rest_ms: 1_000,
            max_request_ms: 600_000,
        }
    }
}

impl Default for PrefillConfig {
    fn default() -> Self {
        Self { max_request_ms: 600_000, fetch_timeout_ms: 1_000 }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            fetch: Fetch::default(),
            lookup_timeout_ms: 50,
            read_timeout_ms: 5_000,
            write_back: WriteBackConfig::default(),
            spill: SpillConfig::default(),
        }
    }
}

impl Default for WriteBackConfig {
    fn default() -> Self {
        Self {
            policy: WriteBackPolicy::default(),
            mib_per_s: 0,
            max_queued_blocks: 4096,
            staging_bytes: 64 << 20,
            timeout_ms: 5_000,
        }
    }
}

impl Default for SpillConfig {
    fn default() -> Self {
        Self { staging_bytes: 64 << 20, write_timeout_ms: 5_000, read_timeout_ms: 1_000 }
    }
}

/// Guesses this far ahead are hardly ever right, and each costs a row of logits.
const MAX_DRAFTS: usize = 16;

/// Flags of workers, and of whatever contains one: [`kvasir_runtime::Config::FLAGS`].
pub const FLAGS: &[(&str, &str, &str)] = &[("device", "engine.device", "What computes: auto, cpu or cuda:N")];

/// What may be changed while a worker runs.
const LIVE: &[(&str, &str)] = &[
    ("log.filter", "at once"),
    ("trace.sample", "from the next request on"),
    ("shutdown.grace_ms", "when it leaves"),
    ("engine.max_batch_tokens", "from the next step on"),
    ("engine.offline_patience", "from the next step on"),
    ("engine.max_waiting", "from the next request on"),
    ("engine.max_waiting_offline", "from the next request on"),
    ("decode.local_prefill_tokens", "from the next request on; routers hear of it with the next load"),
    ("decode.max_prefill_attempts", "from the next request on"),
    ("decode.prefill_silence_ms", "from the next request on"),
    ("decode.max_request_ms", "from the next request on"),
    ("prefill", "from the next prompt on"),
];

impl kvasir_runtime::Config for Config {
    const LIVE: &'static [(&'static str, &'static str)] = LIVE;
    const FLAGS: &'static [(&'static str, &'static str, &'static str)] = FLAGS;

    fn verify(&self) -> Result<(), String> {
        self.check().map_err(|error| error.to_string())
    }
}

/// A configuration that can't work, found before anything is started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No model is configured.
    #[error("model.path: not set; it must name a Hugging Face model folder")]
    NoModel,
    /// A number below its least useful value.
    #[error("{key}: must be at least {least}")]
    TooSmall {
        /// The key.
        key: &'static str,
        /// Its least value.
        least: usize,
    },
    /// A draft model is wanted and none is named.
    #[error("engine.speculation.model: not set; it must name the draft model's folder")]
    NoDraftModel,
    /// A number above its greatest useful value.
    #[error("{key}: must be at most {most}")]
    TooLarge {
        /// The key.
        key: &'static str,
        /// Its greatest value.
        most: usize,
    },
    /// No way to move KV.
    #[error("transfer.transports: auto, or at least one of local, shm, ucx, tcp")]
    NoTransport,
}

impl Config {
    /// Checks what the types can't.
    pub fn check(&self) -> Result<(), Error> {
        if self.model.path.as_os_str().is_empty() {
            return Err(Error::NoModel);
        }
        if self.transfer.transports == Transports::Named(Vec::new()) {
            return Err(Error::NoTransport);
        }
        let speculation = &self.engine.speculation;
        if speculation.kind == Speculation::Draft && speculation.model.as_os_str().is_empty() {
            return Err(Error::NoDraftModel);
        }
        if speculation.tokens > MAX_DRAFTS {
            return Err(Error::TooLarge { key: "engine.speculation.tokens", most: MAX_DRAFTS });
        }
        for (key, value) in [
            ("engine.chunk_tokens", self.engine.chunk_tokens),
            ("engine.max_batch_tokens", self.engine.max_batch_tokens),
            ("engine.max_running", self.engine.max_running),
            ("engine.max_waiting", self.engine.max_waiting),
            ("engine.max_waiting_offline", self.engine.max_waiting_offline),
            ("engine.mask_threads", self.engine.mask_threads),
            ("engine.stuck_ms", self.engine.stuck_ms as usize),
            ("engine.speculation.tokens", self.engine.speculation.tokens),
            ("kv.block_size", self.kv.block_size as usize),
            ("transfer.connections_per_peer", self.transfer.connections_per_peer),
            ("store.write_back.max_queued_blocks", self.store.write_back.max_queued_blocks),
        ] {
            if value == 0 {
                return Err(Error::TooSmall { key, least: 1 });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_told_by_its_key() {
        let mut config = Config::default();
        assert_eq!(config.check(), Err(Error::NoModel));
        config.model.path = "models/demo".into();
        assert_eq!(config.check(), Ok(()));
        config.engine.speculation.kind = Speculation::Draft;
        assert_eq!(config.check(), Err(Error::NoDraftModel));
        config.engine.speculation = SpeculationConfig { tokens: 17, ..SpeculationConfig::default() };
        assert!(config.check().unwrap_err().to_string().starts_with("engine.speculation.tokens: "));
        config.engine.speculation = SpeculationConfig::default();
        config.engine.chunk_tokens = 0;
        assert!(config.check().unwrap_err().to_string().starts_with("engine.chunk_tokens: "));
    }
}
