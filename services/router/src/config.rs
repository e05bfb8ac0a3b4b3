//! Configuration of a router.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use kvasir_cluster::RegistryConfig;
use kvasir_runtime::{AdminConfig, LogConfig, ShutdownConfig, TraceConfig};
use kvasir_types::Deadline;
use serde::{Deserialize, Serialize};

use crate::{
    access::AccessConfig,
    admission::AdmissionConfig,
    external::{ExternalConfig, ExternalError},
    http::TlsConfig,
    planner::PlannerConfig,
    retry::RetryConfig,
    route::PolicyName,
    upstream::Patience,
};

/// A router.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name in the cluster, unique among routers. Default: `router` and a random number.
    pub id: Option<String>,
    /// Where the HTTP server listens; port 0 takes a free one. Default 127.0.0.1:8000.
    pub listen: SocketAddr,
    /// `host:port` that others reach the HTTP server at. Default: the address it listens on.
    pub advertise: Option<String>,
    /// File to write the actual addresses to once HTTP is served (JSON).
    pub port_file: Option<PathBuf>,
    /// Threads of the async runtime. Default: one for every core.
    pub threads: Option<usize>,
    /// Health, readiness and metrics over HTTP, on a port of its own.
    pub admin: AdminConfig,
    /// Whether metrics are on the HTTP port, too, for everybody who reaches that. Default false: they tell who asks for how
    /// much, which is for those who reach the admin port.
    pub public_metrics: bool,
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
    /// The models served, at least one.
    pub models: Vec<ModelConfig>,
    /// How workers are chosen: `kv-aware` (default), `session-sticky`, `least-loaded`, `round-robin` or `random`. Can be
    /// changed while the router runs (`kvasirctl route policy`).
    pub policy: PolicyName,
    /// What a client may ask for, and for how long.
    pub limits: Limits,
    /// Second tries, when workers fail.
    pub retry: RetryConfig,
    /// HTTPS instead of HTTP.
    pub tls: TlsConfig,
    /// Who may ask, for what, and how much.
    pub access: AccessConfig,
    /// How many requests workers get, and who waits.
    pub admission: AdmissionConfig,
    /// Which workers read prompts and which write answers.
    pub planner: PlannerConfig,
    /// Engines of others (vLLM, SGLang) that are used as workers.
    pub external: ExternalConfig,
}

/// A model served.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// What clients, and the workers that serve it, call it.
    pub name: String,
    /// A Hugging Face folder; read are tokenizer.json, tokenizer_config.json, the chat template, config.json and
    /// generation_config.json.
    pub path: PathBuf,
    /// How the model writes tool calls: `auto` (default: as its chat template shows), `hermes` (and Qwen), `llama3-json`,
    /// `mistral`, `none`.
    #[serde(default)]
    pub tool_parser: ToolParser,
    /// How the model thinks before it answers: `auto` (default: as its chat template shows), `think` (between `<think>` and
    /// `</think>`), `none`.
    #[serde(default)]
    pub reasoning_parser: ReasoningParser,
    /// How fast its clients should be answered.
    #[serde(default)]
    pub slo: Slo,
}

/// How fast clients should be answered: what requests are placed, and workers are moved, to keep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Slo {
    /// To the first token, in milliseconds. Default 2000.
    pub ttft_ms: f64,
    /// From one token to the next, in milliseconds. Default 100.
    pub tpot_ms: f64,
}

impl Default for Slo {
    fn default() -> Self {
        Self { ttft_ms: 2_000.0, tpot_ms: 100.0 }
    }
}

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToolParser {
    /// As its chat template shows.
    #[default]
    Auto,
    /// They stay text.
    None,
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
    Hermes,
    /// `{"name": …, "parameters": {…}}`.
    #[serde(rename = "llama3-json")]
    Llama3Json,
    /// `[TOOL_CALLS]` and a list.
    Mistral,
}

/// How a model thinks before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReasoningParser {
    /// As its chat template shows.
    #[default]
    Auto,
    /// Thoughts stay text.
    None,
    /// Between `<think>` and `</think>`.
    Think,
}

impl ModelConfig {
    /// A model that is read and written as its folder says.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            tool_parser: ToolParser::default(),
            reasoning_parser: ReasoningParser::default(),
            slo: Slo::default(),
        }
    }
}

/// What a client may ask for, and for how long.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a request's body; a bigger one gets 413. Default 4 MiB.
    pub max_body_bytes: usize,
    /// Requests under way; one more gets 429. Default 4096.
    pub max_inflight: usize,
    /// Connections; one more waits to be accepted. Default 16384.
    pub max_connections: usize,
    /// Tokens of an answer: the default of chat requests that don't say, and the most anybody may ask for. Default 32768.
    pub max_output_tokens: u32,
    /// Choices of one request (`n`), 1 to 128. Default 16.
    pub max_choices: u32,
    /// From a request's head to the end of its answer, in milliseconds; then 504. Default 600000.
    pub request_timeout_ms: u64,
    /// For a request's body to arrive, in milliseconds; then 408. Default 30000.
    pub body_timeout_ms: u64,
    /// Silence between two tokens of a worker that gives no signs of life in between, in milliseconds; then the answer goes on
    /// elsewhere. Default 60000.
    pub idle_timeout_ms: u64,
    /// For a connection's next request to begin and its head to arrive, in milliseconds; then it is closed. Default 75000.
    pub header_timeout_ms: u64,
    /// For a client to read on when nothing more can be sent to it, in milliseconds; then its connection is closed, and
    /// its requests with it. Default 30000.
    pub write_stall_ms: u64,
    /// After a signal to leave, for how long the port stays open, in milliseconds, within `shutdown.grace_ms`. Requests are
    /// answered as ever meanwhile, and every answer closes its connection: for balancers and clients that have not heard yet.
    /// Default 0.
    pub notice_ms: u64,
    /// For a worker to say that it has taken a request, and between any two signs of life of one that gives them, in
    /// milliseconds; then the request goes elsewhere. Default 20000.
    pub worker_silence_ms: u64,
    /// After a worker failed, how long others are preferred to it, in milliseconds, and twice as long each time it fails
    /// again, up to 30 seconds; 0 for not at all. Default 1000: what has died leaves the member list only when its lease ends.
    pub worker_rest_ms: u64,
    /// Bytes kept of what conversations were tokenized to lately, for each model: the next turn begins there; 0 for none.
    /// Default 67108864 (64 MiB).
    pub text_cache_bytes: usize,
    /// Threads for the text work of long prompts (short ones are done where they come in). Default 2.
    pub text_threads: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            advertise: None,
            port_file: None,
            threads: None,
            admin: AdminConfig::default(),
            public_metrics: false,
            log: LogConfig::default(),
            trace: TraceConfig::default(),
            shutdown: ShutdownConfig::default(),
            registry: RegistryConfig::default(),
            rpc: kvasir_rpc::Config::default(),
            operator: kvasir_rpc::operator::Config::default(),
            models: Vec::new(),
            policy: PolicyName::default(),
            limits: Limits::default(),
            retry: RetryConfig::default(),
            tls: TlsConfig::default(),
            access: AccessConfig::default(),
            admission: AdmissionConfig::default(),
            planner: PlannerConfig::default(),
            external: ExternalConfig::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 4 << 20,
            max_inflight: 4096,
            max_connections: 16_384,
            max_output_tokens: 32_768,
            max_choices: 16,
            request_timeout_ms: 600_000,
            body_timeout_ms: 30_000,
            idle_timeout_ms: 60_000,
            header_timeout_ms: 75_000,
            write_stall_ms: 30_000,
            notice_ms: 0,
            worker_silence_ms: 20_000,
            worker_rest_ms: 1_000,
            text_cache_bytes: 64 << 20,
            text_threads: 2,
        }
    }
}

/// What may be changed while a router runs.
const LIVE: &[(&str, &str)] = &[
    ("log.filter", "at once"),
    ("trace.sample", "from the next request on"),
    ("shutdown.grace_ms", "when it leaves"),
    ("policy", "from the next request on"),
    ("limits.max_body_bytes", "from the next request on"),
    ("limits.max_inflight", "from the next request on; those under way go on"),
    ("limits.max_output_tokens", "from the next request on"),
    ("limits.max_choices", "from the next request on"),
    ("limits.request_timeout_ms", "from the next request on"),
    ("limits.body_timeout_ms", "from the next request on"),
    ("limits.idle_timeout_ms", "from the next request to a worker on"),
    ("limits.worker_silence_ms", "from the next request to a worker on"),
    ("limits.worker_rest_ms", "from a worker's next failure on"),
    ("retry", "from the next request on"),
    ("admission", "at once, for those who wait, too"),
    ("planner", "at its next look"),
];

impl kvasir_runtime::Config for Config {
    const LIVE: &'static [(&'static str, &'static str)] = LIVE;

    fn verify(&self) -> Result<(), String> {
        self.check().map_err(|error| error.to_string())
    }
}

/// A configuration that can't work.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// No model is configured.
    #[error("models: at least one {{name, path}} is needed")]
    NoModels,
    /// A model without a name.
    #[error("models[{0}].name: must not be empty")]
    Unnamed(usize),
    /// Two models of one name.
    #[error("models: two are named {0:?}")]
    Twice(String),
    /// A target that nobody can meet.
    #[error("models[{0}].slo.{1}: must be above 0")]
    Slo(usize, &'static str),
    /// A limit of zero.
    #[error("{0}: must be at least 1")]
    Zero(&'static str),
    /// An engine of others that can't be used.
    #[error(transparent)]
    External(#[from] ExternalError),
}

impl Config {
    /// Checks what the types can't.
    pub fn check(&self) -> Result<(), Error> {
        if self.models.is_empty() {
            return Err(Error::NoModels);
        }
        for (at, model) in self.models.iter().enumerate() {
            if model.name.is_empty() {
                return Err(Error::Unnamed(at));
            }
            for (name, value) in [("ttft_ms", model.slo.ttft_ms), ("tpot_ms", model.slo.tpot_ms)] {
                if !(value.is_finite() && value > 0.0) {
                    return Err(Error::Slo(at, name));
                }
            }
            if self.models[..at].iter().any(|other| other.name == model.name) {
                return Err(Error::Twice(model.name.clone()));
            }
        }
        self.external.check(self.models.iter().map(|model| model.name.as_str()))?;
        let admission = &self.admission;
        for (name, value) in [
            ("admission.per_worker", admission.per_worker),
            ("admission.offline_percent", admission.offline_percent),
            ("admission.max_wait_ms", admission.max_wait_ms as usize),
            ("planner.look_ms", self.planner.look_ms as usize),
            ("planner.votes", self.planner.votes as usize),
            ("planner.min_prefill", self.planner.min_prefill),
            ("planner.min_decode", self.planner.min_decode),
        ] {
            if value == 0 {
                return Err(Error::Zero(name));
            }
        }
        let limits = &self.limits;
        let zero = [
            ("limits.max_body_bytes", limits.max_body_bytes == 0),
            ("limits.max_inflight", limits.max_inflight == 0),
            ("limits.max_connections", limits.max_connections == 0),
            ("limits.max_output_tokens", limits.max_output_tokens == 0),
            ("limits.max_choices", limits.max_choices == 0),
            ("limits.request_timeout_ms", limits.request_timeout_ms == 0),
            ("limits.body_timeout_ms", limits.body_timeout_ms == 0),
            ("limits.idle_timeout_ms", limits.idle_timeout_ms == 0),
            ("limits.header_timeout_ms", limits.header_timeout_ms == 0),
            ("limits.worker_silence_ms", limits.worker_silence_ms == 0),
            ("limits.write_stall_ms", limits.write_stall_ms == 0),
            ("limits.text_threads", limits.text_threads == 0),
        ];
        match zero.into_iter().find(|(_, zero)| *zero) {
            Some((name, _)) => Err(Error::Zero(name)),
            None => Ok(()),
        }
    }
}

impl Limits {
    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    pub(crate) fn body_timeout(&self) -> Duration {
        Duration::from_millis(self.body_timeout_ms)
    }

    pub(crate) fn worker_rest(&self) -> Duration {
        Duration::from_millis(self.worker_rest_ms)
    }

    pub(crate) fn patience(&self, deadline: Deadline) -> Patience {
        let (silence, idle) = (self.worker_silence_ms, self.idle_timeout_ms);
        Patience { silence: Duration::from_millis(silence), idle: Duration::from_millis(idle), deadline }
    }

    pub(crate) fn header_timeout(&self) -> Duration {
        Duration::from_millis(self.header_timeout_ms)
    }

    pub(crate) fn notice(&self) -> Duration {
        Duration::from_millis(self.notice_ms)
    }

    pub(crate) fn write_stall(&self) -> Duration {
        Duration::from_millis(self.write_stall_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_work_is_named_by_its_key() {
        let model = |name: &str| ModelConfig::new(name, "m");
        let mut config = Config::default();
        assert_eq!(config.check(), Err(Error::NoModels));
        config.models = vec![model("a"), model("a")];
        assert_eq!(config.check(), Err(Error::Twice("a".into())));
        config.models = vec![model("a"), model("")];
        assert_eq!(config.check(), Err(Error::Unnamed(1)));
        config.models.truncate(1);
        assert_eq!(config.check(), Ok(()));
        config.limits.max_inflight = 0;
        assert_eq!(config.check().unwrap_err().to_string(), "limits.max_inflight: must be at least 1");
    }
}
