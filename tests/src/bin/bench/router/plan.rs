//! What is measured, on whom, and what was found.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::worker::Pace;

/// The model's name, everywhere.
pub const MODEL: &str = "demo";
/// Context of the scripted worker.
pub const MAX_MODEL_LEN: u32 = 8192;
/// Tokens of a prompt.
pub const PROMPT_TOKENS: usize = 512;
/// Clients of a busy router.
pub const CLIENTS: usize = 32;
/// Streams at the same time, where tokens are counted.
pub const STREAMS: usize = 64;
/// Tokens of a streamed answer.
pub const STREAM_TOKENS: u32 = 128;
/// From one token to the next, in milliseconds: a small model's step.
pub const STEP_MS: u32 = 10;
/// How long requests are counted.
pub const SECONDS: f64 = 2.0;
/// How often all streams are run.
pub const ROUNDS: usize = 2;
/// Different requests of a kind.
pub const VARIANTS: usize = 64;

/// Prompt tokens are from here on: words of the demo model.
const WORDS: std::ops::Range<u32> = 400..1200;

/// A router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    Ours,
    Smg,
    SglangRouter,
    Dynamo,
}

impl Side {
    pub const ALL: [Self; 4] = [Self::Ours, Self::Smg, Self::SglangRouter, Self::Dynamo];
    /// Routers that pass bodies on as they are.
    pub const PASS: [Self; 2] = [Self::Smg, Self::SglangRouter];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Smg => "smg",
            Self::SglangRouter => "sglang-router",
            Self::Dynamo => "Dynamo frontend",
        }
    }
}

/// What a router is given to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Load {
    /// Prompts of token ids and answers of one token, by so many clients.
    Ids { clients: usize },
    /// Chats of as many tokens, and answers of one token.
    Chat,
    /// Streamed answers to prompts of token ids, a token a step.
    Stream,
    /// The same with all tokens at once.
    Burst,
}

impl Load {
    pub const ALL: [Self; 5] =
        [Self::Ids { clients: 1 }, Self::Ids { clients: CLIENTS }, Self::Chat, Self::Stream, Self::Burst];

    pub fn name(self) -> String {
        match self {
            Self::Ids { clients: 1 } => format!("{PROMPT_TOKENS} token ids, 1 client"),
            Self::Ids { clients } => format!("{PROMPT_TOKENS} token ids, {clients} clients"),
            Self::Chat => format!("chat of {PROMPT_TOKENS} tokens, {CLIENTS} clients"),
            Self::Stream => format!("{STREAMS} streams, {STREAM_TOKENS} tokens, one each {STEP_MS} ms"),
            Self::Burst => format!("{STREAMS} streams, {STREAM_TOKENS} tokens at once"),
        }
    }

    /// Who is given it. Routers that pass bodies on do nothing with a chat that would compare; Dynamo's worker has a pace of
    /// its own.
    pub fn sides(self) -> &'static [Side] {
        match self {
            Self::Ids { .. } => &[Side::Ours, Side::Smg, Side::SglangRouter, Side::Dynamo],
            Self::Chat => &[Side::Ours, Side::Dynamo],
            Self::Stream => &[Side::Ours, Side::Smg, Side::SglangRouter, Side::Dynamo],
            Self::Burst => &[Side::Ours, Side::Smg, Side::SglangRouter],
        }
    }

    /// Clients at the same time.
    pub fn clients(self) -> usize {
        match self {
            Self::Ids { clients } => clients,
            Self::Chat => CLIENTS,
            Self::Stream | Self::Burst => STREAMS,
        }
    }

    /// Tokens of each answer.
    pub fn tokens(self) -> u32 {
        match self {
            Self::Ids { .. } | Self::Chat => 1,
            Self::Stream | Self::Burst => STREAM_TOKENS,
        }
    }

    /// Whether answers are streamed.
    pub fn streams(self) -> bool {
        matches!(self, Self::Stream | Self::Burst)
    }
}

/// One repetition of a load.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// Answers, or tokens where answers are streamed, for each second of the router's processor time.
    pub per_cpu_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// All repetitions.
#[derive(Default)]
pub struct Found {
    figures: HashMap<(Side, Load), Vec<Figure>>,
    missing: HashMap<Side, String>,
    /// Processor time of the tokenizer library alone for a chat's text, in µs.
    pub tokenizer_us: Vec<f64>,
}

impl Found {
    pub fn add(&mut self, side: Side, load: Load, figure: Figure) {
        self.figures.entry((side, load)).or_default().push(figure);
    }

    /// One figure of each repetition; none if the side is missing.
    pub fn of(&self, side: Side, load: Load, pick: fn(&Figure) -> f64) -> Vec<f64> {
        self.figures.get(&(side, load)).into_iter().flatten().map(pick).collect()
    }

    /// A rival can't be measured (any more); why.
    pub fn miss(&mut self, side: Side, why: &str) {
        self.missing.insert(side, why.to_owned());
    }

    pub fn missing(&self, side: Side) -> Option<&str> {
        self.missing.get(&side).map(String::as_str)
    }
}

/// A prompt of token ids: its first two say the pace, what follows is never the same twice.
pub fn prompt(variant: usize, pace: Pace) -> Vec<u32> {
    let words = WORDS.len() as u32;
    let word = |at: usize| WORDS.start + (variant as u32).wrapping_mul(31).wrapping_add(at as u32 * 7) % words;
    [pace.every_ms, pace.phase_ms].into_iter().chain((2..PROMPT_TOKENS).map(word)).collect()
}

/// A text that comes to some number of words of different lengths, never the same twice.
pub fn text(variant: usize, words: usize) -> String {
    const LIST: [&str; 24] = [
        "the", "cache", "of", "a", "worker", "holds", "blocks", "that", "many", "requests", "share", "and", "router",
        "knows", "where", "each", "one", "is", "so", "prompts", "go", "to", "memory", "which",
    ];
    let mut state = variant as u64 * 2 + 1;
    let mut words = (0..words).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        LIST[(state >> 33) as usize % LIST.len()]
    });
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |text, word| text + " " + word)
}

/// Path and body of a request for token ids.
pub fn ids(side: Side, variant: usize, pace: Pace, tokens: u32, stream: bool) -> (&'static str, Value) {
    let prompt = prompt(variant, pace);
    if Side::PASS.contains(&side) {
        // Their `/v1/completions` takes texts only.
        let sampling = json!({"max_new_tokens": tokens, "temperature": 0, "ignore_eos": true});
        return ("/generate", json!({"input_ids": prompt, "sampling_params": sampling, "stream": stream}));
    }
    let body = json!({
        "model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": stream,
    });
    ("/v1/completions", body)
}

/// Path and body of a chat.
pub fn chat(text: &str) -> (&'static str, Value) {
    let messages = json!([{"role": "user", "content": text}]);
    ("/v1/chat/completions", json!({"model": MODEL, "messages": messages, "max_tokens": 1, "temperature": 0}))
}
