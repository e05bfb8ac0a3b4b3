//! How the planner is set.

use serde::{Deserialize, Serialize};

use super::plan::Settings;

/// Whether and when workers are moved between prefill and decode.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlannerConfig {
    /// `act`: moves workers; `advise`: says in the log and to `kvasirctl planner` which ones it would move; `off`. The same on all
    /// routers, one of which plans at a time. Default advise.
    pub mode: PlannerMode,
    /// Between two looks, in milliseconds, at least 500. Default 2000.
    pub look_ms: u64,
    /// How many looks in a row must find the same. Default 3.
    pub votes: u32,
    /// After a move, in milliseconds, nobody is moved. Default 20000.
    pub pause_ms: u64,
    /// In percent of its targets (`models[].slo`), how slow a model's workers must be expected to be before anybody is moved.
    /// Default 80.
    pub strained_percent: u32,
    /// In percent, by how much less strained another split must be. Default 15.
    pub gain_percent: u32,
    /// Prefill workers that a model keeps. Default 1, and at least 1.
    pub min_prefill: usize,
    /// Decode workers that a model keeps. Default 1, and at least 1.
    pub min_decode: usize,
}

/// What the planner does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlannerMode {
    /// Nothing.
    Off,
    /// It says what it would do.
    #[default]
    Advise,
    /// It moves workers.
    Act,
}

impl PlannerMode {
    /// As the configuration has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Advise => "advise",
            Self::Act => "act",
        }
    }
}

impl Default for PlannerConfig {
    fn default() -> Self {
        Self {
            mode: PlannerMode::default(),
            look_ms: 2_000,
            votes: 3,
            pause_ms: 20_000,
            strained_percent: 80,
            gain_percent: 15,
            min_prefill: 1,
            min_decode: 1,
        }
    }
}

impl PlannerConfig {
    /// What it comes to.
    pub fn settings(&self) -> Settings {
        Settings {
            strained: f64::from(self.strained_percent) / 100.0,
            gain: f64::from(self.gain_percent) / 100.0,
            votes: self.votes,
            pause: self.pause_ms as f64 / 1e3,
            min_prefill: self.min_prefill,
            min_decode: self.min_decode,
        }
    }
}
