//! Stand-ins for engines of others: small servers that speak vLLM's and SGLang's HTTP protocols as strictly as a test needs,
//! and compute nothing. **They are not those engines**; what they say and want was taken from those projects' sources and
//! documentation (`docs/external-engines.md` says which).
//!
//! ```text
//!   rule      the next token is a function of all tokens before (and the seed, if one samples)
//!   prefill   turns a prompt into the rule's state, and hands that over once, to whoever names the right blocks (or room)
//!   decode    goes on from the state it was handed, not from the prompt: a wrong pairing says the wrong tokens, or nothing
//! ```
//!
//! Each is a process of its own (`stand-in`), so that it can be killed. `POST /stand_in` changes what it does next
//! ([`Knobs`]), `GET /stand_in` says what it has seen ([`Seen`]).

pub mod rule;
pub mod serve;
mod sglang;
mod vllm;

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Process, wait, workspace};

/// How long a stand-in may take to listen.
const START: Duration = Duration::from_secs(20);

/// What it stands in for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A vLLM server with NixlConnector.
    Vllm,
    /// An SGLang server.
    Sglang,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prompts for others.
    Prefill,
    /// Answers to prompts of others.
    Decode,
    /// Both by itself.
    Both,
}

impl Kind {
    /// As on the command line and in a router's configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        }
    }
}

impl Role {
    /// The same.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }
}

/// What a stand-in does next.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Knobs {
    /// Milliseconds from one token to the next.
    pub every_ms: u64,
    /// Says these tokens and the end token, instead of what the rule says.
    pub script: Vec<u32>,
    /// Goes wrong: `status:NNN`, `garbage`, `hang`, `cut` (the connection), `error` (as the engine says it). Empty: doesn't.
    pub fault: String,
    /// After so many tokens of an answer.
    pub after: usize,
    /// So many times; then never again.
    pub times: usize,
    /// `/health` says no.
    pub sick: bool,
    /// SGLang: events hold what is new only.
    pub incremental: bool,
}

/// What a stand-in has seen.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Bodies of requests for tokens, in the order in which they came.
    pub requests: Vec<Value>,
    /// Names of those requests (`x-request-id`, `rid`).
    pub ids: Vec<String>,
    /// Prompts that it computed.
    pub computed: usize,
    /// Prompts that it was handed.
    pub handed: usize,
    /// Answers under way.
    pub running: usize,
    /// Answers that nobody wanted any more.
    pub aborted: usize,
    /// Names that `/abort_request` was called with.
    pub aborts: Vec<String>,
    /// `authorization` of the last request.
    pub authorization: Option<String>,
}

/// A running stand-in.
pub struct StandIn {
    /// What it stands in for.
    pub kind: Kind,
    /// What it does.
    pub role: Role,
    /// The process, for signals.
    pub process: Process,
    id: String,
    served: String,
    ports: Ports,
}

/// Where a stand-in listens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ports {
    /// `host:port` of its HTTP API.
    pub http: String,
    /// Where decode servers meet it (SGLang, prefill).
    pub bootstrap: u16,
}

impl StandIn {
    /// Starts one that serves a model under that name, with its files in `dir`.
    pub async fn start(kind: Kind, role: Role, id: &str, served: &str, dir: &Path) -> Result<Self> {
        Self::start_at(kind, role, id, served, dir, None).await
    }

    async fn start_at(kind: Kind, role: Role, id: &str, served: &str, dir: &Path, at: Option<&Ports>) -> Result<Self> {
        let file = dir.join(format!("{id}.ports.json"));
        let _ = std::fs::remove_file(&file); // a former life's
        let mut command = Command::new(workspace::binary("stand-in")?);
        command.args([kind.as_str(), role.as_str(), served]).arg(&file);
        if let Some(ports) = at {
            command.args([ports.http.clone(), ports.bootstrap.to_string()]);
        }
        let mut process = Process::spawn(id, command, dir)?;
        let what = format!("{id} listens");
        let ports = wait::until(&what, START, async || {
            if process.ended().is_some() {
                return Some(None);
            }
            serde_json::from_str::<Ports>(&std::fs::read_to_string(&file).ok()?).ok().map(Some)
        });
        let ports = ports.await?;
        let Some(ports) = ports else { anyhow::bail!("{id} has ended: {}", process.log()) };
        Ok(Self { kind, role, process, id: id.to_owned(), served: served.to_owned(), ports })
    }

    /// Starts it again where it was, after it was killed.
    pub async fn restart(&mut self, dir: &Path) -> Result<()> {
        let ports = self.ports.clone();
        *self = Self::start_at(self.kind, self.role, &self.id, &self.served, dir, Some(&ports)).await?;
        Ok(())
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://{}", self.ports.http)
    }

    /// What a router's configuration says of it.
    pub fn config(&self, model: &str) -> Value {
        let mut config = json!({
            "id": self.id, "kind": self.kind.as_str(), "role": self.role.as_str(), "url": self.url(), "model": model,
            "served_name": self.served,
        });
        if self.kind == Kind::Sglang && self.role == Role::Prefill {
            config["bootstrap_port"] = self.ports.bootstrap.into();
        }
        config
    }

    /// Where decode servers meet it.
    pub fn bootstrap_port(&self) -> u16 {
        self.ports.bootstrap
    }

    /// Changes what it does next.
    pub async fn turn(&self, knobs: Knobs) -> Result<()> {
        let reply = reqwest::Client::new().post(format!("{}/stand_in", self.url())).json(&knobs).send().await?;
        ensure!(reply.status().is_success(), "{}: {}", self.id, reply.text().await?);
        Ok(())
    }

    /// What it has seen.
    pub async fn seen(&self) -> Result<Seen> {
        Ok(reqwest::get(format!("{}/stand_in", self.url())).await?.json().await?)
    }
}
