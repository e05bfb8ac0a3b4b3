//! What the tokenizer library takes by itself, in a process that does nothing else and has the router's allocator: the
//! router's own work stands beside it (`scripts/bench router`).
//!
//! Reads lines of JSON, `{"texts": ["…"], "rounds": 3}`, turns each text into tokens so many times, as the router does, and
//! answers with how many they are together; until its standard input ends.
#![forbid(unsafe_code)]

use std::io::{BufRead, Write};

use anyhow::{Context, Error, Result};
use mimalloc::MiMalloc;
use serde::Deserialize;
use serde_json::json;
use tokenizers::Tokenizer;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

#[derive(Deserialize)]
struct Ask {
    texts: Vec<String>,
    rounds: usize,
}

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: tokenize TOKENIZER.JSON")?;
    let tokenizer = Tokenizer::from_bytes(std::fs::read(path)?).map_err(Error::from_boxed)?;
    for line in std::io::stdin().lock().lines() {
        let ask: Ask = serde_json::from_str(&line?)?;
        let mut tokens = 0;
        for _ in 0..ask.rounds {
            tokens = 0;
            for text in &ask.texts {
                tokens += tokenizer.encode_fast(text.as_str(), false).map_err(Error::from_boxed)?.get_ids().len();
            }
        }
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", json!({"tokens": tokens}))?;
        out.flush()?;
    }
    Ok(())
}
