//! How tokens are chosen, and what is told about a chosen one.

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// How to choose the tokens of one answer. Values are checked where they enter (router, `kvasir-proto`).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 means greedy. 0 to 2.
    pub temperature: f32,
    /// Keep the likeliest tokens whose probabilities sum to this. Above 0, up to 1 (all).
    pub top_p: f32,
    /// Keep this many of the likeliest tokens; 0 means all.
    pub top_k: u32,
    /// Randomness is a pure function of the seed and the token's position in the sequence, so that a request continued
    /// elsewhere draws what it would have drawn here.
    pub seed: u64,
    /// Most tokens to write, at least 1.
    pub max_tokens: u32,
    /// Tokens that end the answer besides the model's own end tokens.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on past the model's end tokens (benchmarks).
    pub ignore_eos: bool,
    /// `Some(k)`: report each token's log-probability and those of the `k` likeliest (0 to 20), from the distribution
    /// before temperature and truncation, as OpenAI does.
    pub logprobs: Option<u8>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            max_tokens: 16,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

/// One alternative at a position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopLogprob {
    /// The token.
    pub token: TokenId,
    /// Its natural-log probability.
    pub logprob: f32,
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its natural-log probability; `None` unless asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens, likeliest first; empty unless asked for.
    pub top: Vec<TopLogprob>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token, or a stop token or string.
    Stop,
    /// `max_tokens` or the model's context length.
    Length,
}

/// What a request cost, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Of those, how many were not computed for this request because their KV was found somewhere.
    pub cached: u32,
    /// Tokens written.
    pub output: u32,
}
