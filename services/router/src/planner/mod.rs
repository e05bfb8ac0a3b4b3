//! The planner: what clients will see, and which workers should read prompts and which write answers.
//!
//! ```text
//!   workers' totals ─▶ speeds (fitted online) ─┐
//!                    └▶ demand ────────────────┴▶ forecast of every split ─▶ plan (with hysteresis) ─▶ SetDuty
//! ```
//!
//! [`fit`], [`speeds`], [`meter`], [`forecast`] and [`plan`] are pure: no clock, no I/O; the simulator runs them as they are. Around them,
//! `lead` holds the office of planner among the routers and does what the plan says.

pub mod fit;
pub mod forecast;
pub mod meter;
pub mod plan;
pub mod speeds;

mod board;
mod config;
mod lead;

pub(crate) use board::{Board, Content};
pub use config::{PlannerConfig, PlannerMode};
pub(crate) use lead::{Lead, Parts};

#[cfg(test)]
mod plan_tests;
