//! `mixed`: a long prompt arrives while other sequences write. How long do they wait for their next token?
//!
//! Twice: with the prompt computed in chunks beside them, and in one piece. What chunks cost the long prompt's own TTFT is
//! told as well.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{
    cli,
    measure::Percentiles,
    output::Output,
    rig::{Plan, Rig, Sent},
};

/// Tokens that every sequence has written before the prompt arrives, and that it writes after that one's first token.
const AROUND: usize = 4;

#[derive(Serialize)]
struct Figures {
    running: usize,
    context: usize,
    prompt: usize,
    chunked: Waits,
    whole: Waits,
    /// Longest gap with chunks over the longest without.
    longest_gap_ratio: f64,
}

#[derive(Clone, Copy, Serialize)]
struct Waits {
    chunk_tokens: usize,
    /// Between two tokens of the same running sequence, from the prompt's arrival to its first token.
    gap_ms: Percentiles,
    /// The same sequences before the prompt arrived.
    undisturbed_ms: Percentiles,
    /// Of the long prompt.
    ttft_ms: f64,
}

/// `mixed`.
pub fn run(options: &cli::Mixed) -> Result<()> {
    let mut output = Output::new(&options.setup);
    let (_, whole) = measure(options, Some(options.prompt as usize))?;
    let (rig, chunked) = measure(options, None)?;
    let found = output.found("mixed", &rig, |_| Figures {
        running: options.running as usize,
        context: options.context as usize,
        prompt: options.prompt as usize,
        chunked,
        whole,
        longest_gap_ratio: chunked.gap_ms.max / whole.gap_ms.max,
    });
    for (name, waits) in [("one piece", whole), ("chunked", chunked)] {
        let cells = [
            ("prompt", format!("{} {name}", options.prompt)),
            ("chunk", waits.chunk_tokens.to_string()),
            ("undisturbed p50 ms", format!("{:.1}", waits.undisturbed_ms.p50)),
            ("gap p50 ms", format!("{:.1}", waits.gap_ms.p50)),
            ("longest ms", format!("{:.1}", waits.gap_ms.max)),
            ("TTFT ms", format!("{:.1}", waits.ttft_ms)),
        ];
        if !options.setup.json {
            output.show(&found, &cells)?;
        }
    }
    if options.setup.json {
        return output.show(&found, &[]);
    }
    println!("\nlongest gap, chunked over one piece: {:.3}", found.figures.longest_gap_ratio);
    Ok(())
}

fn measure(options: &cli::Mixed, chunk: Option<usize>) -> Result<(Rig, Waits)> {
    let (running, context, prompt) = (options.running as usize, options.context as usize, options.prompt as usize);
    // What the running sequences may write: at most a token for every step in which a prompt is computed.
    let steps = |tokens: usize, rig_chunk: usize| tokens.div_ceil(rig_chunk.max(1));
    let usual = chunk.or_else(|| options.setup.chunk_tokens()).unwrap_or(MIN_USUAL_CHUNK);
    let answer = 4 * AROUND + running * steps(context, usual) + 2 * steps(prompt, usual.min(MIN_USUAL_CHUNK)) + 16;
    let mut lengths = vec![context + answer; running];
    lengths.push(prompt + 2);
    let plan = Plan { running: running + 1, lengths, chunk, prefix_cache: false, ngram: false };
    let mut rig = Rig::build(&options.setup, &plan)?;

    let mut writers = Vec::with_capacity(running);
    for stream in 0..running as u64 {
        writers.push(rig.send(rig.prompt(stream, context), answer)?);
    }
    let all: Vec<&Sent> = writers.iter().collect();
    let all_have = |count: usize| writers.iter().all(|writer| writer.count() >= count);
    rig.until(&all, || all_have(2))?; // weights are in memory now, threads run
    let calm = Instant::now();
    let before = writers.iter().map(Sent::count).min().unwrap_or_default();
    rig.until(&all, || all_have(before + AROUND))?;
    let undisturbed: Vec<Duration> = writers.iter().flat_map(|writer| writer.gaps(calm)).collect();

    let arrived = Instant::now();
    let long = rig.send(rig.prompt(running as u64, prompt), 1)?;
    let with_long: Vec<&Sent> = writers.iter().chain([&long]).collect();
    rig.until(&with_long, || long.count() > 0)?;
    let least = writers.iter().map(Sent::count).min().unwrap_or_default();
    rig.until(&with_long, || all_have(least + 1))?; // the gap that the last chunk lies in
    let gaps: Vec<Duration> = writers.iter().flat_map(|writer| writer.gaps(arrived)).collect();
    let waits = Waits {
        chunk_tokens: rig.config.chunk_tokens,
        gap_ms: Percentiles::of_ms(&gaps),
        undisturbed_ms: Percentiles::of_ms(&undisturbed),
        ttft_ms: long.ttft().context("the long prompt has its token")?.as_secs_f64() * 1e3,
    };
    Ok((rig, waits))
}

/// A chunk is never planned smaller than this by the engine's defaults.
const MIN_USUAL_CHUNK: usize = 64;
