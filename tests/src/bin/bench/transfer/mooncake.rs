//! Mooncake's transfer engine over TCP, by its own C++ benchmark.
//!
//! That program submits one batch at a time, polls for its end, and tells how many it did. It moves the same batch again
//! and again, and never writes to its own buffers, so a write may read the kernel's page of zeros: what it gains by that
//! is its own. It counts whole seconds. That the bytes were really moved is checked by the loopback device's count of them.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::plan::{Figure, Load, WORKING_SET};
use crate::{
    child::Child,
    rivals::{self, free_port, until},
};

/// A metadata server and a target.
pub struct Mooncake {
    dir: PathBuf,
    bench: PathBuf,
    metadata: u16,
    names: [String; 2],
    server: Child,
    target: Child,
}

impl Mooncake {
    /// Installs it if need be and starts both.
    pub fn start(dir: &Path) -> Result<Self> {
        let python = rivals::python("mooncake", false)?;
        let bench = rivals::packages(&python)?.join("mooncake/transfer_engine_bench");
        let [metadata, far, near] = [free_port()?, free_port()?, free_port()?];
        let names = [far, near].map(|port| format!("127.0.0.1:{port}"));
        let mut server = Command::new(python);
        server.args(["-m", "mooncake.http_metadata_server", "--host", "127.0.0.1"]);
        server.args(["--port", &metadata.to_string()]);
        let server = Child::start("mooncake-metadata", server, dir)?;
        until("Mooncake's metadata server listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, metadata)).ok())?;
        let mut command = program(&bench, metadata, &names[0]);
        command.arg("--mode=target");
        let target = Child::start("mooncake-target", command, dir)?;
        until("Mooncake's target is registered", || registered(metadata, &names[0]))?;
        let mooncake = Self { dir: dir.to_owned(), bench, metadata, names, server, target };
        mooncake.pause();
        Ok(mooncake)
    }

    /// Moves a load for a second.
    pub fn transfer(&self, load: &Load) -> Result<Figure> {
        self.server.resume();
        self.target.resume();
        let figure = self.measure(load);
        self.pause();
        figure
    }

    fn pause(&self) {
        self.server.pause();
        self.target.pause();
    }

    fn measure(&self, load: &Load) -> Result<Figure> {
        let mut command = program(&self.bench, self.metadata, &self.names[1]);
        command.args(["--mode=initiator", "--threads=1", "--duration=1"]);
        command.arg(format!("--segment_id={}", self.names[0])).arg(format!("--operation={}", load.op.name()));
        command.arg(format!("--block_size={}", load.block)).arg(format!("--batch_size={}", load.batch));
        let (far_before, device_before) = (self.target.cpu_seconds(), loopback_bytes()?);
        let initiator = Child::start("mooncake-initiator", command, &self.dir)?;
        let log = self.dir.join("mooncake-initiator.log");
        let (_, near_cpu) = initiator.finish()?;
        let (far_cpu, device_bytes) = (self.target.cpu_seconds() - far_before, loopback_bytes()? - device_before);
        let said = std::fs::read_to_string(log)?;
        let (seconds, batches) = outcome(&said).with_context(|| format!("Mooncake's benchmark said: {said}"))?;
        let bytes = batches * (load.block * load.batch) as f64;
        ensure!(batches > 0.0, "Mooncake moved nothing in a second");
        ensure!(device_bytes as f64 >= bytes, "Mooncake claims {bytes} bytes, {device_bytes} went over loopback");
        Ok(Figure {
            gb_per_s: bytes / seconds / 1e9,
            latency_us: seconds / batches * 1e6,
            cpu_s_per_gib: (near_cpu + far_cpu) * f64::from(1 << 30) / bytes,
        })
    }
}

fn program(bench: &Path, metadata: u16, name: &str) -> Command {
    let mut command = Command::new(bench);
    command.env("MC_TCP_BIND_ADDRESS", "127.0.0.1").arg("--protocol=tcp");
    command.arg(format!("--metadata_server=http://127.0.0.1:{metadata}/metadata"));
    command.arg(format!("--local_server_name={name}")).arg(format!("--buffer_size={WORKING_SET}"));
    command
}

/// `… Test completed: duration 1.02, batch count 26, throughput …`
fn outcome(log: &str) -> Option<(f64, f64)> {
    let rest = log.split("Test completed: duration ").nth(1)?;
    let (seconds, rest) = rest.split_once(", batch count ")?;
    let (batches, _) = rest.split_once(',')?;
    Some((seconds.parse().ok()?, batches.parse().ok()?))
}

/// Whether the target's memory is known at the metadata server.
fn registered(metadata: u16, name: &str) -> Option<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, metadata)).ok()?;
    let key = format!("mooncake/ram/{name}").replace('/', "%2F").replace(':', "%3A");
    write!(stream, "GET /metadata?key={key} HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("\"addr\"").then_some(())
}

/// Bytes that the loopback device has carried.
fn loopback_bytes() -> Result<u64> {
    let devices = std::fs::read_to_string("/proc/net/dev")?;
    let lo = devices.lines().find_map(|line| line.trim().strip_prefix("lo:")).context("there is a loopback device")?;
    Ok(lo.split_whitespace().next().context("its first figure is bytes received")?.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_benchmark_says_is_understood() {
        let log = "I1121 x.cpp:1] Worker 0 stopped!\nI1121 x.cpp:569] Test completed: duration 1.02, batch count 26, \
                   throughput 1.7140 GB/s\n";
        assert_eq!(outcome(log), Some((1.02, 26.0)));
        assert_eq!(outcome("E1121 x.cpp:1] no such segment\n"), None);
    }
}
