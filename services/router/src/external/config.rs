//! Which engines of others there are.

use std::path::PathBuf;

use kvasir_cluster::Member;
use kvasir_types::{MemberId, Role};
use serde::{Deserialize, Serialize};

/// Engines of others: those listed here, and those in etcd (`kvasirctl engine add`).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExternalConfig {
    /// Engines that this router uses beside those in etcd.
    pub engines: Vec<EngineConfig>,
    /// Between two looks at an engine's `/health`, in milliseconds; a look may take as long. Default 1000.
    pub probe_ms: u64,
    /// An engine whose `/health` has not answered for so long is no member any more, until it answers again, in milliseconds.
    /// Default 5000.
    pub gone_after_ms: u64,
    /// File with the key that engines want (`Authorization: Bearer`), for those that name no other. Read each time an engine
    /// appears. Default: none.
    pub key_file: Option<PathBuf>,
    /// Blocks (of 16 tokens) of prompts sent to an engine that are remembered, as it tells nobody what its cache holds; the
    /// longest unused are forgotten first. 0: none. Default 65536.
    pub remember_blocks: usize,
}

impl Default for ExternalConfig {
    fn default() -> Self {
        Self { engines: Vec::new(), probe_ms: 1_000, gone_after_ms: 5_000, key_file: None, remember_blocks: 65_536 }
    }
}

/// An engine of somebody else's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// Its name here, unique among engines.
    pub id: MemberId,
    /// What it is.
    pub kind: EngineKind,
    /// What it does.
    pub role: EngineRole,
    /// `http://host:port`.
    pub url: String,
    /// Which of the router's models it serves.
    pub model: String,
    /// What the engine calls that model. Default: the same.
    #[serde(default)]
    pub served_name: Option<String>,
    /// Engines of one kind and group go together: prefill servers of it hand prompts to its decode servers, and an answer goes
    /// on at another one of it, so all of a group must have the same weights. Default: the empty one.
    #[serde(default)]
    pub group: String,
    /// Where an SGLang prefill server waits for decode servers (`--disaggregation-bootstrap-port`). Default 8998.
    #[serde(default)]
    pub bootstrap_port: Option<u16>,
    /// Most tokens of prompt and answer together. Default: the model's.
    #[serde(default)]
    pub max_model_len: Option<u32>,
    /// An SGLang server runs with `--enable-deterministic-inference`: only then it follows seeds. Default false.
    #[serde(default)]
    pub deterministic: bool,
    /// File with the key that it wants. Default: `external.key_file`.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
}

/// Whose engine it is, that is, which protocol it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// A vLLM server; with prefill and decode apart by a connector such as NIXL's.
    Vllm,
    /// An SGLang server; with prefill and decode apart by `--disaggregation-mode`.
    Sglang,
}

impl EngineKind {
    /// As the configuration has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        }
    }

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Vllm, Self::Sglang].into_iter().find(|kind| kind.as_str() == name)
    }
}

/// What an engine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineRole {
    /// Computes prompts.
    Prefill,
    /// Writes answers to prompts that another one computed.
    Decode,
    /// Does both by itself, without a partner.
    Both,
}

/// An engine that can't be used.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ExternalError {
    /// Two of one name.
    #[error("external.engines: two are named {0}")]
    Twice(MemberId),
    /// It serves what this router doesn't.
    #[error("external.engines[{at}].model: this router serves no model {model:?}")]
    NoModel {
        /// Which engine.
        at: usize,
        /// Its model.
        model: String,
    },
    /// Its address is none.
    #[error("external.engines[{at}].url: {why}")]
    Url {
        /// Which engine.
        at: usize,
        /// What is wrong.
        why: String,
    },
    /// A limit of zero.
    #[error("external.{0}: must be at least 1")]
    Zero(&'static str),
}

impl EngineConfig {
    /// That of a record in etcd; the error says what can't be used.
    pub(crate) fn of(member: &Member) -> Option<Result<Self, String>> {
        let info = member.engine.as_ref()?;
        let Some(kind) = EngineKind::named(&info.kind) else {
            return Some(Err(format!("an engine of kind {:?}, which this router does not know", info.kind)));
        };
        if let Err(why) = authority(&info.url) {
            return Some(Err(why));
        }
        let role = match member.role {
            Role::Prefill => EngineRole::Prefill,
            Role::Decode if info.alone => EngineRole::Both,
            Role::Decode => EngineRole::Decode,
            Role::Router | Role::KvStore => return Some(Err(format!("an engine as {}", member.role))),
        };
        Some(Ok(Self {
            id: member.id.clone(),
            kind,
            role,
            url: info.url.clone(),
            model: info.model.clone(),
            served_name: Some(info.served_name.clone()).filter(|name| !name.is_empty()),
            group: info.group.clone(),
            bootstrap_port: info.bootstrap_port,
            max_model_len: info.max_model_len,
            deterministic: info.deterministic,
            key_file: None,
        }))
    }
}

impl ExternalConfig {
    /// Checks what the types can't, for a router of these models.
    pub(crate) fn check<'a>(&self, models: impl Iterator<Item = &'a str> + Clone) -> Result<(), ExternalError> {
        if self.probe_ms == 0 {
            return Err(ExternalError::Zero("probe_ms"));
        }
        for (at, engine) in self.engines.iter().enumerate() {
            if self.engines[..at].iter().any(|other| other.id == engine.id) {
                return Err(ExternalError::Twice(engine.id.clone()));
            }
            if !models.clone().any(|model| model == engine.model) {
                return Err(ExternalError::NoModel { at, model: engine.model.clone() });
            }
            authority(&engine.url).map_err(|why| ExternalError::Url { at, why })?;
        }
        Ok(())
    }
}

/// `host:port` of an engine's address.
pub(crate) fn authority(url: &str) -> Result<http::uri::Authority, String> {
    let shown: String = url.chars().take(100).collect();
    let uri: http::Uri = url.parse().map_err(|error| format!("{shown:?} is none: {error}"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("{shown:?} does not begin with http:// (TLS to engines is for a proxy beside them)"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(format!("{shown:?} has a path: only http://host:port is taken"));
    }
    uri.authority().cloned().ok_or_else(|| format!("{shown:?} has no host"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(id: &str, role: EngineRole) -> EngineConfig {
        EngineConfig {
            id: id.parse().unwrap(),
            kind: EngineKind::Vllm,
            role,
            url: "http://127.0.0.1:8100".into(),
            model: "demo".into(),
            served_name: None,
            group: String::new(),
            bootstrap_port: None,
            max_model_len: None,
            deterministic: false,
            key_file: None,
        }
    }

    #[test]
    fn what_can_not_be_used_is_named() {
        let check = |engines: Vec<EngineConfig>| {
            ExternalConfig { engines, ..ExternalConfig::default() }
                .check(["demo"].into_iter())
                .map_err(|e| e.to_string())
        };
        let good = || engine("a", EngineRole::Prefill);
        assert_eq!(check(vec![good(), engine("b", EngineRole::Decode)]), Ok(()));
        assert!(check(vec![good(), good()]).unwrap_err().contains("two are named a"));
        let other = EngineConfig { model: "other".into(), ..good() };
        assert_eq!(check(vec![other]).unwrap_err(), "external.engines[0].model: this router serves no model \"other\"");
        for url in ["", "127.0.0.1:1", "https://a:1", "http://a:1/v1", "http://a:1/?x=1", "ftp://a", "http://"] {
            let bad = EngineConfig { url: url.into(), ..good() };
            assert!(check(vec![bad]).unwrap_err().starts_with("external.engines[0].url: "), "{url}");
        }
    }

    #[test]
    fn an_engine_is_read_as_documented() {
        let text = r#"{"id": "d", "kind": "sglang", "role": "both", "url": "http://a:1", "model": "m"}"#;
        let engine: EngineConfig = serde_json::from_str(text).unwrap();
        assert_eq!((engine.kind, engine.role, engine.bootstrap_port), (EngineKind::Sglang, EngineRole::Both, None));
        assert!(serde_json::from_str::<EngineConfig>(&text.replace("\"url\"", "\"uri\"")).is_err());
    }
}
