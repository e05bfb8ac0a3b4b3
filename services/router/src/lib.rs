//! The router: OpenAI's HTTP API in front of prefill and decode workers.
//!
//! ```text
//! client ──HTTP──▶ http ─▶ text (template, tokenize) ─▶ route (which workers) ─▶ upstream ══gRPC══▶ decode worker
//! client ◀──SSE─── http ◀─ text (detokenize, stop)   ◀──────────────────────────────┘
//! ```
//!
//! All text is here: workers know only token ids. The router opens one stream per request, to the decode worker, and
//! proposes prefill workers to it; it knows no tensor and moves no KV. Many routers may run side by side: they share
//! nothing but the cluster's member list.
//!
//! | part | rule |
//! | --- | --- |
//! | [`config`] | every setting, with its default |
//! | `service` | build, announce, wait, drain |
//! | `http` | requests are checked wholly before a worker hears of them; errors have OpenAI's shape |
//! | `access`, `admission` | who may ask, for what, how much; and when it is their turn |
//! | `text` | no async, no clock |
//! | [`route`] | policies are pure functions |
//! | [`planner`] | which workers read and which write: pure, but for the task that acts |
//! | [`cache`] | which workers hold which beginning of a prompt: an index, and a task for each worker that feeds it |
//! | `fleet` | members → workers that may be chosen, their loads and connections |
//! | `health`, `retry` | which workers are left alone for a while, how many second tries there are |
//! | `upstream` | the stream from a decode worker |
//! | `witness` | which members come and go, for the cluster's history |
//! | `external` | engines of others (vLLM, SGLang) as workers |
#![forbid(unsafe_code)]

pub mod cache;
pub mod config;
pub mod planner;
pub mod route;

mod access;
mod admission;
mod external;
mod fleet;
mod health;
mod http;
mod metrics;
mod retry;
mod service;
mod text;
mod upstream;
mod witness;

pub use access::{AccessConfig, KeyConfig, KeysError, TenantConfig};
pub use admission::AdmissionConfig;
pub use config::{Config, Limits, ModelConfig, Slo};
pub use external::{EngineConfig, EngineKind, EngineRole, ExternalConfig, ExternalError};
#[doc(hidden)]
pub use fleet::{Rehearsal, Workers};
pub use http::{TlsConfig, TlsError};
pub use retry::RetryConfig;
pub use service::{run, run_with_etcd};
pub use text::{Encoder, Pieces};
