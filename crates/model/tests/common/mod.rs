//! What the tests of this crate share: an arena of plain memory, and sequences that fill it.
#![allow(unsafe_code, reason = "a test arena is raw memory, as the real one is")]
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::allow_attributes,
    reason = "every test binary uses its own part of this module"
)]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use kvasir_model::{
    Backend, Folder, Logits, SeqInput,
    cpu::{Compute, CpuBackend, HostArena},
};
use kvasir_types::{BlockId, GroupKind, HostMemory, KvDtype, KvLayout, TokenId};

/// An arena whose bytes can be looked at.
pub struct TestMemory(Arc<HostArena>);

impl TestMemory {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(HostArena::new(bytes).unwrap()))
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: an arena is zeroed memory of that length; tests call this only while no backend computes.
        unsafe { std::slice::from_raw_parts(self.0.base(), self.0.len()) }
    }
}

impl HostMemory for TestMemory {
    fn base(&self) -> *mut u8 {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
}

/// The folders of `models/tiny`, by name.
pub fn tiny() -> Vec<String> {
    let names = fs::read_dir(models().join("tiny")).unwrap();
    let mut names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub fn models() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models")
}

/// A backend over an arena of its own.
pub struct Bench {
    pub backend: Box<dyn Backend>,
    pub memory: Arc<TestMemory>,
    pub layout: KvLayout,
    blocks: u32,
    next: u32,
}

pub const BLOCKS: u32 = 2048;

impl Bench {
    pub fn new(folder: &Folder, block_size: u32, dtype: KvDtype, threads: usize) -> Self {
        Self::with_compute(folder, block_size, dtype, threads, Compute::default())
    }

    pub fn with_compute(folder: &Folder, block_size: u32, dtype: KvDtype, threads: usize, compute: Compute) -> Self {
        Self::over(folder, block_size, dtype, BLOCKS, |layout, memory| {
            Box::new(CpuBackend::with_compute(folder, layout, memory, threads, compute).unwrap())
        })
    }

    /// One over an arena of so many blocks.
    pub fn over(
        folder: &Folder,
        block_size: u32,
        dtype: KvDtype,
        blocks: u32,
        backend: impl FnOnce(KvLayout, Arc<dyn HostMemory>) -> Box<dyn Backend>,
    ) -> Self {
        let layout = folder.kv_layout(block_size, dtype);
        let memory = TestMemory::new(layout.block_bytes() * blocks as usize);
        let backend = backend(layout, memory.clone());
        Self { backend, memory, layout, blocks, next: 0 }
    }

    /// A table per group of layers for `tokens` tokens.
    pub fn tables(&mut self, tokens: usize) -> Vec<Vec<BlockId>> {
        (0..self.backend.groups().len()).map(|_| self.table(tokens)).collect()
    }

    /// A table for `tokens` tokens, of blocks that are neither neighbours nor in order.
    pub fn table(&mut self, tokens: usize) -> Vec<BlockId> {
        (0..self.layout.blocks_for(tokens))
            .map(|_| {
                self.next += 1;
                assert!(self.next <= self.blocks);
                BlockId((self.next * 101) % self.blocks)
            })
            .collect()
    }

    pub fn forget(&mut self) {
        self.next = 0;
    }

    pub fn step(&mut self, tokens: &[TokenId], start: usize, tables: &[Vec<BlockId>]) -> Logits {
        let tables = self.with_gone(tables, start);
        let input = SeqInput { tokens, start, tables: &tables, rows: 1 };
        self.backend.forward(&[input], &mut |_| {}).unwrap()
    }

    /// The tables with those blocks gone that no token from `start` on looks at.
    pub fn with_gone(&self, tables: &[Vec<BlockId>], start: usize) -> Vec<Vec<BlockId>> {
        let mut tables = tables.to_vec();
        for (group, table) in self.backend.groups().iter().zip(&mut tables) {
            if let GroupKind::Sliding { window } = group.kind {
                let gone = (start + 1).saturating_sub(window as usize) / self.layout.block_size as usize;
                table[..gone].fill(BlockId::GONE);
            }
        }
        tables
    }

    /// Computes a prompt in chunks of `chunk`; the logits after its last token.
    pub fn prefill(&mut self, prompt: &[TokenId], tables: &[Vec<BlockId>], chunk: usize) -> Vec<f32> {
        let mut last = Vec::new();
        for (i, part) in prompt.chunks(chunk).enumerate() {
            last = self.step(part, i * chunk, tables).rows;
        }
        last
    }
}

pub fn argmax(row: &[f32]) -> TokenId {
    let best = row.iter().enumerate().fold(0, |best, (i, value)| if *value > row[best] { i } else { best });
    TokenId(best as u32)
}

pub fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// A prompt and the reference implementation's greedy answer to it.
#[derive(serde::Deserialize)]
pub struct Golden {
    pub prompt_ids: Vec<u32>,
    pub output_ids: Vec<u32>,
    /// Of the likeliest first tokens.
    pub first_logprobs: HashMap<u32, f32>,
    /// The least distance between the best and the second logit.
    pub margin: f32,
}

/// All of a model's.
pub fn golden(dir: &Path) -> Vec<Golden> {
    let text = fs::read_to_string(dir.join("golden.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The greedy answer to the prompt in `tables`, `first` being the logits after it.
pub fn answer(bench: &mut Bench, line: &Golden, first: &[f32], tables: &[Vec<BlockId>]) -> Vec<TokenId> {
    let mut answer = vec![argmax(first)];
    while answer.len() < line.output_ids.len() {
        let at = line.prompt_ids.len() + answer.len() - 1;
        answer.push(argmax(&bench.step(&answer[answer.len() - 1..], at, tables).rows));
    }
    answer
}

/// How far the log-probabilities of a row are from the reference's, at most.
pub fn logprobs_apart(row: &[f32], line: &Golden) -> f32 {
    let apart = |(&token, &expected): (&u32, &f32)| (log_softmax(row, token as usize) - expected).abs();
    line.first_logprobs.iter().map(apart).fold(0.0, nan_max)
}

/// The largest distance between two rows.
pub fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, nan_max)
}

/// What is not a number is as far away as can be: `f32::max` would drop it.
pub fn nan_max(worst: f32, next: f32) -> f32 {
    if next.is_nan() { f32::INFINITY } else { worst.max(next) }
}

fn log_softmax(row: &[f32], token: usize) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&v| f64::from(v - max).exp()).sum();
    row[token] - max - sum.ln() as f32
}

/// Equality of floats by their bits, telling where they differ.
pub fn assert_same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(a.to_bits() == b.to_bits(), "{what}: element {i} is {a:e} here and {b:e} there");
    }
}
