//! Every checked-in model against the reference implementation's answers, and the law of the seam on real prompts:
//! chunks, batches and threads change no bit.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{fs, path::Path};

use common::{Bench, argmax, assert_same_bits, models, tokens};
use kvasir_model::{Backend, Folder, SeqInput};
use kvasir_types::{KvDtype, TokenId};

#[derive(serde::Deserialize)]
struct Golden {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    first_logprobs: std::collections::HashMap<u32, f32>,
    margin: f32,
}

/// Under this gap between the best and the second logit another correct implementation may choose differently.
const SURE: f32 = 0.05;

/// How far a first log-probability may be from the float32 reference's. With f32 KV everything is float32 and only the
/// order of sums differs, which proves the arithmetic. Rounding keys and values moves the logits by as much as the
/// dtype is coarse: seen on the demo model, at most 0.012 in f16, the default, and 0.059 in bf16.
fn tolerance(dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => 0.001,
        KvDtype::F16 => 0.02,
        KvDtype::Bf16 => 0.1,
        // Three bits of mantissa: answers may differ, see `kvasir-engine-bench accuracy`.
        KvDtype::Fp8 => 1.0,
    }
}

fn golden(dir: &Path) -> Vec<Golden> {
    let text = fs::read_to_string(dir.join("golden.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn log_softmax(row: &[f32], token: usize) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&v| f64::from(v - max).exp()).sum();
    row[token] - max - sum.ln() as f32
}

/// Greedy over every golden prompt, whole and in chunks of 16: same bits, same first log-probabilities, same tokens.
fn check(dir: &Path, dtype: KvDtype) {
    let folder = Folder::open(dir).unwrap();
    let mut bench = Bench::new(&folder, 16, dtype, 2);
    let mut unsure = 0;
    for (i, line) in golden(dir).iter().enumerate() {
        let what = format!("{} line {i}", dir.display());
        let prompt = tokens(&line.prompt_ids);
        bench.forget();
        let table = bench.table(prompt.len() + line.output_ids.len());
        let other_table = bench.table(prompt.len());
        let whole = bench.prefill(&prompt, &table, prompt.len());
        let chunked = bench.prefill(&prompt, &other_table, 16);
        assert_same_bits(&whole, &chunked, &what);

        for (&token, &expected) in &line.first_logprobs {
            let ours = log_softmax(&whole, token as usize);
            let near = (ours - expected).abs() < tolerance(dtype);
            assert!(near, "{what}, {dtype:?}: token {token}: {ours}, expected {expected}");
        }
        let mut answer = vec![argmax(&whole)];
        while answer.len() < line.output_ids.len() {
            let at = prompt.len() + answer.len() - 1;
            let logits = bench.step(&answer[answer.len() - 1..], at, &table);
            answer.push(argmax(&logits.rows));
        }
        if answer != tokens(&line.output_ids) {
            assert!(line.margin < SURE, "{what}: {answer:?}, expected {:?}", line.output_ids);
            unsure += 1;
        }
    }
    println!("{}: {unsure} answers differ where the margin allows it", dir.display());
}

#[test]
fn the_demo_model_answers_as_the_reference_does() {
    for dtype in [KvDtype::Bf16, KvDtype::F16, KvDtype::F32] {
        check(&models().join("demo"), dtype);
    }
}

#[test]
fn tiny_models_of_every_family_answer_as_the_reference_does() {
    let mut count = 0;
    for entry in fs::read_dir(models().join("tiny")).unwrap() {
        let dir = entry.unwrap().path();
        for dtype in [KvDtype::Bf16, KvDtype::F16, KvDtype::F32] {
            check(&dir, dtype);
        }
        count += 1;
    }
    assert!(count >= 5, "{count} tiny models");
}

/// A batch that decodes some sequences beside chunks of others, against each of them alone on one thread.
#[test]
fn a_sequence_in_a_mixed_batch_has_the_same_bits_as_alone() {
    let dir = models().join("demo");
    let folder = Folder::open(&dir).unwrap();
    let lines = golden(&dir);
    let prompts: Vec<Vec<TokenId>> = lines.iter().step_by(9).take(6).map(|line| tokens(&line.prompt_ids)).collect();

    let mut alone = Bench::new(&folder, 16, KvDtype::Bf16, 1);
    let expected: Vec<[Vec<f32>; 2]> = prompts
        .iter()
        .map(|prompt| {
            let table = alone.table(prompt.len() + 1);
            let first = alone.prefill(prompt, &table, prompt.len());
            let second = alone.step(&[argmax(&first)], prompt.len(), &table);
            [first, second.rows]
        })
        .collect();

    let mut batched = Bench::new(&folder, 16, KvDtype::Bf16, 2);
    let tables: Vec<_> = prompts.iter().map(|prompt| batched.table(prompt.len() + 1)).collect();
    let firsts: Vec<[TokenId; 1]> = expected.iter().map(|[first, _]| [argmax(first)]).collect();
    // Step s computes sequence i's next chunk of 7 + 5 i tokens, then its first output token, then leaves.
    let mut done = vec![0; prompts.len()];
    while done.iter().zip(&prompts).any(|(done, prompt)| *done <= prompt.len()) {
        let mut inputs = Vec::new();
        let mut who = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let start = done[i];
            if start > prompt.len() {
                continue;
            }
            let end = (start + 7 + 5 * i).min(prompt.len());
            let tokens = if start < prompt.len() { &prompt[start..end] } else { &firsts[i][..] };
            done[i] += tokens.len();
            let logits = done[i] >= prompt.len();
            if logits {
                who.push((i, done[i] - prompt.len()));
            }
            inputs.push(SeqInput { tokens, start, tables: &tables[i..=i], rows: logits.into() });
        }
        let mut layers = Vec::new();
        let logits = batched.backend.forward(&inputs, &mut |layer| layers.push(layer)).unwrap();
        assert_eq!(layers, (0..folder.config().layers.len()).collect::<Vec<_>>());
        assert_eq!(logits.len(), who.len());
        for (row, (i, step)) in logits.iter().zip(who) {
            assert_same_bits(row, &expected[i][step], &format!("sequence {i}, output {step}"));
        }
    }
}

/// KV is complete when `after_layer` says so: what a peer receives then is what the arena holds in the end.
#[test]
fn a_layer_is_not_written_again_after_it_was_announced() {
    let folder = Folder::open(&models().join("tiny/qwen3-tied")).unwrap();
    let mut bench = Bench::new(&folder, 8, KvDtype::Bf16, 2);
    let prompt = tokens(&(0..50).map(|i| i * 13 % 1532).collect::<Vec<_>>());
    let table = bench.table(prompt.len());
    let (memory, layout) = (bench.memory.clone(), bench.layout);
    let layer_of = |layer: usize| -> Vec<u8> {
        let slices =
            table.iter().map(|&block| &memory.bytes()[layout.layer_offset(block, layer)..][..layout.layer_bytes()]);
        slices.flatten().copied().collect()
    };
    let mut announced = Vec::new();
    let input = SeqInput { tokens: &prompt, start: 0, tables: std::slice::from_ref(&table), rows: 0 };
    let logits = bench.backend.forward(&[input], &mut |layer| announced.push(layer_of(layer))).unwrap();
    assert!(logits.is_empty());
    for (layer, bytes) in announced.iter().enumerate() {
        assert!(bytes.iter().any(|&byte| byte != 0));
        assert_eq!(*bytes, layer_of(layer), "layer {layer}");
    }
}
