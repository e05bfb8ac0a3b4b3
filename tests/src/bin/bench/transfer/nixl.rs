//! NIXL over UCX, by two Python agents that prepare everything before the clock runs (`tests/python/nixl_agent.py`).
//!
//! The initiator has no progress thread, which makes it two to three times as fast on two cores: the one who waits polls.
//! The target has one: without it NIXL does not even connect. It polls all the time, so both sleep when others are measured.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::{Value, json};

use super::plan::{Figure, Load, WORKING_SET, Way};
use crate::{child::Child, rivals};

/// How long it moves before the clock runs: its memory has been touched, its connections are made.
const WARM_UP_SECONDS: f64 = 0.2;

/// Two agents that know each other.
pub struct Nixl {
    far: Child,
    near: Child,
}

impl Nixl {
    /// Installs it if need be, starts both agents with these of UCX's transports open, and checks once that the bytes asked
    /// for are moved.
    pub fn start(name: &str, ucx_tls: &str, dir: &Path) -> Result<Self> {
        let python = rivals::python("nixl", true)?;
        let script = workspace::root().join("tests/python/nixl_agent.py");
        let agent = |side: &str, progress: &str| {
            let name = format!("{name}-{side}");
            let mut command = Command::new(&python);
            command.arg(&script).args([&name, &WORKING_SET.to_string(), progress]);
            command.env("UCX_TLS", ucx_tls).env("UCX_NET_DEVICES", "lo").env("NIXL_LOG_LEVEL", "WARN");
            Child::start(&name, command, dir)
        };
        let mut nixl = Self { far: agent("target", "progress")?, near: agent("initiator", "none")? };
        let mut far = nixl.far.ask(&json!({"do": "hello"}))?;
        let mut near = nixl.near.ask(&json!({"do": "hello"}))?;
        far["do"] = "connect".into();
        near["do"] = "connect".into();
        nixl.far.ask(&near)?;
        nixl.near.ask(&far)?;
        for op in [Way::Read, Way::Write] {
            nixl.verify(op)?;
        }
        nixl.pause();
        Ok(nixl)
    }

    fn verify(&mut self, op: Way) -> Result<()> {
        let (from, into) = match op {
            Way::Read => (&mut self.far, &mut self.near),
            Way::Write => (&mut self.near, &mut self.far),
        };
        from.ask(&json!({"do": "fill", "seed": 1}))?;
        into.ask(&json!({"do": "fill", "seed": 2}))?;
        let load = Load { op, block: 64 << 10, batch: 64 };
        // All of it, however long that takes.
        self.near.ask(&prepare(&load, 60.0))?;
        let into = if op == Way::Read { &mut self.near } else { &mut self.far };
        let check = json!({"do": "check", "seed": 1, "op": op.name(), "block": load.block});
        ensure!(into.ask(&check)?["right"] == true, "NIXL did not move the bytes asked for in a {}", op.name());
        Ok(())
    }

    fn pause(&self) {
        self.near.pause();
        self.far.pause();
    }

    /// Moves a load for so long.
    pub fn transfer(&mut self, load: &Load, seconds: f64) -> Result<Figure> {
        self.far.resume();
        self.near.resume();
        let figure = self.measure(load, seconds);
        self.pause();
        figure
    }

    fn measure(&mut self, load: &Load, seconds: f64) -> Result<Figure> {
        self.near.ask(&prepare(load, WARM_UP_SECONDS))?;
        let cpu = |agent: &mut Child| -> Result<f64> { number(&agent.ask(&json!({"do": "cpu"}))?, "seconds") };
        let far_before = cpu(&mut self.far)?;
        let found = self.near.ask(&json!({"do": "run", "seconds": seconds}))?;
        let far_cpu = cpu(&mut self.far)? - far_before;
        let bytes = number(&found, "bytes")?;
        Ok(Figure {
            gb_per_s: bytes / number(&found, "seconds")? / 1e9,
            latency_us: number(&found["latency_us"], "p50")?,
            cpu_s_per_gib: (number(&found, "cpu_seconds")? + far_cpu) * f64::from(1 << 30) / bytes,
        })
    }
}

fn prepare(load: &Load, seconds: f64) -> Value {
    let (op, block, batch) = (load.op.name(), load.block, load.batch);
    json!({"do": "prepare", "op": op, "block": block, "batch": batch, "seconds": seconds})
}

fn number(value: &Value, name: &str) -> Result<f64> {
    value[name].as_f64().with_context(|| format!("NIXL's agent told no {name}: {value}"))
}
