//! Configuration that changes while a service runs: what operators set for the cluster, laid over what the service was
//! started with.
//!
//! ```text
//!   kvasirctl config set ─▶ page (a running member checks it) ─▶ registry: a document, its history
//!                                                                   │ watch, at every member of the role
//!                                    own layers + documents ◀───────┘
//!                                        │ can be used          │ can't
//!                                        ▼                      ▼
//!                                  a new configuration     the last good one stays; a log line, an event, a metric
//! ```
//!
//! The rule this crate guards: **a service always has a configuration that it has checked.** What is in the registry may
//! have been put there by hand, or by another version.

#![forbid(unsafe_code)]

mod page;

use std::{
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use kvasir_cluster::{Document, Event, EventKind, Found, Registry, Scope};
use kvasir_rpc::operator::Desk;
use kvasir_runtime::{
    Config, Context,
    config::{Base, Over, Running},
    metrics::Gauge,
};
use kvasir_types::{MemberId, Role};
use tokio::sync::watch;

pub use page::{Ask, Changed, Page, Refusal};

/// For the settings to be read when a service starts: the registry has just been reached.
const PATIENCE: Duration = Duration::from_secs(3);

/// A configuration as it is now.
#[derive(Debug)]
pub struct Now<C> {
    config: Arc<C>,
    /// Who set something last, if anybody did.
    pub who: String,
}

impl<C> Now<C> {
    /// The same, for what is read once.
    pub fn start(&self) -> Arc<C> {
        self.config.clone()
    }
}

impl<C> Deref for Now<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.config
    }
}

/// The configuration, whenever it is looked at: cheap to clone, and to borrow from.
pub type Live<C> = watch::Receiver<Arc<Now<C>>>;

/// A service's configuration and what keeps it what the cluster wants. Cheap to clone; clones are the same.
pub struct Settings<C>(Arc<Inner<C>>);

impl<C> Clone for Settings<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Inner<C> {
    role: Role,
    id: MemberId,
    base: Base,
    /// Not held: the admin page outlives the service.
    registry: Weak<dyn Registry>,
    context: Context,
    now: watch::Sender<Arc<Now<C>>>,
    /// Held for a copy, and for telling of a new configuration.
    state: Mutex<State<C>>,
    revision: Gauge,
    refused: Gauge,
}

struct State<C> {
    running: Arc<Running<C>>,
    /// Of what was laid over last: all of the role, this one.
    documents: [u64; 2],
    /// Why what is set is not used.
    refused: Option<String>,
}

impl<C: Config> Settings<C> {
    /// Lays what is set over the configuration that a service was started with. What can't be used, or can't be read in
    /// time, is told, and the service starts with what it has.
    pub async fn begin(config: C, role: Role, id: &MemberId, registry: &Arc<dyn Registry>, context: &Context) -> Self {
        let base = context.base.as_deref().cloned().unwrap_or_else(|| Base::of(&config));
        let running = Arc::new(base.alone(config));
        let metrics = &context.metrics;
        let inner = Inner {
            role,
            id: id.clone(),
            base,
            registry: Arc::downgrade(registry),
            context: context.clone(),
            now: watch::Sender::new(Arc::new(Now { config: running.config.clone(), who: String::new() })),
            state: Mutex::new(State { running, documents: [0; 2], refused: None }),
            revision: metrics
                .gauge("kvasir_config_revision", "Revision of the cluster's settings that are in use; 0: none are set"),
            refused: metrics.gauge(
                "kvasir_config_refused",
                "1 while what is set in the cluster can't be used, and the last good configuration is",
            ),
        };
        let settings = Self(Arc::new(inner));
        let mut seen = registry.settings();
        let read = tokio::time::timeout(PATIENCE, seen.wait_for(Option::is_some)).await;
        match read {
            Ok(Ok(found)) => {
                let found = found.clone();
                settings.follow(found.as_deref());
            }
            _ => tracing::warn!("the cluster's settings could not be read in time, starting without them"),
        }
        settings
    }

    /// The configuration, from now on.
    pub fn live(&self) -> Live<C> {
        self.0.now.subscribe()
    }

    /// The configuration now.
    pub fn now(&self) -> Arc<C> {
        self.0.now.borrow().config.clone()
    }

    /// Lets operators ask and change, at that page and that desk.
    pub fn open(&self, page: &Page, desk: Desk) {
        page.open(self.clone(), desk);
    }

    /// Follows what is set. Ends with the registry.
    pub async fn run(self) {
        let mut seen = match self.0.registry.upgrade() {
            Some(registry) => registry.settings(),
            None => return,
        };
        loop {
            let found = seen.borrow_and_update().clone();
            self.follow(found.as_deref());
            if seen.changed().await.is_err() {
                return;
            }
        }
    }

    fn scopes(&self) -> [Scope; 2] {
        [Scope::all(self.0.role), Scope::one(self.0.role, self.0.id.clone())]
    }

    fn state(&self) -> MutexGuard<'_, State<C>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses what is set, if it is something else than before and can be used.
    fn follow(&self, found: Option<&kvasir_cluster::Settings>) {
        let Some(found) = found else { return };
        let scopes = self.scopes();
        let documents = [0, 1].map(|at| found.documents.get(&scopes[at]));
        let revisions = documents.map(|found| found.map_or(0, Found::revision));
        let inner = &self.0;
        if self.state().documents == revisions {
            return;
        }
        match self.lay(&documents) {
            Ok((running, who)) => {
                if inner.context.base.is_some() {
                    inner.context.process.follow(&running);
                }
                let now = Arc::new(Now { config: running.config.clone(), who: who.clone() });
                let again = {
                    // Together: who sees that these documents are in use finds the configuration that they make.
                    let mut state = self.state();
                    state.documents = revisions;
                    state.running = Arc::new(running);
                    inner.now.send_replace(now);
                    state.refused.take().is_some()
                };
                inner.refused.set(0);
                inner.revision.set(revisions.into_iter().max().unwrap_or(0) as i64);
                tracing::info!(
                    revision = revisions[0].max(revisions[1]),
                    who,
                    again,
                    "the cluster's settings are used"
                );
            }
            Err(why) => {
                let mut state = self.state();
                state.documents = revisions;
                state.refused = Some(why.clone());
                drop(state);
                inner.refused.set(1);
                tracing::warn!(why, "what is set in the cluster can't be used, the last good configuration stays");
                if let Some(registry) = inner.registry.upgrade() {
                    let what = format!("keeps its last good configuration: {why}");
                    registry.note(Event::now(EventKind::Config, &inner.id, inner.id.as_str(), what));
                }
            }
        }
    }

    /// The configuration that these documents make, and who wanted it so.
    fn lay(&self, documents: &[Option<&Found>; 2]) -> Result<(Running<C>, String), String> {
        let names = self.scopes().map(|scope| format!("config {scope}"));
        let (mut over, mut latest) = (Vec::new(), None::<&Document>);
        for ((found, name), origin) in documents.iter().zip(&names).zip(["cluster", "member"]) {
            match found {
                Some(Found::Document(document)) => {
                    over.push(Over { name, origin, set: &document.set });
                    if latest.is_none_or(|latest| latest.revision < document.revision) {
                        latest = Some(document);
                    }
                }
                Some(Found::Unusable { reason, .. }) => return Err(format!("{name}: {reason}")),
                None => {}
            }
        }
        let running = self.0.base.over(&over).map_err(|error| error.to_string())?;
        Ok((running, latest.map_or_else(String::new, |latest| latest.who.clone())))
    }
}

#[cfg(test)]
mod tests;
