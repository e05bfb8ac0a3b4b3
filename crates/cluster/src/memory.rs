//! Members of one process, in its memory: for standalone and for tests.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use kvasir_types::{Epoch, Incarnation, MemberId, Role};
use tokio::sync::watch;

use crate::{
    Change, Document, Error, Event, Found, Member, Noted, Office, Registry, Scope, Settings, View,
    settings::MAX_CHANGES,
};

/// Most events that are kept.
const MAX_EVENTS: usize = 4096;

type Members = BTreeMap<(Role, MemberId), Member>;

/// Who holds which office since which term.
#[derive(Debug, Default)]
struct Offices {
    term: u64,
    held: BTreeMap<MemberId, (Role, MemberId, u64)>,
}

/// What happened, the latest of it.
#[derive(Debug, Default)]
struct History {
    noted: u64,
    events: VecDeque<Noted>,
}

/// What is set, and what was changed lately.
#[derive(Debug)]
struct Set {
    revision: u64,
    changes: VecDeque<Change>,
    now: watch::Sender<Option<Arc<Settings>>>,
}

impl Default for Set {
    fn default() -> Self {
        let now = watch::Sender::new(Some(Arc::default()));
        Self { revision: 0, changes: VecDeque::new(), now }
    }
}

/// The members that all registries of this hub share. Clones are the same hub.
#[derive(Clone, Debug, Default)]
pub struct MemoryHub(Arc<Hub>);

/// Written by whoever registers; read through the channel.
#[derive(Debug, Default)]
struct Hub {
    members: Mutex<Members>,
    offices: Mutex<Offices>,
    history: Mutex<History>,
    set: Mutex<Set>,
    view: watch::Sender<Arc<View>>,
}

impl MemoryHub {
    /// A hub without members.
    pub fn new() -> Self {
        Self::default()
    }

    /// A registry of this hub. Its members leave when it is dropped, as a process's members do when it dies.
    pub fn registry(&self) -> Arc<dyn Registry> {
        Arc::new(MemoryRegistry { hub: self.0.clone(), own: Mutex::default() })
    }
}

impl Hub {
    fn change<T>(&self, change: impl FnOnce(&mut Members) -> T) -> T {
        let mut members = self.members.lock().expect(UNPOISONED);
        let result = change(&mut members);
        self.view.send_if_modified(|view| {
            let now: Vec<_> = members.values().cloned().collect();
            let changed = view.members != now;
            if changed {
                let revision = view.revision + 1;
                *view = Arc::new(View { revision, epoch: Epoch(revision), members: now });
            }
            changed
        });
        result
    }
}

const UNPOISONED: &str = "no code panics while it holds this lock";

/// One service's access to a hub.
struct MemoryRegistry {
    hub: Arc<Hub>,
    /// What this registry has registered.
    own: Mutex<BTreeMap<(Role, MemberId), Incarnation>>,
}

#[async_trait]
impl Registry for MemoryRegistry {
    async fn register(&self, member: Member) -> Result<(), Error> {
        let key = (member.role, member.id.clone());
        let mut own = self.own.lock().expect(UNPOISONED);
        self.hub.change(|members| match members.get(&key) {
            Some(held) if held.incarnation != member.incarnation => {
                Err(Error::Taken { role: member.role, id: member.id.clone(), holder: held.incarnation })
            }
            _ => {
                own.insert(key.clone(), member.incarnation);
                members.insert(key, member);
                Ok(())
            }
        })
    }

    async fn update(&self, member: Member) -> Result<(), Error> {
        let key = (member.role, member.id.clone());
        if !self.own.lock().expect(UNPOISONED).contains_key(&key) {
            return Err(Error::NotRegistered { role: member.role, id: member.id });
        }
        self.hub.change(|members| members.insert(key, member));
        Ok(())
    }

    async fn deregister(&self, id: &MemberId, role: Role) -> Result<(), Error> {
        let key = (role, id.clone());
        if self.own.lock().expect(UNPOISONED).remove(&key).is_some() {
            self.hub.offices.lock().expect(UNPOISONED).held.retain(|_, held| (held.0, &held.1) != (role, id));
            self.hub.change(|members| members.remove(&key));
        }
        Ok(())
    }

    async fn claim_office(&self, office: &MemberId, candidate: &MemberId, role: Role) -> Result<Office, Error> {
        if !self.own.lock().expect(UNPOISONED).contains_key(&(role, candidate.clone())) {
            return Err(Error::NotRegistered { role, id: candidate.clone() });
        }
        let mut offices = self.hub.offices.lock().expect(UNPOISONED);
        if let Some((held_as, holder, term)) = offices.held.get(office) {
            let ours = (*held_as, holder) == (role, candidate);
            return Ok(Office { holder: holder.clone(), term: *term, ours });
        }
        offices.term += 1;
        let term = offices.term;
        offices.held.insert(office.clone(), (role, candidate.clone(), term));
        Ok(Office { holder: candidate.clone(), term, ours: true })
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.hub.view.subscribe()
    }

    fn note(&self, event: Event) {
        let mut history = self.hub.history.lock().expect(UNPOISONED);
        history.noted += 1;
        let key = format!("{:013}-{:08x}", event.at_ms, history.noted);
        if history.events.len() >= MAX_EVENTS {
            history.events.pop_front();
        }
        history.events.push_back(Noted { key, event: event.plain() });
    }

    async fn events(&self, after: &str) -> Result<Vec<Noted>, Error> {
        let history = self.hub.history.lock().expect(UNPOISONED);
        let mut noted: Vec<Noted> = history.events.iter().filter(|noted| *noted.key > *after).cloned().collect();
        noted.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(noted)
    }

    fn events_lost(&self) -> u64 {
        0
    }

    fn settings(&self) -> watch::Receiver<Option<Arc<Settings>>> {
        self.hub.set.lock().expect(UNPOISONED).now.subscribe()
    }

    async fn settings_of(&self, scope: &Scope) -> Result<Option<Found>, Error> {
        let set = self.hub.set.lock().expect(UNPOISONED);
        let now = set.now.borrow();
        Ok(now.as_ref().and_then(|now| now.documents.get(scope).cloned()))
    }

    async fn set(&self, scope: &Scope, document: &Document, changes: &[Change]) -> Result<u64, Error> {
        document.fits(scope)?;
        let mut set = self.hub.set.lock().expect(UNPOISONED);
        let mut now = set.now.borrow().as_deref().cloned().unwrap_or_default();
        let there = now.documents.get(scope);
        if there.map_or(0, Found::revision) != document.revision {
            let by = match there {
                Some(Found::Document(there)) => there.who.clone(),
                _ => String::new(),
            };
            return Err(Error::Changed { scope: scope.clone(), by });
        }
        set.revision += 1;
        let revision = set.revision;
        now.documents.insert(scope.clone(), Found::Document(Document { revision, ..document.clone() }));
        set.changes.extend(changes.iter().map(Change::bounded));
        let surplus = set.changes.len().saturating_sub(MAX_CHANGES);
        set.changes.drain(..surplus);
        set.now.send_replace(Some(Arc::new(now)));
        Ok(revision)
    }

    async fn changes(&self) -> Result<Vec<Change>, Error> {
        Ok(self.hub.set.lock().expect(UNPOISONED).changes.iter().cloned().collect())
    }

    fn answers(&self) -> bool {
        true
    }
}

impl Drop for MemoryRegistry {
    fn drop(&mut self) {
        let own = std::mem::take(&mut *self.own.lock().expect(UNPOISONED));
        let gone = |role: Role, id: &MemberId| own.contains_key(&(role, id.clone()));
        self.hub.offices.lock().expect(UNPOISONED).held.retain(|_, (role, id, _)| !gone(*role, id));
        self.hub.change(|members| members.retain(|key, _| !own.contains_key(key)));
    }
}
