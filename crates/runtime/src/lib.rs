//! What every process of Kvasir needs: configuration, telemetry, supervised tasks, an orderly end, an admin page.
//!
//! A service's `main.rs` is one call:
//!
//! ```no_run
//! # use std::process::ExitCode;
//! # #[derive(Default, serde::Serialize, serde::Deserialize)]
//! # struct Config {}
//! # impl kvasir_runtime::Config for Config {}
//! fn main() -> ExitCode {
//!     kvasir_runtime::main(
//!         kvasir_runtime::Service { name: "example", about: "Shows how.", version: env!("CARGO_PKG_VERSION") },
//!         |_config: Config, context| async move {
//!             context.health.set_ready();
//!             context.shutdown.wait().await;
//!             Ok(())
//!         },
//!     )
//! }
//! ```
//!
//! The life of a process: load the configuration (exit 2 if it is wrong), start telemetry, run the service, and after
//! SIGINT or SIGTERM (or when a critical task ends) give it the grace to finish what it has begun. Rules that are kept
//! here so that nobody else must: every task has an owner and a fate ([`Tasks`]), every failure to start is one line,
//! a panic is a log line, no component reads the environment.
#![forbid(unsafe_code)]

pub mod admin;
pub mod config;
mod context;
mod entry;
mod health;
mod listen;
pub mod metrics;
mod misc;
mod process;
mod shutdown;
mod spans;
pub mod story;
mod tasks;
mod telemetry;

pub use config::{AdminConfig, Config, LogConfig, LogFormat, ShutdownConfig, TraceConfig};
pub use context::Context;
pub use entry::{Service, main};
pub use health::Health;
pub use listen::{ListenError, Listening};
pub use metrics::Metrics;
pub use misc::{chain, random_u64, write_port_file};
pub use process::Process;
pub use shutdown::Shutdown;
pub use tasks::{Kind, Tasks};
