//! From configuration to a router that serves, and back out again: build, announce, wait, drain.

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::Context as _;
use kvasir_cluster::{Audit, Member, Registry, View};
use kvasir_rpc::{
    Rpc,
    operator::{Asked, Desk, Operators},
};
use kvasir_runtime::{Context, Kind, Listening, random_u64};
use kvasir_settings::{Live, Settings};
use kvasir_types::{Incarnation, MemberId, PROTOCOL_VERSION, Role};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    access,
    admission::{Gate, Gates},
    cache::{Feeds, Index},
    config::Config,
    external::{Directory, Engines},
    fleet::{Crew, Fleet, Misfit},
    http::{self, App, Server},
    metrics::{CacheMetrics, Metrics, PlannerMetrics},
    planner::{self, Board, Lead},
    text::Model,
    witness,
};

/// Runs a router with the cluster's metadata in etcd until shutdown.
pub async fn run_with_etcd(config: Config, context: Context) -> anyhow::Result<()> {
    config.check()?;
    let (registry, watching) =
        kvasir_cluster::connect_etcd(config.registry.etcd.clone()).await.context("registry.etcd")?;
    context.tasks.spawn(Kind::Critical, "registry", async move {
        watching.await;
        Ok(())
    });
    run(config, context, registry).await
}

/// Runs a router until shutdown.
///
/// It serves as soon as its models' text files are read; `/ready` says yes once a decode worker is known that it can use.
pub async fn run(config: Config, context: Context, registry: Arc<dyn Registry>) -> anyhow::Result<()> {
    config.check()?;
    let (rpc, keeping) = Rpc::open(&config.rpc)?;
    context.tasks.spawn(Kind::Background, "certificates for calls", async move {
        keeping.await;
        Ok(())
    });
    let listening = Listening::bind("listen", config.listen, config.advertise.as_deref()).await?;
    let operators = http::Operators::default();
    let page = kvasir_settings::Page::default();
    let more = http::admin(operators.clone()).merge(page.routes());
    let admin = kvasir_runtime::admin::start_with(&config.admin, &context, more).await?;
    let ports = serde_json::json!({ "http": listening.bound, "admin": admin });
    let admin = listening.beside(admin);
    let id = config.id.clone().unwrap_or_else(|| format!("router-{:08x}", random_u64() as u32));
    let id: MemberId = id.parse().context("id")?;
    let settings = Settings::begin(config, Role::Router, &id, &registry, &context).await;
    let config = settings.now();
    let tls = http::acceptor(&config.tls)?;
    let tls = tls.map(|(acceptor, watching)| {
        context.tasks.spawn(Kind::Background, "certificate", async move {
            watching.await;
            Ok(())
        });
        acceptor
    });
    let (keys, keyring) = watch::channel(Arc::new(config.access.keyring()?));
    context.tasks.spawn(Kind::Background, "keys", {
        let watching = access::watch(config.access.clone(), keys);
        async move {
            watching.await;
            Ok(())
        }
    });
    let (operators_known, keeping) = Operators::open(&config.operator)?;
    context.tasks.spawn(Kind::Background, "operators' tokens", async move {
        keeping.await;
        Ok(())
    });
    let lost =
        context.metrics.counter("kvasir_cluster_events_lost", "Events that did not get into the cluster's history");
    let counts = Arc::downgrade(&registry);
    let up = context.metrics.gauge("kvasir_cluster_registry_up", "1 if etcd answered the last thing it was asked");
    context.metrics.on_scrape(move || {
        let Some(registry) = counts.upgrade() else { return };
        kvasir_runtime::metrics::set_total(&lost, registry.events_lost());
        up.set(registry.answers().into());
    });
    let desk = {
        let (id, registry) = (id.clone(), Arc::downgrade(&registry));
        Desk::new(operators_known, move |asked: &Asked<'_>| {
            let Asked { who, what, on, result, many } = *asked;
            if let Some(registry) = registry.upgrade() {
                kvasir_cluster::audit(&*registry, &Audit { member: &id, who, what, on, result, many });
            }
        })
    };
    settings.open(&page, desk.clone());
    let token = config.operator.token_file.as_deref().map(kvasir_rpc::operator::token).transpose()?;
    let models = load(&config).await?;

    let metrics = Metrics::new(&context.metrics);
    let gate_config = Arc::new(config.admission.clone());
    let gate = |model: &Arc<Model>| (model.name().to_owned(), Gate::new(Arc::clone(&gate_config)));
    let gates: Gates = Arc::new(models.iter().map(gate).collect());
    Metrics::watch_gates(&context.metrics, Arc::clone(&gates));
    let index = Arc::new(Index::default());
    let feeds = Feeds::new(Arc::clone(&index), context.tasks.clone(), CacheMetrics::new(&context.metrics, &index));
    let followers = Followers { gates: Arc::clone(&gates), feeds };
    let contexts = models.iter().map(|model| (model.name().to_owned(), model.context_len())).collect();
    let directory = Directory::new(config.external.clone(), contexts, context.tasks.clone());
    let (nobody, all) = (Fleet::new(rpc), models.clone());
    let (fleet, watcher) =
        watch_members(registry.view(), nobody, directory, all, followers, metrics.clone(), context.clone());
    context.tasks.spawn(Kind::Critical, "members", watcher);
    let board = Arc::new(Board::new(config.planner.mode));
    let lead = Lead::new(planner::Parts {
        id: id.clone(),
        live: settings.live(),
        targets: config.models.iter().map(|model| (model.name.clone(), model.slo)).collect(),
        registry: Arc::clone(&registry),
        fleet: fleet.clone(),
        gates: Arc::clone(&gates),
        board: Arc::clone(&board),
        token,
        metrics: PlannerMetrics::new(&context.metrics),
    });
    let parts = http::Parts {
        models,
        fleet,
        index,
        keys: keyring,
        gates,
        board,
        desk,
        id: id.clone(),
        registry: Arc::downgrade(&registry),
        metrics,
        context: context.clone(),
        live: settings.live(),
    };
    let app = Arc::new(App::new(&config, parts));
    context.tasks.spawn(Kind::Background, "settings", {
        let (following, running) = (follow(settings.live(), Arc::clone(&app)), settings.clone().run());
        async move {
            tokio::join!(following, running);
            Ok(())
        }
    });
    let around = http::Surroundings::new(id.clone(), registry.view(), page, context.tasks.clone());
    operators.open(Arc::clone(&app), around);
    let http = listening.advertised;
    let server = Server { listener: listening.listener, routes: http::routes(app), limits: config.limits.clone(), tls };

    let member = member(id.clone(), http, admin);
    let witness = witness::watch(id, Arc::clone(&registry));
    context.tasks.spawn(Kind::Background, "witness", async move {
        witness.await;
        Ok(())
    });
    registry.register(member.clone()).await.context("registration")?;
    context.tasks.spawn(Kind::Critical, "planner", {
        let leaving = context.shutdown.clone();
        async move {
            tokio::select! {
                () = lead.run() => {}
                () = leaving.wait() => {}
            }
            Ok(())
        }
    });
    let live = settings.live();
    let grace = || Duration::from_millis(live.borrow().shutdown.grace_ms);
    if let Some(path) = &config.port_file {
        // Connections are accepted from here on: the listener has its queue.
        kvasir_runtime::write_port_file(path, &ports)
            .with_context(|| format!("port_file: cannot write {}", path.display()))?;
    }
    info!(router = %member.id, http = member.http, admin = member.admin, "ready");

    let serving = server.run(&context, grace);
    let leaving = async {
        context.shutdown.wait().await;
        context.health.set_not_ready("draining");
        if let Err(error) = registry.deregister(&member.id, Role::Router).await {
            warn!(%error, "not deregistered, the lease will end by itself");
        }
    };
    tokio::join!(serving, leaving);
    Ok(())
}

/// Has the router do what it is set to, as long as somebody may set it.
async fn follow(mut live: Live<Config>, app: Arc<App>) {
    loop {
        let now = Arc::clone(&live.borrow_and_update());
        app.follow(&now);
        if live.changed().await.is_err() {
            return;
        }
    }
}

async fn load(config: &Config) -> anyhow::Result<Vec<Arc<Model>>> {
    let (wanted, kept) = (config.models.clone(), config.limits.text_cache_bytes);
    let loading = move || {
        wanted
            .iter()
            .map(|model| {
                let loaded = Model::load(model);
                loaded.map(|model| Arc::new(model.keeping(kept))).with_context(|| format!("model {}", model.name))
            })
            .collect()
    };
    tokio::task::spawn_blocking(loading).await.context("loading the models panicked")?
}

fn member(id: MemberId, http: String, admin: String) -> Member {
    Member {
        id,
        incarnation: Incarnation(random_u64()),
        role: Role::Router,
        grpc: String::new(),
        admin,
        http,
        protocol: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model: None,
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
    }
}

/// Who is told of every new fleet.
struct Followers {
    gates: Gates,
    feeds: Feeds,
}

impl Followers {
    fn follow(&mut self, fleet: &Fleet) {
        self.feeds.follow(fleet);
        for (model, gate) in self.gates.iter() {
            gate.set_workers(fleet.crew(model).map_or(0, Crew::len));
        }
    }
}

/// Keeps the fleet what the members are. The first fleet is there on return; the future keeps it so.
fn watch_members(
    mut view: watch::Receiver<Arc<View>>,
    nobody: Fleet,
    mut directory: Directory,
    models: Vec<Arc<Model>>,
    mut followers: Followers,
    metrics: Metrics,
    context: Context,
) -> (watch::Receiver<Arc<Fleet>>, impl Future<Output = anyhow::Result<()>>) {
    let mut told: HashSet<Misfit> = HashSet::new();
    let mut build = move |view: &View, engines: &Engines, previous: &Fleet| {
        let (fleet, misfits) = Fleet::build(view, engines, &models, previous);
        // Once for each life of a worker, however often the members change.
        for misfit in misfits.iter().filter(|misfit| !told.contains(*misfit)) {
            warn!(worker = %misfit.id, why = misfit.why, "a worker is not used");
        }
        told = misfits.into_iter().collect();
        followers.follow(&fleet);
        metrics.decode_workers.set(fleet.decode_workers() as i64);
        match fleet.decode_workers() {
            _ if context.shutdown.is_triggered() => {} // not ready is all it will be from now on
            0 => context.health.set_not_ready("no decode worker is known"),
            _ => context.health.set_ready(),
        }
        Arc::new(fleet)
    };
    let mut known = directory.known();
    let now = Arc::clone(&view.borrow_and_update());
    directory.follow(&now);
    let (sender, receiver) = watch::channel(build(&now, &Engines::default(), &nobody));
    let watching = async move {
        loop {
            // Whether either has changed loses nothing when the other has.
            let changed = tokio::select! {
                changed = view.changed() => changed,
                changed = known.changed() => changed,
            };
            if changed.is_err() {
                break;
            }
            let now = Arc::clone(&view.borrow_and_update());
            directory.follow(&now);
            let engines = Arc::clone(&known.borrow_and_update());
            let previous = Arc::clone(&sender.borrow());
            sender.send_replace(build(&now, &engines, &previous));
        }
        // The registry is gone, and with it the process's end is near: until then the last known members are used.
        std::future::pending().await
    };
    (receiver, watching)
}
