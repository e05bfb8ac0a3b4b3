//! What was found, as a table for people or as JSON for programs.

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{cli::Setup, limits::Machine, measure::peak_rss_bytes, rig::Rig};

/// One measurement of a scenario: its own figures, and how they were come by.
#[derive(Serialize)]
pub struct Found<T> {
    pub scenario: &'static str,
    #[serde(flatten)]
    pub figures: T,
    pub model: Model,
    pub engine: Engine,
    pub blocks: Blocks,
    pub memory: Memory,
    /// What the machine can do at most; none if that was not measured.
    pub limits: Option<Machine>,
}

/// The model measured.
#[derive(Serialize)]
pub struct Model {
    pub name: String,
    pub family: &'static str,
    pub parameters: u64,
    pub weight_bytes: u64,
    /// What most weights are stored in.
    pub weights: String,
}

/// How the engine was set up.
#[derive(Serialize)]
pub struct Engine {
    pub threads: usize,
    pub chunk_tokens: usize,
    pub max_batch_tokens: usize,
    pub max_running: usize,
    pub prefix_cache: bool,
    pub kv: Value,
    /// How products are computed.
    pub compute: Value,
    pub block_size: u32,
    pub seed: u64,
}

/// The pool.
#[derive(Serialize)]
pub struct Blocks {
    pub total: usize,
    /// Most that sequences held at once.
    pub used: usize,
    pub block_bytes: usize,
}

/// What the process took, beside what it cannot do without.
#[derive(Serialize)]
pub struct Memory {
    pub peak_rss_bytes: u64,
    pub weight_bytes: u64,
    /// Blocks that held anything: memory of the pool that was never touched costs nothing.
    pub cache_bytes: u64,
    /// Peak over weights and cache together.
    pub ratio: f64,
}

/// Where the figures of a run go.
pub struct Output {
    setup: Setup,
    machine: Option<Machine>,
    head_shown: bool,
}

impl Output {
    pub fn new(setup: &Setup) -> Self {
        Self { setup: setup.clone(), machine: None, head_shown: false }
    }

    /// Puts the run's circumstances beside its figures. Measures the machine after the first of them, so that the memory it
    /// takes for that is not counted.
    pub fn found<T>(
        &mut self,
        scenario: &'static str,
        rig: &Rig,
        figures: impl FnOnce(Option<&Machine>) -> T,
    ) -> Found<T> {
        let (cost, cache_bytes) = (&rig.cost, (rig.blocks_touched * rig.layout.block_bytes()) as u64);
        let peak = peak_rss_bytes();
        let memory = Memory {
            peak_rss_bytes: peak,
            weight_bytes: cost.weight_bytes,
            cache_bytes,
            ratio: peak as f64 / (cost.weight_bytes + cache_bytes) as f64,
        };
        if self.machine.is_none() && !self.setup.no_limits {
            self.machine = Some(Machine::measure(rig.threads));
        }
        let config = &rig.config;
        Found {
            scenario,
            figures: figures(self.machine.as_ref()),
            model: Model {
                name: rig.name.clone(),
                family: rig.folder.config().family,
                parameters: cost.parameters,
                weight_bytes: cost.weight_bytes,
                weights: cost.weight_dtype.as_str().to_ascii_lowercase(),
            },
            engine: Engine {
                threads: rig.threads,
                chunk_tokens: config.chunk_tokens,
                max_batch_tokens: config.max_batch_tokens,
                max_running: config.max_running,
                prefix_cache: config.prefix_cache,
                kv: json!(rig.layout.dtype),
                compute: json!(self.setup.compute.compute()),
                block_size: rig.layout.block_size,
                seed: self.setup.seed,
            },
            blocks: Blocks { total: rig.blocks, used: rig.blocks_used, block_bytes: rig.layout.block_bytes() },
            memory,
            limits: self.machine,
        }
    }

    /// Tells one measurement as soon as it is there; `cells` are its columns: name and value.
    pub fn show<T: Serialize>(&mut self, found: &Found<T>, cells: &[(&str, String)]) -> Result<()> {
        if self.setup.json {
            println!("{}", serde_json::to_string(found)?);
            return Ok(());
        }
        let width = |(name, value): &(&str, String)| name.chars().count().max(value.chars().count()).max(7);
        let line = |pick: fn(&(&str, String)) -> String| {
            let padded: Vec<_> = cells.iter().map(|cell| format!("{:>1$}", pick(cell), width(cell))).collect();
            padded.join("  ")
        };
        if !std::mem::replace(&mut self.head_shown, true) {
            let Model { name, parameters, weight_bytes, weights, .. } = &found.model;
            let (millions, gb) = (*parameters as f64 / 1e6, *weight_bytes as f64 / 1e9);
            let compute = found.engine.compute.as_str().unwrap_or_default();
            let threads = found.engine.threads;
            println!("{name}: {millions:.1} million parameters, {gb:.2} GB in {weights}");
            println!("{threads} threads, {compute} products");
            if let Some(machine) = &found.limits {
                let (peak, read) = (machine.peak_gflops(), machine.read_gb_per_s);
                println!("the machine's limits: {peak:.0} GFLOP/s, {read:.1} GB/s read\n");
            }
            println!("{}", line(|(name, _)| (*name).to_owned()));
        }
        println!("{}", line(|(_, value)| value.clone()));
        Ok(())
    }

    /// A last line on the memory the process took.
    pub fn memory<T>(&self, found: &Found<T>) {
        if !self.setup.json {
            let Memory { peak_rss_bytes, ratio, .. } = found.memory;
            let Blocks { total, used, .. } = found.blocks;
            let mib = peak_rss_bytes >> 20;
            println!("\nblocks: {used} of {total} used; memory: {mib} MiB at most, {ratio:.2} × (weights + cache)");
        }
    }
}

/// A share as people read it.
pub fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", 100.0 * share))
}
