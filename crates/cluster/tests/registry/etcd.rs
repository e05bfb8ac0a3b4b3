//! A real etcd for one test: on free ports of the loopback, its data in a directory of its own, ended with the test.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use kvasir_cluster::EtcdConfig;
use rustix::process::{Pid, Signal, kill_process};

use crate::given::until;

/// A running (or stopped) etcd.
pub(crate) struct Etcd {
    dir: tempfile::TempDir,
    client: u16,
    peer: u16,
    child: Option<Child>,
    /// More arguments, and how clients speak to it.
    more: Vec<String>,
    scheme: &'static str,
    /// Where else it listens, in the clear.
    also: Option<String>,
}

impl Etcd {
    /// Starts one and waits until it answers.
    pub(crate) async fn start() -> Self {
        Self::start_with("http", None, Vec::new()).await
    }

    /// The same with more arguments, and clients that speak to it by `https`, say.
    pub(crate) async fn start_with(scheme: &'static str, also: Option<String>, more: Vec<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut etcd = Self { dir, client: 0, peer: 0, child: None, more, scheme, also };
        // Another process may take a port between choosing it and listening on it.
        for _ in 0..5 {
            (etcd.client, etcd.peer) = (free_port(), free_port());
            if etcd.restart().await {
                return etcd;
            }
        }
        panic!("no etcd after five tries (is etcd installed?)");
    }

    /// Starts it again on the same ports; whether it answers.
    pub(crate) async fn restart(&mut self) -> bool {
        self.kill();
        let url = |scheme: &str, port| format!("{scheme}://127.0.0.1:{port}");
        let also = self.also.as_ref().map(|clear| format!(",http://{clear}")).unwrap_or_default();
        let (client, peer) = (url(self.scheme, self.client), url("http", self.peer));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.dir.path().join("data"))
            .args(["--listen-client-urls", &(client.clone() + &also), "--advertise-client-urls", &client])
            .args(&self.more)
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error", "--logger", "zap"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let mut alive = true;
        let config = self.config();
        let guarded = self.scheme == "https";
        until("etcd answers", async || {
            alive = self.child.as_mut().unwrap().try_wait().unwrap().is_none();
            let listens = || std::net::TcpStream::connect(("127.0.0.1", self.client)).is_ok();
            !alive || if guarded { listens() } else { kvasir_cluster::connect_etcd(config.clone()).await.is_ok() }
        })
        .await;
        alive
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Forgets everything it held; only while it does not run.
    pub(crate) fn wipe(&self) {
        assert!(self.child.is_none());
        std::fs::remove_dir_all(self.dir.path().join("data")).unwrap();
    }

    /// Stops it in mid-breath, or lets it go on.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), signal).unwrap();
    }

    /// Settings with a short lease.
    pub(crate) fn config(&self) -> EtcdConfig {
        EtcdConfig {
            endpoints: vec![format!("127.0.0.1:{}", self.client)],
            lease_ttl_s: 2,
            connect_timeout_ms: 2_000,
            request_timeout_ms: 1_000,
            ..EtcdConfig::default()
        }
    }

    /// A client that bypasses us.
    pub(crate) async fn raw(&self) -> etcd_client::Client {
        etcd_client::Client::connect(self.config().endpoints, None).await.unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
