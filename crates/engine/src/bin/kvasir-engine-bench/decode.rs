//! `decode`: sequences that all write, one token each per step.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kvasir_engine::Config;
use serde::Serialize;

use crate::{
    cli,
    limits::Machine,
    measure::Percentiles,
    output::{Output, percent},
    rig::{Plan, Rig, Sent},
};

/// Steps before the measured ones: weights come in from disk, threads start.
const WARM_UP: usize = 4;

#[derive(Serialize)]
struct Figures {
    batch: usize,
    context: usize,
    steps: usize,
    tokens_per_s: f64,
    step_ms: Percentiles,
    /// Weights read per step, over the median step.
    weight_gb_per_s: f64,
    /// That, of what memory can be read at.
    weight_share_of_reads: Option<f64>,
    gflops: f64,
    share_of_peak: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<u32>>,
}

/// `decode`.
pub fn run(options: &cli::Decode) -> Result<()> {
    let mut output = Output::new(&options.setup);
    for &batch in &options.batch {
        let (batch, context, steps) = (batch as usize, options.context as usize, options.steps as usize);
        let answer = head_start(&options.setup, batch, context) + WARM_UP + steps + 2;
        let mut rig = Rig::build(&options.setup, &Plan::even(batch, context + answer))?;
        let (requests, times) = measure(&mut rig, batch, context, steps, answer)?;
        let step_ms = Percentiles::of_ms(&times);
        let total: Duration = times.iter().sum();
        let flops = rig.cost.flops(context + WARM_UP + steps / 2, 1) * batch as f64;
        let weight_gb_per_s = rig.cost.step_weight_bytes as f64 / step_ms.p50 / 1e6;
        let gflops = flops / step_ms.p50 / 1e6;
        let figures = |machine: Option<&Machine>| Figures {
            batch,
            context,
            steps,
            tokens_per_s: (batch * steps) as f64 / total.as_secs_f64(),
            step_ms,
            weight_gb_per_s,
            weight_share_of_reads: machine.map(|machine| weight_gb_per_s / machine.read_gb_per_s),
            gflops,
            share_of_peak: machine.map(|machine| gflops / machine.peak_gflops()),
            tokens: options.show_tokens.then(|| requests[0].tokens()),
        };
        let found = output.found("decode", &rig, figures);
        let f = &found.figures;
        let cells = [
            ("batch", batch.to_string()),
            ("context", context.to_string()),
            ("tok/s", format!("{:.1}", f.tokens_per_s)),
            ("step p50 ms", format!("{:.2}", f.step_ms.p50)),
            ("p99 ms", format!("{:.2}", f.step_ms.p99)),
            ("weights GB/s", format!("{:.1}", f.weight_gb_per_s)),
            ("of reads", percent(f.weight_share_of_reads)),
            ("GFLOP/s", format!("{:.0}", f.gflops)),
            ("of peak", percent(f.share_of_peak)),
            ("memory", format!("{:.2} ×", found.memory.ratio)),
        ];
        output.show(&found, &cells)?;
        if let Some(tokens) = f.tokens.as_ref().filter(|_| !options.setup.json) {
            println!("tokens {tokens:?}");
        }
    }
    Ok(())
}

/// The requests, and the times of the measured steps.
fn measure(
    rig: &mut Rig,
    batch: usize,
    context: usize,
    steps: usize,
    output: usize,
) -> Result<(Vec<Sent>, Vec<Duration>)> {
    let mut requests = Vec::with_capacity(batch);
    for stream in 0..batch as u64 {
        requests.push(rig.send(rig.prompt(stream, context), output)?);
    }
    let all: Vec<_> = requests.iter().collect();
    rig.until(&all, || requests.iter().all(|request| request.count() > WARM_UP))?;
    let counts = || requests.iter().map(Sent::count).sum::<usize>();
    let before = counts();
    let mut times = Vec::with_capacity(steps);
    for _ in 0..steps {
        let start = Instant::now();
        rig.step();
        times.push(start.elapsed());
    }
    let came = counts() - before;
    ensure!(came == batch * steps, "{came} tokens came in {steps} steps of {batch} sequences: {:?}", rig.stats());
    Ok((requests, times))
}

/// Steps in which the last prompts are computed while the first sequences write already: so much further these get.
fn head_start(setup: &cli::Setup, batch: usize, context: usize) -> usize {
    let chunk = setup.chunk_tokens().unwrap_or_else(|| Config::default().chunk_tokens);
    batch * context.div_ceil(chunk.max(1))
}
