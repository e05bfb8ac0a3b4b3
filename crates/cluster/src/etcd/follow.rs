//! Following the members: read everything once, then watch from that revision on; after every break, again.
//!
//! Reading everything again after a break, rather than watching from where the last watch stopped, also covers a compacted
//! history and an etcd that came back with other data.

use std::time::{Duration, Instant};

use etcd_client::{EventType, WatchStream};
use tokio::time::{sleep, sleep_until};

use super::{
    Shared,
    table::{Entry, Refused},
};
use crate::Error;

/// Between two tries to reach etcd.
const PAUSE: Duration = Duration::from_millis(300);

/// Reads all members into the view and returns the revision they were read at.
pub(super) async fn read(shared: &Shared, limit: Duration) -> Result<i64, Error> {
    let prefix = shared.table().prefix().to_owned();
    let found = shared.etcd.read(&prefix, limit).await?;
    let revision = found.header().map_or(0, |header| header.revision());
    let entries = found.kvs().iter().map(|kv| Entry { key: kv.key(), record: kv.value(), revision: kv.mod_revision() });
    let refused = shared.table().snapshot(entries, Instant::now(), shared.lease_ttl);
    shared.table().seen(revision);
    refused.iter().for_each(tell);
    shared.publish();

    let slots: Vec<_> = shared.slots().values().cloned().collect();
    for slot in slots {
        if !found.kvs().iter().any(|kv| kv.key() == slot.key.as_bytes()) {
            slot.missed_at(revision);
        }
    }
    Ok(revision)
}

/// Never ends.
pub(super) async fn run(shared: &Shared, mut revision: i64) {
    loop {
        let why = watch(shared, revision).await;
        tracing::debug!(why, "watch of the members ended");
        let mut told = false;
        revision = loop {
            match read(shared, shared.lease_ttl.max(Duration::from_secs(2))).await {
                Ok(revision) => break revision,
                Err(error) if !told => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "etcd is away: going on with the members known");
                    told = true;
                }
                Err(_) => {}
            }
            expire(shared);
            sleep(PAUSE).await;
        };
        if told {
            tracing::info!("etcd is back");
        }
        // It may have come back without us.
        shared.wake.notify_one();
    }
}

/// Watches until that is no longer possible, and says why.
async fn watch(shared: &Shared, revision: i64) -> String {
    let prefix = shared.table().prefix().to_owned();
    let mut stream = match shared.etcd.watch(&prefix, revision + 1).await {
        Ok(stream) => stream,
        Err(error) => return error.to_string(),
    };
    loop {
        let expiry = shared.table().next_expiry();
        // Dropping either loses nothing: a message stays in its stream, the time comes again.
        tokio::select! {
            end = changes(shared, &mut stream) => match end {
                Ok(()) => {}
                Err(why) => return why,
            },
            () = sleep_until(expiry.unwrap_or_else(Instant::now).into()), if expiry.is_some() => expire(shared),
        }
    }
}

/// Takes in one message of the watch.
async fn changes(shared: &Shared, stream: &mut WatchStream) -> Result<(), String> {
    let message = match stream.message().await {
        Ok(Some(message)) => message,
        Ok(None) => return Err("closed".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    if message.canceled() || message.compact_revision() != 0 {
        return Err(format!("cancelled: {} (compacted up to {})", message.cancel_reason(), message.compact_revision()));
    }
    if message.events().is_empty() && !message.created() {
        // A sign of life: all events up to here have been sent. The first message of a watch is none, nor is the header of
        // one with events: a watch that catches up says there what etcd has, not what it has sent.
        shared.table().seen(message.header().map_or(0, |header| header.revision()));
    }
    for event in message.events() {
        let Some(kv) = event.kv() else { continue };
        shared.table().seen(kv.mod_revision());
        match event.event_type() {
            EventType::Put => {
                let entry = Entry { key: kv.key(), record: kv.value(), revision: kv.mod_revision() };
                let put = shared.table().put(entry);
                if let Err(Some(refused)) = put {
                    tell(&refused);
                }
            }
            EventType::Delete => {
                let name = shared.table().delete(kv.key());
                let slot = name.and_then(|name| shared.slots().get(&name).cloned());
                if slot.is_some_and(|slot| slot.missed_at(kv.mod_revision())) {
                    shared.wake.notify_one();
                }
            }
        }
    }
    shared.publish();
    Ok(())
}

fn expire(shared: &Shared) {
    if shared.table().expire(Instant::now()) {
        shared.publish();
    }
}

fn tell(refused: &Refused) {
    tracing::warn!(key = refused.key, reason = refused.reason, "not a member's record, skipped");
}
