//! What is measured: loads, who carries them, and the figures that come out.

use std::collections::HashMap;

/// The shape whose weights everybody has, and one that only shows that all of this works.
pub const SHAPE: &str = "qwen3-0.6b";
pub const SMOKE_SHAPE: &str = "qwen3-tiny";
/// Threads that everybody computes on.
pub const THREADS: usize = 2;
/// Tokens of the prompt of prefill.
pub const PROMPT: usize = 2048;
/// Steps that are not measured.
pub const WARM_UP: usize = 4;

/// Work that several programs can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Load {
    /// So many sequences write one token each per step.
    Decode(usize),
    /// A prompt is computed.
    Prefill,
}

impl Load {
    /// As the table names it.
    pub fn name(self) -> String {
        match self {
            Self::Decode(batch) => format!("decode, batch {batch}"),
            Self::Prefill => format!("prefill, {PROMPT} tokens"),
        }
    }

    /// Tokens of each sequence's prompt.
    pub fn context(self) -> usize {
        match self {
            // Prompts of many sequences take long to compute and are not what is measured.
            Self::Decode(33..) => 32,
            Self::Decode(_) => 64,
            Self::Prefill => PROMPT,
        }
    }

    /// Steps to measure.
    pub fn steps(self) -> usize {
        match self {
            Self::Decode(1) => 32,
            Self::Decode(2..=16) => 16,
            Self::Decode(_) => 8,
            Self::Prefill => 1,
        }
    }

    /// Prompt `stream`: the same numbers as `kvasir-engine-bench` makes with seed 1.
    pub fn prompt(self, stream: u64, vocab: u64) -> Vec<u64> {
        (0..self.context() as u64).map(|i| (1_000_003 + stream * 104_729 + i * 7919) % vocab).collect()
    }

    /// Who carries it in a repetition. What has no goal is measured less often.
    pub fn who(self, repetition: usize) -> Vec<Who> {
        use Who::{Llama, LlamaQ8, Ours, OursExact, OursInt8, Transformers};
        match (self, repetition) {
            (Self::Decode(4 | 64), _) => vec![Ours, Llama],
            (_, 0 | 1) => vec![Ours, Llama, Transformers, OursExact, OursInt8, LlamaQ8],
            (_, 2) => vec![Ours, Llama, OursInt8, LlamaQ8],
            _ => vec![Ours, Llama],
        }
    }
}

/// The loads of a repetition.
pub fn loads(repetition: usize, quick: bool) -> Vec<Load> {
    let mut loads = vec![Load::Decode(1), Load::Decode(16), Load::Prefill];
    if repetition == 0 && !quick {
        loads.extend([Load::Decode(4), Load::Decode(64)]);
    }
    loads
}

/// How often our own scenarios are measured.
pub fn scenarios(quick: bool) -> usize {
    if quick { 1 } else { 3 }
}

/// Who carries a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// Activations rounded to bf16 for products, as the rivals' are.
    Ours,
    /// Activations in f32: the default.
    OursExact,
    OursInt8,
    Llama,
    LlamaQ8,
    Transformers,
}

impl Who {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "fast products",
            Self::OursExact => "exact products",
            Self::OursInt8 => "int8 weights, fast products",
            Self::Llama => "llama.cpp bf16",
            Self::LlamaQ8 => "llama.cpp q8_0",
            Self::Transformers => "transformers bf16",
        }
    }
}

/// A figure and what it stands beside, by repetition.
#[derive(Default)]
pub struct Pairs {
    pub ours: Vec<f64>,
    pub theirs: Vec<f64>,
}

impl Pairs {
    pub fn add(&mut self, ours: f64, theirs: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }
}

/// What an operation of the cache costs.
pub struct Operation {
    pub name: String,
    /// With a million blocks.
    pub many_ns: f64,
    /// With a thousand.
    pub few_ns: f64,
}

/// All that was found, in order of the repetitions, and why nothing was.
#[derive(Default)]
pub struct Found {
    tokens_per_s: HashMap<(Who, Load), Vec<f64>>,
    missing: HashMap<Who, String>,
    /// Weights read per second and what memory can be read at, by who and load.
    pub reads: HashMap<(Who, Load), Pairs>,
    /// Products per second and what the processor can do.
    pub products: HashMap<(Who, Load), Pairs>,
    /// Longest gap with chunks and without, in ms.
    pub gaps: Pairs,
    /// TTFT of the second request and of the first, in ms.
    pub prefix: Pairs,
    /// Peak memory, and weights and cache, in MiB.
    pub memory: Pairs,
    /// Or why they were not measured.
    pub cache: Option<Result<Vec<Operation>, String>>,
}

impl Found {
    pub fn add(&mut self, who: Who, load: Load, tokens_per_s: f64) {
        self.tokens_per_s.entry((who, load)).or_default().push(tokens_per_s);
    }

    /// Notes that somebody can't be measured (any more). What was found before stays.
    pub fn miss(&mut self, who: Who, reason: &str) {
        println!("{} is left out: {reason}", who.name());
        self.missing.entry(who).or_insert_with(|| reason.to_owned());
    }

    pub fn is_missing(&self, who: Who) -> bool {
        self.missing.contains_key(&who)
    }

    /// One figure of each repetition, or why there is none.
    pub fn get(&self, who: Who, load: Load) -> Result<&[f64], &str> {
        match self.tokens_per_s.get(&(who, load)) {
            Some(figures) => Ok(figures),
            None => Err(self.missing.get(&who).map_or("not measured", String::as_str)),
        }
    }
}
