//! Members, processes and waiting: what makes a test a few lines.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_cluster::{Error, EtcdConfig, Member, MemoryHub, ModelInfo, Registry, View};
use kvasir_types::{Incarnation, KvDtype, KvLayout, ModelFingerprint, PROTOCOL_VERSION, Role};
use tokio::task::JoinSet;

/// How long anything here may take on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Waits for a condition.
pub(crate) async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !done().await {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A process of the cluster: its registry, and what it runs beside it. Dropping it is a crash.
pub(crate) struct Process {
    pub(crate) registry: Arc<dyn Registry>,
    running: JoinSet<()>,
}

impl Process {
    pub(crate) async fn with_etcd(config: EtcdConfig) -> Result<Self, Error> {
        let (registry, run) = kvasir_cluster::connect_etcd(config).await?;
        let mut running = JoinSet::new();
        running.spawn(run);
        Ok(Self { registry, running })
    }

    pub(crate) fn in_memory(hub: &MemoryHub) -> Self {
        Self { registry: hub.registry(), running: JoinSet::new() }
    }

    /// What it sees.
    pub(crate) fn view(&self) -> Arc<View> {
        self.registry.view().borrow().clone()
    }

    /// Names of the members it sees, in order.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.view().members.iter().map(|member| member.id.to_string()).collect()
    }

    /// Waits until it sees exactly these members.
    pub(crate) async fn sees(&self, ids: &[&str]) {
        let mut view = self.registry.view();
        let seen = view.wait_for(|view| view.members.iter().map(|member| member.id.as_str()).eq(ids.iter().copied()));
        if tokio::time::timeout(LIMIT, seen).await.is_err() {
            panic!("sees {:?}, not {ids:?}", self.ids());
        }
    }

    /// Whether what it runs is still running.
    pub(crate) fn runs(&mut self) -> bool {
        self.running.try_join_next().is_none()
    }
}

/// A decode worker.
pub(crate) fn member(id: &str, incarnation: u64) -> Member {
    Member {
        id: id.parse().unwrap(),
        incarnation: Incarnation(incarnation),
        role: Role::Decode,
        grpc: "127.0.0.1:1".into(),
        admin: "127.0.0.1:2".into(),
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: "0.1.0".into(),
        model: Some(ModelInfo {
            name: "demo".into(),
            fingerprint: ModelFingerprint([1; 16]),
            layout: KvLayout { block_size: 16, layers: 2, kv_heads: 1, k_dim: 8, v_dim: 8, dtype: KvDtype::Bf16 },
            max_model_len: 512,
            tokenizer: String::new(),
        }),
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
    }
}
