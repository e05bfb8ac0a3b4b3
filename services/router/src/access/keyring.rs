//! The keys there are, found by their hashes.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use super::{Budget, Caller, Key, Tenant, lock};

/// Longest name of a key or a tenant: a tenant's goes to the KV store.
const MAX_NAME: usize = 64;
/// Longest `Authorization` that is looked at.
const MAX_BEARER: usize = 4096;
/// A file with more bytes is not read.
const MAX_FILE: u64 = 16 << 20;

/// A key.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// Its name in logs, unique. At most 64 characters.
    pub name: String,
    /// SHA-256 of the key, 64 hexadecimal digits: `printf %s "$KEY" | sha256sum`.
    pub sha256: String,
    /// Whose it is. Default: a tenant of the key's name.
    #[serde(default)]
    pub tenant: Option<String>,
    /// The models it may ask for. Default: all.
    #[serde(default)]
    pub models: Vec<String>,
    /// Requests a minute; more get 429. Default: no limit but the tenant's.
    #[serde(default)]
    pub requests_per_minute: Option<u64>,
    /// Tokens of prompts and answers a minute; more get 429. Default: no limit but the tenant's.
    #[serde(default)]
    pub tokens_per_minute: Option<u64>,
}

/// What a tenant may do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// Its name, unique. At most 64 characters. The KV store's quotas are given by this name.
    pub name: String,
    /// Its part of the workers' time beside others' (1 each), when there is not enough for all. Default 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// Requests a minute of all its keys. Default: no limit.
    #[serde(default)]
    pub requests_per_minute: Option<u64>,
    /// Tokens a minute of all its keys. Default: no limit.
    #[serde(default)]
    pub tokens_per_minute: Option<u64>,
    /// What its cached blocks are known by; tenants of one salt share them. Default: the name, so it shares with nobody.
    #[serde(default)]
    pub cache_salt: Option<String>,
}

fn one() -> u32 {
    1
}

/// A file of keys.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct KeysFile {
    pub(crate) keys: Vec<KeyConfig>,
    pub(crate) tenants: Vec<TenantConfig>,
}

/// Why keys can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file could not be read.
    #[error("access.keys_file: {} cannot be read", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is too big.
    #[error("access.keys_file: {} has {bytes} bytes, at most {MAX_FILE} are read", path.display())]
    TooBig {
        /// Which.
        path: PathBuf,
        /// How big.
        bytes: u64,
    },
    /// The file is not what it should be.
    #[error("access.keys_file: {}: {reason}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// A name that is none, or too long.
    #[error("access: {what} {name:?}: a name has 1 to 64 printable characters without spaces")]
    Name {
        /// `key` or `tenant`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Two of one name.
    #[error("access: two {what}s are named {name:?}")]
    Twice {
        /// `key` or `tenant`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A hash that is none.
    #[error("access: key {name:?}: sha256 must be 64 hexadecimal digits (never the key itself)")]
    Hash {
        /// The key's name.
        name: String,
    },
    /// Two names for one key.
    #[error("access: keys {one:?} and {other:?} have the same hash")]
    SameHash {
        /// A key's name.
        one: String,
        /// Another's.
        other: String,
    },
    /// A limit that lets nobody in.
    #[error("access: {what} {name:?}: {field} must be at least 1")]
    Zero {
        /// `key` or `tenant`.
        what: &'static str,
        /// The name.
        name: String,
        /// Which limit.
        field: &'static str,
    },
}

impl KeysFile {
    /// Reads a file.
    pub(crate) fn read(path: &Path) -> Result<Self, KeysError> {
        let unreadable = |source| KeysError::Unreadable { path: path.to_owned(), source };
        let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        if bytes > MAX_FILE {
            return Err(KeysError::TooBig { path: path.to_owned(), bytes });
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let malformed = |reason: String| KeysError::Malformed { path: path.to_owned(), reason };
        serde_yaml_ng::from_str(&text).map_err(|error| malformed(error.to_string()))
    }
}

/// All keys and tenants. Replaced as a whole when they change; what was used of limits goes over.
#[derive(Debug)]
pub(crate) struct Keyring {
    /// `None`: no key is needed.
    by_hash: Option<HashMap<[u8; 32], Caller>>,
    tenants: BTreeMap<String, Arc<Tenant>>,
    anonymous: Caller,
}

/// Why a request has no caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// It says no key.
    NoKey,
    /// There is no such key.
    BadKey,
}

impl Keyring {
    /// Checks and sorts them; `required`: nobody without a key is let in, even if there is none.
    pub(crate) fn new(file: KeysFile, required: bool) -> Result<Self, KeysError> {
        let now = Instant::now();
        let mut tenants = BTreeMap::new();
        for tenant in file.tenants {
            name_is_one("tenant", &tenant.name)?;
            let name = tenant.name.clone();
            let limits = [("weight", Some(tenant.weight.into()))];
            at_least_one("tenant", &name, &limits)?;
            let limits = (tenant.requests_per_minute, tenant.tokens_per_minute);
            let salt = tenant.cache_salt.unwrap_or_else(|| name.clone());
            let budget = budget("tenant", &name, limits, now)?;
            if tenants.insert(name.clone(), new_tenant(name.clone(), tenant.weight, salt, budget)).is_some() {
                return Err(KeysError::Twice { what: "tenant", name });
            }
        }
        let mut by_hash: HashMap<[u8; 32], Caller> = HashMap::new();
        let mut names = BTreeMap::new();
        for key in file.keys {
            name_is_one("key", &key.name)?;
            let name = key.name.clone();
            if names.insert(name.clone(), ()).is_some() {
                return Err(KeysError::Twice { what: "key", name });
            }
            let hash = digits(&key.sha256).ok_or_else(|| KeysError::Hash { name: name.clone() })?;
            let tenant = key.tenant.unwrap_or_else(|| name.clone());
            name_is_one("tenant", &tenant)?;
            let usual = || new_tenant(tenant.clone(), 1, tenant.clone(), Budget::new(None, None, now));
            let tenant = Arc::clone(tenants.entry(tenant.clone()).or_insert_with(usual));
            let limits = (key.requests_per_minute, key.tokens_per_minute);
            let budget = Mutex::new(budget("key", &name, limits, now)?);
            let caller = Caller(Arc::new(Key { name: name.clone(), tenant, models: key.models, budget }));
            if let Some(other) = by_hash.insert(hash, caller) {
                return Err(KeysError::SameHash { one: other.key().name.clone(), other: name });
            }
        }
        let nobody = new_tenant(String::new(), 1, String::new(), Budget::new(None, None, now));
        let budget = Mutex::new(Budget::new(None, None, now));
        let anonymous = Caller(Arc::new(Key { name: String::new(), tenant: nobody, models: Vec::new(), budget }));
        Ok(Self { by_hash: required.then_some(by_hash), tenants, anonymous })
    }

    /// One that lets everybody in.
    #[cfg(test)]
    pub(crate) fn open() -> Self {
        Self::new(KeysFile::default(), false).expect("nothing can't be wrong")
    }

    /// The same with what was used of the limits before.
    pub(crate) fn after(self, before: &Self) -> Self {
        let carry = |new: &Mutex<Budget>, old: &Mutex<Budget>| {
            let old = *lock(old);
            let mut new = lock(new);
            *new = new.after(&old);
        };
        for (name, tenant) in &self.tenants {
            if let Some(old) = before.tenants.get(name) {
                carry(&tenant.budget, &old.budget);
            }
        }
        for (hash, caller) in self.by_hash.iter().flatten() {
            if let Some(old) = before.by_hash.as_ref().and_then(|keys| keys.get(hash)) {
                carry(&caller.0.budget, &old.0.budget);
            }
        }
        self
    }

    /// Whoever sent a request with this `Authorization`.
    pub(crate) fn caller(&self, authorization: Option<&[u8]>) -> Result<Caller, Unknown> {
        let Some(by_hash) = &self.by_hash else { return Ok(self.anonymous.clone()) };
        let authorization = authorization.ok_or(Unknown::NoKey)?;
        let key = bearer(authorization).ok_or(Unknown::BadKey)?;
        let hash = ring::digest::digest(&ring::digest::SHA256, key);
        by_hash.get(hash.as_ref()).cloned().ok_or(Unknown::BadKey)
    }

    /// How many keys there are; `None`: none is needed.
    pub(crate) fn keys(&self) -> Option<usize> {
        self.by_hash.as_ref().map(HashMap::len)
    }
}

fn new_tenant(name: String, weight: u32, salt: String, budget: Budget) -> Arc<Tenant> {
    Arc::new(Tenant { name, weight, salt, budget: Mutex::new(budget) })
}

fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = authorization.split_at_checked(7)?;
    let key = key.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !key.is_empty() && key.len() <= MAX_BEARER).then_some(key)
}

fn name_is_one(what: &'static str, name: &str) -> Result<(), KeysError> {
    let good = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
    if good { Ok(()) } else { Err(KeysError::Name { what, name: name.chars().take(MAX_NAME).collect() }) }
}

fn budget(
    what: &'static str,
    name: &str,
    (requests, tokens): (Option<u64>, Option<u64>),
    now: Instant,
) -> Result<Budget, KeysError> {
    at_least_one(what, name, &[("requests_per_minute", requests), ("tokens_per_minute", tokens)])?;
    Ok(Budget::new(requests, tokens, now))
}

fn at_least_one(what: &'static str, name: &str, fields: &[(&'static str, Option<u64>)]) -> Result<(), KeysError> {
    match fields.iter().find(|(_, value)| *value == Some(0)) {
        Some((field, _)) => Err(KeysError::Zero { what, name: name.to_owned(), field }),
        None => Ok(()),
    }
}

fn digits(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(key: &str) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, key.as_bytes());
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn key(name: &str) -> KeyConfig {
        KeyConfig { name: name.into(), sha256: hash(&format!("sk-{name}")), ..KeyConfig::default() }
    }

    fn ring_of(keys: Vec<KeyConfig>, tenants: Vec<TenantConfig>) -> Result<Keyring, KeysError> {
        Keyring::new(KeysFile { keys, tenants }, true)
    }

    #[test]
    fn a_key_is_found_by_its_hash_and_nobody_else_is_let_in() {
        let ring = ring_of(vec![key("one"), KeyConfig { tenant: Some("one".into()), ..key("two") }], vec![]).unwrap();
        let of = |header: &str| ring.caller(Some(header.as_bytes()));
        assert_eq!(of("Bearer sk-one").unwrap().key().name, "one");
        assert_eq!(of("bearer  sk-two ").unwrap().tenant().name, "one");
        for bad in ["", "Bearer", "Bearer ", "Basic sk-one", "Bearer sk-three", &format!("Bearer {}", hash("sk-one"))] {
            assert_eq!(of(bad).unwrap_err(), Unknown::BadKey, "{bad}");
        }
        assert_eq!(ring.caller(None).unwrap_err(), Unknown::NoKey);
        // The SHA-256 of "abc" is in the standard.
        assert_eq!(hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn without_keys_everybody_may_ask_but_an_empty_file_lets_nobody_in() {
        let open = Keyring::open();
        assert_eq!(open.caller(None).unwrap().tenant().name, "");
        assert!(open.caller(Some(b"Bearer whatever")).is_ok());
        let shut = Keyring::new(KeysFile::default(), true).unwrap();
        assert_eq!(shut.caller(Some(b"Bearer whatever")).unwrap_err(), Unknown::BadKey);
    }

    #[test]
    fn mistakes_are_told_by_name() {
        let tenant = |name: &str, weight| TenantConfig {
            name: name.into(),
            weight,
            requests_per_minute: None,
            tokens_per_minute: None,
            cache_salt: None,
        };
        let told = |keys, tenants| ring_of(keys, tenants).unwrap_err().to_string();
        insta::assert_snapshot!(told(vec![key("a"), key("a")], vec![]), @r#"access: two keys are named "a""#);
        let twin = KeyConfig { name: "b".into(), ..key("a") };
        insta::assert_snapshot!(told(vec![key("a"), twin], vec![]), @r#"access: keys "a" and "b" have the same hash"#);
        let plain = KeyConfig { sha256: "sk-secret".into(), ..key("a") };
        insta::assert_snapshot!(told(vec![plain], vec![]), @r#"access: key "a": sha256 must be 64 hexadecimal digits (never the key itself)"#);
        let never = KeyConfig { requests_per_minute: Some(0), ..key("a") };
        insta::assert_snapshot!(told(vec![never], vec![]), @r#"access: key "a": requests_per_minute must be at least 1"#);
        insta::assert_snapshot!(told(vec![], vec![tenant("t", 0)]), @r#"access: tenant "t": weight must be at least 1"#);
        insta::assert_snapshot!(told(vec![], vec![tenant("a b", 1)]), @r#"access: tenant "a b": a name has 1 to 64 printable characters without spaces"#);
    }

    #[test]
    fn tenants_share_no_salt_and_a_request_cannot_name_anothers() {
        let shared = TenantConfig {
            name: "s".into(),
            weight: 1,
            requests_per_minute: None,
            tokens_per_minute: None,
            cache_salt: Some("a".into()),
        };
        let ring = ring_of(vec![key("a"), key("b"), key("s")], vec![shared]).unwrap();
        let salt = |key: &str, asked: &str| {
            ring.caller(Some(format!("Bearer sk-{key}").as_bytes())).unwrap().cache_salt(asked)
        };
        assert_eq!(salt("a", ""), salt("s", ""));
        assert_ne!(salt("a", ""), salt("b", ""));
        assert_ne!(salt("a", "x"), salt("a", ""));
        assert_ne!(salt("b", &salt("a", "")), salt("a", ""));
        assert!(salt("a", &"x".repeat(256)).len() <= kvasir_proto::convert::MAX_SALT_BYTES);
        let open = Keyring::open();
        assert_eq!(open.caller(None).unwrap().cache_salt("mine"), "mine");
    }

    #[test]
    fn what_was_used_stays_used_when_keys_change() {
        let limited = KeyConfig { requests_per_minute: Some(2), ..key("a") };
        let old = ring_of(vec![limited.clone()], vec![]).unwrap();
        let now = Instant::now();
        let ask = |ring: &Keyring| ring.caller(Some(b"Bearer sk-a")).unwrap().request(now);
        ask(&old).unwrap();
        ask(&old).unwrap();
        let new = ring_of(vec![limited, key("b")], vec![]).unwrap().after(&old);
        assert_eq!(ask(&new).unwrap_err().what, "requests");
    }
}
