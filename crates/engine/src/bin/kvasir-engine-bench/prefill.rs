//! `prefill`: one prompt at a time, to its first token.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::{
    cli,
    measure::{Percentiles, median},
    output::{Output, percent},
    rig::{Plan, Rig},
};

#[derive(Serialize)]
struct Figures {
    tokens: usize,
    repeat: usize,
    ttft_ms: Percentiles,
    /// Of the median.
    tokens_per_s: f64,
    /// Products of weights and of attention, over the median.
    gflops: f64,
    /// That, of what the processor can do.
    share_of_peak: Option<f64>,
}

/// `prefill`.
pub fn run(options: &cli::Prefill) -> Result<()> {
    let mut output = Output::new(&options.setup);
    for &tokens in &options.tokens {
        let (tokens, repeat) = (tokens as usize, options.repeat as usize);
        let mut rig = Rig::build(&options.setup, &Plan::even(1, tokens + 2))?;
        // Weights come in from disk, threads start, buffers and the cache get their pages: not timed, as all of it happens
        // once in a worker's life.
        first_token(&mut rig, u64::MAX >> 32, tokens)?;
        let times = (0..repeat as u64).map(|n| first_token(&mut rig, n, tokens)).collect::<Result<Vec<_>>>()?;
        let ttft_ms = Percentiles::of_ms(&times);
        let seconds = median(times).as_secs_f64();
        let gflops = rig.cost.flops(0, tokens) / seconds / 1e9;
        let found = output.found("prefill", &rig, |machine| Figures {
            tokens,
            repeat,
            ttft_ms,
            tokens_per_s: tokens as f64 / seconds,
            gflops,
            share_of_peak: machine.map(|machine| gflops / machine.peak_gflops()),
        });
        let f = &found.figures;
        let cells = [
            ("prompt", tokens.to_string()),
            ("chunk", found.engine.chunk_tokens.to_string()),
            ("tok/s", format!("{:.1}", f.tokens_per_s)),
            ("TTFT p50 ms", format!("{:.1}", f.ttft_ms.p50)),
            ("max ms", format!("{:.1}", f.ttft_ms.max)),
            ("GFLOP/s", format!("{:.0}", f.gflops)),
            ("of peak", percent(f.share_of_peak)),
            ("memory", format!("{:.2} ×", found.memory.ratio)),
        ];
        output.show(&found, &cells)?;
    }
    Ok(())
}

fn first_token(rig: &mut Rig, stream: u64, tokens: usize) -> Result<Duration> {
    Ok(rig.alone(rig.prompt(stream, tokens))?.0)
}
