//! One engine: what it is, how it is reached, what was sent there.

use std::{path::Path, sync::Arc};

use http::{HeaderValue, uri::Authority};
use kvasir_cluster::{Duty, Member, ModelInfo};
use kvasir_types::{Incarnation, KvDtype, KvLayout, MemberId, ModelFingerprint, PROTOCOL_VERSION, Role};

use super::{
    config::{EngineConfig, EngineKind, EngineRole, authority},
    http::Http,
    remembered::Remembered,
};

/// Tokens of the blocks by which prompts sent to engines are remembered. How an engine itself cuts prompts does not matter.
const BLOCK_TOKENS: u32 = 16;
/// Where SGLang's prefill servers wait unless somebody says otherwise.
const BOOTSTRAP_PORT: u16 = 8998;
/// Longest key.
const MAX_KEY_BYTES: usize = 4096;

/// One life of one engine: from a health check that it answered to the last one that it did.
pub(crate) struct Engine {
    /// Its protocol.
    pub(crate) kind: EngineKind,
    /// Whom it works with: engines of its kind and group.
    pub(crate) group: String,
    /// It needs no partner, and takes none.
    pub(crate) alone: bool,
    /// What it calls its model.
    pub(crate) served_name: String,
    /// Where it is.
    pub(crate) authority: Authority,
    /// Where decode servers meet it, if it is an SGLang prefill server.
    pub(crate) bootstrap_port: u16,
    /// It follows seeds.
    pub(crate) seeds: bool,
    /// What it wants to be shown.
    pub(crate) key: Option<HeaderValue>,
    /// What it is reached by; all engines' is the same.
    pub(crate) http: Http,
    /// Which prompts it was sent.
    pub(crate) remembered: Remembered,
}

impl Engine {
    /// Of this configuration, which has been checked; the error says what is wrong with its key.
    pub(crate) fn new(
        config: &EngineConfig,
        key: Option<HeaderValue>,
        http: Http,
        remember: usize,
    ) -> Result<Self, String> {
        Ok(Self {
            kind: config.kind,
            group: config.group.clone(),
            alone: config.role == EngineRole::Both,
            served_name: config.served_name.clone().unwrap_or_else(|| config.model.clone()),
            authority: authority(&config.url)?,
            bootstrap_port: config.bootstrap_port.unwrap_or(BOOTSTRAP_PORT),
            seeds: config.kind == EngineKind::Vllm || config.deterministic,
            key,
            http,
            remembered: Remembered::new(remember),
        })
    }

    /// Whether it may be given a prompt that `prefill` computed.
    pub(crate) fn pairs_with(&self, prefill: &Self) -> bool {
        !self.alone && self.kind == prefill.kind && self.group == prefill.group
    }

    /// Whether it can do nothing without a prefill server: SGLang's decode servers compute no prompt.
    pub(crate) fn needs_a_partner(&self) -> bool {
        self.kind == EngineKind::Sglang && !self.alone
    }
}

/// Its role among the members.
pub(crate) fn role(config: &EngineConfig) -> Role {
    match config.role {
        EngineRole::Prefill => Role::Prefill,
        EngineRole::Decode | EngineRole::Both => Role::Decode,
    }
}

/// The record of an engine in a life that has just begun; `context`: tokens that the model was made for.
pub(crate) fn member(config: &EngineConfig, incarnation: Incarnation, context: u32) -> Member {
    Member {
        id: config.id.clone(),
        incarnation,
        role: role(config),
        grpc: String::new(),
        admin: String::new(),
        http: config.url.clone(),
        protocol: PROTOCOL_VERSION,
        version: config.kind.as_str().to_owned(),
        model: Some(ModelInfo {
            name: config.model.clone(),
            fingerprint: fingerprint(config),
            // Of no meaning but for the blocks' size: engines' KV is their own affair.
            layout: KvLayout {
                block_size: BLOCK_TOKENS,
                layers: 1,
                kv_heads: 1,
                k_dim: 1,
                v_dim: 1,
                dtype: KvDtype::F16,
            },
            max_model_len: config.max_model_len.unwrap_or(context),
            tokenizer: String::new(),
        }),
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: Duty::default(),
    }
}

/// Which weights: those of the group. Never those of a worker of ours, whose answers differ in the last bits.
fn fingerprint(config: &EngineConfig) -> ModelFingerprint {
    let mut hasher = blake3::Hasher::new_derive_key("kvasir external engine group");
    for part in [config.kind.as_str(), &config.model, &config.group] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    ModelFingerprint(bytes)
}

/// The header for a key in a file.
pub(crate) fn read_key(path: &Path) -> Result<HeaderValue, String> {
    let told = |why: &dyn std::fmt::Display| format!("key file {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| told(&error))?;
    let key = text.trim();
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(told(&format_args!("a key has 1 to {MAX_KEY_BYTES} bytes, this has {}", key.len())));
    }
    let mut header = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| told(&"holds what no header can"))?;
    header.set_sensitive(true);
    Ok(header)
}

/// An engine and the record it has in this life.
#[derive(Clone)]
pub(crate) struct Known {
    /// Its record.
    pub(crate) member: Member,
    /// The engine.
    pub(crate) engine: Arc<Engine>,
}

/// Its name.
pub(crate) type Name = (Role, MemberId);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn config(kind: EngineKind, role: EngineRole, url: &str) -> EngineConfig {
        EngineConfig {
            id: "e".parse().unwrap(),
            kind,
            role,
            url: url.to_owned(),
            model: "demo".into(),
            served_name: None,
            group: String::new(),
            bootstrap_port: None,
            max_model_len: None,
            deterministic: false,
            key_file: None,
        }
    }

    fn engine(change: impl FnOnce(&mut EngineConfig)) -> Engine {
        let mut config = config(EngineKind::Sglang, EngineRole::Decode, "http://127.0.0.1:1");
        change(&mut config);
        Engine::new(&config, None, Http::default(), 0).unwrap()
    }

    #[test]
    fn only_engines_of_one_kind_and_group_go_together() {
        let prefill = engine(|config| config.role = EngineRole::Prefill);
        assert!(engine(|_| {}).pairs_with(&prefill));
        assert!(!engine(|config| config.group = "b".into()).pairs_with(&prefill));
        assert!(!engine(|config| config.kind = EngineKind::Vllm).pairs_with(&prefill));
        assert!(!engine(|config| config.role = EngineRole::Both).pairs_with(&prefill));
        assert!(engine(|_| {}).needs_a_partner() && !engine(|config| config.role = EngineRole::Both).needs_a_partner());
        assert!(!engine(|config| config.kind = EngineKind::Vllm).needs_a_partner());
    }

    #[test]
    fn a_group_has_weights_of_its_own() {
        let print = |kind, group: &str| {
            fingerprint(&EngineConfig { group: group.into(), ..config(kind, EngineRole::Decode, "http://a:1") })
        };
        assert_eq!(print(EngineKind::Vllm, "a"), print(EngineKind::Vllm, "a"));
        assert_ne!(print(EngineKind::Vllm, "a"), print(EngineKind::Vllm, "b"));
        assert_ne!(print(EngineKind::Vllm, "a"), print(EngineKind::Sglang, "a"));
    }

    #[test]
    fn a_key_is_read_and_what_is_none_is_told_without_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, " s3cret\n").unwrap();
        let header = read_key(&path).unwrap();
        assert_eq!((header.to_str().unwrap(), header.is_sensitive()), ("Bearer s3cret", true));
        for bad in ["", "\n", "s3cr\net"] {
            std::fs::write(&path, bad).unwrap();
            let error = read_key(&path).unwrap_err();
            assert!(error.starts_with("key file /") && !error.contains("s3cr"), "{error}");
        }
    }
}
