//! What the tokenizer library takes by itself, in a process that does nothing else: the router's own work stands beside it.

use std::io::{BufRead, Write};

use anyhow::{Error, Result};
use serde::Deserialize;
use serde_json::json;
use tokenizers::Tokenizer;

#[derive(Deserialize)]
struct Ask {
    texts: Vec<String>,
    rounds: usize,
}

/// Reads lines of JSON, turns each text into tokens so many times, as the router does, and answers with how many they are
/// together; until its standard input ends.
pub fn run(path: &str) -> Result<()> {
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
