//! From configuration to a node that serves, and back out again: build, announce, wait, leave.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use kvasir_cluster::{Audit, Member, Registry, StoreInfo};
use kvasir_paths::Paths;
use kvasir_proto::v1::{paths_server::PathsServer, store_server::StoreServer};
use kvasir_rpc::{
    Incoming, Rpc,
    operator::{Asked, Desk, Operators},
};
use kvasir_runtime::{Context, Kind, Listening};
use kvasir_settings::{Live, Page, Settings};
use kvasir_store_client::StoreClient;
use kvasir_transfer::{LocalNet, TransferEngine};
use kvasir_types::{MemberId, PROTOCOL_VERSION, Role};

use crate::{
    config::Config,
    disk::{self, Disk, Origins},
    exchange::Exchange,
    expiry,
    handover::{self, Handover, HotGroups, Progress},
    heat::Heat,
    membership::Membership,
    metrics::Metrics,
    mover,
    node::{DiskTier, Node},
    service::{Drain, MAX_REQUEST_BYTES, StoreService},
    store::Recovered,
};

/// What a call may send before it is told to go on, and all calls of a connection together. With HTTP/2's own 64 KiB, the last
/// bytes of a block that comes along with a call wait for a round trip.
const CALL_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Largest frame: one for such a block, rather than one for each 16 KiB of it.
const FRAME: u32 = 160 << 10;

/// Runs a store node with the cluster's metadata in etcd until shutdown.
pub async fn run_with_etcd(config: Config, context: Context) -> anyhow::Result<()> {
    config.store_info(config.settings(0)?.capacity_bytes)?; // a mistake of the operator's is told before anybody is waited for
    let (registry, watching) =
        kvasir_cluster::connect_etcd(config.registry.etcd.clone()).await.context("registry.etcd")?;
    context.tasks.spawn(Kind::Critical, "registry", async move {
        watching.await;
        Ok(())
    });
    run(config, context, registry, LocalNet::new()).await
}

/// Runs a store node until shutdown. `local` is shared by all workers and store nodes of this process.
pub async fn run(config: Config, context: Context, registry: Arc<dyn Registry>, local: LocalNet) -> anyhow::Result<()> {
    let started = start(config, &context, &registry, local).await?;
    context.shutdown.wait().await;
    let (grace, handing_over) = {
        let now = started.live.borrow();
        let grace = Duration::from_millis(now.shutdown.grace_ms);
        (grace, Duration::from_millis(now.handover.on_shutdown_ms).min(grace))
    };
    context.health.set_not_ready("leaving");
    if let Err(error) = registry.deregister(&started.member.id, Role::KvStore).await {
        tracing::warn!(error = kvasir_runtime::chain(&error), "not deregistered, the lease will end by itself");
    }
    let leaving = Instant::now();
    started.handover.leave(leaving + handing_over).await;
    context.tasks.finish_requests(grace.saturating_sub(leaving.elapsed())).await;
    // Joins its threads; readers and writers see their transfers fail and take the blocks for misses.
    let node = started.node;
    tokio::task::spawn_blocking(move || node.close()).await.context("stopping the transfer engine")
}

/// A node that serves.
pub(crate) struct Started {
    pub(crate) node: Arc<Node>,
    pub(crate) member: Member,
    handover: Arc<Handover>,
    live: Live<Config>,
}

/// Builds and announces a node; it serves until the context's shutdown.
pub(crate) async fn start(
    config: Config,
    context: &Context,
    registry: &Arc<dyn Registry>,
    local: LocalNet,
) -> anyhow::Result<Started> {
    let id = config.member_id()?;
    let wanted = Settings::begin(config, Role::KvStore, &id, registry, context).await;
    let config = wanted.now();
    let (rpc, keeping) = Rpc::open(&config.rpc)?;
    context.tasks.spawn(Kind::Background, "certificates for calls", async move {
        keeping.await;
        Ok(())
    });
    let (operators, keeping) = Operators::open(&config.operator)?;
    context.tasks.spawn(Kind::Background, "operators' tokens", async move {
        keeping.await;
        Ok(())
    });
    let lost =
        context.metrics.counter("kvasir_cluster_events_lost", "Events that did not get into the cluster's history");
    let counts = Arc::downgrade(registry);
    let up = context.metrics.gauge("kvasir_cluster_registry_up", "1 if etcd answered the last thing it was asked");
    context.metrics.on_scrape(move || {
        let Some(registry) = counts.upgrade() else { return };
        kvasir_runtime::metrics::set_total(&lost, registry.events_lost());
        up.set(registry.answers().into());
    });
    let desk = {
        // Not held, as in `Drain`.
        let (id, registry) = (id.clone(), Arc::downgrade(registry));
        Desk::new(operators, move |asked: &Asked<'_>| {
            let Asked { who, what, on, result, many } = *asked;
            if let Some(registry) = registry.upgrade() {
                kvasir_cluster::audit(&*registry, &Audit { member: &id, who, what, on, result, many });
            }
        })
    };
    let settings = config.settings(kvasir_runtime::random_u64())?;
    let info = config.store_info(settings.capacity_bytes)?;
    let listening = Listening::bind("listen", config.listen, config.advertise.as_deref()).await?;
    let page = Page::default();
    let admin = kvasir_runtime::admin::start_with(&config.admin, context, page.routes()).await?;
    wanted.open(&page, desk.clone());
    let ports = serde_json::json!({ "grpc": listening.bound, "admin": admin });

    let arena_bytes = usize::try_from(settings.capacity_bytes).context("capacity_bytes")?;
    let engine = TransferEngine::builder()
        .name(id.to_string())
        .config(config.transfer.config(listening.host()))
        .local_net(local)
        .arena(config.transfer.arena(arena_bytes))
        .build()
        .context("transfer")?;
    let disk = open_disk(&config, &engine).await?;
    let (tier, recovered) = disk.map_or((None, Vec::new()), |(tier, recovered)| (Some(tier), recovered));
    if let Some(tier) = &tier {
        disk::copy_at_scrape(&context.metrics, &tier.disk);
    }
    let (lease, reservation, capacity_bytes) = (settings.lease, settings.reservation, settings.capacity_bytes);
    let node = Arc::new(Node::new(engine.clone(), settings, tier, config.verify_on_commit).context("transfer")?);
    node.recover(recovered);
    let (grpc, admin) = (listening.advertised.clone(), listening.beside(admin));
    let member = member(&id, &engine, info, grpc, admin);
    let heat = Heat::new(config.replication.hot_lookups_per_s, config.replication.max_copies);
    let (hot, waiting) = HotGroups::new(heat);
    let to_others = kvasir_store_client::Config { rpc: rpc.clone(), ..kvasir_store_client::Config::default() };
    let handover = Arc::new(Handover {
        id: id.clone(),
        node: node.clone(),
        client: StoreClient::new(to_others, registry.view(), engine.clone()),
        live: wanted.live(),
        progress: Arc::new(Progress::new()),
        hot: Arc::new(hot),
    });
    context.tasks.spawn(Kind::Background, "settings", {
        let (following, running) = (follow(wanted.live(), handover.clone()), wanted.clone().run());
        async move {
            tokio::join!(following, running);
            Ok(())
        }
    });
    handover::copy_at_scrape(&context.metrics, handover.progress.clone(), handover.hot.clone());
    let service = StoreService {
        id: id.clone(),
        node: node.clone(),
        tasks: context.tasks.clone(),
        metrics: Metrics::new(&context.metrics, &node),
        lease,
        reservation,
        started: Instant::now(),
        hot: handover.hot.clone(),
        desk,
        drain: Drain {
            registry: Arc::downgrade(registry),
            member: member.clone(),
            progress: handover.progress.clone(),
        },
        membership: Membership::new(registry.view(), Duration::from_millis(config.warm_ms)),
    };
    let paths = Paths::new(
        id.clone(),
        engine.clone(),
        rpc.clone(),
        registry.view(),
        service.desk.clone(),
        context.tasks.clone(),
    );
    let expiring = expiry::run(node.clone(), context.tasks.clone(), context.shutdown.clone());
    context.tasks.spawn(Kind::Critical, "expiry", async move {
        expiring.await;
        Ok(())
    });
    serve(&config, context, service, paths, rpc.incoming(listening.listener));
    let watching = node.clone().watch_disk(Duration::from_millis(config.disk.retry_ms), context.shutdown.clone());
    context.tasks.spawn(Kind::Background, "disk", async move {
        watching.await;
        Ok(())
    });
    if config.eviction.exchange_ms > 0 {
        let interval = Duration::from_millis(config.eviction.exchange_ms);
        let exchange = Exchange { id: id.clone(), node: node.clone(), rpc, interval };
        let (view, leaving) = (registry.view(), context.shutdown.clone());
        context.tasks.spawn(Kind::Background, "exchange", async move {
            exchange.run(view, leaving).await;
            Ok(())
        });
    }
    let (view, leaving, handing) = (registry.view(), context.shutdown.clone(), handover.clone());
    context.tasks.spawn(Kind::Background, "handover", async move {
        handing.run(view, waiting, leaving).await;
        Ok(())
    });

    registry.register(member.clone()).await.context("registration")?;
    if let Some(path) = &config.port_file {
        kvasir_runtime::write_port_file(path, &ports)
            .with_context(|| format!("port_file: cannot write {}", path.display()))?;
    }
    context.health.set_ready();
    tracing::info!(
        store = %id,
        grpc = member.grpc,
        admin = member.admin,
        capacity_bytes,
        disk_capacity_bytes = node.usage().disk_capacity_bytes,
        disk_blocks = node.usage().disk_blocks,
        "ready"
    );
    Ok(Started { node, member, handover, live: wanted.live() })
}

/// Has the node do what it is set to, as long as somebody may set it.
async fn follow(mut live: Live<Config>, handover: Arc<Handover>) {
    loop {
        let now = live.borrow_and_update().clone();
        handover.node.set_max_pinned_percent(now.max_pinned_percent);
        handover.hot.set(now.replication.hot_lookups_per_s, now.replication.max_copies);
        if live.changed().await.is_err() {
            return;
        }
    }
}

/// The disk, and what it held. A disk that does not work is a warning: the node serves from memory.
async fn open_disk(config: &Config, engine: &TransferEngine) -> anyhow::Result<Option<(DiskTier, Vec<Recovered>)>> {
    let Some(settings) = config.disk.settings(config.slab_bytes)? else { return Ok(None) };
    let (path, engine) = (settings.path.clone(), engine.clone());
    // Ten million records are a gigabyte to read: not on a thread that serves.
    let opened = tokio::task::spawn_blocking(move || {
        let mut found = Vec::new();
        let disk = Disk::open(settings, engine, |block| found.push(block))?;
        let (origins, names) = Origins::open(&path);
        Ok::<_, disk::Error>((DiskTier { disk: Arc::new(disk), origins }, mover::recovered(found, &names)))
    });
    match opened.await.context("opening the disk")? {
        Ok(opened) => Ok(Some(opened)),
        Err(error) if error.is_mistake() => Err(error.into()),
        Err(error) => {
            tracing::warn!(error = kvasir_runtime::chain(&error), "no disk, serving from memory only");
            Ok(None)
        }
    }
}

fn serve(config: &Config, context: &Context, service: StoreService, paths: Paths, incoming: Incoming) {
    let store = StoreServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES);
    let closing = context.shutdown.clone();
    let server = kvasir_rpc::server()
        .concurrency_limit_per_connection(config.limits.max_calls_per_connection)
        .timeout(Duration::from_millis(config.limits.call_timeout_ms))
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .add_service(store)
        .add_service(PathsServer::new(paths))
        .serve_with_incoming_shutdown(incoming, async move { closing.wait().await });
    context.tasks.spawn(Kind::Critical, "grpc", async move { server.await.context("grpc server") });
}

fn member(id: &MemberId, engine: &TransferEngine, store: StoreInfo, grpc: String, admin: String) -> Member {
    let segment = engine.descriptor();
    Member {
        id: id.clone(),
        // The segment's life is the node's: a client that knows one incarnation knows both.
        incarnation: segment.incarnation,
        role: Role::KvStore,
        grpc,
        admin,
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model: None,
        segment: Some(segment),
        store: Some(store),
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
    }
}
