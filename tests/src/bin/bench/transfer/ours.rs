//! Our side, and the limits: `kvasir-transfer-bench` as target, initiator, socket loop and memcpy.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

use super::plan::{Figure, Load, WORKING_SET, Way};
use crate::child::Child;

/// Targets and a socket server that stay up all along; they sleep while nobody asks.
pub struct Ours<'a> {
    dir: &'a Path,
    target: Target,
    /// `auto` starts ucx only where there is something for it to do, so it has a target that was told to; or why not.
    ucx: Result<Target>,
    _server: Child,
    server: String,
}

/// One target, and where it is asked.
struct Target {
    _child: Child,
    control: String,
}

impl Target {
    fn start(transport: &str, dir: &Path) -> Result<Self> {
        let buffer = WORKING_SET.to_string();
        let arguments = ["target", "--until-eof", "--transport", transport, "--ucx-devices", "lo", "--buffer", &buffer];
        let mut child = Child::start(&format!("kvasir-target-{transport}"), command(&arguments)?, dir)?;
        let control = text(&child.json()?["control"])?;
        Ok(Self { _child: child, control })
    }
}

impl<'a> Ours<'a> {
    /// Starts them.
    pub fn start(dir: &'a Path) -> Result<Self> {
        let (target, ucx) = (Target::start("auto", dir)?, Target::start("ucx", dir));
        let mut server = Child::start("socket-server", command(&["socket", "server", "--until-eof"])?, dir)?;
        let listen = text(&server.json()?["listen"])?;
        Ok(Self { dir, target, ucx, _server: server, server: listen })
    }

    /// Moves a load through one of our transports.
    pub fn transfer(&self, transport: &str, load: &Load, seconds: f64) -> Result<(String, Figure)> {
        let found = self.run(&self.initiator(transport, load, seconds)?)?;
        let [found] = found.as_slice() else { anyhow::bail!("one measurement was asked for") };
        Ok((text(&found["over"])?, figure(found)?))
    }

    /// Moves the whole working set both ways and checks every byte.
    pub fn verify(&self, transport: &str) -> Result<()> {
        let load = Load { op: Way::Read, block: 64 << 10, batch: 64 };
        let mut arguments = self.initiator(transport, &load, 0.01)?;
        arguments.extend(["--op", "write", "--verify"].map(str::to_owned));
        for found in self.run(&arguments)? {
            ensure!(found["verified_bytes"] == WORKING_SET, "verified other bytes than asked for: {found}");
        }
        Ok(())
    }

    fn initiator(&self, transport: &str, load: &Load, seconds: f64) -> Result<Vec<String>> {
        let target = match transport {
            "ucx" => self.ucx.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?,
            _ => &self.target,
        };
        let mut arguments = vec!["initiator".to_owned(), target.control.clone()];
        arguments.extend(["--ucx-devices", "lo", "--transport", transport, "--op", load.op.name()].map(str::to_owned));
        arguments.extend(["--batch".to_owned(), load.batch.to_string()]);
        arguments.extend(sizes(load.block, seconds));
        Ok(arguments)
    }

    /// A plain loop over one connection.
    pub fn socket(&self, load: &Load, seconds: f64) -> Result<Figure> {
        let mut arguments = ["socket", "client", &self.server, "--op", load.op.name()].map(str::to_owned).to_vec();
        arguments.extend(sizes(load.block, seconds));
        let found = self.run(&arguments)?;
        figure(found.first().context("one measurement was asked for")?)
    }

    /// A memcpy, and the local transport.
    pub fn local(&self, load: &Load, seconds: f64) -> Result<[Figure; 2]> {
        let mut arguments = vec!["local".to_owned(), "--batch".to_owned(), load.batch.to_string()];
        arguments.extend(sizes(load.block, 2.0 * seconds));
        let found = self.run(&arguments)?;
        let [memcpy, local] = found.as_slice() else { anyhow::bail!("two measurements were asked for") };
        Ok([figure(memcpy)?, figure(local)?])
    }

    fn run(&self, arguments: &[String]) -> Result<Vec<Value>> {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let (said, _) = Child::start("kvasir-initiator", command(&arguments)?, self.dir)?.finish()?;
        Ok(said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    }
}

fn sizes(block: u64, seconds: f64) -> [String; 7] {
    let (block, working_set, seconds) = (block.to_string(), WORKING_SET.to_string(), seconds.to_string());
    let [a, b, c] = ["--block", "--working-set", "--duration"].map(str::to_owned);
    [a, block, b, working_set, c, seconds, "--json".to_owned()]
}

fn command(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(workspace::binary("kvasir-transfer-bench")?);
    command.args(arguments);
    Ok(command)
}

fn text(value: &Value) -> Result<String> {
    value.as_str().map(str::to_owned).with_context(|| format!("{value} is no text"))
}

fn figure(found: &Value) -> Result<Figure> {
    let number = |value: &Value| value.as_f64().with_context(|| format!("a figure is missing in {found}"));
    let far = found["far_cpu_s_per_gib"].as_f64().unwrap_or_default();
    Ok(Figure {
        gb_per_s: number(&found["gb_per_s"])?,
        latency_us: number(&found["latency_us"]["p50"])?,
        cpu_s_per_gib: number(&found["cpu_s_per_gib"])? + far,
    })
}
