//! Request traces against a KV store: what share of the blocks asked for it has, and how evenly its nodes are loaded.
//!
//! A trace says which blocks each request's prompt begins with ([`trace`]): recorded ones in Mooncake's format, or ones
//! made up here, from a seed ([`generate`]). [`simulate`] runs one through the store's own eviction policies and its own
//! placement, without a byte being moved: for nodes by the hundred, in seconds. [`report`] shows what came out. [`live`]
//! sends one to what runs: to the nodes of a store, or through a router to a whole cluster.

#![forbid(unsafe_code)]

pub mod generate;
pub mod live;
pub mod report;
pub mod simulate;
pub mod size;
pub mod trace;

/// The recorded trace that comes with this crate; see traces/README.md.
pub const CONVERSATION: &str = include_str!("../traces/conversation.txt");
