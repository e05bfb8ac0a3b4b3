//! What the machine can do at most, and the share of it that a run reached.

use anyhow::Result;
use kvasir_model::cpu::limits;
use serde::Serialize;

use crate::cli;

/// Far above any last-level cache.
const BUFFER_BYTES: usize = 512 << 20;

/// The machine's limits on so many threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Machine {
    pub threads: usize,
    /// Multiply-adds in f32, two operations each.
    pub f32_gflops: f64,
    /// The same with products of bf16, where the processor has an instruction for them.
    pub bf16_gflops: Option<f64>,
    /// Bytes read from memory.
    pub read_gb_per_s: f64,
}

impl Machine {
    /// Measures them; about a second.
    pub fn measure(threads: usize) -> Self {
        Self {
            threads,
            f32_gflops: limits::peak_f32(threads) / 1e9,
            bf16_gflops: limits::peak_bf16(threads).map(|flops| flops / 1e9),
            read_gb_per_s: limits::read_bandwidth(threads, BUFFER_BYTES) / 1e9,
        }
    }

    /// The highest rate at which products can be computed.
    pub fn peak_gflops(&self) -> f64 {
        self.bf16_gflops.map_or(self.f32_gflops, |bf16| bf16.max(self.f32_gflops))
    }
}

/// One per core, if nobody says otherwise.
pub fn threads(asked: Option<u32>) -> usize {
    asked.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), |threads| threads as usize)
}

/// `limits`.
pub fn run(options: &cli::Limits) -> Result<()> {
    let machine = Machine::measure(threads(options.threads));
    if options.json {
        println!("{}", serde_json::to_string(&machine)?);
        return Ok(());
    }
    println!("{} threads", machine.threads);
    println!("{:>8.1} GFLOP/s  f32 multiply-adds", machine.f32_gflops);
    match machine.bf16_gflops {
        Some(bf16) => println!("{bf16:>8.1} GFLOP/s  bf16 dot products"),
        None => println!("       -          bf16 dot products: not on this processor"),
    }
    println!("{:>8.1} GB/s     memory reads", machine.read_gb_per_s);
    Ok(())
}
