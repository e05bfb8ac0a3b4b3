//! How tokens are chosen, and what is told about a chosen one.

use std::sync::Arc;

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
    /// Keep tokens at least this fraction as likely as the likeliest. 0 (all) to 1.
    pub min_p: f32,
    /// Divides the positive logits of tokens seen in prompt or answer, multiplies the negative ones. Above 0; 1 is none.
    pub repetition_penalty: f32,
    /// Taken once from the logit of a token that the answer has already. −2 to 2.
    pub presence_penalty: f32,
    /// Taken from the logit of a token for each time that the answer has it already. −2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of some tokens. Each token once, −100 to 100.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The form that the answer must have.
    pub grammar: Option<Grammar>,
    /// Randomness is a pure function of the seed and the token's position in the sequence, so that a request continued
    /// elsewhere draws what it would have drawn here.
    pub seed: u64,
    /// Most tokens of the answer, at least 1.
    pub max_tokens: u32,
    /// `max_tokens` is what the client asked for: a worker that could never hold so many refuses the request. Else it is
    /// a bound that nobody chose (the server's, what the context leaves), and the answer goes as far as the blocks do.
    pub max_tokens_asked: bool,
    /// No end or stop token is chosen before the answer has so many tokens, unless its grammar leaves nothing else.
    pub min_tokens: u32,
    /// How many of the prompt's last tokens are the beginning of the answer: a request that goes on after another worker
    /// wrote so many. They count for penalties, `min_tokens`, `max_tokens` and the grammar as if written here.
    pub continued: u32,
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
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            grammar: None,
            seed: 0,
            max_tokens: 16,
            max_tokens_asked: false,
            min_tokens: 0,
            continued: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

impl Sampling {
    /// Whether the choice of a token depends on the tokens before it by more than the logits.
    pub fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// The form that an answer must have, as the client wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// A JSON object, whatever is in it.
    JsonObject,
    /// JSON that this schema (itself JSON) describes.
    JsonSchema(Arc<str>),
    /// A text that the regular expression matches as a whole.
    Regex(Arc<str>),
    /// One of these texts.
    Choice(Arc<[String]>),
    /// A text that this grammar, in llguidance's variant of Lark, describes.
    Lark(Arc<str>),
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

/// Who goes before whom, wherever requests wait for one another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for the answer.
    #[default]
    Online,
    /// Uses what the others leave.
    Offline,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token, or a stop token or string.
    Stop,
    /// `max_tokens`, the model's context length, or the worker's memory.
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

/// 2^64 divided by the golden ratio: the step of SplitMix64.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014, figure
/// 15): every bit of the argument changes about half the bits of the result.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The seed of one of several answers to the same request. The first one's is the request's own, so that asking for one
/// more choice does not change the one there was. Whoever has a choice go on elsewhere asks for it alone, with this seed.
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    if choice == 0 { seed } else { mix(seed.wrapping_add(GOLDEN_GAMMA.wrapping_mul(choice.into()))) }
}
