//! From configuration to a worker that serves, and back out again: build, announce, wait, drain.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use kvasir_cluster::{Audit, Member, Registry};
use kvasir_paths::Paths;
use kvasir_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        decode_server::DecodeServer, paths_server::PathsServer, prefill_server::PrefillServer,
        worker_server::WorkerServer,
    },
};
use kvasir_rpc::operator::{Asked, Desk, Operators};
use kvasir_runtime::{Context, Kind, Listening};
use kvasir_settings::{Live, Page, Settings};
use kvasir_transfer::LocalNet;
use kvasir_types::{Deadline, Incarnation, MemberId, PROTOCOL_VERSION, Role};
use tokio::net::TcpListener;

use crate::{
    config::Config, decode::DecodeService, duty::Duties, host::Host, prefill::PrefillService, status::StatusService,
    watch::Hub,
};

/// Runs a worker in `role` with the cluster's metadata in etcd until shutdown.
pub async fn run_with_etcd(role: Role, config: Config, context: Context) -> anyhow::Result<()> {
    let (registry, watching) =
        kvasir_cluster::connect_etcd(config.registry.etcd.clone()).await.context("registry.etcd")?;
    context.tasks.spawn(Kind::Critical, "registry", async move {
        watching.await;
        Ok(())
    });
    run(role, config, context, registry, LocalNet::new()).await
}

/// Runs a worker in `role` until shutdown. `local` is shared by all workers and store nodes of this process.
pub async fn run(
    role: Role,
    config: Config,
    context: Context,
    registry: Arc<dyn Registry>,
    local: LocalNet,
) -> anyhow::Result<()> {
    config.check()?;
    // Whatever may be taken already is claimed before the slow part: a taken port is told at once.
    let listening = Listening::bind("listen", config.listen, config.advertise.as_deref()).await?;
    let page = Page::default();
    let admin = kvasir_runtime::admin::start_with(&config.admin, &context, page.routes()).await?;
    let ports = serde_json::json!({ "grpc": listening.bound, "admin": admin });
    let admin = listening.beside(admin);
    let id = member_id(role, &config)?;
    let settings = Settings::begin(config, role, &id, &registry, &context).await;

    let host = {
        let (context, registry, name) = (context.clone(), registry.clone(), listening.host().to_owned());
        let live = settings.live();
        let build = move || Host::build(id, role, live, &context, &*registry, local, &name);
        Arc::new(tokio::task::spawn_blocking(build).await.context("loading the model panicked")??)
    };
    let incarnation = host.transfer.descriptor().incarnation;
    let hub = Hub::new(&host, context.shutdown.clone());
    let member = member(&host, incarnation, listening.advertised, admin);
    let (operators, keeping) = Operators::open(&host.config.operator)?;
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
        let (id, registry) = (host.id.clone(), Arc::downgrade(&registry));
        Desk::new(operators, move |asked: &Asked<'_>| {
            let Asked { who, what, on, result, many } = *asked;
            if let Some(registry) = registry.upgrade() {
                kvasir_cluster::audit(&*registry, &Audit { member: &id, who, what, on, result, many });
            }
        })
    };
    settings.open(&page, desk.clone());
    context.tasks.spawn(Kind::Background, "settings", {
        let (following, running) = (follow(settings.live(), host.clone()), settings.run());
        async move {
            tokio::join!(following, running);
            Ok(())
        }
    });
    let duties = Arc::new(Duties::new(host.clone(), member.clone(), registry.clone()));
    let server = {
        let closing = context.shutdown.clone();
        let paths = Paths::new(
            host.id.clone(),
            host.transfer.clone(),
            host.rpc.clone(),
            registry.view(),
            desk.clone(),
            context.tasks.clone(),
        );
        let status = StatusService { host: host.clone(), incarnation, hub: hub.clone(), duties, desk };
        serve(host.clone(), status, paths, listening.listener, async move { closing.wait().await })
    };
    let watched = host.clone();
    context.tasks.spawn(Kind::Background, "watch", async move {
        hub.run(&watched).await;
        Ok(())
    });
    context.tasks.spawn(Kind::Critical, "grpc", async move { server.await.context("grpc server") });

    registry.register(member.clone()).await.context("registration")?;
    if let Some(path) = &host.config.port_file {
        kvasir_runtime::write_port_file(path, &ports)
            .with_context(|| format!("port_file: cannot write {}", path.display()))?;
    }
    context.health.set_ready();
    watch_engine(&host, &context);
    tracing::info!(worker = %host.id, role = %role, grpc = member.grpc, admin = member.admin, "ready");

    context.shutdown.wait().await;
    context.health.set_not_ready("draining");
    host.end();
    // Out of the cluster first: routers stop choosing this worker while what it has taken goes on to its end.
    if let Err(error) = registry.deregister(&host.id, role).await {
        tracing::warn!(error = %error, "not deregistered, the lease will end by itself");
    }
    let grace = Deadline::after(Duration::from_millis(host.now().shutdown.grace_ms));
    context.tasks.finish_requests(grace.remaining()).await;
    if let Some(store) = &host.store {
        store.write_back.drain(grace.remaining()).await;
    }
    host.engine.shutdown();
    host.transfer.shutdown();
    Ok(())
}

/// Has the worker do what it is set to, as long as somebody may set it.
async fn follow(mut live: Live<Config>, host: Arc<Host>) {
    loop {
        let now = live.borrow_and_update().clone();
        host.follow(&now);
        if live.changed().await.is_err() {
            return;
        }
    }
}

fn watch_engine(host: &Arc<Host>, context: &Context) {
    let (pulse, engine, health) = (host.pulse.clone(), host.engine.clone(), context.health.clone());
    let limit = Duration::from_millis(host.config.engine.stuck_ms);
    let draining = context.shutdown.clone();
    // What a device that failed held is lost: others go on with the requests sooner if this process ends.
    context.tasks.spawn(Kind::Critical, "engine watch", async move {
        tokio::select! {
            () = pulse.watch(engine, health, limit, || draining.is_triggered()) => {
                anyhow::bail!("the device that the model is computed on failed, see the requests' errors")
            }
            () = draining.wait() => Ok(()),
        }
    });
}

async fn serve(
    host: Arc<Host>,
    status: StatusService,
    paths: Paths,
    listener: TcpListener,
    closing: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let incoming = host.rpc.incoming(listener);
    // Both, whatever it works as: that may change, and callers hear of it later.
    let server = kvasir_rpc::server()
        .add_service(WorkerServer::new(status))
        .add_service(PathsServer::new(paths))
        .add_service(
            DecodeServer::new(DecodeService::new(host.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            PrefillServer::new(PrefillService::new(host))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        );
    server.serve_with_incoming_shutdown(incoming, closing).await
}

fn member_id(role: Role, config: &Config) -> anyhow::Result<MemberId> {
    let id = config.id.clone().unwrap_or_else(|| format!("{role}-{:08x}", kvasir_runtime::random_u64() as u32));
    id.parse().context("id")
}

fn member(host: &Host, incarnation: Incarnation, grpc: String, admin: String) -> Member {
    Member {
        id: host.id.clone(),
        incarnation,
        role: host.role,
        grpc,
        admin,
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model: Some(host.model.clone()),
        segment: Some(host.transfer.descriptor()),
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty { pinned: host.duty.pinned(), ..kvasir_cluster::Duty::default() },
    }
}
