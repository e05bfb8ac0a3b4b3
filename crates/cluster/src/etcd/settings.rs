//! Settings in etcd.
//!
//! ```text
//!   <prefix>/config/<role>            =  JSON of what is set for all members of a role      no lease: until it is unset
//!   <prefix>/config/<role>/<member>   =  the same for one of them
//!   <prefix>/config-history/<milliseconds since 1970>-<random>  =  JSON of a change, at most 256 of them
//! ```
//!
//! A document and its changes are written in one transaction, which fails if the document is another one than its writer has
//! seen. They are few and small, so whoever follows them reads all of them again when one changes, and after every break:
//! a compacted history, or an etcd that came back with other data, need nothing more.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp, TxnOpResponse, WatchStream};
use tokio::{sync::watch, time::sleep};

use super::{call::Etcd, check};
use crate::{
    Error, EtcdConfig,
    settings::{Change, Document, MAX_CHANGES, MAX_DOCUMENTS, Scope, Settings},
};

/// Between two tries to reach etcd.
const PAUSE: Duration = Duration::from_millis(300);

/// What is set, as it was last seen.
pub(super) struct Kept {
    /// What the keys of documents begin with.
    documents: String,
    /// What those of changes begin with.
    history: String,
    limit: Duration,
    seen: watch::Sender<Option<Arc<Settings>>>,
}

impl Kept {
    pub(super) fn new(config: &EtcdConfig) -> Self {
        let prefix = config.prefix.trim_end_matches('/');
        Self {
            documents: format!("{prefix}/config/"),
            history: format!("{prefix}/config-history/"),
            limit: Duration::from_millis(config.request_timeout_ms),
            seen: watch::Sender::new(None),
        }
    }

    pub(super) fn seen(&self) -> watch::Receiver<Option<Arc<Settings>>> {
        self.seen.subscribe()
    }

    /// Reads all documents, and says as of which revision.
    async fn read(&self, etcd: &Etcd) -> Result<i64, Error> {
        let found = etcd.ask("a read of the settings", self.limit, |mut client| async move {
            let options = GetOptions::new().with_prefix().with_limit(MAX_DOCUMENTS as i64);
            client.get(self.documents.as_str(), Some(options)).await
        });
        let found = found.await?;
        let entries = found.kvs().iter().filter_map(|kv| {
            let name = kv.key_str().ok()?.strip_prefix(&self.documents)?;
            Some((name, kv.value(), kv.mod_revision().unsigned_abs()))
        });
        let settings = Settings::read(entries);
        self.seen.send_if_modified(|seen| {
            let news = seen.as_deref() != Some(&settings);
            if news {
                *seen = Some(Arc::new(settings));
            }
            news
        });
        Ok(found.header().map_or(0, |header| header.revision()))
    }

    /// Follows the documents. Never ends.
    pub(super) async fn run(&self, etcd: &Etcd) {
        loop {
            let why = match self.read(etcd).await {
                Ok(revision) => self.watch(etcd, revision).await,
                Err(error) => error.to_string(),
            };
            tracing::debug!(why, "the settings are read again");
            sleep(PAUSE).await;
        }
    }

    /// Reads again whenever something changes, until that can't be heard any more; says why.
    async fn watch(&self, etcd: &Etcd, revision: i64) -> String {
        let mut stream = match etcd.watch(&self.documents, revision + 1).await {
            Ok(stream) => stream,
            Err(error) => return error.to_string(),
        };
        loop {
            let read = match next(&mut stream).await {
                Ok(false) => continue,
                Ok(true) => self.read(etcd).await,
                Err(why) => return why,
            };
            if let Err(error) = read {
                return error.to_string();
            }
        }
    }

    /// Writes a document over the one that its writer has seen (`document.revision`), and its changes with it.
    pub(super) async fn write(
        &self,
        etcd: &Etcd,
        scope: &Scope,
        document: &Document,
        changes: &[Change],
    ) -> Result<u64, Error> {
        document.fits(scope)?;
        let (key, record) = (format!("{}{scope}", self.documents), document.record());
        let expected = i64::try_from(document.revision).unwrap_or(i64::MAX);
        let changes = changes.iter().enumerate().map(|(at, change)| {
            let random = RandomState::new().hash_one(at) as u32;
            (format!("{}{:013}-{at:03}-{random:08x}", self.history, change.at_ms), change.bounded().record())
        });
        let changes: Vec<(String, String)> = changes.collect();
        let done = etcd.ask("a change of settings", self.limit, |mut client| {
            let mut puts = vec![TxnOp::put(key.as_str(), record.as_str(), None)];
            puts.extend(changes.iter().map(|(key, record)| TxnOp::put(key.as_str(), record.as_str(), None)));
            let unchanged = Compare::mod_revision(key.as_str(), CompareOp::Equal, expected);
            // Tried twice because the first answer got lost: what we wrote is what is there.
            let read = TxnOp::get(key.as_str(), None);
            async move { client.txn(Txn::new().when([unchanged]).and_then(puts).or_else([read])).await }
        });
        let done = done.await?;
        let revision = if done.succeeded() {
            done.header().map_or(u64::MAX, |header| header.revision().unsigned_abs())
        } else {
            let there = done.op_responses().into_iter().find_map(|response| match response {
                TxnOpResponse::Get(found) => found
                    .kvs()
                    .first()
                    .map(|kv| (kv.value() == record.as_bytes(), kv.mod_revision(), Document::parse(kv.value(), 0))),
                _ => None,
            });
            match there {
                Some((true, revision, _)) => revision.unsigned_abs(),
                other => {
                    let by = other.and_then(|(_, _, there)| there.ok()).map_or_else(String::new, |there| there.who);
                    return Err(Error::Changed { scope: scope.clone(), by });
                }
            }
        };
        // What is too much of it goes with the next change if it does not now.
        let _ = etcd.keep_newest(&self.history, MAX_CHANGES as i64).await;
        Ok(revision)
    }

    /// The document as it is now.
    pub(super) async fn now(&self, etcd: &Etcd, scope: &Scope) -> Result<Option<crate::settings::Found>, Error> {
        let name = scope.to_string();
        let found = etcd.get(&format!("{}{name}", self.documents)).await?;
        Ok(found.and_then(|found| {
            let entry = (name.as_str(), found.record.as_slice(), found.revision.unsigned_abs());
            Settings::read([entry]).documents.into_values().next()
        }))
    }

    /// What was changed, oldest first.
    pub(super) async fn changes(&self, etcd: &Etcd) -> Result<Vec<Change>, Error> {
        let found = etcd.read_after(&self.history, "").await?;
        let surplus = found.kvs().len().saturating_sub(MAX_CHANGES);
        Ok(found.kvs().iter().skip(surplus).filter_map(|kv| Change::parse(kv.value())).collect())
    }
}

/// All that is set, for members that are gone, too; for tools that keep no registry.
///
/// # Errors
/// [`Error::Unreachable`] if it can't be read.
pub async fn read_settings(config: &EtcdConfig) -> Result<Settings, Error> {
    check(config)?;
    let (etcd, kept) = (Etcd::new(config).await?, Kept::new(config));
    kept.read(&etcd).await?;
    let seen = kept.seen.borrow().as_deref().cloned();
    Ok(seen.unwrap_or_default())
}

/// Whether the next message of a watch tells of a change.
async fn next(stream: &mut WatchStream) -> Result<bool, String> {
    match stream.message().await {
        Ok(Some(message)) if message.canceled() || message.compact_revision() != 0 => {
            Err(format!("cancelled: {} (compacted up to {})", message.cancel_reason(), message.compact_revision()))
        }
        Ok(Some(message)) => Ok(!message.events().is_empty()),
        Ok(None) => Err("closed".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
