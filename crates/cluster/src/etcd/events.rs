//! The cluster's history in etcd.
//!
//! ```text
//!   <prefix>/events/<milliseconds since 1970>-<random>  =  JSON of the event     lease: events_ttl_s and a part of it
//! ```
//!
//! All events that a process writes within a part of their time to live share a lease, which nobody renews: etcd forgets
//! them by itself. And there are so many at most (`max_events`): whoever has written a few looks how many there are, and
//! removes the oldest ones above that.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, RandomState},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{call::Etcd, check};
use crate::{Error, EtcdConfig, Event, Noted};

/// Events that wait to be written; more are dropped.
const QUEUE: usize = 256;
/// Between two looks at how many there are.
const LOOK_EVERY: u32 = 32;
/// A lease is used for this part of the events' time to live.
const LEASE_PART: u32 = 24;

/// The way of this process's events to etcd.
pub(super) struct History {
    /// What their keys begin with.
    prefix: String,
    limit: u32,
    ttl: Duration,
    /// Filled by whoever notes something, emptied by the registry's future. A leaf.
    queue: Mutex<VecDeque<Event>>,
    work: Notify,
    lost: AtomicU64,
}

/// What the writer has in hand.
#[derive(Default)]
struct Writer {
    lease: Option<(i64, Instant)>,
    written: u32,
}

impl History {
    pub(super) fn new(config: &EtcdConfig) -> Self {
        Self {
            prefix: format!("{}/events/", config.prefix.trim_end_matches('/')),
            limit: config.max_events,
            ttl: Duration::from_secs(config.events_ttl_s.into()),
            queue: Mutex::default(),
            work: Notify::new(),
            lost: AtomicU64::new(0),
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.queue.lock().expect(super::UNPOISONED)
    }

    /// Will be written, or counted as lost.
    pub(super) fn note(&self, event: Event) {
        if self.limit == 0 {
            return;
        }
        let mut queue = self.queue();
        if queue.len() >= QUEUE {
            self.lost.fetch_add(1, Relaxed);
            return;
        }
        queue.push_back(event.plain());
        drop(queue);
        self.work.notify_one();
    }

    /// How many were not written.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }

    /// What there is after that key, oldest first.
    pub(super) async fn read(&self, etcd: &Etcd, after: &str) -> Result<Vec<Noted>, Error> {
        let found = etcd.read_after(&self.prefix, after).await?;
        let noted = found.kvs().iter().filter_map(|kv| {
            let key = kv.key_str().ok()?.strip_prefix(&self.prefix)?.to_owned();
            Some(Noted { key, event: Event::parse(kv.value())? })
        });
        Ok(noted.collect())
    }

    /// Writes what is noted. Never ends.
    pub(super) async fn run(&self, etcd: &Etcd) {
        let mut writer = Writer::default();
        loop {
            let event = self.queue().pop_front();
            let Some(event) = event else {
                self.work.notified().await;
                continue;
            };
            if let Err(error) = self.write(etcd, &mut writer, &event).await {
                // Whatever waits would wait as long: history has gaps rather than holding anything up.
                let dropped = 1 + std::mem::take(&mut *self.queue()).len() as u64;
                self.lost.fetch_add(dropped, Relaxed);
                writer.lease = None;
                tracing::debug!(%error, dropped, "events not written");
            }
        }
    }

    async fn write(&self, etcd: &Etcd, writer: &mut Writer, event: &Event) -> Result<(), Error> {
        let lease = match writer.lease {
            Some((lease, since)) if since.elapsed() < self.ttl / LEASE_PART => lease,
            _ => {
                let lease = etcd.grant(self.ttl + self.ttl / LEASE_PART).await?;
                writer.lease = Some((lease, Instant::now()));
                lease
            }
        };
        let key = format!("{}{:013}-{:08x}", self.prefix, event.at_ms, RandomState::new().hash_one(0) as u32);
        etcd.put(&key, &event.record(), lease, 0).await?;
        if writer.written.is_multiple_of(LOOK_EVERY) {
            etcd.keep_newest(&self.prefix, self.limit.into()).await?;
        }
        writer.written = writer.written.wrapping_add(1);
        Ok(())
    }
}

/// Writes one event, for tools that keep no registry.
///
/// # Errors
/// [`Error::Unreachable`] if it was not written.
pub async fn note_event(config: &EtcdConfig, event: Event) -> Result<(), Error> {
    check(config)?;
    if config.max_events == 0 {
        return Ok(());
    }
    let (etcd, history) = (Etcd::new(config).await?, History::new(config));
    history.write(&etcd, &mut Writer::default(), &event.plain()).await
}
