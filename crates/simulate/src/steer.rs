//! Workers that change between prefill and decode while the run goes on: the router's planner, on the virtual clock.
//!
//! ```text
//!   workers' totals ─▶ Learned (how fast) ─┐
//!                    └▶ Demand ────────────┴▶ planner::plan::Planner::look ─▶ who changes, and why
//! ```
//!
//! The forecast and the plan are the router's own (`kvasir_router::planner`); what is asked of the workers is counted here as the
//! router's task does it: from what they did lately, where what is ten seconds ago counts half.

use kvasir_router::planner::{
    forecast::{Demand, Fleet, Targets},
    plan::{Candidate, Planner, Settings, Situation, Verdict},
    speeds::{Learned, Prompt, Speeds, Step, Totals},
};

use crate::{
    front::Role,
    worker::{self, Worker},
    workload::{Ns, nanos, seconds},
};

/// What was asked so long ago counts half, in seconds.
const HALF_LIFE: f64 = 10.0;
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
    all: Learned,
    workers: Vec<(Totals, Learned)>,
    /// When workers are looked at next, and when the planner looks.
    pub next: Ns,
    observed: Ns,
    look: Ns,
    seconds: f64,
    done: Sums,
}

/// What was done lately.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    prompt_tokens: f64,
    prompts: f64,
    answer_tokens: f64,
    answers: f64,
    context: f64,
}

impl Steer {
    /// Of so many workers.
    pub fn new(steering: Steering, workers: usize) -> Self {
        Self {
            steering,
            planner: Planner::new(Settings::default()),
            all: Learned::default(),
            workers: vec![Default::default(); workers],
            next: OBSERVE,
            observed: 0,
            look: nanos(steering.look_seconds),
            seconds: 0.0,
            done: Sums::default(),
        }
    }

    /// It is [`next`](Self::next): learns, and looks if it is time to. `None` as a role: it is changing, and stays out of it.
    pub fn observe(&mut self, now: Ns, workers: &[Worker], roles: &[Option<Role>], room: u64) -> Option<Verdict> {
        self.next = now + OBSERVE;
        let passed = seconds(now - self.observed);
        self.observed = now;
        let fade = (-passed / HALF_LIFE).exp2();
        let Sums { prompt_tokens, prompts, answer_tokens, answers, context } = &mut self.done;
        for sum in [&mut self.seconds, prompt_tokens, prompts, answer_tokens, answers, context] {
            *sum *= fade;
        }
        self.seconds += passed;
        for ((before, learned), worker) in self.workers.iter_mut().zip(workers) {
            let totals = totals(&worker.done(now));
            if let Some(done) = totals.since(before) {
                learned.add(&done);
                self.all.add(&done);
                *prompt_tokens += done.prefilled_tokens as f64;
                *prompts += done.prefilled_prompts as f64;
                *answer_tokens += done.sampled_tokens as f64;
                *answers += done.plain_answers as f64;
                *context += done.plain_context as f64;
            }
            *before = totals;
        }
        if now < self.look {
            return None;
        }
        self.look = now + nanos(self.steering.look_seconds);
        Some(self.planner.look(seconds(now), &self.situation(workers, roles, room)))
    }

    fn situation(&self, workers: &[Worker], roles: &[Option<Role>], room: u64) -> Situation {
        let Sums { prompt_tokens, prompts, answer_tokens, answers, context } = self.done;
        let per = |amount: f64, each: f64| if each > 0.0 { amount / each } else { 0.0 };
        let waiting = |worker: &Worker| (worker.prefilling_tokens() + worker.waiting_tokens) as f64;
        let reads = |role: &Option<Role>| *role == Some(Role::Prefill);
        let demand = Demand {
            prompt_tokens_per_second: per(prompt_tokens, self.seconds),
            prompt_tokens: per(prompt_tokens, prompts),
            answer_tokens_per_second: per(answer_tokens, self.seconds),
            context_tokens: per(context, answers),
            backlog_tokens: workers.iter().zip(roles).filter(|(_, role)| reads(role)).map(|one| waiting(one.0)).sum(),
        };
        let candidate = |(worker, role): (&Worker, &Option<Role>)| Candidate {
            decodes: *role != Some(Role::Prefill),
            movable: role.is_some(),
            work: if reads(role) { waiting(worker) } else { f64::from(worker.holding) + worker.waiting.len() as f64 },
        };
        let targets = Targets { ttft: self.steering.ttft_seconds, tpot: self.steering.tpot_seconds };
        let candidates = workers.iter().zip(roles).map(candidate).collect();
        Situation { demand, fleet: self.fleet(room as f64), targets, workers: candidates }
    }

    /// How fast all of them are, on average; `None` as long as nobody has shown it.
    fn fleet(&self, room_tokens: f64) -> Option<Fleet> {
        let speeds: Vec<Speeds> = self.workers.iter().map(|(_, learned)| learned.speeds(Some(&self.all))).collect();
        let steps: Vec<Step> = speeds.iter().filter_map(|speeds| speeds.step).collect();
        let prompts: Vec<Prompt> = speeds.iter().filter_map(|speeds| speeds.prompt).collect();
        if steps.is_empty() || prompts.is_empty() {
            return None;
        }
        let step = |pick: fn(&Step) -> f64| steps.iter().map(pick).sum::<f64>() / steps.len() as f64;
        let prompt = |pick: fn(&Prompt) -> f64| prompts.iter().map(pick).sum::<f64>() / prompts.len() as f64;
        Some(Fleet {
            step: Step {
                base: step(|step| step.base),
                per_answer: step(|step| step.per_answer),
                per_context_token: step(|step| step.per_context_token),
            },
            prompt: Prompt {
                per_token: prompt(|prompt| prompt.per_token),
                per_place: prompt(|prompt| prompt.per_place),
            },
            room_tokens,
        })
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
