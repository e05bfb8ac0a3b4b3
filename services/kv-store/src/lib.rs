//! A KV store node: keeps KV blocks for the whole cluster, finds them by hash, and never lets go of one too early.
//!
//! ```text
//!   gRPC            service ──▶ node ──▶ store (pure: index, slabs, leases, pins)  what is where, who may touch it
//!                                 │  └─▶ transfer engine: grants                   who can touch it
//!                                 └────▶ mover ──▶ disk                            between memory and disk
//!   one-sided bytes ───────────────────▶ the engine's arena                        the blocks themselves
//!   expiry ─────────▶ node                                                         ends what nobody ended
//!   handover ───────▶ node, store client                                           gives others what they are to have
//! ```
//!
//! Control goes over gRPC, bytes do not: a client reads and writes the arena itself, under a grant. The rules this service
//! guards: **a slot that somebody may write is not used again until that writer has been fenced off**; a block can be found
//! only after its writer can't change it any more; and whoever reads can tell by a checksum that what he read is what he
//! asked for. A lease keeps a block where it is, it fences nobody off.
//!
//! There is no master: clients choose the node by hashing (`kvasir-store-client`), and each node is the authority for
//! what it holds. A node that dies loses what it had in memory only, never answers.
#![forbid(unsafe_code)]

mod ahead;
mod config;
#[doc(hidden)] // for the benchmark that puts it beside another engine
pub mod disk;
mod error;
mod exchange;
mod expiry;
#[doc(hidden)] // for the benchmark that shows it
pub mod footprint;
mod handover;
mod heat;
mod membership;
mod messages;
mod metrics;
mod mover;
mod node;
mod published;
mod serve;
mod service;
mod store;

#[cfg(test)]
mod tests;

pub use config::{Config, EvictionConfig, HandoverConfig, LimitsConfig, QuotasConfig, ReplicationConfig};
pub use serve::{run, run_with_etcd};
pub use store::Policy;
