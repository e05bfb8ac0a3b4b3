//! Whole models: the golden file of the demo model, and every family beside the processor.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use kvasir_model::{Error, Folder, cpu::Compute, cuda::Options};
use kvasir_types::{KvDtype, TokenId};
use serde_json::json;

use crate::{Cli, Row, rig::Rig};

/// A prompt and the reference implementation's greedy answer to it.
#[derive(serde::Deserialize)]
struct Golden {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    first_logprobs: HashMap<u32, f32>,
}

fn options(cli: &Cli) -> Options {
    Options { ordinal: cli.ordinal, compute: Compute::Exact, max_tokens: 256, graphs: true }
}

fn read<T>(path: &Path, read: impl FnOnce(&Path) -> std::io::Result<T>) -> Result<T, Error> {
    read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// The demo model's answers, token by token, and the first step's log-probabilities.
pub fn golden(cli: &Cli) -> Result<Vec<Row>, Error> {
    let dir = cli.models.join("demo");
    let folder = Folder::open(&dir)?;
    let path = dir.join("golden.jsonl");
    let text = read(&path, |path| fs::read_to_string(path))?;
    let lines = text.lines().map(serde_json::from_str::<Golden>).collect::<Result<Vec<_>, _>>();
    let lines = lines.map_err(|source| Error::Json { path, source })?;
    let mut rig = Rig::device(&folder, KvDtype::F16, 256, options(cli))?;
    let (mut same, mut asked, mut apart) = (0, 0, 0.0f32);
    for line in lines.iter().step_by(if cli.quick { 20 } else { 1 }) {
        rig.forget();
        let tables = rig.tables(line.prompt_ids.len() + line.output_ids.len());
        let mut input: Vec<TokenId> = line.prompt_ids.iter().copied().map(TokenId).collect();
        let mut start = 0;
        let mut answer = Vec::new();
        while answer.len() < line.output_ids.len() {
            let row = rig.step(&input, start, &tables, 1)?;
            if start == 0 {
                apart = line
                    .first_logprobs
                    .iter()
                    .map(|(&token, &expected)| (log_softmax(&row, token) - expected).abs())
                    .fold(apart, worse);
            }
            start += input.len();
            let token = argmax(&row);
            answer.push(token);
            input = vec![TokenId(token)];
        }
        asked += 1;
        same += usize::from(answer == line.output_ids);
    }
    Ok(vec![
        Row {
            what: "golden answers of the demo model".to_owned(),
            found: format!("{same} of {asked} the same"),
            goal: "all".to_owned(),
            met: Some(same == asked && asked > 0),
            json: json!({ "same": same, "asked": asked }),
        },
        Row {
            what: "first log-probabilities".to_owned(),
            found: format!("{apart:.5} apart at most"),
            goal: "0.05".to_owned(),
            met: Some(apart < 0.05),
            json: json!({ "apart": apart }),
        },
    ])
}

/// Every tiny model: whole rows of logits beside the processor's; the same bits in two cuts and two companies; fp8 caches.
pub fn families(cli: &Cli) -> Result<Vec<Row>, Error> {
    let tiny = cli.models.join("tiny");
    let mut folders: Vec<PathBuf> = read(&tiny, |path| fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect())?;
    folders.sort();
    let mut rows = Vec::new();
    for path in folders.iter().step_by(if cli.quick { 8 } else { 1 }) {
        let folder = Folder::open(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let vocab = folder.config().vocab;
        let prompt: Vec<TokenId> = (0..70).map(|i| TokenId((i * 37 % vocab) as u32)).collect();
        let dtypes: &[KvDtype] = if cli.quick { &[KvDtype::F16] } else { &[KvDtype::F16, KvDtype::F32, KvDtype::Fp8] };
        for &dtype in dtypes {
            let ours = logits(&mut Rig::device(&folder, dtype, 64, options(cli))?, &prompt, 70)?;
            let again = logits(&mut Rig::device(&folder, dtype, 64, options(cli))?, &prompt, 13)?;
            let expected = logits(&mut Rig::processor(&folder, dtype, 64)?, &prompt, 70)?;
            let apart = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, worse);
            let bits = ours.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits());
            // A rounded key or value may round the other way.
            let goal = if dtype == KvDtype::Fp8 { 0.5 } else { 0.05 };
            rows.push(Row {
                what: format!("{name}, {} cache", format!("{dtype:?}").to_lowercase()),
                found: format!("{apart:.5} apart, {} bits", if bits { "the same" } else { "OTHER" }),
                goal: format!("{goal}, the same bits in two cuts"),
                met: Some(apart < goal && bits && ours.len() == expected.len()),
                json: json!({ "apart": apart, "same_bits": bits }),
            });
        }
    }
    Ok(rows)
}

/// All rows of a prompt computed in chunks.
fn logits(rig: &mut Rig, prompt: &[TokenId], chunk: usize) -> Result<Vec<f32>, Error> {
    let tables = rig.tables(prompt.len());
    let mut all = Vec::new();
    for (i, part) in prompt.chunks(chunk).enumerate() {
        all.extend(rig.step(part, i * chunk, &tables, part.len())?);
    }
    Ok(all)
}

/// What is not a number is as far away as can be.
fn worse(worst: f32, next: f32) -> f32 {
    if next.is_nan() { f32::INFINITY } else { worst.max(next) }
}

fn argmax(row: &[f32]) -> u32 {
    row.iter().enumerate().fold(0, |best, (i, value)| if *value > row[best] { i } else { best }) as u32
}

fn log_softmax(row: &[f32], token: u32) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&v| f64::from(v - max).exp()).sum();
    row.get(token as usize).map_or(f32::NAN, |value| value - max - sum.ln() as f32)
}
