//! A KV store node: keeps KV blocks for the whole cluster, finds them by hash, and never lets go of one too early.
//!
//! ```text
//!   gRPC            service ──▶ node ──▶ store (pure: index, slabs, leases)        what is where, who may touch it
//!                                 │  └─▶ transfer engine: grants                   who can touch it
//!   one-sided bytes ──────────────┴────▶ the engine's arena                        the blocks themselves
//!   expiry ─────────▶ node                                                         ends what nobody ended
//! ```
//!
//! Control goes over gRPC, bytes do not: a client reads and writes the arena itself, under a grant. The rule this service
//! guards: **a slot is reused only after every grant over it has been revoked**, a reader's as well as a writer's, and a
//! block can be found only after its writer can't change it any more.
//!
//! There is no master: clients choose the node by hashing (`kvasir-store-client`), and each node is the authority for
//! what it holds. A node that dies loses cached blocks, never answers. DRAM is the only tier as yet.
#![forbid(unsafe_code)]

mod config;
mod error;
mod expiry;
mod membership;
mod metrics;
mod node;
mod serve;
mod service;
mod store;

#[cfg(test)]
mod tests;

pub use config::{Config, LimitsConfig};
pub use serve::{run, run_with_etcd};
