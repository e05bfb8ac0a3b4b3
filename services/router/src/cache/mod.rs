//! What workers hold: who has which beginning of a prompt.
//!
//! ```text
//!   worker ══Watch══▶ feed (one task a worker) ─▶ follow (pure: snapshot, then numbered changes) ─▶ Index ◀─lookup─ decisions
//!                                                                        └─ load ─▶ the worker's pulse
//! ```

mod feed;
#[cfg(test)]
mod feed_tests;
mod follow;
mod index;
mod table;

pub(crate) use feed::Feeds;
pub use index::{Index, Lookup, Number, SHARDS};
pub use table::MAX_WORKERS;
