//! The router's own policies in front of modelled workers, on a virtual clock.
//!
//! ```text
//!   trace ─▶ workload ─▶ run: front (the router's policy and index) ◀─▶ worker × N (steps, room) ─▶ figures ─▶ report, plot
//! ```
//!
//! What is modelled and what is not: docs/simulator.md.
#![forbid(unsafe_code)]

pub mod tides;
pub mod workload;

pub mod profile;
pub mod room;
pub mod worker;

pub mod front;
pub mod known;
pub mod plan;
pub mod run;
pub mod steer;

pub mod figures;
pub mod plot;
pub mod report;

pub use kvasir_router::route::PolicyName;
pub use plan::{Fate, Outcome, Plan};
pub use profile::Profile;
pub use run::run;
pub use steer::Steering;
pub use workload::{Shape, Workload};
