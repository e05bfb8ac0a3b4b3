//! A real etcd of one node, on loopback. It can die and come back.
//!
//! Its data is in memory (`/dev/shm`) where that can be: etcd waits for the disk at every write, and on a machine that compiles or
//! tests other things, a disk may well take seconds. What is tested is how services live with an etcd that is there, that is
//! not, or that comes back with its data; a slow one is made by stopping it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Process, logs, wait};

/// How long one start may take on a busy machine.
const START: Duration = Duration::from_secs(20);

/// The files by which etcd shows who it is, and whose certificates it wants to see.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Whose certificates clients show.
    pub authority: PathBuf,
    /// Its own.
    pub certificate: PathBuf,
    /// The key of that.
    pub key: PathBuf,
}

/// A running (or killed) etcd.
pub struct Etcd {
    process: Process,
    dir: PathBuf,
    /// Below it is its data.
    data: TempDir,
    address: String,
    guard: Option<Guard>,
}

impl Etcd {
    /// Starts etcd with its log below `dir`, on a port that is free.
    pub async fn start(dir: &Path) -> Result<Self> {
        Self::start_at(dir, Ipv4Addr::LOCALHOST.into(), None).await
    }

    /// The same on another address than loopback, and by TLS.
    pub async fn start_at(dir: &Path, address: IpAddr, guard: Option<Guard>) -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let data = TempDir::new_in(memory).or_else(|_| TempDir::new_in(dir)).context("no folder for etcd's data")?;
        let process = spawn(dir, data.path(), &SocketAddr::new(address, 0).to_string(), guard.as_ref())?;
        let mut etcd = Self { process, dir: dir.to_owned(), data, address: String::new(), guard };
        etcd.address = etcd.serving().await?;
        Ok(etcd)
    }

    /// `host:port` for clients.
    pub fn endpoint(&self) -> &str {
        &self.address
    }

    /// Kills it. Its data stays.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same port with the same data.
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill();
        std::fs::remove_file(self.dir.join("etcd.log"))?; // or the old start would look like the new one
        self.process = spawn(&self.dir, self.data.path(), &self.address, self.guard.as_ref())?;
        self.serving().await.map(drop)
    }

    /// Waits until it serves clients; where, it says in its log only.
    async fn serving(&mut self) -> Result<String> {
        let serving = wait::until("etcd serves clients", START, async || {
            if self.process.ended().is_some() {
                return Some(None);
            }
            self.process.log().lines().find_map(client_address).map(Some)
        });
        match serving.await? {
            Some(address) => Ok(address),
            None => bail!("etcd exited while starting:\n{}", logs::tail(&self.process.log(), 5, "  ")),
        }
    }
}

/// `{"msg":"serving client traffic insecurely; …","address":"127.0.0.1:40675"}`
fn client_address(line: &str) -> Option<String> {
    let line: Value = serde_json::from_str(line).ok()?;
    let serves = line["msg"].as_str()?.starts_with("serving client traffic");
    serves.then(|| line["address"].as_str().map(str::to_owned)).flatten()
}

fn spawn(dir: &Path, data: &Path, client: &str, guard: Option<&Guard>) -> Result<Process> {
    let peer = "http://127.0.0.1:0";
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(data.join("etcd"));
    let urls = match guard {
        None => format!("http://{client}"),
        Some(Guard { authority, certificate, key }) => {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(authority);
            command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
            format!("https://{client}")
        }
    };
    command.args(["--listen-client-urls", &urls, "--advertise-client-urls", &urls]);
    command.args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]);
    command.args(["--initial-cluster", &format!("default={peer}"), "--logger", "zap", "--log-level", "info"]);
    Process::spawn("etcd", command, dir).context("is etcd installed? scripts/setup --test")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_comes_back_on_the_same_address() {
        let dir = tempfile::tempdir().unwrap();
        let mut etcd = Etcd::start(dir.path()).await.unwrap();
        let before = etcd.endpoint().to_owned();
        etcd.kill();
        etcd.restart().await.unwrap();
        assert_eq!(etcd.endpoint(), before);
    }
}
