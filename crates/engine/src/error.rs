//! Why a request is refused or a sequence fails.

use std::{sync::Arc, time::Duration};

use kvasir_types::{Retry, TokenId};

use crate::{BadGrammar, Duty};

/// What went wrong with one request.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to compute.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A token id that the model does not have.
    #[error("token {} is not in the vocabulary of {vocab}", token.0)]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A request that goes on elsewhere, with nothing before the answer or nothing left to write.
    #[error("{continued} of {tokens} prompt tokens cannot be the beginning of an answer of at most {max_tokens}")]
    BadContinuation {
        /// How many tokens are said to be the answer's.
        continued: usize,
        /// Tokens of the prompt, those included.
        tokens: usize,
        /// Most tokens of the answer.
        max_tokens: usize,
    },
    /// The answer can't have the form that was asked for: no grammar, too large a one, or an answer that breaks it.
    #[error("the form of the answer: {0}")]
    Grammar(BadGrammar),
    /// The model's context does not hold the prompt and one more token.
    #[error("a prompt of {tokens} tokens leaves no room for an answer in a context of {max_len}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// The model's context length.
        max_len: usize,
    },
    /// Even an idle engine would not have enough blocks.
    #[error("a prompt of {tokens} tokens needs {needed} blocks, there are {blocks}")]
    PromptExceedsPool {
        /// Tokens of the prompt.
        tokens: usize,
        /// Blocks it needs.
        needed: usize,
        /// Blocks of the pool.
        blocks: usize,
    },
    /// The client asked for an answer that even an idle engine could not write to its end.
    #[error(
        "a prompt of {tokens} tokens and an answer of {max_tokens} may need {needed} blocks, there are {blocks}: ask for \
         at most {at_most} tokens"
    )]
    AnswerExceedsPool {
        /// Tokens of the prompt.
        tokens: usize,
        /// Most tokens of the answer, within the model's context.
        max_tokens: usize,
        /// Blocks that both may need.
        needed: usize,
        /// Blocks of the pool.
        blocks: usize,
        /// The most tokens that an answer to this prompt may have here.
        at_most: usize,
    },
    /// The engine's duty is another one at present.
    #[error("the engine takes no such request: its duty is {duty:?}")]
    WrongDuty {
        /// What it takes.
        duty: Duty,
    },
    /// No or too many choices.
    #[error("{choices} choices: there must be 1 to {limit}")]
    BadChoices {
        /// How many were asked for.
        choices: u32,
        /// Most there may be.
        limit: u32,
    },
    /// As many requests as may wait are waiting.
    #[error("{limit} requests are waiting already")]
    QueueFull {
        /// The queue's bound.
        limit: usize,
    },
    /// The engine takes no more requests, or is gone.
    #[error("the engine is shutting down")]
    Closed,
    /// No block for the next token, and nobody to take one from.
    #[error("no block is left for the next token after {tokens}")]
    OutOfBlocks {
        /// Tokens of the sequence so far.
        tokens: usize,
    },
    /// The batch that the sequence was part of could not be computed.
    #[error("the step failed")]
    Runner(#[source] Arc<kvasir_model::Error>),
    /// The runner broke its contract or panicked: a bug of ours.
    #[error("the step failed: {reason}")]
    RunnerBroken {
        /// What happened.
        reason: Arc<str>,
    },
    /// The model's output is not a distribution over tokens.
    #[error("the logits at position {position} are not numbers")]
    BadLogits {
        /// Position of the token that was to be chosen.
        position: usize,
    },
    /// The sequence's [`crate::LayerSink`] panicked: a bug of ours.
    #[error("the layer sink panicked")]
    SinkPanicked,
}

impl Error {
    /// Whether trying again may help.
    pub fn retry(&self) -> Retry {
        match self {
            Self::EmptyPrompt
            | Self::UnknownToken { .. }
            | Self::BadContinuation { .. }
            | Self::BadChoices { .. }
            | Self::Grammar(_)
            | Self::PromptTooLong { .. } => Retry::Never,
            Self::QueueFull { .. } => Retry::After(Duration::from_secs(1)),
            Self::Runner(error) => error.retry(),
            Self::WrongDuty { .. } | Self::Closed | Self::OutOfBlocks { .. } => Retry::Elsewhere,
            // Another pool may be larger.
            Self::PromptExceedsPool { .. } | Self::AnswerExceedsPool { .. } => Retry::Elsewhere,
            Self::RunnerBroken { .. } | Self::BadLogits { .. } | Self::SinkPanicked => Retry::Elsewhere,
        }
    }
}
