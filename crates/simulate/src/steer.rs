//! Workers that change between prefill and decode while the run goes on: the router's planner, on the virtual clock.
//!
//! ```text
//!   workers' totals ─▶ planner::meter ─▶ planner::plan::Planner::look ─▶ who changes, and why
//! ```
//!
//! All of it is the router's own code (`kvasir_router::planner`).

use kvasir_router::planner::{
    forecast::Targets,
    meter::{Meter, Told},
    plan::{Candidate, Planner, Settings, Situation, Verdict},
    speeds::Totals,
};

use crate::{
    front::Role,
    worker::{self, Worker},
    workload::{Ns, nanos, seconds},
};

/// How often workers' totals are looked at.
const OBSERVE: Ns = 500_000_000;

/// How workers are moved.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Steering {
    /// What clients should see: seconds to the first token, and from one to the next.
    pub ttft_seconds: f64,
    /// See `ttft_seconds`.
    pub tpot_seconds: f64,
    /// Between two looks of the planner.
    pub look_seconds: f64,
    /// A worker that changes is chosen for nothing for so long; what it has to do it goes on with.
    pub switch_seconds: f64,
}

/// A worker that changes.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Move {
    /// When.
    pub at_seconds: f64,
    /// Who.
    pub worker: u32,
    /// To what.
    pub to: Role,
    /// Why, as the planner says it.
    pub why: String,
}

/// See the module's page.
pub struct Steer {
    steering: Steering,
    planner: Planner,
    meter: Meter<usize>,
    /// When workers are looked at next, and when the planner looks.
    pub next: Ns,
    observed: Ns,
    look: Ns,
}

impl Steer {
    /// That has not looked yet.
    pub fn new(steering: Steering) -> Self {
        Self {
            steering,
            planner: Planner::new(Settings::default()),
            meter: Meter::default(),
            next: OBSERVE,
            observed: 0,
            look: nanos(steering.look_seconds),
        }
    }

    /// It is [`next`](Self::next): learns, and looks if it is time to. `None` as a role: it is changing, and stays out of it.
    pub fn observe(&mut self, now: Ns, workers: &[Worker], roles: &[Option<Role>], room: u64) -> Option<Verdict> {
        self.next = now + OBSERVE;
        let passed = seconds(now - self.observed);
        self.observed = now;
        let told: Vec<Told<usize>> = workers
            .iter()
            .zip(roles)
            .enumerate()
            .map(|(at, (worker, role))| told(at, worker, *role, now, room))
            .collect();
        self.meter.observe(passed, &told);
        if now < self.look {
            return None;
        }
        self.look = now + nanos(self.steering.look_seconds);
        Some(self.planner.look(seconds(now), &self.situation(&told, roles)))
    }

    fn situation(&self, told: &[Told<usize>], roles: &[Option<Role>]) -> Situation {
        let candidate = |(worker, role): (&Told<usize>, &Option<Role>)| Candidate {
            decodes: !worker.reads,
            movable: role.is_some(),
            work: worker.work(),
        };
        Situation {
            demand: self.meter.demand(told, 1.0),
            fleet: self.meter.fleet(told),
            targets: Targets { ttft: self.steering.ttft_seconds, tpot: self.steering.tpot_seconds },
            workers: told.iter().zip(roles).map(candidate).collect(),
        }
    }
}

fn told(worker: usize, state: &Worker, role: Option<Role>, now: Ns, room_tokens: u64) -> Told<usize> {
    Told {
        worker,
        totals: totals(&state.done(now)),
        reads: role == Some(Role::Prefill),
        waiting_tokens: state.prefilling_tokens() + state.waiting_tokens,
        room_tokens,
        requests: state.holding + state.waiting.len() as u32,
    }
}

/// What a worker tells of what it has done.
fn totals(all: &worker::Totals) -> Totals {
    Totals {
        prefilled_tokens: all.prompt_tokens,
        prefilled_prompts: all.prompts,
        timed_tokens: all.timed_tokens,
        timed_positions: all.timed_positions as u64,
        timed_seconds: all.timed_seconds,
        sampled_tokens: all.answer_tokens,
        plain_steps: all.plain_steps,
        plain_seconds: all.plain_seconds,
        plain_answers: all.plain_answers,
        plain_context: all.plain_context as u64,
    }
}
