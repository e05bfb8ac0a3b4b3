//! The CUDA backend on an emulated device: the kernels that a GPU runs, compiled for the processor, under the same host code.
//! What differs on a real one is the compiler, the hardware, and time.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/emulated.rs"]
mod emulated;

use common::{
    Bench, TestMemory, answer, argmax, assert_same_bits, furthest, golden, logprobs_apart, models, nan_max, tiny,
    tokens,
};
use emulated::emulated;
use kvasir_model::{
    Backend, Folder, Need, Row, SeqInput,
    cpu::Compute,
    cuda::{CudaBackend, Options},
    likeliest,
    quantize::{Scheme, quantize},
};
use kvasir_types::{BlockId, KvDtype, TokenId, mix};

const OPTIONS: Options = Options { ordinal: 0, compute: Compute::Exact, max_tokens: 64, graphs: true };

/// Enough for these tests: the emulated device has not much memory.
const BLOCKS: u32 = 128;

fn bench(folder: &Folder, block_size: u32, dtype: KvDtype) -> Bench {
    emulated();
    Bench::over(folder, block_size, dtype, BLOCKS, |layout, memory| {
        Box::new(CudaBackend::new(folder, layout, memory, OPTIONS).unwrap())
    })
}

/// Some of the golden file: emulating takes its time.
#[test]
fn the_demo_model_answers_as_the_reference_does() {
    let dir = models().join("demo");
    let folder = Folder::open(&dir).unwrap();
    let mut bench = bench(&folder, 16, KvDtype::F16);
    for line in golden(&dir).iter().step_by(10) {
        let prompt = tokens(&line.prompt_ids);
        bench.forget();
        let tables = bench.tables(prompt.len() + line.output_ids.len());
        let first = bench.prefill(&prompt, &tables, prompt.len());
        let apart = logprobs_apart(&first, line);
        assert!(apart < 0.05, "log-probabilities differ by {apart}");
        assert_eq!(answer(&mut bench, line, &first, &tables), tokens(&line.output_ids));
    }
}

/// One term of each activation instead of two, as most programs compute.
#[test]
fn fast_products_are_near_the_reference() {
    emulated();
    let dir = models().join("demo");
    let folder = Folder::open(&dir).unwrap();
    let mut bench = Bench::over(&folder, 16, KvDtype::F16, BLOCKS, |layout, memory| {
        Box::new(CudaBackend::new(&folder, layout, memory, Options { compute: Compute::Fast, ..OPTIONS }).unwrap())
    });
    for line in golden(&dir).iter().step_by(20) {
        let prompt = tokens(&line.prompt_ids);
        bench.forget();
        let tables = bench.tables(prompt.len());
        let first = bench.prefill(&prompt, &tables, prompt.len());
        let apart = logprobs_apart(&first, line);
        assert!(apart < 0.2, "log-probabilities differ by {apart}");
        assert_eq!(argmax(&first).0, line.output_ids[0]);
    }
}

/// Where the likeliest tokens are enough the device lists them: those of the very logits that it would have brought.
#[test]
fn rows_that_need_not_be_whole_are_lists_of_the_likeliest_tokens() {
    let folder = Folder::open(&models().join("tiny/gemma2")).unwrap();
    let mut bench = bench(&folder, 16, KvDtype::F16);
    let prompt = tokens(&(0..40).map(|i| i * 37 % 1532).collect::<Vec<_>>());
    let tables: Vec<_> = (0..4).map(|_| bench.tables(prompt.len())).collect();
    // A prompt, one without logits, one token, and a run of drafted ones; the device puts the prompt last.
    let parts = [(0..20, 2), (0..4, 0), (0..1, 1), (0..3, 3)];
    let inputs = parts.iter().zip(&tables).map(|((range, rows), tables)| SeqInput {
        tokens: &prompt[range.clone()],
        start: 0,
        tables,
        rows: *rows,
    });
    let inputs: Vec<_> = inputs.collect();
    let whole = bench.backend.forward(&inputs, &mut |_| {}).unwrap();
    assert_eq!(whole.len(), 6);
    let drawn = |noise| Need::Drawn { noise, scale: 1.5 };
    for needs in [
        [Need::Whole, Need::Whole, Need::Whole, Need::Likeliest, Need::Likeliest, Need::Likeliest],
        [Need::Likeliest, drawn(5), Need::Whole, drawn(77), Need::Likeliest, drawn(1 << 60)],
        [drawn(1), drawn(2), drawn(3), drawn(4), drawn(5), drawn(6)],
        [Need::Whole; 6],
    ] {
        let mut rows = bench.backend.forward_few(&inputs, &needs, &mut |_| {}).unwrap();
        assert_eq!((rows.len(), rows.vocab()), (6, whole.vocab));
        for (index, (expected, need)) in whole.iter().zip(needs).enumerate() {
            let largest = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            match (rows.row(index).unwrap(), need) {
                (Row::Whole(row), Need::Whole) => assert_same_bits(row, expected, "a whole row"),
                (Row::Few { tokens, max }, Need::Likeliest) => {
                    assert_eq!((tokens, max), (&likeliest(expected)[..], largest), "row {index}");
                }
                (Row::Few { tokens, max }, Need::Drawn { noise, scale }) => {
                    let sum = |token: usize| {
                        let bits =
                            mix(noise.wrapping_add((token as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))) >> 12;
                        let unit = (bits as f64 + 0.5) / (1u64 << 52) as f64;
                        f64::from(expected[token]) * f64::from(scale) - (-unit.ln()).ln()
                    };
                    let mut order: Vec<usize> = (0..expected.len()).collect();
                    order.sort_by(|&a, &b| sum(b).total_cmp(&sum(a)));
                    // The last places are rounding's; the first are not, with these numbers.
                    let first: Vec<usize> = tokens[..16].iter().map(|(_, token)| token.0 as usize).collect();
                    assert_eq!(first, order[..16]);
                    assert_eq!((tokens.len(), max), (256, largest));
                    assert!(tokens.iter().all(|&(logit, token)| logit == expected[token.0 as usize]));
                }
                other => panic!("row {index} is {other:?}"),
            }
        }
    }
}

/// Keys and values in the host's arena are complete when `after_layer` says so, layer by layer.
#[test]
fn a_layer_is_not_written_again_after_it_was_announced() {
    emulated();
    let folder = Folder::open(&models().join("tiny/gemma3")).unwrap();
    let (layout, groups) = (folder.kv_layout(8, KvDtype::Bf16), folder.kv_groups());
    let memory = TestMemory::new(layout.block_bytes() * BLOCKS as usize);
    let mut backend = CudaBackend::new(&folder, layout, memory.clone(), OPTIONS).unwrap();
    let prompt: Vec<TokenId> = (0..50).map(|i| TokenId(i * 13 % 1532)).collect();
    let tables: Vec<Vec<BlockId>> =
        (0..groups.len() as u32).map(|group| (8 * group..8 * group + 7).rev().map(BlockId).collect()).collect();
    let layer_of = |layer: usize| -> Vec<u8> {
        let (group, place) = groups.place(layer);
        let slice = |&block| &memory.bytes()[layout.layer_offset(block, place)..][..layout.layer_bytes()];
        tables[group].iter().flat_map(slice).copied().collect()
    };
    let mut announced = Vec::new();
    let input = SeqInput { tokens: &prompt, start: 0, tables: &tables, rows: 0 };
    let logits = backend.forward(&[input], &mut |_| announced.push(layer_of(announced.len()))).unwrap();
    assert!(logits.is_empty());
    assert_eq!(announced.len(), folder.config().layers.len());
    for (layer, bytes) in announced.iter().enumerate() {
        assert!(bytes.iter().any(|&byte| byte != 0));
        assert_eq!(*bytes, layer_of(layer), "layer {layer}");
    }
}

/// Whole rows of logits beside the processor's, of every family, in two cuts and companies.
#[test]
fn every_family_computes_what_the_processor_does() {
    for name in tiny() {
        computes_what_the_processor_does(&name, &Folder::open(&models().join("tiny").join(&name)).unwrap());
    }
}

/// The same where blocks of 8-bit weights share a scale: wider than a block, of experts, of latents.
#[test]
fn scales_of_blocks_are_the_processors() {
    for name in ["demo", "tiny/qwen3-moe", "tiny/deepseek-v3"] {
        let dir = tempfile::tempdir().unwrap();
        quantize(&models().join(name), dir.path(), Scheme::Fp8Block).unwrap();
        computes_what_the_processor_does(name, &Folder::open(dir.path()).unwrap());
    }
}

fn computes_what_the_processor_does(name: &str, folder: &Folder) {
    let prompt: Vec<TokenId> = (0..70).map(|i| TokenId(i * 37 % 1532)).collect();
    let rows = |mut bench: Bench, chunk: usize| {
        let (tables, company) = (bench.tables(prompt.len()), bench.tables(prompt.len()));
        let mut rows = Vec::new();
        for start in (0..prompt.len()).step_by(chunk) {
            let end = (start + chunk).min(prompt.len());
            let tables = bench.with_gone(&tables, start);
            let own = SeqInput { tokens: &prompt[start..end], start, tables: &tables, rows: end - start };
            let other = SeqInput { tokens: &prompt[..3], start: 0, tables: &company, rows: 2 };
            let logits = bench.backend.forward(&[own, other], &mut |_| {}).unwrap();
            rows.extend_from_slice(&logits.rows[..(end - start) * logits.vocab]);
        }
        rows
    };
    // In f16 a difference in the last place may be rounded to one of a thousandth. Few do both: emulating takes its time.
    let in_f16 = ["deepseek-v2", "gemma2", "gemma3", "llama3-untied", "mistral-window"].contains(&name);
    let dtypes = [(KvDtype::F32, 0.02), (KvDtype::F16, 0.1)];
    for (dtype, tolerance) in dtypes.into_iter().take(if in_f16 { 2 } else { 1 }) {
        let ours = rows(bench(folder, 16, dtype), 41);
        let others = rows(bench(folder, 8, dtype), 13);
        assert_same_bits(&ours, &others, name);
        let expected = rows(Bench::new(folder, 16, dtype, 1), 41);
        let apart = furthest(&ours, &expected);
        println!("{name}, {dtype:?}: logits differ by {apart}");
        assert!(nan_max(0.0, apart) < tolerance, "{name}, {dtype:?}: logits differ by {apart}");
    }
}
