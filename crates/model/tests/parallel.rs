//! Tensor parallelism on the processor: whatever the number of ranks, the same bits, in logits and in blocks.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use common::{Bench, answer, assert_same_bits, golden, models, tiny, tokens};
use kvasir_model::{
    Backend, Device, Error, Folder, Options, SeqInput,
    cpu::Compute,
    quantize::{Scheme, quantize},
};
use kvasir_types::{BlockId, HostMemory, KvDtype, KvLayout, TokenId};

const BLOCKS: u32 = 256;

fn open(
    folder: &Folder,
    layout: KvLayout,
    memory: Arc<dyn HostMemory>,
    tensor_parallel: usize,
    compute: Compute,
) -> Result<Box<dyn Backend>, Error> {
    let options = Options { device: Device::Cpu, compute, threads: 2, tensor_parallel, max_tokens: 64 };
    Device::open(folder, layout, memory, options)
}

fn bench(folder: &Folder, degree: usize, compute: Compute) -> Bench {
    Bench::over(folder, 8, KvDtype::F16, BLOCKS, |layout, memory| {
        open(folder, layout, memory, degree, compute).unwrap()
    })
}

/// How many ranks a family's model can be divided among.
fn degrees(folder: &Folder) -> Vec<usize> {
    let layout = folder.kv_layout(8, KvDtype::F16);
    let memory = || common::TestMemory::new(layout.block_bytes());
    let opens = |degree: usize| match open(folder, layout, memory(), degree, Compute::Exact) {
        Ok(_) => true,
        Err(Error::Degree { degree: refused, count, .. }) => {
            assert!(refused == degree && count % degree != 0);
            false
        }
        Err(error) => panic!("{error}"),
    };
    [2, 4, 8].into_iter().filter(|&degree| opens(degree)).collect()
}

#[test]
fn every_family_has_the_same_bits_on_any_number_of_ranks() {
    let mut all = Vec::new();
    // 8-bit weights of which blocks share a scale: ranks' rows begin anywhere in a block.
    let rounded = ["demo", "tiny/deepseek-v3", "tiny/qwen3-moe"].map(|name| {
        let dir = tempfile::tempdir().unwrap();
        quantize(&models().join(name), dir.path(), Scheme::Fp8Block).unwrap();
        (format!("{name} in fp8 blocks"), Folder::open(dir.path()).unwrap())
    });
    let plain = tiny().into_iter().map(|name| {
        let folder = Folder::open(&models().join("tiny").join(&name)).unwrap();
        (name, folder)
    });
    for (name, folder) in plain.chain(rounded) {
        let prompt: Vec<TokenId> = (0..70).map(|i| TokenId(i * 37 % 1532)).collect();
        // Two cuts, and company that asks for rows of its own.
        let compute = |degree: usize, chunk: usize, compute: Compute| {
            let mut bench = bench(&folder, degree, compute);
            let (tables, company) = (bench.tables(prompt.len()), bench.tables(prompt.len()));
            let (mut rows, mut layers) = (Vec::new(), Vec::new());
            for start in (0..prompt.len()).step_by(chunk) {
                let end = (start + chunk).min(prompt.len());
                let tables = bench.with_gone(&tables, start);
                let own = SeqInput { tokens: &prompt[start..end], start, tables: &tables, rows: end - start };
                let other = SeqInput { tokens: &prompt[..3], start: 0, tables: &company, rows: 2 };
                layers.clear();
                let logits = bench.backend.forward(&[own, other], &mut |layer| layers.push(layer)).unwrap();
                assert_eq!((logits.vocab, logits.len()), (1532, end - start + 2));
                rows.extend_from_slice(&logits.rows[..(end - start) * logits.vocab]);
            }
            assert_eq!(layers, (0..folder.config().layers.len()).collect::<Vec<_>>());
            // A block that goes on elsewhere: every rank copies its heads.
            let (from, to) = (tables[0][tables[0].len() - 1], bench.table(1)[0]);
            bench.backend.copy_blocks(&[(from, to)]).unwrap();
            (rows, bench.memory.clone())
        };
        let (whole, blocks) = compute(1, 41, Compute::Exact);
        let degrees = degrees(&folder);
        for &degree in &degrees {
            let what = format!("{name} on {degree} ranks");
            let (rows, others) = compute(degree, 41, Compute::Exact);
            assert_same_bits(&rows, &whole, &what);
            assert!(others.bytes() == blocks.bytes(), "{what}: blocks differ");
            let (rows, _) = compute(degree, 13, Compute::Exact);
            assert_same_bits(&rows, &whole, &what);
        }
        if let Some(&degree) = degrees.last() {
            let (fast, _) = compute(degree, 41, Compute::Fast);
            assert_same_bits(&fast, &compute(1, 41, Compute::Fast).0, &name);
        }
        all.push((name, degrees));
    }
    let able = |degree: usize| all.iter().filter(|(_, degrees)| degrees.contains(&degree)).count();
    assert!(able(2) >= 10 && able(4) >= 4, "{all:?}");
}

/// A prompt by two ranks, its answer by one, and the other way round.
#[test]
fn an_answer_goes_on_with_another_number_of_ranks() {
    let dir = models().join("demo");
    let folder = Folder::open(&dir).unwrap();
    for (line, (first, then)) in golden(&dir).iter().zip([(2, 1), (1, 2), (2, 2)].into_iter().cycle()).step_by(4) {
        let prompt = tokens(&line.prompt_ids);
        let mut bench = bench(&folder, first, Compute::Exact);
        let tables = bench.tables(prompt.len() + line.output_ids.len());
        let row = bench.prefill(&prompt, &tables, 24);
        bench.backend = open(&folder, bench.layout, bench.memory.clone(), then, Compute::Exact).unwrap();
        assert_eq!(answer(&mut bench, line, &row, &tables), tokens(&line.output_ids));
    }
}

#[test]
fn a_bad_batch_is_refused_and_the_ranks_go_on() {
    let folder = Folder::open(&models().join("tiny/llama3-untied")).unwrap();
    let mut bench = bench(&folder, 2, Compute::Exact);
    let outside = [vec![BlockId(BLOCKS)]];
    let bad = SeqInput { tokens: &[TokenId(1)], start: 0, tables: &outside, rows: 1 };
    assert!(matches!(bench.backend.forward(&[bad], &mut |_| {}), Err(Error::BlockOutOfArena { .. })));
    assert!(bench.backend.copy_blocks(&[(BlockId(0), BlockId(BLOCKS))]).is_err());
    let tables = bench.tables(3);
    let good = SeqInput { tokens: &[TokenId(1)], start: 0, tables: &tables, rows: 1 };
    assert_eq!(bench.backend.forward(&[good], &mut |_| {}).unwrap().len(), 1);
    assert!(bench.backend.forward(&[], &mut |_| {}).unwrap().is_empty());
}
