//! Batches from outside: a bad one is an error that leaves the arena as it was, a good one the same whatever the cut.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{BLOCKS, Bench, TestMemory, assert_same_bits, models, tiny, tokens};
use kvasir_model::{Backend, Error, Folder, SeqInput, cpu::CpuBackend};
use kvasir_types::{BlockId, KvDtype, KvLayout, TokenId};
use proptest::prelude::*;

fn folder(name: &str) -> Folder {
    Folder::open(&models().join("tiny").join(name)).unwrap()
}

#[test]
fn a_bad_input_is_refused_before_anything_is_written() {
    let folder = folder("qwen3-f32");
    let mut bench = Bench::new(&folder, 4, KvDtype::Bf16, 1);
    let good = SeqInput { tokens: &[TokenId(5); 6], start: 0, tables: &[vec![BlockId(0), BlockId(1)]], rows: 1 };
    let outside = [vec![BlockId(0), BlockId(BLOCKS)]];
    let empty = [vec![]];
    let wide = [vec![BlockId(0); 300]];
    type Expected = fn(&Error) -> bool;
    let cases: Vec<(SeqInput<'_>, Expected)> = vec![
        (SeqInput { tokens: &[], ..good }, |e| matches!(e, Error::NoTokens { input: 1 })),
        (SeqInput { tokens: &[TokenId(1532)], ..good }, |e| matches!(e, Error::TokenOutOfVocabulary { input: 1, .. })),
        (SeqInput { tokens: &[TokenId(u32::MAX)], ..good }, |e| matches!(e, Error::TokenOutOfVocabulary { .. })),
        (SeqInput { start: 3, ..good }, |e| matches!(e, Error::TableTooShort { needed: 3, blocks: 2, .. })),
        (SeqInput { tables: &empty, ..good }, |e| matches!(e, Error::TableTooShort { .. })),
        (SeqInput { tables: &[], ..good }, |e| matches!(e, Error::WrongTables { input: 1, tables: 0, groups: 1 })),
        (SeqInput { rows: 7, ..good }, |e| matches!(e, Error::TooManyRows { rows: 7, tokens: 6, .. })),
        (SeqInput { tables: &outside, ..good }, |e| matches!(e, Error::BlockOutOfArena { blocks: 2048, .. })),
        (SeqInput { start: 1019, tables: &wide, ..good }, |e| matches!(e, Error::TooLong { max_len: 1024, .. })),
        (SeqInput { start: usize::MAX, ..good }, |e| matches!(e, Error::TooLong { .. })),
    ];
    for (bad, expected) in cases {
        let mut layers = 0;
        let error = bench.backend.forward(&[good, bad], &mut |_| layers += 1).unwrap_err();
        assert!(expected(&error), "{error}");
        assert_eq!(layers, 0);
        assert!(bench.memory.bytes().iter().all(|&byte| byte == 0), "{error}");
    }
    bench.backend.forward(&[good], &mut |_| {}).unwrap();
}

#[test]
fn a_block_past_what_is_needed_is_nobodys_business() {
    let folder = folder("qwen3-f32");
    let mut bench = Bench::new(&folder, 4, KvDtype::Bf16, 1);
    bench.step(&[TokenId(1)], 0, &[vec![BlockId(0), BlockId(u32::MAX)]]);
}

#[test]
fn a_layout_or_an_arena_that_does_not_fit_is_refused() {
    let folder = folder("qwen3-f32");
    let layout = folder.kv_layout(16, KvDtype::Bf16);
    let build =
        |layout: KvLayout, bytes: usize, threads| CpuBackend::new(&folder, layout, TestMemory::new(bytes), threads);
    let whole = layout.block_bytes();
    for bad in [
        KvLayout { layers: 3, ..layout },
        KvLayout { kv_heads: 2, ..layout },
        KvLayout { k_dim: 32, v_dim: 32, ..layout },
        KvLayout { block_size: 0, ..layout },
        KvLayout { block_size: u32::MAX, ..layout },
    ] {
        assert!(matches!(build(bad, whole, 1), Err(Error::Layout { .. })), "{bad:?}");
    }
    assert!(matches!(build(layout, whole - 1, 1), Err(Error::ArenaTooSmall { .. })));
    assert!(matches!(build(layout, whole, 0), Err(Error::Threads { .. })));
    assert!(build(layout, whole, 1).is_ok());
}

#[test]
fn an_empty_batch_has_no_logits() {
    let mut bench = Bench::new(&folder("qwen3-f32"), 4, KvDtype::Bf16, 1);
    let logits = bench.backend.forward(&[], &mut |_| {}).unwrap();
    assert!(logits.is_empty());
    assert_eq!((logits.len(), logits.iter().count()), (0, 0));
}

/// Only its own slots: the rest of the arena is other sequences'.
#[test]
fn a_step_writes_its_own_tokens_and_nothing_else() {
    let folder = folder("llama3-untied");
    let mut bench = Bench::new(&folder, 8, KvDtype::F32, 2);
    bench.step(&tokens(&[3, 4, 5]), 0, &[vec![BlockId(7)]]);
    let before = bench.memory.bytes().to_vec();
    bench.step(&tokens(&[9]), 3, &[vec![BlockId(7)]]);
    let row = bench.layout.k_dim as usize * 4;
    let block = bench.layout.block_offset(BlockId(7));
    for (at, (old, new)) in before.iter().zip(bench.memory.bytes()).enumerate() {
        let inside = at >= block && at < block + bench.layout.block_bytes();
        let slot = (at - block.min(at)) % bench.layout.key_bytes() / row;
        assert!(old == new || (inside && slot == 3), "byte {at}");
    }
}

/// Rows for several tokens of one input are what each of them would have got as the last one.
#[test]
fn many_rows_are_the_rows_of_shorter_runs() {
    for name in ["llama3-untied", "gemma3", "deepseek-v3"] {
        let mut bench = Bench::new(&folder(name), 4, KvDtype::F16, 2);
        let prompt = tokens(&(0..61).map(|i| i * 37 % 1532).collect::<Vec<_>>());
        let tables = bench.tables(prompt.len());
        let whole = SeqInput { tokens: &prompt, start: 0, tables: &tables, rows: 5 };
        let logits = bench.backend.forward(&[whole], &mut |_| {}).unwrap();
        assert_eq!(logits.len(), 5);
        for (row, end) in logits.iter().zip(prompt.len() - 4..) {
            let tables = bench.tables(end);
            let alone = SeqInput { tokens: &prompt[..end], start: 0, tables: &tables, rows: 1 };
            let expected = bench.backend.forward(&[alone], &mut |_| {}).unwrap();
            assert_same_bits(row, &expected.rows, &format!("{name} after {end} tokens"));
        }
    }
}

#[test]
fn a_sequence_goes_on_from_copied_blocks_as_from_its_own() {
    let folder = folder("qwen2-tied");
    let mut bench = Bench::new(&folder, 4, KvDtype::Bf16, 1);
    let prompt = tokens(&(0..11).map(|i| i * 53 % 1532).collect::<Vec<_>>());
    let (own, copy) = (bench.tables(12), bench.tables(12));
    bench.prefill(&prompt, &own, prompt.len());
    let copies: Vec<_> = own[0].iter().copied().zip(copy[0].iter().copied()).collect();
    bench.backend.copy_blocks(&copies).unwrap();
    let [a, b] = [own, copy].map(|table| bench.step(&tokens(&[7]), 11, &table));
    assert_same_bits(&a.rows, &b.rows, "after the copy");
    let outside = bench.backend.copy_blocks(&[(BlockId(0), BlockId(BLOCKS))]);
    assert!(matches!(outside, Err(Error::BlockOutOfArena { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The law of the seam on random cuts: any chunks, any block size, any thread count, any company, every tiny family.
    #[test]
    fn no_cut_changes_a_bit(
        name in prop::sample::select(tiny()),
        dtype in prop::sample::select(vec![KvDtype::Bf16, KvDtype::F16, KvDtype::F32]),
        (one, other) in (1u32..40, 1u32..200),
        threads in 1usize..4,
        prompt in prop::collection::vec(0u32..1532, 2..260),
        cuts in prop::collection::vec(1usize..60, 1..12),
    ) {
        let folder = folder(&name);
        let prompt = tokens(&prompt);
        let mut whole = Bench::new(&folder, one, dtype, 1);
        let tables = whole.tables(prompt.len());
        let expected = whole.prefill(&prompt, &tables, prompt.len());

        let mut cut = Bench::new(&folder, other, dtype, threads);
        let (tables, neighbour) = (cut.tables(prompt.len()), cut.tables(64));
        let (mut start, mut last) = (0, Vec::new());
        for length in cuts.into_iter().cycle() {
            let end = (start + length).min(prompt.len());
            let company =
                SeqInput { tokens: &prompt[..length.min(prompt.len())], start: 0, tables: &neighbour, rows: 0 };
            let tables = cut.with_gone(&tables, start);
            let rows = usize::from(end == prompt.len());
            let own = SeqInput { tokens: &prompt[start..end], start, tables: &tables, rows };
            last = cut.backend.forward(&[company, own], &mut |_| {}).unwrap().rows;
            start = end;
            if start == prompt.len() {
                break;
            }
        }
        assert_same_bits(&expected, &last, &name);
    }
}
