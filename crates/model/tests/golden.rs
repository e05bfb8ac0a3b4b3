//! Every checked-in model against the reference implementation's answers, with every type of KV, and the law of the seam
//! on real prompts: chunks, batches and threads change no bit.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{collections::HashSet, fs, path::Path};

use common::{
    Bench, answer, argmax, assert_same_bits, furthest, golden, logprobs_apart, models, nan_max, tiny, tokens,
};
use kvasir_model::{Backend, Folder, SeqInput, graph::MlpSpec};
use kvasir_types::{KvDtype, TokenId};

/// Under this gap between the best and the second logit another correct implementation may choose differently. (With fp8
/// that leaves the demo model's answers, which are the same from 0.43 on.)
fn sure(dtype: KvDtype) -> f32 {
    if dtype == KvDtype::Fp8 { 1.0 } else { 0.05 }
}

/// How far a first log-probability may be from the float32 reference's. With f32 KV everything is float32 and only the
/// order of sums differs, which proves the arithmetic. Rounding keys and values moves the logits by as much as the
/// dtype is coarse: seen at most 0.012 in f16, the default, 0.083 in bf16 and 0.92 in fp8, whose three bits of mantissa
/// change answers, too; with an expert tipped, 3.4 in fp8. What that does to most rows is in `rounding.rs`.
fn tolerance(folder: &Folder, dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => 0.001,
        KvDtype::F16 => 0.02,
        KvDtype::Bf16 => 0.1,
        KvDtype::Fp8 if has_experts(folder) => f32::INFINITY,
        KvDtype::Fp8 => 1.2,
    }
}

/// The same for any logit at the references' positions. With routed experts a rounding can tip a choice between two, which
/// moves the logits by as much as the experts differ: 4.1 once in bf16. Nothing bounds that; how often it may happen is
/// bounded in `rounding.rs`. f16 tips none of these models' choices here, but brings one near (0.051).
fn tolerance_anywhere(folder: &Folder, dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::Bf16 if has_experts(folder) => f32::INFINITY,
        KvDtype::F16 if has_experts(folder) => 0.1,
        KvDtype::Fp8 => 2.5 * tolerance(folder, dtype),
        dtype => 2.0 * tolerance(folder, dtype),
    }
}

const ALL: [KvDtype; 4] = [KvDtype::Fp8, KvDtype::Bf16, KvDtype::F16, KvDtype::F32];

fn has_experts(folder: &Folder) -> bool {
    folder.config().layers.iter().any(|layer| matches!(layer.mlp, MlpSpec::Routed(_)))
}

/// Greedy over every golden prompt, whole and in chunks of 16: same bits, same first log-probabilities, same tokens.
fn check(dir: &Path, dtype: KvDtype) {
    let folder = Folder::open(dir).unwrap();
    let mut bench = Bench::new(&folder, 16, dtype, 2);
    let (mut worst, mut unsure) = (0f32, 0);
    for (i, line) in golden(dir).iter().enumerate() {
        let what = format!("{} line {i}", dir.display());
        let prompt = tokens(&line.prompt_ids);
        bench.forget();
        let tables = bench.tables(prompt.len() + line.output_ids.len());
        let other_tables = bench.tables(prompt.len());
        let whole = bench.prefill(&prompt, &tables, prompt.len());
        let chunked = bench.prefill(&prompt, &other_tables, 16);
        assert_same_bits(&whole, &chunked, &what);

        let apart = logprobs_apart(&whole, line);
        worst = nan_max(worst, apart);
        assert!(apart < tolerance(&folder, dtype), "{what}, {dtype:?}: log-probabilities differ by {apart}");
        let answer = answer(&mut bench, line, &whole, &tables);
        if answer != tokens(&line.output_ids) {
            let tipped = dtype != KvDtype::F16 && dtype != KvDtype::F32 && has_experts(&folder);
            assert!(
                tipped || line.margin < sure(dtype),
                "{what}, {dtype:?}: {answer:?}, expected {:?}",
                line.output_ids
            );
            unsure += 1;
        }
    }
    println!("{}, {dtype:?}: log-probabilities within {worst}, {unsure} other answers", dir.display());
}

#[test]
fn the_demo_model_answers_as_the_reference_does() {
    for dtype in ALL {
        check(&models().join("demo"), dtype);
    }
}

#[test]
fn tiny_models_of_every_family_answer_as_the_reference_does() {
    for name in tiny() {
        for dtype in ALL {
            check(&models().join("tiny").join(&name), dtype);
        }
    }
}

/// A family without a model here would be a claim that nothing checks.
#[test]
fn every_supported_family_has_a_model_here() {
    let has = |name: &String| Folder::open(&models().join("tiny").join(name)).unwrap().config().family;
    let families: HashSet<&str> = tiny().iter().map(has).collect();
    for family in kvasir_model::supported_families() {
        assert!(families.contains(family), "{family} is in no folder of models/tiny");
    }
}

/// Whole rows of logits, from early positions to far behind any window, in every cut and company.
#[test]
fn logits_are_the_references_at_every_position_in_every_chunk_and_batch() {
    for name in tiny() {
        let dir = models().join("tiny").join(&name);
        let folder = Folder::open(&dir).unwrap();
        let reference = Reference::read(&dir);
        for dtype in ALL {
            let mut first = None;
            for (chunk, batch) in [(usize::MAX, 1), (64, 3), (16, 16), (16, 1), (64, 16), (usize::MAX, 3)] {
                let rows = all_rows(&folder, dtype, &reference.tokens, chunk, batch);
                let what = format!("{name}, {dtype:?}, chunks of {chunk}, batch of {batch}");
                assert_same_bits(first.get_or_insert_with(|| rows.clone()), &rows, &what);
            }
            let rows = first.unwrap();
            let vocab = folder.config().vocab;
            let mut worst = 0f32;
            for (expected, &position) in reference.logits.chunks_exact(vocab).zip(&reference.positions) {
                let ours = &rows[position * vocab..][..vocab];
                worst = nan_max(worst, furthest(ours, expected));
            }
            println!("{name}, {dtype:?}: logits differ by {worst} at most");
            assert!(worst < tolerance_anywhere(&folder, dtype), "{name}, {dtype:?}: logits differ by {worst}");
        }
    }
}

/// Logits that hardly differ would be near to anything: a reference is worth something by how far it spreads them.
#[test]
fn references_spread_their_logits_far_beyond_any_tolerance() {
    for name in tiny() {
        let dir = models().join("tiny").join(&name);
        let vocab = Folder::open(&dir).unwrap().config().vocab;
        let reference = Reference::read(&dir);
        let rows: Vec<&[f32]> = reference.logits.chunks_exact(vocab).collect();
        for (row, position) in rows.iter().zip(&reference.positions) {
            let mean = row.iter().sum::<f32>() / vocab as f32;
            let spread = (row.iter().map(|logit| (logit - mean).powi(2)).sum::<f32>() / vocab as f32).sqrt();
            assert!(spread > 1.5, "{name}: the logits at {position} are spread by {spread}");
        }
        // Nor is one row like another.
        let nearest = |i: usize| rows[..i].iter().map(|row| furthest(row, rows[i])).fold(f32::INFINITY, f32::min);
        assert!((1..rows.len()).all(|i| nearest(i) > 1.5), "{name}: two positions look alike");
    }
}

/// `reference.safetensors`: logits at some positions of a run of tokens.
struct Reference {
    tokens: Vec<TokenId>,
    positions: Vec<usize>,
    logits: Vec<f32>,
}

impl Reference {
    fn read(dir: &Path) -> Self {
        let bytes = fs::read(dir.join("reference.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
        Self {
            tokens: words("tokens").into_iter().map(|word| TokenId(u32::from_le_bytes(word))).collect(),
            positions: words("positions").into_iter().map(|word| u32::from_le_bytes(word) as usize).collect(),
            logits: words("logits").into_iter().map(f32::from_le_bytes).collect(),
        }
    }
}

/// The logits after every token, computed in chunks beside `batch - 1` shorter sequences of the same beginning.
fn all_rows(folder: &Folder, dtype: KvDtype, tokens: &[TokenId], chunk: usize, batch: usize) -> Vec<f32> {
    let mut bench = Bench::new(folder, 16, dtype, 2);
    let chunk = chunk.min(tokens.len());
    let tables: Vec<_> = (0..batch).map(|_| bench.tables(tokens.len())).collect();
    let (vocab, mut rows) = (folder.config().vocab, Vec::new());
    for start in (0..tokens.len()).step_by(chunk) {
        let tables: Vec<_> = tables.iter().map(|tables| bench.with_gone(tables, start)).collect();
        // Sequence i ends 11 i tokens earlier than the first, the only one whose logits are looked at.
        let end = |i: usize| (start + chunk).min(tokens.len() - 11 * i);
        let inputs: Vec<_> = (0..batch)
            .filter(|&i| end(i) > start)
            .map(|i| SeqInput {
                tokens: &tokens[start..end(i)],
                start,
                tables: &tables[i],
                rows: if i == 0 { end(0) - start } else { i % 2 },
            })
            .collect();
        let logits = bench.backend.forward(&inputs, &mut |_| {}).unwrap();
        rows.extend_from_slice(&logits.rows[..inputs[0].rows * vocab]);
    }
    rows
}

/// A batch that decodes some sequences beside chunks of others, against each of them alone on one thread.
#[test]
fn a_sequence_in_a_mixed_batch_has_the_same_bits_as_alone() {
    for (name, every) in [("demo", 9), ("tiny/gemma3", 1), ("tiny/qwen3-moe", 1), ("tiny/deepseek-v2", 1)] {
        mixed_batch(&models().join(name), every);
    }
}

fn mixed_batch(dir: &Path, every: usize) {
    let folder = Folder::open(dir).unwrap();
    let lines = golden(dir);
    let prompts: Vec<Vec<TokenId>> = lines.iter().step_by(every).take(6).map(|line| tokens(&line.prompt_ids)).collect();

    let mut alone = Bench::new(&folder, 16, KvDtype::Bf16, 1);
    let expected: Vec<[Vec<f32>; 2]> = prompts
        .iter()
        .map(|prompt| {
            let tables = alone.tables(prompt.len() + 1);
            let first = alone.prefill(prompt, &tables, prompt.len());
            let second = alone.step(&[argmax(&first)], prompt.len(), &tables);
            [first, second.rows]
        })
        .collect();

    let mut batched = Bench::new(&folder, 16, KvDtype::Bf16, 2);
    let tables: Vec<_> = prompts.iter().map(|prompt| batched.tables(prompt.len() + 1)).collect();
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
            inputs.push(SeqInput { tokens, start, tables: &tables[i], rows: logits.into() });
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
    for name in ["tiny/qwen3-tied", "tiny/gemma3", "tiny/deepseek-v3"] {
        let folder = Folder::open(&models().join(name)).unwrap();
        let mut bench = Bench::new(&folder, 8, KvDtype::Bf16, 2);
        let prompt = tokens(&(0..50).map(|i| i * 13 % 1532).collect::<Vec<_>>());
        let tables = bench.tables(prompt.len());
        let (memory, layout, groups) = (bench.memory.clone(), bench.layout, folder.kv_groups());
        let layer_of = |layer: usize| -> Vec<u8> {
            let (group, place) = groups.place(layer);
            let slice = |&block| &memory.bytes()[layout.layer_offset(block, place)..][..layout.layer_bytes()];
            tables[group].iter().flat_map(slice).copied().collect()
        };
        let mut announced = Vec::new();
        let input = SeqInput { tokens: &prompt, start: 0, tables: &tables, rows: 0 };
        let logits = bench.backend.forward(&[input], &mut |layer| announced.push(layer_of(layer))).unwrap();
        assert!(logits.is_empty());
        assert_eq!(announced.len(), folder.config().layers.len());
        for (layer, bytes) in announced.iter().enumerate() {
            assert!(bytes.iter().any(|&byte| byte != 0));
            assert_eq!(*bytes, layer_of(layer), "{name} layer {layer}");
        }
    }
}
