//! What the next turn of a conversation costs to tokenize: whole, and from where the last one was.
//!
//! ```text
//! cargo run --release -p kvasir-router --example conversation-turns [-- TOKENIZER.json TURNS ROUNDS]
//! ```
//!
//! Prints a line of JSON: microseconds a turn, medians over the rounds. By default the demo model's tokenizer, 20 turns of some
//! 200 words each, 200 rounds.
#![forbid(unsafe_code)]

use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use kvasir_router::{Encoder, Pieces};
use tokenizers::Tokenizer;

const ROOM: usize = 64 << 20;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/tokenizer.json");
    let path = arguments.next().unwrap_or_else(|| demo.to_owned());
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (turns, rounds) = (number(20)?, number(200)?);
    let encoder = Encoder::of(Tokenizer::from_file(&path).map_err(|error| anyhow!("{path}: {error}"))?);

    let (mut whole, mut next) = (Vec::new(), Vec::new());
    let (mut bytes, mut tokens) = (0, 0);
    for round in 0..rounds {
        let pieces = Pieces::of(&encoder, ROOM).context("a tokenizer whose texts can be taken apart")?;
        let mut text: String = (0..turns).map(|number| turn(round, number)).collect();
        pieces.encode(&encoder, &text, "").map_err(|error| anyhow!(error))?;
        text += &turn(round, turns);
        let began = Instant::now();
        let alone = encoder.tokenizer().encode_fast(text.as_str(), false).map_err(|error| anyhow!(error))?;
        whole.push(began.elapsed().as_secs_f64() * 1e6);
        let began = Instant::now();
        let found = pieces.encode(&encoder, &text, "").map_err(|error| anyhow!(error))?;
        next.push(began.elapsed().as_secs_f64() * 1e6);
        ensure!(alone.get_ids().iter().copied().eq(found.iter().map(|token| token.0)), "not the same tokens");
        (bytes, tokens) = (text.len(), found.len());
    }
    let (whole, next) = (median(whole), median(next));
    let ratio = whole / next;
    println!(
        "{}",
        serde_json::json!({"bytes": bytes, "tokens": tokens, "whole_us": whole, "next_us": next, "ratio": ratio})
    );
    Ok(())
}

fn turn(round: usize, number: usize) -> String {
    let words = |from: usize| -> String {
        const LIST: [&str; 8] = ["worker ", "holds ", "the ", "blocks ", "which ", "router ", "asks ", "for "];
        (0..100).map(|at| format!("{}{}", LIST[(at * 7 + from) % LIST.len()], (at * from) % 97)).collect()
    };
    let (asked, said) = (words(round * 31 + number * 3 + 1), words(round * 17 + number * 5 + 2));
    format!("<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n")
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}
