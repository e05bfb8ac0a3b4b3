//! Which KV blocks hold what, who uses them, and which one goes next: pure data structures.
//!
//! No clock, no I/O, no threads, no locks, and no bytes of KV: only ids. The engine keeps one [`KvCache`] for its arena
//! and one [`Table`] for each sequence; a KV store node an order of eviction ([`Evict`]) for its own. What is guarded here:
//!
//! - a block is handed out to one writer at a time, and not again before it came back;
//! - a block that anybody reads is never written or evicted, one that a peer may write is never read;
//! - free + cached + in use = all blocks, always ([`Counts`]).
//!
//! Reading order: the [`BlockPool`] with the states of a block; how long blocks of which group are needed
//! ([`Geometry`]); the tables over both; the [`CacheEvent`]s for followers.

#![forbid(unsafe_code)]

mod pool;

mod geometry;

mod cache;
mod table;

mod events;
mod evict;

pub use cache::{Hit, KvCache};
pub use events::{Batch, CacheEvent, Snapshot, Stored};
pub use evict::{Ask, Evict, Facts, HitDensity, Learned, Lru, NotLearned, POLICIES, S3Fifo, Tick, policy};
pub use geometry::{Geometry, in_group};
pub use pool::{BlockPool, Counts, Filling, Landing, Leaving, Name, OnEvict, Sealed};
pub use table::Table;

#[cfg(test)]
mod model_tests;
