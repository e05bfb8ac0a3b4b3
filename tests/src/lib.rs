//! The end-to-end harness: real processes, a real etcd, real sockets, and the laws that every test ends with.
//!
//! ```text
//!   Cluster::builder().prefill(2).decode(1)          what to start
//!       .worker("engine.chunk_tokens", 16)           a setting of every worker
//!       .run(async |cluster| { … })                  start, wait until ready, do, check the laws, stop
//! ```
//!
//! The laws, checked at the end of every [`Cluster::run`](Builder::run):
//!
//! 1. **Nothing leaks**: on every worker that lives, free + cached blocks = all blocks once no request runs.
//! 2. **Nobody complains unannounced**: no WARN or ERROR line and no panic in any log, but those that the test named with
//!    [`Cluster::expect_warning`].
//! 3. **Everybody leaves when asked**: SIGTERM ends every service with status 0 within its grace.
//!
//! Nothing here sleeps for a fixed time: [`wait::until`] polls a condition and has a limit. Every port is free for the
//! moment: services take port 0 and say in their port file what they got.

#![forbid(unsafe_code)]

pub mod balancer;
pub mod cluster;
pub mod collector;
pub mod etcd;
pub mod golden;
pub mod logs;
pub mod members;
pub mod metrics;
pub mod namespace;
pub mod net;
pub mod node;
pub mod openai;
pub mod process;
pub mod settings;
pub mod stand_in;
pub mod wait;
pub mod workspace;

pub use balancer::Balancer;
pub use cluster::{Builder, Cluster};
pub use etcd::Etcd;
pub use members::Members;
pub use node::{Addresses, Node, Service};
pub use openai::{Client, Reply};
pub use process::Process;
pub use stand_in::StandIn;
