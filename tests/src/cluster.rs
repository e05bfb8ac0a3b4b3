//! A whole cluster of separate processes, and the laws it is held to.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Error, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    Client, Etcd, Node, Service,
    etcd::Guard,
    logs,
    net::Place,
    settings::set,
    wait::{self, SOON},
    workspace,
};

/// How long a service may take from SIGTERM to its end; its own grace is far shorter.
const LEAVE: Duration = Duration::from_secs(20);

/// What to start.
#[derive(Clone)]
pub struct Builder {
    counts: [(Service, usize); 4],
    model: PathBuf,
    name: String,
    settings: Vec<(Service, String, Value)>,
    places: HashMap<String, Place>,
    etcd: IpAddr,
    guard: Option<Guard>,
}

impl Builder {
    /// So many prefill workers. Default 1.
    #[must_use]
    pub fn prefill(self, count: usize) -> Self {
        self.count(Service::Prefill, count)
    }

    /// So many decode workers. Default 1.
    #[must_use]
    pub fn decode(self, count: usize) -> Self {
        self.count(Service::Decode, count)
    }

    /// So many KV store nodes. Default 1.
    #[must_use]
    pub fn kv_store(self, count: usize) -> Self {
        self.count(Service::KvStore, count)
    }

    /// So many routers. Default 1.
    #[must_use]
    pub fn routers(self, count: usize) -> Self {
        self.count(Service::Router, count)
    }

    /// The folder of the model served, instead of the demo model; its name is the model's name.
    #[must_use]
    pub fn model(mut self, path: impl Into<PathBuf>) -> Self {
        self.model = path.into();
        self.name = self.model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self
    }

    /// A setting of every prefill and decode worker, by its dotted name.
    #[must_use]
    pub fn worker(self, path: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        self.set(Service::Prefill, path, value.clone()).set(Service::Decode, path, value)
    }

    /// A setting of every process of one kind, by its dotted name. In a text, `{id}` stands for the process's own.
    #[must_use]
    pub fn set(mut self, service: Service, path: &str, value: impl Into<Value>) -> Self {
        self.settings.push((service, path.to_owned(), value.into()));
        self
    }

    /// Where the `index`th process of a kind is to run.
    #[must_use]
    pub fn place(mut self, service: Service, index: usize, place: Place) -> Self {
        self.places.insert(service.id(index), place);
        self
    }

    /// The address that etcd listens on. Default: loopback.
    #[must_use]
    pub fn etcd(mut self, address: IpAddr) -> Self {
        self.etcd = address;
        self
    }

    /// Etcd is called by TLS, shows this and wants to see a certificate.
    #[must_use]
    pub fn guarded_etcd(mut self, guard: Guard) -> Self {
        self.guard = Some(guard);
        self
    }

    /// Starts everything and waits until it is ready, does `body`, checks the laws, stops everything. If any of that
    /// fails, the end of every log is shown.
    pub async fn run(self, body: impl AsyncFnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
        let mut cluster = self.start().await?;
        cluster.quiet = false;
        let result = match body(&mut cluster).await {
            Ok(()) => cluster.check_laws().await,
            failed => failed,
        };
        cluster.quiet = result.is_ok();
        result
    }

    /// Starts everything and waits until it is ready; without the laws, and without a word at the end. For benchmarks.
    pub async fn start(self) -> Result<Cluster> {
        let dir = tempfile::Builder::new().prefix("kvasir-").tempdir()?;
        let etcd = Etcd::start_at(dir.path(), self.etcd, self.guard.clone()).await?;
        let mut cluster =
            Cluster { nodes: Vec::new(), etcd, expected: Vec::new(), quiet: false, builder: self, _dir: dir };
        // From the back to the front, each kind ready before the next starts: who starts later has seen all before it.
        for (service, count) in cluster.builder.counts {
            let first = cluster.nodes.len();
            for index in 0..count {
                let node = cluster.spawn(service, index)?;
                cluster.nodes.push(node);
            }
            for node in &mut cluster.nodes[first..] {
                node.ready().await?;
            }
        }
        cluster.quiet = true;
        Ok(cluster)
    }

    fn count(mut self, service: Service, count: usize) -> Self {
        for entry in self.counts.iter_mut().filter(|entry| entry.0 == service) {
            entry.1 = count;
        }
        self
    }

    fn place_of(&self, id: &str) -> Place {
        self.places.get(id).cloned().unwrap_or_default()
    }

    /// The configuration of one process: what all have, what its kind has, what the test set.
    fn config(&self, service: Service, id: &str, etcd: &str) -> Value {
        let listen = SocketAddr::new(self.place_of(id).address, 0).to_string();
        let mut config = json!({
            "id": id,
            "listen": listen,
            "admin": {"listen": listen},
            "log": {"format": "json"},
            "registry": {"etcd": {"endpoints": [etcd]}},
        });
        match service {
            Service::Prefill | Service::Decode => {
                set(&mut config, "model.path", self.model.to_string_lossy());
                set(&mut config, "model.name", self.name.as_str());
                set(&mut config, "engine.threads", 1);
                set(&mut config, "kv.memory_bytes", 67108864);
                // Tests share a few cores: who answers late need not be away.
                set(&mut config, "store.lookup_timeout_ms", 2000);
            }
            Service::Router => {
                let path = self.model.to_string_lossy();
                set(&mut config, "models", json!([{"name": self.name, "path": path}]));
            }
            Service::KvStore => {}
        }
        if service != Service::Router {
            set(&mut config, "transfer.listen", listen);
        }
        for (_, path, value) in self.settings.iter().filter(|setting| setting.0 == service) {
            let value = match value {
                Value::String(text) => Value::String(text.replace("{id}", id)),
                other => other.clone(),
            };
            set(&mut config, path, value);
        }
        config
    }
}

/// A running cluster. Dropping it kills all its processes.
pub struct Cluster {
    nodes: Vec<Node>, // before the directory: processes die before their files go
    etcd: Etcd,
    expected: Vec<String>,
    quiet: bool,
    builder: Builder,
    _dir: tempfile::TempDir,
}

impl Cluster {
    /// One of everything, with the demo model.
    pub fn builder() -> Builder {
        let counts = [(Service::KvStore, 1), (Service::Prefill, 1), (Service::Decode, 1), (Service::Router, 1)];
        Builder {
            counts,
            model: PathBuf::new(),
            name: String::new(),
            settings: Vec::new(),
            places: HashMap::new(),
            etcd: Ipv4Addr::LOCALHOST.into(),
            guard: None,
        }
        .model(workspace::demo_model())
    }

    /// A client of the first router.
    pub fn client(&self) -> Client {
        Client::new(self.node(Service::Router, 0).http())
    }

    /// The name under which the model is served.
    pub fn model(&self) -> &str {
        &self.builder.name
    }

    /// `host:port` of the cluster's etcd.
    pub fn etcd_endpoint(&self) -> &str {
        self.etcd.endpoint()
    }

    /// The cluster's etcd.
    pub fn etcd(&mut self) -> &mut Etcd {
        &mut self.etcd
    }

    /// All processes, in the order in which they were started.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The `index`th process of a kind.
    pub fn node(&self, service: Service, index: usize) -> &Node {
        let id = service.id(index);
        self.nodes.iter().find(|node| node.id() == id).unwrap_or_else(|| panic!("there is no {id}"))
    }

    /// The same, to be signalled.
    pub fn node_mut(&mut self, service: Service, index: usize) -> &mut Node {
        let id = service.id(index);
        self.nodes.iter_mut().find(|node| node.id() == id).unwrap_or_else(|| panic!("there is no {id}"))
    }

    /// Allows log lines of level WARN and above that contain `text`. Name the message, not more.
    pub fn expect_warning(&mut self, text: &str) {
        self.expected.push(text.to_owned());
    }

    /// Starts a process that has ended again, with the same configuration, and waits until it is ready.
    pub async fn restart(&mut self, service: Service, index: usize) -> Result<()> {
        let mut node = self.spawn(service, index)?;
        node.ready().await?;
        *self.node_mut(service, index) = node;
        Ok(())
    }

    /// Starts one more process of a kind, and waits until it is ready: its index.
    pub async fn join(&mut self, service: Service) -> Result<usize> {
        let index = self.nodes.iter().filter(|node| node.service == service).count();
        let mut node = self.spawn(service, index)?;
        node.ready().await?;
        self.nodes.push(node);
        Ok(index)
    }

    /// Reads the certificates that processes are asked with again.
    pub fn renew(&mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::renew)
    }

    /// Waits until no worker that lives has a request, then checks that free + cached blocks are all its blocks, and that
    /// no store node has a block pinned or reserved.
    pub async fn assert_no_leak(&self) -> Result<()> {
        for node in self.nodes.iter().filter(|node| !node.process.is_reaped()) {
            let what = format!("{} holds nothing", node.id());
            let mut last = String::from("no answer");
            let idle = wait::until(&what, SOON, async || {
                match held(node).await {
                    Ok(None) => return Some(()),
                    Ok(Some(holds)) => last = holds,
                    Err(error) => last = format!("{error:#}"),
                }
                None
            });
            let idle = idle.await;
            idle.map_err(|error| Error::msg(format!("{error}: {last}")))?;
        }
        Ok(())
    }

    fn spawn(&self, service: Service, index: usize) -> Result<Node> {
        let id = service.id(index);
        let config = self.builder.config(service, &id, self.etcd.endpoint());
        Node::spawn(service, &id, config, self._dir.path(), &self.builder.place_of(&id).enter)
    }

    async fn check_laws(&mut self) -> Result<()> {
        self.assert_no_leak().await?;
        // Leaving is announced from the front to the back: a router must not see its workers vanish.
        for service in [Service::Router, Service::Decode, Service::Prefill, Service::KvStore] {
            self.leave(service).await?;
        }
        self.check_logs()
    }

    async fn leave(&mut self, service: Service) -> Result<()> {
        let mut leaving: Vec<_> =
            self.nodes.iter_mut().filter(|node| node.service == service && !node.process.is_reaped()).collect();
        for node in &mut leaving {
            node.process.terminate();
        }
        for node in leaving {
            let status = node.process.wait(LEAVE).await?;
            ensure!(status.success(), "{} ended with {status} after SIGTERM", node.process.name());
        }
        Ok(())
    }

    fn check_logs(&self) -> Result<()> {
        for node in &self.nodes {
            let log = node.process.log();
            let unannounced = |line: &&&str| !self.expected.iter().any(|text| line.contains(text.as_str()));
            let complaints = logs::complaints(&log);
            if let Some(line) = complaints.iter().find(unannounced) {
                bail!("{} complained, and the test did not announce it:\n  {line}", node.process.name());
            }
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.quiet {
            for node in &self.nodes {
                let log = node.process.log();
                eprintln!("--- the end of {}.log", node.process.name());
                eprint!("{}", logs::tail(&log, 30, "    "));
            }
        }
    }
}

/// What keeps a node from being idle; `None` if nothing does.
async fn held(node: &Node) -> Result<Option<String>> {
    match node.service {
        Service::Router => Ok(None),
        Service::KvStore => {
            let status = node.store_status().await?;
            let clean = status.pinned == 0 && status.reserved == 0;
            Ok((!clean).then(|| format!("{} pinned, {} reserved", status.pinned, status.reserved)))
        }
        Service::Prefill | Service::Decode => {
            let status = node.status().await?;
            let blocks = status.blocks.context("a worker's status has block counts")?;
            ensure!(blocks.total > 0, "{} has no blocks at all", node.id());
            let idle = status.running == 0 && status.waiting == 0;
            let clean = blocks.in_use == 0 && blocks.free + blocks.cached == blocks.total;
            Ok((!(idle && clean))
                .then(|| format!("{blocks:?}, {} running, {} waiting", status.running, status.waiting)))
        }
    }
}
