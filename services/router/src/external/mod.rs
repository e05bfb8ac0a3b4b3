//! Engines of others behind the same door: vLLM and SGLang servers, with prefill and decode apart or not.
//!
//! ```text
//!   config.engines ─┐                                    ┌─▶ fleet (members while they answer)
//!   etcd records ───┴─▶ directory: a probe for each ─────┘
//!   placing ─▶ answers: one stream a choice ─▶ vllm | sglang (what is said, what is heard) ══HTTP/1.1══▶ engine
//! ```
//!
//! They get token ids and return token ids, as Kvasir's workers do, so templates, tools, stop strings and all that clients
//! see stay the router's. What their protocols can't carry is refused by name (`carry`). An engine pairs only with those of
//! its kind and group: KV never moves between one of theirs and one of ours.
//!
//! | part | rule |
//! | --- | --- |
//! | `config` | which engines there are, with defaults |
//! | `engine` | one engine: what it is and how it is reached |
//! | `directory` | an engine is a member while its `/health` answers |
//! | `feed`, `remembered` | its load, and what was sent there: an estimate of what its cache holds |
//! | `http`, `sse` | bytes from outside: bounded in size and time |
//! | `vllm`, `sglang`, `carry` | the protocols; pure, no I/O |
//! | `answers` | prefill, decode, tokens |

mod answers;
mod carry;
mod config;
mod directory;
mod engine;
mod feed;
mod http;
mod remembered;
mod sglang;
mod sse;
mod vllm;

pub use config::{EngineConfig, EngineKind, EngineRole, ExternalConfig, ExternalError};

pub(crate) use answers::{Answers, Asked, Way};
pub(crate) use carry::carries;
pub(crate) use directory::{Directory, Engines};
pub(crate) use engine::Engine;
pub(crate) use feed::feed;

/// A choice's next token, its end, or nothing yet.
#[derive(Debug, PartialEq)]
pub(crate) enum Told {
    /// The next token.
    Token(kvasir_types::Sampled),
    /// The end, with how many of the prompt's tokens were not computed, if that was said.
    Finished(kvasir_types::FinishReason, Option<u32>),
}

/// What an engine said that means nothing, or what it says went wrong.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum Nonsense {
    /// Against the protocol.
    #[error("{0}")]
    Protocol(String),
    /// It failed, and says so.
    #[error("{0}")]
    Failed(String),
    /// It finds the request unacceptable.
    #[error("{0}")]
    Refused(String),
    /// It has no room.
    #[error("{0}")]
    Busy(String),
}

impl Nonsense {
    /// Against the protocol.
    fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }
}

/// A text from outside, cut and in one line.
fn brief(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// As many of the alternatives as were asked for, likeliest first.
fn likeliest(mut all: Vec<kvasir_types::TopLogprob>, most: u8) -> Vec<kvasir_types::TopLogprob> {
    all.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
    all.truncate(most.into());
    all
}
