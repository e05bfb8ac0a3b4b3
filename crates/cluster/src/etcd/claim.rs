//! Claiming a name: at most one living process has it.
//!
//! ```text
//!   key absent, or ours ──▶ lease ──▶ put if unchanged ──▶ claimed
//!        ▲    ▲                            │ changed
//!        │    └────────────────────────────┘
//!   another incarnation's ── nobody listens where it says it does ──▶ it is dead: put if unchanged
//!                         └─ else it may be dead: wait for one lease time ──▶ Taken
//! ```
//!
//! A process that was killed and comes back gets its name at once: its old port refuses connections. One that is stopped or
//! cut off does not refuse them, and keeps its name until its lease ends.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use kvasir_types::Incarnation;
use serde::Deserialize;
use tokio::time::sleep;

use super::{Own, Shared, Slot, call::Found};
use crate::Error;

/// Between two looks at a name that another process has.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// A lease of a process with other settings may be longer than this; its name then has to be waited for by the operator.
const MAX_PATIENCE: Duration = Duration::from_secs(60);

/// etcd checks leases every half second and needs a moment to remove the keys.
const EXPIRY_SLACK: Duration = Duration::from_millis(1_500);

/// How long to wait for a name that another process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// As long as that process may be silent: it may be dead.
    OneLease,
    /// Not at all: somebody will try again.
    None,
}

/// Gets the slot's name, under a new lease.
pub(super) async fn claim(shared: &Shared, slot: &Slot, own: &mut Own, patience: Patience) -> Result<(), Error> {
    let mut give_up: Option<Instant> = None;
    loop {
        let found = shared.etcd.get(&slot.key).await?;
        let theirs =
            found.as_ref().map(|found| (found, holder(found))).filter(|(_, holder)| *holder != own.member.incarnation);
        let Some((found, holder)) = theirs else {
            if attempt(shared, slot, own, found.map_or(0, |found| found.revision)).await? {
                return Ok(());
            }
            continue;
        };
        if patience == Patience::OneLease
            && give_up.is_none()
            && is_gone(found).await
            && attempt(shared, slot, own, found.revision).await?
        {
            tracing::info!(key = slot.key, %holder, "took the name of a process that is gone");
            return Ok(());
        }
        let end = match (give_up, patience) {
            (Some(end), _) => end,
            (None, Patience::None) => Instant::now(),
            (None, Patience::OneLease) => {
                let lease = shared.etcd.granted_ttl(found.lease).await?.unwrap_or_default();
                Instant::now() + (lease + EXPIRY_SLACK).min(MAX_PATIENCE)
            }
        };
        give_up = Some(end);
        if Instant::now() >= end {
            let (role, id) = slot.name.clone();
            return Err(Error::Taken { role, id, holder });
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Puts the record where `expected` is still the key's revision; `false` if it is not.
async fn attempt(shared: &Shared, slot: &Slot, own: &mut Own, expected: i64) -> Result<bool, Error> {
    let lease = shared.etcd.grant(shared.lease_ttl).await?;
    match shared.etcd.put(&slot.key, &own.member.record(), lease, expected).await {
        Ok(Some(revision)) => {
            own.lease = Some(lease);
            own.unpublished = false;
            slot.claimed_at.store(revision, Ordering::Release);
            slot.removed.store(false, Ordering::Release);
            Ok(true)
        }
        Ok(None) => {
            let _ = shared.etcd.revoke(lease).await; // best effort: it holds no key and ends by itself
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Publishes the record under the lease we have, if the name is still ours.
pub(super) async fn publish(shared: &Shared, slot: &Slot, own: &mut Own) -> Result<(), Error> {
    let (Some(lease), Some(found)) = (own.lease, shared.etcd.get(&slot.key).await?) else {
        return claim(shared, slot, own, Patience::None).await;
    };
    if holder(&found) != own.member.incarnation || found.lease != lease {
        return claim(shared, slot, own, Patience::None).await;
    }
    match shared.etcd.put(&slot.key, &own.member.record(), lease, found.revision).await? {
        Some(_) => {
            own.unpublished = false;
            Ok(())
        }
        None => claim(shared, slot, own, Patience::None).await,
    }
}

/// Whether a process's port says that nobody is there any more. Any other answer, and none, says nothing.
async fn is_gone(found: &Found) -> bool {
    #[derive(Deserialize)]
    struct Address {
        grpc: String,
    }
    let Ok(Address { grpc }) = serde_json::from_slice(&found.record) else { return false };
    let connected = tokio::time::timeout(LOOK_AGAIN, tokio::net::TcpStream::connect(&grpc)).await;
    matches!(connected, Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Whose record it is; the record itself may be one we can't read.
fn holder(found: &Found) -> Incarnation {
    #[derive(Deserialize)]
    struct Holder {
        incarnation: Incarnation,
    }
    serde_json::from_slice(&found.record).map_or(Incarnation(0), |holder: Holder| holder.incarnation)
}
