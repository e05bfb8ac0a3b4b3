//! The transfer engine: moves KV blocks between the memories of processes, one-sided.
//!
//! An engine registers **regions** of memory and offers them to peers as its **segment**. Its owner opens ranges of it under a
//! **grant** and hands the grant's key to a peer (over gRPC, not here); the peer's engine then reads or writes those ranges in
//! **batches**, and the owner's program takes no part: the owner's engine checks key, bounds and direction and lets the
//! bytes land. Two promises carry the rest of Kvasir:
//!
//! - once [`Grant::revoke`] has resolved, no byte can land in or leave its ranges under that key: blocks can be reused;
//! - a [`Transfer`] always resolves, and from then on the engine does not touch its local ranges: blocks can be freed.
//!
//! ```text
//!          submit                      choose                       moves frames
//! caller ─────────▶ engine, gate ─────────────────▶ Transport ─────────────────────────▶ owner: enter grant, copy, leave
//!   ▲                    │ plan: batch → frames     local: memcpy                            ▲
//!   └── Transfer ◀── batch: frames settled          tcp: own sockets          grant / revoke ┴── the owner's program
//! ```
//!
//! ```
//! use std::time::Duration;
//!
//! use kvasir_transfer::{Access, Batch, Config, GrantRange, LocalNet, Op, Range, TransferEngine};
//! use kvasir_types::Deadline;
//!
//! # fn main() -> Result<(), kvasir_transfer::Error> {
//! let net = LocalNet::new();
//! let prefill = TransferEngine::new(Config::default(), net.clone(), 1 << 20)?;
//! let decode = TransferEngine::new(Config::default(), net, 1 << 20)?;
//!
//! let grant = decode.grant(vec![GrantRange { offset: 4096, len: 4096, access: Access::Write }])?;
//! prefill.write_bytes(0, b"keys and values")?;
//! let ranges = vec![Range { local: 0, remote: 4096, len: 15 }];
//! let deadline = Deadline::after(Duration::from_secs(5));
//! let pushed = prefill.submit(Batch::new(Op::Write, decode.descriptor(), grant.key(), ranges, deadline));
//! assert_eq!(pushed.wait()?.bytes, 15);
//! grant.revoke().wait();
//! assert_eq!(decode.checksum(4096, 15)?, prefill.checksum(0, 15)?);
//! # Ok(()) }
//! ```
//!
//! Its own named threads do the work; futures need no particular executor. It knows no model and no gRPC.

#![expect(unsafe_code, reason = "owns the arena and hands its addresses to the kernel")]

mod builder;
mod checksum;
mod choice;
mod config;
mod engine;
mod error;
mod files;
mod segment;
mod settings;

mod batch;
mod gate;
mod grant;
mod plan;
mod transfers;

mod copier;
mod local;
mod shm;
mod tcp;
mod transport;
mod ucx;

mod counters;
mod histogram;
mod memory;
mod notice;
mod owner;
mod peers;
mod space;
mod stats;
mod threads;
mod timer;

#[doc(hidden)]
pub mod fuzz;

pub mod topology;

pub use kvasir_types::Transports;

pub use batch::{Batch, Op, Priority, Range, Report, Transfer};
pub use builder::Builder;
pub use checksum::Checksum;
pub use config::{Config, ShmConfig, TlsConfig, UcxConfig};
pub use engine::{Region, TransferEngine};
pub use error::{Error, Refusal};
pub use files::MemoryRange;
pub use grant::{Access, Grant, GrantRange, Revoke};
pub use histogram::{BUCKETS, Histogram};
pub use local::LocalNet;
pub use memory::{Allocation, HugePages, Memory};
pub use notice::{MAX_NOTICE_BYTES, NextNotice, Notice, Notices};
pub use peers::PeerStats;
pub use segment::{Directory, Lookup, Published, Segment};
pub use settings::{Pages, Settings, ShmSettings, TlsSettings, UcxSettings};
pub use space::Unregister;
pub use stats::{Refused, Side, Stats, Traffic};
pub use topology::Topology;
pub use transfers::Transfers;
