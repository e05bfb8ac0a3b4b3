//! Which engines there are now: those that somebody named (configuration, etcd) and whose `/health` answers.
//!
//! ```text
//!   named ─▶ probe ──answers──▶ known (a life begins) ──no answer for gone_after_ms──▶ not known ──answers──▶ the next life
//! ```
//!
//! It is to engines what leases in etcd are to workers. Each router looks for itself. An engine that answers `/health` and
//! fails requests is dealt with as a worker that does (`health`).

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use kvasir_cluster::View;
use kvasir_runtime::{Kind, Tasks, random_u64};
use kvasir_types::{Incarnation, MemberId};
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use tracing::{Span, info, warn};

use super::{
    config::{EngineConfig, ExternalConfig},
    engine::{self, Engine, Known, Name},
    http::{Ask, Http},
};

/// Longest answer to a health check that is read.
const MAX_HEALTH_BYTES: usize = 64 << 10;
/// Context of a model whose folder does not say.
const GUESSED_CONTEXT: u32 = 4096;

/// The engines that answer, by name.
pub(crate) type Engines = Arc<BTreeMap<Name, Known>>;

/// All probes. Used by the task that watches the members.
pub(crate) struct Directory {
    config: Arc<ExternalConfig>,
    /// The router's models, and how many tokens they were made for.
    contexts: HashMap<String, Option<u32>>,
    http: Http,
    tasks: Tasks,
    known: watch::Sender<Engines>,
    /// Dropping the sender ends the probe.
    running: HashMap<Name, (EngineConfig, oneshot::Sender<()>)>,
    /// Records that can't be used, and why: told once.
    unfit: HashMap<MemberId, String>,
}

impl Directory {
    /// Of no engine yet; `contexts`: the router's models, and how many tokens they were made for.
    pub(crate) fn new(config: ExternalConfig, contexts: HashMap<String, Option<u32>>, tasks: Tasks) -> Self {
        let (config, http) = (Arc::new(config), Http::default());
        Self {
            config,
            contexts,
            http,
            tasks,
            known: watch::Sender::default(),
            running: HashMap::new(),
            unfit: HashMap::new(),
        }
    }

    /// The engines that answer, now and whenever that changes.
    pub(crate) fn known(&self) -> watch::Receiver<Engines> {
        self.known.subscribe()
    }

    /// Follows those of the configuration and those in the cluster's metadata, and no others. The configuration's word counts.
    pub(crate) fn follow(&mut self, view: &View) {
        let ours = self.config.engines.clone();
        let mut found = Vec::new();
        let mut unfit = HashMap::new();
        for member in &view.members {
            match EngineConfig::of(member) {
                None => {}
                Some(Ok(engine)) => found.push(engine),
                Some(Err(why)) => {
                    if self.unfit.get(&member.id) != Some(&why) {
                        warn!(worker = %member.id, why, "an engine is not used");
                    }
                    unfit.insert(member.id.clone(), why);
                }
            }
        }
        self.unfit = unfit;
        let mut named: HashMap<Name, EngineConfig> = HashMap::new();
        for engine in ours.into_iter().chain(found).filter(|engine| self.contexts.contains_key(&engine.model)) {
            named.entry((engine::role(&engine), engine.id.clone())).or_insert(engine);
        }
        let mut before = std::mem::take(&mut self.running);
        for (name, engine) in named {
            let running = match before.remove(&name) {
                Some((same, running)) if same == engine => running,
                _ => self.start(&name, &engine),
            };
            self.running.insert(name, (engine, running));
        }
        // Those that are left in `before` are dropped, and their probes end.
    }

    fn start(&self, name: &Name, engine: &EngineConfig) -> oneshot::Sender<()> {
        let (stop, stopped) = oneshot::channel();
        let context = self.contexts.get(&engine.model).copied().flatten().unwrap_or(GUESSED_CONTEXT);
        let probe = Probe {
            name: name.clone(),
            engine: engine.clone(),
            context,
            config: Arc::clone(&self.config),
            http: self.http.clone(),
            known: self.known.clone(),
        };
        self.tasks.spawn_in(Kind::Background, "engine probe", Span::none(), async move {
            let mut life = None;
            tokio::select! {
                () = probe.run(&mut life) => {}
                _ = stopped => {}
            }
            probe.gone(&mut life);
            Ok(())
        });
        stop
    }
}

/// Looks after one engine.
struct Probe {
    name: Name,
    engine: EngineConfig,
    context: u32,
    config: Arc<ExternalConfig>,
    http: Http,
    known: watch::Sender<Engines>,
}

impl Probe {
    async fn run(&self, life: &mut Option<Incarnation>) {
        let pause = Duration::from_millis(self.config.probe_ms);
        let patience = Duration::from_millis(self.config.gone_after_ms);
        let (mut heard, mut told) = (Instant::now(), String::new());
        loop {
            match self.look(pause).await {
                Ok(engine) => {
                    heard = Instant::now();
                    told.clear();
                    if life.is_none() {
                        self.appeared(life, engine);
                    }
                }
                Err(why) => {
                    if life.is_some() && heard.elapsed() >= patience {
                        warn!(worker = %self.name.1, url = self.engine.url, why, "an engine is gone");
                        self.gone(life);
                        told = why;
                    } else if life.is_none() && told != why {
                        // Once for each reason: it may be a long time starting.
                        info!(worker = %self.name.1, url = self.engine.url, why, "an engine does not answer yet");
                        told = why;
                    }
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn look(&self, limit: Duration) -> Result<Engine, String> {
        let path: Option<&PathBuf> = self.engine.key_file.as_ref().or(self.config.key_file.as_ref());
        let key = path.map(|path| engine::read_key(path)).transpose()?;
        let engine = Engine::new(&self.engine, key, self.http.clone(), self.config.remember_blocks)?;
        let until = Instant::now() + limit;
        let ask = Ask { engine: &engine, worker: &self.name.1, path: "/health", until };
        ask.whole(None, None, MAX_HEALTH_BYTES).await.map_err(|error| kvasir_runtime::chain(&error))?;
        Ok(engine)
    }

    fn appeared(&self, life: &mut Option<Incarnation>, engine: Engine) {
        let incarnation = Incarnation(random_u64());
        *life = Some(incarnation);
        info!(worker = %self.name.1, kind = self.engine.kind.as_str(), url = self.engine.url, "an engine answers");
        let member = engine::member(&self.engine, incarnation, self.context);
        let known = Known { member, engine: Arc::new(engine) };
        self.known.send_modify(|all| {
            Arc::make_mut(all).insert(self.name.clone(), known);
        });
    }

    /// It is no member any more, unless its successor under the same name is.
    fn gone(&self, life: &mut Option<Incarnation>) {
        let Some(ours) = life.take() else { return };
        self.known.send_if_modified(|all| {
            let there = all.get(&self.name).is_some_and(|known| known.member.incarnation == ours);
            if there {
                Arc::make_mut(all).remove(&self.name);
            }
            there
        });
    }
}
