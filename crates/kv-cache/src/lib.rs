//! Which KV blocks hold what, who uses them, and which one goes next: pure data structures.
//!
//! No clock, no I/O, no threads, no locks, and no bytes of KV: only ids. The engine keeps one [`BlockPool`] for its
//! arena; a KV store node uses [`Evict`] for its own keys. What is guarded here:
//!
//! - a block is handed out to one writer at a time, and not again before it came back;
//! - a block that anybody reads is never evicted;
//! - free + cached + in use = all blocks, always ([`Counts`]).

#![forbid(unsafe_code)]

mod evict;
mod pool;

pub use evict::{Evict, Lru};
pub use pool::{BlockPool, Counts, Filling, Run, Sealed};

#[cfg(test)]
mod model_tests;
