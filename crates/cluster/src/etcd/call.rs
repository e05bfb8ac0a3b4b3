//! Calls to etcd, each with a time limit.
//!
//! A call may fail because the node in use is down, and wait for ever because it is silent. [`Etcd::ask`] therefore tries
//! again, with the next node, until its limit is over; all calls here may be repeated without harm. What a person must mend
//! (a password, a right) is told at once.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Error as EtcdError, GetOptions, GetResponse, PutOptions,
    Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream,
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    account::{self, Account, Trouble},
    nodes::{self, Nodes, Spoken},
};
use crate::{Error, EtcdConfig};

/// Between two tries of a call.
const PAUSE: Duration = Duration::from_millis(50);

/// Most members read in one go.
const MAX_READ: i64 = 20_000;

/// A connection to etcd. Cheap to clone.
#[derive(Clone)]
pub(super) struct Etcd {
    client: Client,
    nodes: Nodes,
    account: Option<Arc<Account>>,
    endpoints: String,
    /// What our keys begin with.
    prefix: String,
    spoken: Spoken,
    limit: Duration,
    /// Whether the last call got an answer.
    answers: Arc<AtomicBool>,
}

/// A key as it is in etcd.
pub(super) struct Found {
    pub(super) record: Vec<u8>,
    pub(super) lease: i64,
    pub(super) revision: i64,
}

impl Etcd {
    /// Prepares the connection; nothing is sent yet.
    pub(super) async fn new(config: &EtcdConfig) -> Result<Self, Error> {
        let limit = Duration::from_millis(config.request_timeout_ms);
        // A node that has lost the others says so instead of showing an old state for ever.
        let options = ConnectOptions::new().with_require_leader(true);
        let nodes = Nodes::new(config).await?;
        let client = Client::from_channel(nodes.channel(), Some(options)).await.map_err(|error| Error::Config {
            key: "registry.etcd.endpoints",
            reason: format!("{:?}: {error}; expected `host:port`", config.endpoints),
        })?;
        let account = config.username.clone().zip(config.password_file.clone());
        Ok(Self {
            client,
            nodes,
            account: account.map(|(username, password_file)| Arc::new(Account::new(username, password_file))),
            endpoints: config.endpoints.join(", "),
            prefix: config.prefix.trim_end_matches('/').to_owned(),
            spoken: match &config.tls {
                None => Spoken::Clear,
                Some(tls) => Spoken::Tls { certificate: tls.certificate.is_some() },
            },
            limit,
            answers: Arc::new(AtomicBool::new(true)),
        })
    }

    /// Whether the last call got an answer.
    pub(super) fn answers(&self) -> bool {
        self.answers.load(Relaxed)
    }

    /// All keys with that beginning.
    pub(super) async fn read(&self, prefix: &str, limit: Duration) -> Result<GetResponse, Error> {
        self.ask("a read of the members", limit, |mut client| async move {
            client.get(prefix, Some(GetOptions::new().with_prefix().with_limit(MAX_READ))).await
        })
        .await
    }

    /// The keys with that beginning that come after `prefix` + `after`, in order.
    pub(super) async fn read_after(&self, prefix: &str, after: &str) -> Result<GetResponse, Error> {
        let (from, end) = (format!("{prefix}{after}\0"), end_of(prefix));
        self.ask("a read of the events", self.limit, |mut client| {
            let options = GetOptions::new().with_range(end.clone()).with_limit(MAX_READ);
            let from = from.clone();
            async move { client.get(from, Some(options)).await }
        })
        .await
    }

    /// Removes the first of the keys with that beginning, so that at most so many are left.
    pub(super) async fn keep_newest(&self, prefix: &str, limit: i64) -> Result<(), Error> {
        let counted = self.ask("a count of the events", self.limit, |mut client| async move {
            client.get(prefix, Some(GetOptions::new().with_prefix().with_count_only())).await
        });
        let surplus = counted.await?.count() - limit;
        if surplus <= 0 {
            return Ok(());
        }
        let oldest = self.ask("a read of the events", self.limit, |mut client| async move {
            let options = GetOptions::new().with_prefix().with_keys_only().with_limit(surplus);
            client.get(prefix, Some(options)).await
        });
        let oldest = oldest.await?;
        let Some(last) = oldest.kvs().last().map(|kv| [kv.key(), b"\0"].concat()) else { return Ok(()) };
        self.ask("a removal of events", self.limit, |mut client| {
            let options = DeleteOptions::new().with_range(last.clone());
            async move { client.delete(prefix, Some(options)).await }
        })
        .await?;
        Ok(())
    }

    /// One key.
    pub(super) async fn get(&self, key: &str) -> Result<Option<Found>, Error> {
        let found = self.ask("a read", self.limit, |mut client| async move { client.get(key, None).await }).await?;
        Ok(found.kvs().first().map(|kv| Found {
            record: kv.value().to_vec(),
            lease: kv.lease(),
            revision: kv.mod_revision(),
        }))
    }

    /// Changes under keys with that beginning, from a revision on.
    pub(super) async fn watch(&self, prefix: &str, from: i64) -> Result<WatchStream, Error> {
        let options = WatchOptions::new().with_prefix().with_start_revision(from).with_progress_notify();
        self.ask("a watch", self.limit, |mut client| {
            let options = options.clone();
            async move { client.watch(prefix, Some(options)).await }
        })
        .await
    }

    /// A new lease.
    pub(super) async fn grant(&self, ttl: Duration) -> Result<i64, Error> {
        let seconds = ttl.as_secs() as i64;
        let granted = self
            .ask("a lease", self.limit, |mut client| async move { client.lease_grant(seconds, None).await })
            .await?;
        Ok(granted.id())
    }

    /// How long the lease's holder may be silent; `None` if there is no such lease.
    pub(super) async fn granted_ttl(&self, lease: i64) -> Result<Option<Duration>, Error> {
        let lease = self
            .ask("the state of a lease", self.limit, |mut client| async move {
                client.lease_time_to_live(lease, None).await
            })
            .await?;
        Ok((lease.ttl() > 0).then(|| Duration::from_secs(lease.granted_ttl().unsigned_abs())))
    }

    /// Renews a lease; `false` if it is gone.
    ///
    /// A stream for each renewal, not one for all: it costs a few hundred bytes every other second, and each renewal is a
    /// call with an answer and a limit.
    pub(super) async fn keep_alive(&self, lease: i64) -> Result<bool, Error> {
        self.ask("a keep-alive", self.limit, |mut client| async move {
            match client.lease_keep_alive(lease).await {
                Ok(_) => Ok(true),
                Err(error) if lease_is_gone(&error) => Ok(false),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Ends a lease and removes its keys; one that is gone is fine.
    pub(super) async fn revoke(&self, lease: i64) -> Result<(), Error> {
        self.ask("the end of a lease", self.limit, |mut client| async move {
            match client.lease_revoke(lease).await {
                Ok(_) => Ok(()),
                Err(error) if lease_is_gone(&error) => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Writes a key if its last change was at `expected` (0: if it does not exist). Returns the revision of the write, or
    /// `None` if the key was otherwise.
    pub(super) async fn put(&self, key: &str, record: &str, lease: i64, expected: i64) -> Result<Option<i64>, Error> {
        let done = self
            .ask("a registration", self.limit, |mut client| async move {
                let put = TxnOp::put(key, record, Some(PutOptions::new().with_lease(lease)));
                let unchanged = Compare::mod_revision(key, CompareOp::Equal, expected);
                // Tried twice because the first answer got lost: what we wrote is what is there.
                let read = TxnOp::get(key, None);
                client.txn(Txn::new().when([unchanged]).and_then([put]).or_else([read])).await
            })
            .await?;
        if done.succeeded() {
            return Ok(Some(done.header().map_or(i64::MAX, |header| header.revision())));
        }
        let ours = done.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(found) => found
                .kvs()
                .first()
                .filter(|kv| kv.lease() == lease && kv.value() == record.as_bytes())
                .map(|kv| kv.mod_revision()),
            _ => None,
        });
        Ok(ours)
    }

    /// Removes a key if its last change was at `expected`; whether it did.
    pub(super) async fn delete(&self, key: &str, expected: i64) -> Result<bool, Error> {
        let done = self
            .ask("a removal", self.limit, |mut client| async move {
                let unchanged = Compare::mod_revision(key, CompareOp::Equal, expected);
                client.txn(Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)])).await
            })
            .await?;
        Ok(done.succeeded())
    }

    /// Calls until there is an answer, or the limit is over.
    pub(super) async fn ask<T, F>(
        &self,
        what: &'static str,
        limit: Duration,
        call: impl Fn(Client) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let asked = self.insist(what, limit, call).await;
        self.answers.store(asked.is_ok(), Relaxed);
        asked
    }

    async fn insist<T, F>(&self, what: &'static str, limit: Duration, call: impl Fn(Client) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let end = Instant::now() + limit;
        let mut last = None;
        loop {
            let node = self.nodes.used();
            match timeout_at(end, self.attempt(&call)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Trouble::Refused(why))) => {
                    return Err(Error::Refused { endpoints: self.endpoints.clone(), why });
                }
                Ok(Err(Trouble::Failed(error))) => last = Some(error),
                Err(_) => {
                    self.nodes.leave(node);
                    return Err(self.unreachable(what, limit, last));
                }
            }
            self.nodes.leave(node);
            if Instant::now() + PAUSE >= end {
                return Err(self.unreachable(what, limit, last));
            }
            sleep(PAUSE).await;
        }
    }

    /// One try, and another one with a new token where the first lacked that.
    async fn attempt<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, Trouble>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let mut tokens = 0;
        if let Some(account) = &self.account {
            account.prove(&mut self.client.clone(), 0).await?;
            tokens = account.tokens().await;
        }
        let mut answer = call(self.client.clone()).await;
        if let (Err(error), Some(account)) = (&answer, &self.account)
            && (account::wants_token(error) || account::is_denied(error) && account.is_unasked().await)
        {
            account.prove(&mut self.client.clone(), tokens).await?;
            answer = call(self.client.clone()).await;
        }
        answer.map_err(|error| self.refused(error))
    }

    /// What of errors a person must mend.
    fn refused(&self, error: EtcdError) -> Trouble {
        let user = self.account.as_ref().map(|account| account.username());
        if account::is_denied(&error) {
            let (user, or) = match user {
                Some(user) => (format!("user {user:?}"), ""),
                None => ("the user of its certificate".to_owned(), ", or set registry.etcd.username and password_file"),
            };
            return Trouble::Refused(format!(
                "{user} may not read and write below {0}/: etcdctl role grant-permission ROLE readwrite --prefix=true {0}/{or}",
                self.prefix
            ));
        }
        if account::wants_token(&error) && user.is_none() {
            return Trouble::Refused(
                "it wants to know who calls: set registry.etcd.username and password_file (kvasirctl: --etcd-username, \
                 --etcd-password-file)"
                    .to_owned(),
            );
        }
        Trouble::Failed(error)
    }

    fn unreachable(&self, what: &'static str, limit: Duration, last: Option<EtcdError>) -> Error {
        let reason = last.map_or_else(|| "silence".to_owned(), |error| brief(&error, self.spoken));
        Error::Unreachable {
            endpoints: self.endpoints.clone(),
            what,
            source: format!("{reason} (for {} ms)", limit.as_millis()).into(),
        }
    }
}

/// tonic's own text is a paragraph with metadata; the message is what a person needs.
fn brief(error: &EtcdError, spoken: Spoken) -> String {
    let plain = || match error {
        EtcdError::GRpcStatus(status) => format!("{}: {}", status.code().description(), status.message()),
        other => other.to_string(),
    };
    let source = match error {
        EtcdError::GRpcStatus(status) => std::error::Error::source(status),
        EtcdError::TransportError(error) => Some(error as _),
        _ => None,
    };
    source.and_then(|source| nodes::explained(source, spoken)).unwrap_or_else(plain).chars().take(300).collect()
}

/// The first key after all that begin so.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // A prefix is visible ASCII, and ends with a slash: there is room above its last byte.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

fn lease_is_gone(error: &EtcdError) -> bool {
    match error {
        EtcdError::GRpcStatus(status) => status.message().contains("lease not found"),
        EtcdError::LeaseKeepAliveError(text) => text.contains("not found"),
        _ => false,
    }
}
