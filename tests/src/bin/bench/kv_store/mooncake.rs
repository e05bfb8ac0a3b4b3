//! Mooncake Store over TCP: its master, a client that lends its memory, and a client that puts and gets.
//!
//! Both clients are Python processes, as its users have them; what they call is its C++ library. Nothing of it is paused
//! while others are measured: a master that has not heard of its clients for a while takes them for dead.

use std::{
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use kvasir_tests::workspace;
use serde_json::json;

use crate::{
    child::Child,
    rivals::{self, free_port, until},
};

/// A key that was read can't be removed for so long: its default is five seconds.
const LEASE: Duration = Duration::from_millis(500);

/// A master and two clients.
pub struct Mooncake {
    pub client: Child,
    _owner: Child,
    _master: Child,
}

impl Mooncake {
    /// Installs it if need be and starts all three, with room for half as much again as `arena`.
    pub fn start(arena: u64, dir: &Path) -> Result<Self> {
        let python = rivals::python("mooncake", false)?;
        let [rpc, metrics, owner, client] = [free_port()?, free_port()?, free_port()?, free_port()?];
        let mut command = Command::new(python.with_file_name("mooncake_master"));
        command.args(["--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1", "--rpc_thread_num=2", "-logtostderr"]);
        command.arg(format!("--rpc_port={rpc}")).arg(format!("--metrics_port={metrics}"));
        command.arg(format!("--default_kv_lease_ttl={}ms", LEASE.as_millis()));
        let master = Child::start("mooncake-master", command, dir)?;
        until("Mooncake's master listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, rpc)).ok())?;
        let start = |name: &str, port: u16, lent: u64, buffer: u64| {
            let mut command = Command::new(&python);
            command.env("MC_TCP_BIND_ADDRESS", "127.0.0.1");
            command.arg(workspace::root().join("tests/python/mooncake_store.py"));
            command.args([
                format!("127.0.0.1:{port}"),
                format!("127.0.0.1:{rpc}"),
                lent.to_string(),
                buffer.to_string(),
            ]);
            let mut child = Child::start(name, command, dir)?;
            child.ask(&json!({"do": "hello"})).context("a client of Mooncake Store")?;
            anyhow::Ok(child)
        };
        let owner = start("mooncake-owner", owner, arena * 3 / 2, 0)?;
        let client = start("mooncake-client", client, 0, arena)?;
        Ok(Self { client, _owner: owner, _master: master })
    }

    /// Takes all values out, so that others have room.
    pub fn clear(&mut self) -> Result<()> {
        std::thread::sleep(LEASE + LEASE / 5);
        self.client.ask(&json!({"do": "clear"})).map(drop)
    }
}
