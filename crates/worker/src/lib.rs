//! A worker: the engine and what surrounds it so that it can serve one role of a cluster.
//!
//! ```text
//!             gRPC (tonic, on tokio)                     engine thread            transfer threads
//!   decode/   service → request → remote  ── commands ─▶  scheduler, model
//!             ◀──────────── events ──────────────────────  (kvasir-engine)
//!   prefill/  service → job ─────────────── commands ─▶      │ layer done
//!                        ▲                                   ▼
//!                        └── writes awaited ──── push ── submit ──────────▶ one-sided writes
//! ```
//!
//! The rule this crate guards: **a block goes back to the pool only when nothing can write into it or read from it any
//! more.** A request therefore runs in a task of its own, which no dropped stream cancels midway: it sees that the caller
//! is gone, revokes its grants, waits for its transfers, and only then lets go of its sequence.
#![forbid(unsafe_code)]

mod caller;
mod config;
mod decode;
mod directory;
mod duty;
mod error;
mod handoff;
mod host;
mod metrics;
mod parts;
mod peers;
mod prefill;
mod pulse;
mod sequence;
mod serve;
mod spill;
mod stages;
mod status;
mod store;
mod watch;

pub use config::{
    Config, DecodeConfig, EngineConfig, FLAGS, Fetch, KvConfig, ModelConfig, PrefillConfig, SpillConfig, StoreConfig,
    WriteBackConfig, WriteBackPolicy,
};
pub use kvasir_types::Role;
pub use serve::{run, run_with_etcd};
