//! As whom etcd is called, where it wants to know.
//!
//! A password gets a **token**, which goes with every call. etcd forgets tokens: after five minutes without a call, when it
//! is restarted, when somebody's rights change. A call that it refuses for that is made again with a new one, and the
//! password is read anew for it, so that one exchanged on disk counts at once.
//!
//! etcd may begin to ask while we are connected. It tells who shows no certificate that a token is wanted; whoever shows one
//! that names nobody it takes for a user without a name, who may do nothing. So where etcd did not ask when we came, a call
//! that it denies is made again with a token.
//!
//! Checking a password is made to be slow: one that was refused is not shown again for a while.

use std::{path::PathBuf, time::Duration};

use etcd_client::{Client, Error as EtcdError};
use tokio::{sync::Mutex, time::Instant};

use super::nodes;

/// Before a password that was refused is shown again, unless its file holds another one by then.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

/// A user of etcd.
pub(super) struct Account {
    username: String,
    password_file: PathBuf,
    /// Held while a token is asked for, so that one is asked for by all who need it.
    proof: Mutex<Proof>,
}

#[derive(Default)]
struct Proof {
    /// How many tokens there were.
    tokens: u64,
    /// The last time etcd gave none, because it did not ask who calls.
    unasked: bool,
    refused: Option<Refused>,
}

struct Refused {
    password: String,
    at: Instant,
    why: String,
}

/// Why there is no token.
pub(super) enum Trouble {
    /// The password is none, or the wrong one: what to do.
    Refused(String),
    /// etcd said something else, or nothing.
    Failed(EtcdError),
}

impl Account {
    pub(super) fn new(username: String, password_file: PathBuf) -> Self {
        Self { username, password_file, proof: Mutex::default() }
    }

    /// How many tokens there have been.
    pub(super) async fn tokens(&self) -> u64 {
        self.proof.lock().await.tokens
    }

    /// Whether there is no token because etcd did not ask for any, as far as we know.
    pub(super) async fn is_unasked(&self) -> bool {
        self.proof.lock().await.unasked
    }

    /// Who it is.
    pub(super) fn username(&self) -> &str {
        &self.username
    }

    /// Gets the client a token, unless there is a newer one than the last of `seen` by now.
    pub(super) async fn prove(&self, client: &mut Client, seen: u64) -> Result<(), Trouble> {
        let mut proof = self.proof.lock().await;
        if proof.tokens > seen {
            return Ok(());
        }
        let password = nodes::password(self.password_file.clone());
        let password = password.await.map_err(|why| Trouble::Refused(format!("registry.etcd.password_file: {why}")))?;
        if let Some(refused) = &proof.refused
            && refused.password == password
            && refused.at.elapsed() < REFUSED_PAUSE
        {
            return Err(Trouble::Refused(refused.why.clone()));
        }
        match client.update_user(Some((self.username.clone(), password.clone()))).await {
            Ok(()) => proof.unasked = false,
            // The user may be told to us before etcd begins to ask.
            Err(error) if message(&error).contains("authentication is not enabled") => proof.unasked = true,
            Err(error) if message(&error).contains("authentication failed") => {
                let why = format!(
                    "it knows no user {:?} with the password in {} (registry.etcd.username, password_file)",
                    self.username,
                    self.password_file.display()
                );
                proof.refused = Some(Refused { password, at: Instant::now(), why: why.clone() });
                return Err(Trouble::Refused(why));
            }
            Err(error) => return Err(Trouble::Failed(error)),
        }
        proof.tokens += 1;
        proof.refused = None;
        Ok(())
    }
}

/// Whether etcd refuses a call for want of a (new) token.
pub(super) fn wants_token(error: &EtcdError) -> bool {
    let EtcdError::GRpcStatus(status) = error else { return false };
    let told = ["invalid auth token", "user name is empty", "revision of auth store is old"];
    status.code() == tonic::Code::Unauthenticated || told.iter().any(|told| status.message().contains(told))
}

/// Whether etcd refuses a call because whoever calls may not do that.
pub(super) fn is_denied(error: &EtcdError) -> bool {
    matches!(error, EtcdError::GRpcStatus(status) if status.code() == tonic::Code::PermissionDenied)
}

fn message(error: &EtcdError) -> &str {
    match error {
        EtcdError::GRpcStatus(status) => status.message(),
        _ => "",
    }
}
