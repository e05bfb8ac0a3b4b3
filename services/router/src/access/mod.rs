//! Who may ask, for what, and how much.
//!
//! ```text
//! Authorization: Bearer sk-…  ──sha256──▶ Keyring ─▶ Caller { key, tenant } ─▶ models, limits, cache salt, fair share
//! ```
//!
//! Keys are known by their hashes only: neither configuration nor file holds one that could be used. The file is read again
//! when it changes; a mistake in it is told and the former keys stay. Without any key configured everybody may ask, as one
//! tenant without a name.
//!
//! Each router counts for itself: with several, a client may have the sum of what they allow.

mod keyring;
mod rate;
mod watch;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

pub use keyring::{KeyConfig, KeysError, TenantConfig};
pub(crate) use keyring::{Keyring, Unknown};
pub(crate) use rate::{Budget, Over};
use serde::{Deserialize, Serialize};
pub(crate) use watch::watch;

/// Who may ask.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessConfig {
    /// A YAML or JSON file with `keys` and `tenants`, as below; read again when it changes. Default: none.
    pub keys_file: Option<PathBuf>,
    /// Keys, by their hashes. Default: none. With none here and in the file, no key is needed.
    pub keys: Vec<KeyConfig>,
    /// Tenants whose share or limits are not the usual ones. Default: none.
    pub tenants: Vec<TenantConfig>,
}

impl AccessConfig {
    /// The keys and tenants of this configuration and its file.
    pub(crate) fn keyring(&self) -> Result<Keyring, KeysError> {
        let mut all = keyring::KeysFile { keys: self.keys.clone(), tenants: self.tenants.clone() };
        if let Some(path) = &self.keys_file {
            let file = keyring::KeysFile::read(path)?;
            all.keys.extend(file.keys);
            all.tenants.extend(file.tenants);
        }
        let required = self.keys_file.is_some() || !all.keys.is_empty();
        Keyring::new(all, required)
    }
}

/// A group of keys that share cached blocks, a fair share and limits.
#[derive(Debug)]
pub(crate) struct Tenant {
    /// Its name; empty for those without a key.
    pub(crate) name: String,
    /// Its part of the workers' time, when there is not enough for all.
    pub(crate) weight: u32,
    /// What block hashes begin with, so that no other tenant finds its blocks; empty: the shared one.
    salt: String,
    budget: Mutex<Budget>,
}

/// One key.
#[derive(Debug)]
pub(crate) struct Key {
    /// Its name, for logs; empty for those without a key.
    pub(crate) name: String,
    tenant: Arc<Tenant>,
    /// Empty: all.
    models: Vec<String>,
    budget: Mutex<Budget>,
}

/// Whoever sent a request. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Caller(Arc<Key>);

/// What a caller has left, for the headers of its answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Left {
    /// Of the limit, how many remain, and until all of it does.
    pub(crate) requests: Option<(u64, u64, Duration)>,
    /// The same for tokens.
    pub(crate) tokens: Option<(u64, u64, Duration)>,
}

fn lock(budget: &Mutex<Budget>) -> MutexGuard<'_, Budget> {
    budget.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Caller {
    /// The tenant.
    pub(crate) fn tenant(&self) -> &Arc<Tenant> {
        &self.0.tenant
    }

    /// The key.
    pub(crate) fn key(&self) -> &Key {
        &self.0
    }

    /// Whether it may ask for this model.
    pub(crate) fn may_use(&self, model: &str) -> bool {
        self.0.models.is_empty() || self.0.models.iter().any(|allowed| allowed == model)
    }

    /// Counts a request, unless it is one too many.
    pub(crate) fn request(&self, now: Instant) -> Result<(), Over> {
        lock(&self.0.budget).request(now)?;
        lock(&self.0.tenant.budget).request(now)
    }

    /// Counts a prompt's tokens, unless they are too many.
    pub(crate) fn prompt(&self, tokens: u64, now: Instant) -> Result<(), Over> {
        lock(&self.0.budget).prompt(tokens, now)?;
        lock(&self.0.tenant.budget).prompt(tokens, now)
    }

    /// Counts an answer's tokens: they have been written already.
    pub(crate) fn answer(&self, tokens: u64, now: Instant) {
        lock(&self.0.budget).answer(tokens, now);
        lock(&self.0.tenant.budget).answer(tokens, now);
    }

    /// What its key has left.
    pub(crate) fn left(&self, now: Instant) -> Left {
        lock(&self.0.budget).left(now)
    }

    /// What block hashes begin with: the tenant's salt and the request's, so that neither can be had through the other.
    pub(crate) fn cache_salt(&self, asked: &str) -> String {
        kvasir_types::tenant_salt(&self.0.tenant.salt, asked)
    }
}
