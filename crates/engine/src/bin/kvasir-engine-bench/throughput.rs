//! `throughput`: a list of requests, so many at a time, to the end of the last one.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::{
    cli::{self, Range},
    measure::Percentiles,
    output::{Output, percent},
    rig::{Plan, Rig, Sent},
};

#[derive(Serialize)]
struct Figures {
    requests: usize,
    concurrency: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    seconds: f64,
    requests_per_s: f64,
    prompt_tokens_per_s: f64,
    output_tokens_per_s: f64,
    ttft_ms: Percentiles,
    tpot_ms: Percentiles,
    gap_ms: Percentiles,
    preemptions: u64,
    /// Tokens that were guessed, and those of them that were right.
    drafted_tokens: u64,
    accepted_tokens: u64,
    /// Products that were necessary, per second, of what the processor can do.
    share_of_peak: Option<f64>,
}

/// `throughput`.
pub fn run(options: &cli::Throughput) -> Result<()> {
    let (requests, concurrency) = (options.requests as usize, options.concurrency as usize);
    let shared = options.shared as usize;
    let lengths: Vec<_> = (0..requests as u64)
        .map(|n| (pick(options.prompt, options.setup.seed, 2 * n), pick(options.output, options.setup.seed, 2 * n + 1)))
        .collect();
    let longest = options.prompt.1 + options.output.1;
    let mut output = Output::new(&options.setup);
    let plan = Plan { prefix_cache: true, ngram: options.ngram, ..Plan::even(concurrency, longest) };
    let mut rig = Rig::build(&options.setup, &plan)?;

    let (mut running, mut done): (Vec<Sent>, Vec<Sent>) = (Vec::new(), Vec::new());
    let mut next = lengths.iter().enumerate();
    let (start, mut said) = (Instant::now(), Instant::now());
    loop {
        while running.len() < concurrency {
            let Some((n, &(prompt, answer))) = next.next() else { break };
            let mut tokens = rig.prompt(u64::MAX >> 32, shared.min(prompt));
            tokens.extend(rig.prompt(n as u64, prompt - tokens.len()));
            running.push(rig.send(tokens, answer)?);
        }
        if running.is_empty() {
            break;
        }
        rig.until(&running.iter().collect::<Vec<_>>(), || running.iter().any(Sent::finished))?;
        done.extend(running.extract_if(.., |request| request.finished()));
        if said.elapsed() > Duration::from_secs(5) {
            said = Instant::now();
            eprintln!("{} of {requests} requests after {:.0} s", done.len(), start.elapsed().as_secs_f64());
        }
    }
    let seconds = start.elapsed().as_secs_f64();

    let stats = rig.stats();
    let prompt_tokens: usize = lengths.iter().map(|(prompt, _)| prompt).sum();
    let output_tokens: usize = done.iter().map(Sent::count).sum();
    let cached_tokens: usize = done.iter().map(Sent::cached_tokens).sum();
    let flops = |request: &Sent| {
        let (cached, prompt) = (request.cached_tokens(), request.prompt_tokens);
        let answer = (1..request.count()).map(|n| rig.cost.flops(prompt + n - 1, 1));
        rig.cost.flops(cached, prompt - cached) + answer.sum::<f64>()
    };
    let flops: f64 = done.iter().map(flops).sum();
    let of =
        |pick: fn(&Sent) -> Option<Duration>| Percentiles::of_ms(&done.iter().filter_map(pick).collect::<Vec<_>>());
    let gaps: Vec<_> = done.iter().flat_map(|request| request.gaps(start)).collect();
    let found = output.found("throughput", &rig, |machine| Figures {
        requests,
        concurrency,
        prompt_tokens,
        cached_tokens,
        output_tokens,
        seconds,
        requests_per_s: requests as f64 / seconds,
        prompt_tokens_per_s: prompt_tokens as f64 / seconds,
        output_tokens_per_s: output_tokens as f64 / seconds,
        ttft_ms: of(Sent::ttft),
        tpot_ms: of(Sent::tpot),
        gap_ms: Percentiles::of_ms(&gaps),
        preemptions: stats.preemptions,
        drafted_tokens: stats.drafted_tokens,
        accepted_tokens: stats.accepted_tokens,
        share_of_peak: machine.map(|machine| flops / seconds / 1e9 / machine.peak_gflops()),
    });
    let f = &found.figures;
    let cells = [
        ("requests", requests.to_string()),
        ("at a time", concurrency.to_string()),
        ("prompt tok/s", format!("{:.1}", f.prompt_tokens_per_s)),
        ("output tok/s", format!("{:.1}", f.output_tokens_per_s)),
        ("TTFT p50 ms", format!("{:.1}", f.ttft_ms.p50)),
        ("p99 ms", format!("{:.1}", f.ttft_ms.p99)),
        ("TPOT p50 ms", format!("{:.2}", f.tpot_ms.p50)),
        ("p99 ms", format!("{:.2}", f.tpot_ms.p99)),
        ("longest gap ms", format!("{:.1}", f.gap_ms.max)),
        ("of peak", percent(f.share_of_peak)),
    ];
    output.show(&found, &cells)?;
    if options.ngram && !options.setup.json {
        println!("\nguessed tokens: {} of {} right", f.accepted_tokens, f.drafted_tokens);
    }
    output.memory(&found);
    Ok(())
}

/// A number of the range, the same for the same seed.
fn pick(range: Range, seed: u64, n: u64) -> usize {
    let share = kvasir_engine::uniform(seed, n);
    range.0 + (share * (range.1 - range.0 + 1) as f64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_drawn_from_the_whole_range_and_repeat() {
        let drawn: Vec<_> = (0..1000).map(|n| pick(Range(3, 7), 5, n)).collect();
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&3), Some(&7)));
        assert_eq!(drawn, (0..1000).map(|n| pick(Range(3, 7), 5, n)).collect::<Vec<_>>());
        assert_eq!(pick(Range(4, 4), 5, 9), 4);
    }
}
