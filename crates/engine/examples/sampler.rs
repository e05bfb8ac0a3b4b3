//! How long choosing a token takes, at a vocabulary of 151,936.
//!
//! ```text
//! cargo run --release -p kvasir-engine --example sampler
//! ```
//!
//! Two kinds of logits: `flat`, where tens of thousands of tokens are possible, and `peaked`, as a trained model's, where
//! most are hopeless. Median of 51 tokens each, microseconds; beside it a pass that only reads the row.

use std::{hint::black_box, time::Instant};

use kvasir_engine::{Ask, History, Mask, Sampler};
use kvasir_types::{Sampling, TokenId};

const VOCAB: usize = 151_936;

fn noise(i: usize) -> f32 {
    let mut z = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z >> 40) as f32 / (1u64 << 24) as f32
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let flat: Vec<f32> = (0..VOCAB).map(|i| noise(i) * 4.0).collect();
    // Logits of a trained model fall off about exponentially from the likeliest.
    let peaked: Vec<f32> = (0..VOCAB).map(|i| noise(i + VOCAB).max(1e-7).ln() * -1.5).collect();
    let hot = Sampling { temperature: 1.0, ..Sampling::default() };
    let text: Vec<TokenId> = (0..2000).map(|i| TokenId((noise(i) * VOCAB as f32) as u32)).collect();
    let penalties = Sampling { repetition_penalty: 1.1, frequency_penalty: 0.2, presence_penalty: 0.2, ..hot.clone() };
    let dense = Mask::of(VOCAB, (0..VOCAB as u32).filter(|i| i % 50 != 0).map(TokenId));
    let cases = [
        ("greedy", Sampling::default(), None),
        ("greedy, 5 logprobs", Sampling { logprobs: Some(5), ..Sampling::default() }, None),
        ("temperature 1", hot.clone(), None),
        ("top_k 50", Sampling { top_k: 50, ..hot.clone() }, None),
        ("top_p 0.95", Sampling { top_p: 0.95, ..hot.clone() }, None),
        ("top_k 50, top_p 0.95", Sampling { top_k: 50, top_p: 0.95, ..hot.clone() }, None),
        ("min_p 0.05", Sampling { min_p: 0.05, ..hot.clone() }, None),
        ("penalties, 2,000 tokens seen", penalties, None),
        ("grammar mask", hot, Some(&dense)),
    ];
    println!("{:<32}{:>10}{:>10}", "µs per token", "flat", "peaked");
    let read = |row: &[f32]| {
        let start = Instant::now();
        black_box(row.iter().fold(0u32, |sum, x| sum ^ x.to_bits()));
        start.elapsed().as_secs_f64() * 1e6
    };
    let reads = [&flat, &peaked].map(|row| median((0..51).map(|_| read(row)).collect()));
    println!("{:<32}{:>10.0}{:>10.0}", "reading only", reads[0], reads[1]);
    let mut sampler = Sampler::default();
    for (name, sampling, mask) in cases {
        let history = History::new(&Sampling { continued: 1000, ..sampling.clone() }, &text);
        let times = [&flat, &peaked].map(|logits| {
            let mut row = logits.clone();
            let run = |position| {
                row.copy_from_slice(logits);
                let ask = Ask { sampling: &sampling, position, history: &history, eos: &[], mask };
                let start = Instant::now();
                black_box(sampler.sample(&mut row, ask)).ok();
                start.elapsed().as_secs_f64() * 1e6
            };
            median((0..51).map(run).collect())
        });
        println!("{name:<32}{:>10.0}{:>10.0}", times[0], times[1]);
    }
}
