//! Making an engine: its settings, its name, its first memory, and the transports it can have.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kvasir_types::{Incarnation, SegmentId, TransportKind, Transports};

use crate::{
    choice::Slot,
    config::Config,
    copier::Copier,
    counters::Counters,
    engine::{Running, TransferEngine},
    error::Error,
    gate::Gate,
    grant::GrantTable,
    local::{LocalNet, LocalTransport},
    memory::{Allocation, Memory},
    notice::Notices,
    owner::{Owner, random_u64},
    peers::Peers,
    segment::Directory,
    shm::ShmTransport,
    space::Space,
    tcp::TcpTransport,
    threads::Threads,
    timer::Timer,
    topology::Topology,
    transport::Transport,
    ucx::UcxTransport,
};

/// Settings of an engine to be made; begin with [`TransferEngine::builder`].
#[must_use = "a builder does nothing until `build`"]
#[derive(Default)]
pub struct Builder {
    name: String,
    config: Config,
    local: LocalNet,
    arena: Option<Allocation>,
    directory: Option<Arc<dyn Directory>>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("name", &self.name).field("arena", &self.arena).finish()
    }
}

impl Builder {
    /// The segment's name: the process's, usually. Peers' logs and metrics show it. Default none.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Its settings. Default [`Config::default`].
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// The engines of this process that can be reached by memcpy. Default a net of its own.
    pub fn local_net(mut self, net: LocalNet) -> Self {
        self.local = net;
        self
    }

    /// Where segments are found by name. Default nowhere.
    pub fn directory(mut self, directory: Arc<dyn Directory>) -> Self {
        self.directory = Some(directory);
        self
    }

    /// Memory to begin with, registered at offset 0: see [`TransferEngine::memory`]. Default none.
    pub fn arena(mut self, arena: Allocation) -> Self {
        self.arena = Some(arena);
        self
    }

    /// Takes memory, listens, and starts its threads.
    ///
    /// # Errors
    /// A setting out of range, a transport asked for by name that can't be had here, no memory, no port or no thread.
    pub fn build(self) -> Result<TransferEngine, Error> {
        let Self { name, mut config, local, arena, directory } = self;
        config.check()?;
        let topology = match &config.topology {
            Some(path) => Topology::from_file(path)?,
            None => Topology::detect(),
        };
        if config.ucx.net_devices.is_none() {
            config.ucx.net_devices = topology.ucx_devices(arena.and_then(|arena| arena.numa_node));
        }
        let (timer, threads, counters) = (Timer::default(), Arc::new(Threads::default()), Arc::<Counters>::default());
        let owner = Arc::new(Owner {
            name,
            segment: SegmentId(random_u64()),
            incarnation: Incarnation(random_u64()),
            space: Space::default(),
            grants: GrantTable::new(timer.clone(), config.fence_grace, Arc::clone(&counters)),
            notices: Notices::default(),
            counters,
        });
        if let Some(arena) = arena {
            owner.space.add(Memory::Allocate(arena).realize()?)?;
        }
        // Made first, so that what has been started is stopped by its drop if the next thing can't be had.
        let gate = Gate::new(config.max_inflight_bytes as u64);
        let stopped = AtomicBool::new(false);
        let copier = Copier::start(&threads, config.copy_threads)?;
        let rdma = topology.has_rdma();
        let kinds = match config.transports.clone() {
            Transports::Auto => TransportKind::ALL.to_vec(),
            Transports::Named(kinds) => kinds,
        };
        let transports = kinds.into_iter().map(Slot::new).collect();
        let peers = Peers::default();
        let running =
            Running { config, owner, transports, peers, local, rdma, directory, gate, copier, timer, threads, stopped };
        let timer = running.timer.clone();
        running.threads.spawn("transfer-timer", move || timer.run())?;
        for slot in &running.transports {
            match running.config.transports {
                // Without RDMA it is wanted only for memory that can't be mapped: when the first comes along.
                Transports::Auto if slot.kind == TransportKind::Ucx && !rdma => {}
                Transports::Auto => match running.start(slot.kind) {
                    Ok(transport) => _ = slot.state.set(Ok(transport)), // nobody else has the slots yet
                    Err(Error::TransportUnavailable { kind, reason }) => {
                        tracing::info!(%kind, reason, "transport left out");
                        let _ = slot.state.set(Err(reason));
                    }
                    Err(error) => return Err(error),
                },
                Transports::Named(_) => _ = slot.state.set(Ok(running.start(slot.kind)?)),
            }
        }
        Ok(TransferEngine::from_running(running))
    }
}

impl Running {
    /// The transport of a slot, started if it was not yet.
    pub(crate) fn started(&self, slot: &Slot) -> Result<Arc<dyn Transport>, String> {
        let start = || match self.start(slot.kind) {
            Err(Error::TransportUnavailable { reason, .. }) => Err(reason),
            other => other.map_err(|error| error.to_string()),
        };
        slot.state.get_or_init(start).clone()
    }

    fn start(&self, kind: TransportKind) -> Result<Arc<dyn Transport>, Error> {
        let Self { config, owner, threads, local, copier, .. } = self;
        Ok(match kind {
            TransportKind::Local => Arc::new(LocalTransport::new(local.clone(), owner, copier.clone())),
            TransportKind::Shm => Arc::new(ShmTransport::new(config, owner, copier.clone(), threads)?),
            TransportKind::Tcp => Arc::new(TcpTransport::new(config, owner, threads)?),
            TransportKind::Ucx => Arc::new(UcxTransport::new(config, owner, threads)?),
        })
    }

    pub(crate) fn shutdown(&self) {
        if self.stopped.swap(true, Ordering::SeqCst) {
            return;
        }
        self.gate.close();
        self.owner.notices.close();
        self.owner.grants.close_all();
        self.transports.iter().filter_map(Slot::started).for_each(|transport| transport.shutdown());
        self.copier.stop();
        self.timer.stop();
        self.threads.join_all();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown();
    }
}
