//! The tokens that models are compared on.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kvasir_model::{Backend, Folder, SeqInput, cpu::Compute};
use kvasir_types::{KvDtype, Sampling, TokenId};
use serde::Deserialize;

use super::Model;
use crate::cli;

/// Tokens, of which those from `from` on are what models are compared on: nobody foretells a question.
pub struct Sequence {
    pub tokens: Vec<TokenId>,
    pub from: usize,
}

/// One line of a file: a prompt, and what was written after it.
#[derive(Deserialize)]
struct Line {
    prompt_ids: Vec<u32>,
    #[serde(default)]
    output_ids: Vec<u32>,
}

/// The file to read: the one asked for, else the reference answers that lie in the model's folder.
pub fn find(options: &cli::Accuracy) -> Option<PathBuf> {
    let beside = options.source.model.as_deref().map(|dir| dir.join("golden.jsonl")).filter(|file| file.is_file());
    options.prompts.clone().or(beside)
}

/// At most so many sequences of a file, prompt and answer together.
pub fn read(file: &Path, vocab: usize, count: usize) -> Result<Vec<Sequence>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let sequence = |(number, line): (usize, &str)| {
        let at = || format!("{}:{}", file.display(), number + 1);
        let line: Line = serde_json::from_str(line).with_context(at)?;
        // A prompt without an answer is all there is to go by.
        let from = if line.output_ids.is_empty() { 1 } else { line.prompt_ids.len().max(1) };
        let ids = [line.prompt_ids, line.output_ids].concat();
        let known = ids.iter().all(|&id| (id as usize) < vocab);
        ensure!(known && ids.len() > 1, "{}: wants two or more tokens of the vocabulary of {vocab}", at());
        Ok(Sequence { tokens: ids.into_iter().map(TokenId).collect(), from })
    };
    text.lines().enumerate().take(count).map(sequence).collect()
}

/// Sequences drawn from the model itself, at temperature 1, with keys and values in f32. Each begins with a token of its own.
pub fn draw(folder: &Folder, options: &cli::Accuracy) -> Result<Vec<Sequence>> {
    let (count, length) = (options.count as usize, options.tokens as usize);
    let mut model = Model::load(folder, (KvDtype::F32, Compute::Exact), length, count, options)?;
    let vocab = folder.config().vocab as u64;
    let first = |n: u64| TokenId(((options.seed.wrapping_mul(1_000_003) + n * 104_729) % vocab) as u32);
    let mut sequences: Vec<Vec<TokenId>> = (0..count as u64).map(|n| vec![first(n)]).collect();
    for position in 1..length {
        if position.is_multiple_of(64) {
            eprintln!("drawing {count} sequences: {position} of {length} tokens");
        }
        let input = |(sequence, tables)| {
            let tokens: &Vec<TokenId> = sequence;
            SeqInput { tokens: &tokens[position - 1..], start: position - 1, tables, rows: 1 }
        };
        let tables = model.tables.iter().map(Vec::as_slice);
        let batch: Vec<_> = sequences.iter().zip(tables).map(input).collect();
        let logits = model.backend.forward(&batch, &mut |_| {})?;
        for (n, row) in logits.iter().enumerate() {
            let sampling = Sampling { temperature: 1.0, seed: options.seed + n as u64, ..Sampling::default() };
            sequences[n].push(kvasir_engine::sample(row, &sampling, position)?.token);
        }
    }
    Ok(sequences.into_iter().map(|tokens| Sequence { tokens, from: 1 }).collect())
}
