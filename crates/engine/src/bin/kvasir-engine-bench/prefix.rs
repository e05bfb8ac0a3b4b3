//! `prefix`: two requests that begin alike, one after the other. What does the second one's first token cost?

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::{
    cli,
    output::Output,
    rig::{Plan, Rig},
};

#[derive(Serialize)]
struct Figures {
    shared: usize,
    own: usize,
    first_ttft_ms: f64,
    second_ttft_ms: f64,
    /// Tokens of the second prompt that the cache had.
    cached_tokens: usize,
    /// The second over the first.
    ttft_ratio: f64,
}

/// `prefix`.
pub fn run(options: &cli::Prefix) -> Result<()> {
    let (shared, own) = (options.shared as usize, options.own as usize);
    let mut output = Output::new(&options.setup);
    let plan = Plan { prefix_cache: true, ..Plan::even(3, shared + own + 2) };
    let mut rig = Rig::build(&options.setup, &plan)?;
    // Touches every weight, and shares nothing with the others.
    ttft(&mut rig, &[(9, shared.min(64))])?;
    let (first, _) = ttft(&mut rig, &[(0, shared), (1, own)])?;
    let (second, cached_tokens) = ttft(&mut rig, &[(0, shared), (2, own)])?;
    let whole_blocks = shared / rig.layout.block_size as usize * rig.layout.block_size as usize;
    ensure!(cached_tokens == whole_blocks, "{cached_tokens} tokens were found in the cache, not {whole_blocks}");
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let found = output.found("prefix", &rig, |_| Figures {
        shared,
        own,
        first_ttft_ms: ms(first),
        second_ttft_ms: ms(second),
        cached_tokens,
        ttft_ratio: ms(second) / ms(first),
    });
    let f = &found.figures;
    let cells = [
        ("shared", shared.to_string()),
        ("own", own.to_string()),
        ("first TTFT ms", format!("{:.1}", f.first_ttft_ms)),
        ("second TTFT ms", format!("{:.1}", f.second_ttft_ms)),
        ("from cache", f.cached_tokens.to_string()),
        ("ratio", format!("{:.4}", f.ttft_ratio)),
    ];
    output.show(&found, &cells)
}

/// TTFT of a prompt made of pieces of streams, and how much of it was in the cache.
fn ttft(rig: &mut Rig, pieces: &[(u64, usize)]) -> Result<(Duration, usize)> {
    rig.alone(pieces.iter().flat_map(|&(stream, tokens)| rig.prompt(stream, tokens)).collect())
}
