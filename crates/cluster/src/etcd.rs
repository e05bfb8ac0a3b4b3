//! Members in etcd: a key each, under a lease each.
//!
//! ```text
//!   <prefix>/members/<role>/<id>  =  JSON of the member        lease of lease_ttl_s, kept alive by its process
//!   <prefix>/offices/<name>       =  JSON of who holds it      the same lease as that member's
//!
//!   register, update, deregister ──▶ Slot ◀── keep: keep-alive, claim again after a lost lease
//!   <prefix>/events/<when>        =  JSON of what happened     a lease that nobody renews (events.rs)
//!   <prefix>/config/<role>…       =  JSON of what is set       no lease (settings.rs)
//!
//!   view ◀── watch channel ◀── Table ◀─────── follow: read everything, then watch; again after every break
//! ```
//!
//! A name is claimed with a transaction that only creates: of two processes, one gets it. `keep` and `follow` make up the
//! future that [`connect`] returns beside the registry; without it nothing is kept alive and the view stays what it was.
//! Every call to etcd has a time limit. etcd being away changes nothing here but the log: the view stays, and both loops
//! go on trying.

mod account;
mod call;
mod claim;
mod engines;
mod events;
mod follow;
mod keep;
mod nodes;
mod office;
mod settings;
mod table;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use kvasir_types::{MemberId, Role};
use tokio::sync::{Notify, watch};

use self::{
    call::Etcd,
    events::History,
    settings::Kept,
    table::{Name, Table},
};
pub use self::{
    engines::{add_engine, remove_engine},
    events::note_event,
    nodes::page,
    settings::read_settings,
};
use crate::{
    Change, Document, Error, EtcdConfig, Event, Found, Member, Noted, Office, Registry, Scope, Settings, View,
    member::MAX_RECORD_BYTES,
};

/// Connects to etcd and reads the members.
///
/// The future keeps the registry alive: leases, re-registration, the view. It never ends; dropping it is what a crash is.
///
/// # Errors
/// [`Error::Unreachable`] if no endpoint answers within `connect_timeout_ms`, [`Error::Config`] for settings that can't
/// be used.
pub async fn connect(
    config: EtcdConfig,
) -> Result<(Arc<dyn Registry>, impl Future<Output = ()> + Send + 'static + use<>), Error> {
    check(&config)?;
    let etcd = Etcd::new(&config).await?;
    let shared = Arc::new(Shared {
        etcd,
        lease_ttl: Duration::from_secs(config.lease_ttl_s.into()),
        offices: format!("{}/offices/", config.prefix.trim_end_matches('/')),
        table: Mutex::new(Table::new(config.prefix.trim_end_matches('/'))),
        view: watch::Sender::default(),
        slots: Mutex::default(),
        wake: Notify::new(),
        history: History::new(&config),
        settings: Kept::new(&config),
    });
    let revision = follow::read(&shared, Duration::from_millis(config.connect_timeout_ms)).await?;
    let running = {
        let shared = shared.clone();
        async move {
            let events = shared.history.run(&shared.etcd);
            let settings = shared.settings.run(&shared.etcd);
            let all = futures_util::future::join4(follow::run(&shared, revision), keep::run(&shared), events, settings);
            Box::pin(all).await;
        }
    };
    Ok((Arc::new(EtcdRegistry { shared }), running))
}

/// What the registry and its future share.
struct Shared {
    etcd: Etcd,
    lease_ttl: Duration,
    /// What the keys of offices begin with.
    offices: String,
    /// Written by `follow` only.
    table: Mutex<Table>,
    view: watch::Sender<Arc<View>>,
    /// The members of this process. Written by register and deregister, read by both loops.
    slots: Mutex<BTreeMap<Name, Arc<Slot>>>,
    /// Has `keep` look at the slots now.
    wake: Notify,
    history: History,
    settings: Kept,
}

/// A member of this process.
struct Slot {
    name: Name,
    key: String,
    /// Held for the time of an exchange with etcd (bounded), so that two do not cross.
    own: tokio::sync::Mutex<Own>,
    /// etcd's revision of our claim; `follow` compares what it sees with it.
    claimed_at: AtomicI64,
    /// Somebody removed the key while the lease lives: claim it again.
    removed: AtomicBool,
}

/// What a slot publishes.
struct Own {
    member: Member,
    /// `None`: to be claimed (again).
    lease: Option<i64>,
    /// etcd has an older record than this one.
    unpublished: bool,
    /// Deregistered: never to be claimed again.
    gone: bool,
    /// The last attempt failed and was logged.
    troubled: bool,
}

const UNPOISONED: &str = "no code panics while it holds this lock";

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect(UNPOISONED)
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<Name, Arc<Slot>>> {
        self.slots.lock().expect(UNPOISONED)
    }

    /// Shows the table to everybody, if it has changed.
    fn publish(&self) {
        let table = self.table();
        self.view.send_if_modified(|view| {
            let (changed, epoch) = (!view.members.iter().eq(table.members()), table.epoch());
            if changed {
                let members = table.members().cloned().collect();
                *view = Arc::new(View { revision: view.revision + 1, epoch, members });
            } else if view.epoch != epoch {
                // The same members, known to be so for longer: there for whoever looks, and nobody's news.
                *view = Arc::new(View { epoch, ..View::clone(view) });
            }
            changed
        });
    }

    fn slot(&self, member: Member) -> Arc<Slot> {
        let name = (member.role, member.id.clone());
        let own = Own { member, lease: None, unpublished: true, gone: false, troubled: false };
        Arc::new(Slot {
            key: self.table().key(&name),
            name,
            own: tokio::sync::Mutex::new(own),
            claimed_at: AtomicI64::new(i64::MAX),
            removed: AtomicBool::new(false),
        })
    }
}

/// The handle. Its members go when it is dropped: they are no longer kept alive.
struct EtcdRegistry {
    shared: Arc<Shared>,
}

#[async_trait]
impl Registry for EtcdRegistry {
    async fn register(&self, member: Member) -> Result<(), Error> {
        check_size(&member)?;
        let slot = self.shared.slot(member);
        claim::claim(&self.shared, &slot, &mut *slot.own.lock().await, claim::Patience::OneLease).await?;
        self.shared.slots().insert(slot.name.clone(), slot);
        self.shared.wake.notify_one();
        Ok(())
    }

    async fn update(&self, member: Member) -> Result<(), Error> {
        check_size(&member)?;
        let name = (member.role, member.id.clone());
        let slot = self.shared.slots().get(&name).cloned();
        let Some(slot) = slot else {
            return Err(Error::NotRegistered { role: name.0, id: name.1 });
        };
        let mut own = slot.own.lock().await;
        own.member = member;
        own.unpublished = true;
        if claim::publish(&self.shared, &slot, &mut own).await.is_err() {
            self.shared.wake.notify_one(); // `keep` goes on trying, and logs
        }
        Ok(())
    }

    async fn deregister(&self, id: &MemberId, role: Role) -> Result<(), Error> {
        let slot = self.shared.slots().remove(&(role, id.clone()));
        let Some(slot) = slot else { return Ok(()) };
        let mut own = slot.own.lock().await;
        own.gone = true;
        match own.lease.take() {
            Some(lease) => self.shared.etcd.revoke(lease).await,
            None => Ok(()),
        }
    }

    async fn claim_office(&self, office: &MemberId, candidate: &MemberId, role: Role) -> Result<Office, Error> {
        let not_registered = || Error::NotRegistered { role, id: candidate.clone() };
        let slot = self.shared.slots().get(&(role, candidate.clone())).cloned().ok_or_else(not_registered)?;
        office::claim(&self.shared, &slot, office).await
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view.subscribe()
    }

    fn note(&self, event: Event) {
        self.shared.history.note(event);
    }

    async fn events(&self, after: &str) -> Result<Vec<Noted>, Error> {
        self.shared.history.read(&self.shared.etcd, after).await
    }

    fn events_lost(&self) -> u64 {
        self.shared.history.lost()
    }

    fn settings(&self) -> watch::Receiver<Option<Arc<Settings>>> {
        self.shared.settings.seen()
    }

    async fn settings_of(&self, scope: &Scope) -> Result<Option<Found>, Error> {
        self.shared.settings.now(&self.shared.etcd, scope).await
    }

    async fn set(&self, scope: &Scope, document: &Document, changes: &[Change]) -> Result<u64, Error> {
        self.shared.settings.write(&self.shared.etcd, scope, document, changes).await
    }

    async fn changes(&self) -> Result<Vec<Change>, Error> {
        self.shared.settings.changes(&self.shared.etcd).await
    }

    fn answers(&self) -> bool {
        self.shared.etcd.answers()
    }
}

impl Drop for EtcdRegistry {
    fn drop(&mut self) {
        self.shared.slots().clear();
    }
}

impl Slot {
    /// Told by `follow`: etcd at `revision` has no such key (any more). An older statement than our claim is no news.
    fn missed_at(&self, revision: i64) -> bool {
        let news = revision >= self.claimed_at.load(Ordering::Acquire);
        if news {
            self.removed.store(true, Ordering::Release);
        }
        news
    }
}

fn check_size(member: &Member) -> Result<(), Error> {
    match member.record().len() {
        bytes if bytes > MAX_RECORD_BYTES => {
            Err(Error::TooLarge { role: member.role, id: member.id.clone(), bytes, limit: MAX_RECORD_BYTES })
        }
        _ => Ok(()),
    }
}

fn check(config: &EtcdConfig) -> Result<(), Error> {
    let wrong = |key, reason: &str| Err(Error::Config { key, reason: reason.to_owned() });
    if config.endpoints.is_empty() || config.endpoints.len() > 64 {
        return wrong("registry.etcd.endpoints", "expected 1 to 64 endpoints, each `host:port`");
    }
    if config.username.is_some() != config.password_file.is_some() {
        return wrong("registry.etcd.username, password_file", "one is set and the other is not: they belong together");
    }
    let prefix = &config.prefix;
    if !prefix.starts_with('/') || prefix.len() > 256 || !prefix.bytes().all(|byte| byte.is_ascii_graphic()) {
        return wrong("registry.etcd.prefix", "expected up to 256 visible characters that begin with `/`");
    }
    if !(1..=3600).contains(&config.lease_ttl_s) {
        return wrong("registry.etcd.lease_ttl_s", "expected 1 to 3600 seconds");
    }
    if config.max_events > 100_000 {
        return wrong("registry.etcd.max_events", "expected up to 100000");
    }
    if !(60..=31_536_000).contains(&config.events_ttl_s) {
        return wrong("registry.etcd.events_ttl_s", "expected 60 to 31536000 seconds");
    }
    if config.connect_timeout_ms == 0 || config.request_timeout_ms == 0 {
        return wrong("registry.etcd.connect_timeout_ms, request_timeout_ms", "expected at least 1 millisecond");
    }
    Ok(())
}
