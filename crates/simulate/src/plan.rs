//! What is simulated, and what comes of it.

use std::time::Duration;

use crate::{
    front::MOST_WORKERS,
    profile::Profile,
    steer::{Move, Steering},
    worker::Totals,
    workload::Ns,
};

/// What is simulated.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Plan {
    /// Workers that compute prompts.
    pub prefill: usize,
    /// Workers that write answers.
    pub decode: usize,
    /// All of them alike.
    pub profile: Profile,
    /// A router knows what a worker holds so many milliseconds later.
    pub index_delay_ms: u64,
    /// Workers tell their loads every so many milliseconds.
    pub load_interval_ms: u64,
    /// Tokens that the KV store has room for; 0: there is none.
    pub store_tokens: u64,
    /// The router's planner changes what workers are there for.
    #[serde(skip)]
    pub steering: Option<Steering>,
}

impl Plan {
    /// Whether it can be simulated.
    ///
    /// # Errors
    /// If not.
    pub fn check(&self) -> Result<(), Error> {
        let &Self { prefill, decode, index_delay_ms, load_interval_ms, .. } = self;
        if decode == 0 || prefill.saturating_add(decode) > MOST_WORKERS {
            return Err(Error::Workers { prefill, decode });
        }
        if let Some(&ms) = [index_delay_ms, load_interval_ms].iter().find(|&&ms| ms > 3_600_000) {
            return Err(Error::Delay(ms));
        }
        let Some(Steering { ttft_seconds, tpot_seconds, look_seconds, switch_seconds }) = self.steering else {
            return Ok(());
        };
        let times = [ttft_seconds, tpot_seconds, look_seconds, switch_seconds];
        match times.into_iter().find(|seconds| !(1e-6..=3600.0).contains(seconds)) {
            Some(wrong) => Err(Error::Steering(wrong)),
            None => Ok(()),
        }
    }
}

/// A plan that can't be simulated.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    /// Nobody, or more than a router tells apart.
    #[error(
        "{prefill} prefill and {decode} decode workers: there must be one decode worker, and at most {MOST_WORKERS} in all"
    )]
    Workers {
        /// As asked for.
        prefill: usize,
        /// As asked for.
        decode: usize,
    },
    /// Longer than the simulation's clock.
    #[error("{0} ms between what happens and what is known of it: at most an hour")]
    Delay(u64),
    /// Targets or times of the planner that make no sense.
    #[error("the planner's targets and times: {0} s must be between 0.000001 and 3600")]
    Steering(f64),
}

/// What became of a request. All zero: it was refused, as no worker has room for it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fate {
    /// When the client had the first token.
    pub first: Ns,
    /// And the last one.
    pub end: Ns,
    /// Tokens of the prompt that workers had.
    pub found: u32,
    /// And those that the KV store had beside them.
    pub stored: u32,
    /// Who computed the prompt; the decode worker, if it did.
    pub prefill: u32,
    /// Who wrote the answer.
    pub decode: u32,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of each request.
    pub fates: Vec<Fate>,
    /// Of each worker.
    pub totals: Vec<Totals>,
    /// When the last answer ended.
    pub end: Ns,
    /// Events that happened.
    pub events: u64,
    /// Decisions, and how long they took in reality.
    pub decisions: (u64, Duration),
    /// Workers that changed.
    pub moves: Vec<Move>,
}
