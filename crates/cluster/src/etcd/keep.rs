//! Keeping this process's members in etcd: renew leases, claim again what was lost, publish what is not published yet.

use std::{sync::atomic::Ordering, time::Duration};

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{Shared, Slot, claim};
use crate::Error;

/// Between two tries while something is not as it should be.
const TROUBLED_PAUSE: Duration = Duration::from_millis(300);

/// Never ends.
pub(super) async fn run(shared: &Shared) {
    loop {
        let slots: Vec<_> = shared.slots().values().cloned().collect();
        let fine = join_all(slots.iter().map(|slot| tend(shared, slot))).await;
        // Three renewals to a lease: two may get lost.
        let pause = if fine.into_iter().all(|fine| fine) { shared.lease_ttl / 3 } else { TROUBLED_PAUSE };
        // Woken or due: both lead to the same next round.
        let _ = timeout(pause, shared.wake.notified()).await;
    }
}

/// One round for one member; whether all is well with it.
async fn tend(shared: &Shared, slot: &Slot) -> bool {
    let mut own = slot.own.lock().await;
    if own.gone {
        return true;
    }
    let held = own.lease.is_some();
    let result = async {
        if slot.removed.swap(false, Ordering::AcqRel) {
            own.lease = None;
        }
        if let Some(lease) = own.lease {
            if shared.etcd.keep_alive(lease).await? {
                return if own.unpublished { claim::publish(shared, slot, &mut own).await } else { Ok(()) };
            }
            own.lease = None;
        }
        claim::claim(shared, slot, &mut own, claim::Patience::None).await
    }
    .await;

    let (role, id) = &slot.name;
    match result {
        Ok(()) => {
            let troubled = std::mem::take(&mut own.troubled);
            if troubled || !held {
                tracing::info!(%role, %id, "registered again");
            }
            true
        }
        Err(error) => {
            if !std::mem::replace(&mut own.troubled, true) {
                tell(slot, &error);
            }
            false
        }
    }
}

fn tell(slot: &Slot, error: &Error) {
    let (role, id) = &slot.name;
    match error {
        // A person must look: two processes were given one name.
        Error::Taken { holder, .. } => {
            tracing::error!(%role, %id, %holder, "another process has taken this one's name")
        }
        error => {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            tracing::warn!(%role, %id, %error, cause, "registration not renewed, trying on");
        }
    }
}
