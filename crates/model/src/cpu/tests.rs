//! Whole forwards on every instruction set of this machine.

use std::path::Path;

use kvasir_types::{BlockId, KvDtype, TokenId};

use super::*;

#[test]
fn every_instruction_set_returns_the_same_logits() {
    for (name, compute) in [
        ("demo", Compute::Exact),
        ("demo", Compute::Fast),
        ("tiny/qwen3-f32", Compute::Exact),
        ("tiny/llama-linear-f16", Compute::Exact),
        ("tiny/gemma2", Compute::Exact),
        ("tiny/mixtral", Compute::Fast),
        ("tiny/deepseek-v3", Compute::Exact),
    ] {
        let folder = Folder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name)).unwrap();
        let layout = folder.kv_layout(16, KvDtype::Bf16);
        let tokens: Vec<_> = (0..41).map(|i| TokenId(i * 37 % 1532)).collect();
        let groups = folder.kv_groups().len() as u32;
        let tables: Vec<Vec<_>> = (0..groups).map(|group| (3 * group..3 * group + 3).map(BlockId).collect()).collect();
        let all: Vec<Logits> = Isa::available()
            .into_iter()
            .map(|isa| {
                let arena = HostArena::new(layout.block_bytes() * 3 * groups as usize).unwrap();
                let mut backend = CpuBackend::of(&folder, layout, arena, Arc::new(Alone), (1, compute, isa)).unwrap();
                let prompt = SeqInput { tokens: &tokens[..40], start: 0, tables: &tables, rows: 1 };
                let first = backend.forward(&[prompt], &mut |_| {}).unwrap();
                let next = SeqInput { tokens: &tokens[40..], start: 40, tables: &tables, rows: 1 };
                let second = backend.forward(&[next], &mut |_| {}).unwrap();
                Logits { vocab: first.vocab, rows: [first.rows, second.rows].concat() }
            })
            .collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{name} {compute:?}");
        assert!(all[0].rows.iter().all(|value| value.is_finite()));
    }
}
