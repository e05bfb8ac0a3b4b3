//! The engine: from prompts to tokens, many sequences at once, on one thread.
//!
//! ```text
//!   Handle ──commands──▶ ┌ engine thread ───────────────────────────────────────────┐
//!   (any thread)         │ loop { take commands; Engine::step() }                   │
//!                        │    step = share → decoders → admit → chunks of prompts   │
//!   EventSink ◀──────────│           → Runner::run → sample → events                │
//!   LayerSink ◀──────────│                  └ after each layer                      │
//!                        └──────────────────────────────────────────────────────────┘
//! ```
//!
//! Reading order: what callers say and hear ([`Request`], [`Event`], [`LayerSink`]); the thread and its [`Handle`]; the
//! [`Engine`] itself, which is pure (no clock, no thread, no I/O: commands in, events out, one `step` at a time) and made
//! of the sequences' states, the scheduler and the sampler, with the grammars that answers must follow and
//! the proposers that guess how they go on; the [`Runner`] it drives, with [`ScriptedRunner`] as the test
//! double for everything above the model.
//!
//! What holds at all times:
//! - a sequence that was admitted ends with exactly one of `Finished` for its last choice, `Failed`, or the caller's
//!   abort/release;
//! - what is emitted depends on the request alone: not on the batch, on chunking, on cache hits or on preemption;
//! - a block that was told to the outside ([`Admission`]) stays with its sequence until that ends, is aborted, or is told to
//!   compute by itself, unwatched;
//! - with no sequence alive and nothing pinned, free + cached blocks = all blocks.

#![forbid(unsafe_code)]

mod config;
mod error;
mod event;
mod request;

mod thread;

mod constrain;
mod engine;
mod sampler;
mod scheduler;
mod sequence;
mod speculate;
mod stats;

mod runner;
mod scripted;

pub use config::{Config, Limits};
pub use constrain::{BadGrammar, Constraint, Constraints};
pub use engine::{Command, Engine, Parts, PinId, Progress};
pub use error::Error;
pub use event::{Admission, Event, EventSink, LayerDone, LayerSink, Spill, SpilledBlock};
pub use request::{Demand, Duty, Intake, MAX_CHOICES, Mode, NewSequence, Rejected, Request, SeqId};
pub use runner::{ModelRunner, Runner, RunnerSpec};
pub use sampler::{Ask, History, Mask, Sampler, choice_seed, sample, uniform};
pub use scripted::{Script, ScriptedRunner};
pub use speculate::{DraftModel, Guess, NGrams, Proposer};
pub use stats::{DecodeTimes, PlainTimes, PrefillTimes, Stats};
pub use thread::{Handle, Pinned, spawn};

// What a caller names together with this crate's API.
pub use kvasir_kv_cache::{
    Batch as CacheBatch, CacheEvent, Counts, Leaving, OnEvict, Snapshot as CacheSnapshot, Stored,
};
pub use kvasir_model::{Likely, Logits, Need, Row, Rows, SeqInput};
pub use kvasir_types::Priority;

#[cfg(test)]
mod tests;
