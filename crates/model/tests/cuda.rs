//! The CUDA backend on an emulated device: the kernels that a GPU runs, compiled for the processor, under the same host code.
//! What differs on a real one is the compiler, the hardware, and time.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/emulated.rs"]
mod emulated;

use common::{Bench, answer, assert_same_bits, furthest, golden, logprobs_apart, models, nan_max, tiny, tokens};
use emulated::emulated;
use kvasir_model::{
    Backend, Folder, SeqInput,
    cpu::Compute,
    cuda::{CudaBackend, Options},
};
use kvasir_types::{KvDtype, TokenId};

const OPTIONS: Options = Options { ordinal: 0, compute: Compute::Exact, max_tokens: 64 };

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

/// Whole rows of logits beside the processor's, of every family, in two cuts and companies.
#[test]
fn every_family_computes_what_the_processor_does() {
    for name in tiny() {
        let folder = Folder::open(&models().join("tiny").join(&name)).unwrap();
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
        let ours = rows(bench(&folder, 16, KvDtype::F32), 41);
        let others = rows(bench(&folder, 8, KvDtype::F32), 13);
        assert_same_bits(&ours, &others, &name);
        let expected = rows(Bench::new(&folder, 16, KvDtype::F32, 1), 41);
        let apart = furthest(&ours, &expected);
        println!("{name}: logits differ by {apart}");
        assert!(nan_max(0.0, apart) < 0.02, "{name}: logits differ by {apart}");
    }
}
