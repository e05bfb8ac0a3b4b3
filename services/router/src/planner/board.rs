//! What the planner knows and has done, for people to read.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use super::{
    PlannerMode,
    forecast::{Forecast, Split, Targets},
    plan::{Situation, Verdict},
};

/// Events kept.
const EVENTS: usize = 64;

/// All of it. Written by the planner's task, read by the admin page; held for a copy.
#[derive(Debug, Default)]
pub(crate) struct Board(Mutex<Content>);

/// What the page shows. Its field names are a public surface.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Content {
    mode: &'static str,
    /// Who plans, and since which term; absent: nobody, or it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    leader: Option<Leader>,
    models: BTreeMap<String, Outlook>,
    /// The last ones, oldest first.
    events: VecDeque<Event>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Leader {
    pub(crate) router: String,
    pub(crate) term: u64,
    /// It is the router that was asked.
    pub(crate) here: bool,
}

/// A model, as the planner sees it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outlook {
    ttft_target_ms: f64,
    tpot_target_ms: f64,
    prompt_tokens_per_second: f64,
    answer_tokens_per_second: f64,
    prompt_tokens: f64,
    context_tokens: f64,
    backlog_tokens: f64,
    now: Expected,
    #[serde(skip_serializing_if = "Option::is_none")]
    better: Option<Expected>,
    why: String,
}

/// A split and what is expected of it.
#[derive(Clone, Copy, Debug, Serialize)]
struct Expected {
    prefill: usize,
    decode: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttft_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tpot_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strain: Option<f64>,
}

/// Something that happened.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Event {
    /// Milliseconds since 1970.
    at: u64,
    /// `moved`, `advised`, `failed`, `leads`.
    what: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    model: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    worker: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    to: String,
    why: String,
}

impl Expected {
    fn new(split: Split, forecast: Option<Forecast>, targets: &Targets) -> Self {
        let ms = |seconds: f64| (seconds * 1e5).round() / 100.0;
        Self {
            prefill: split.prefill,
            decode: split.decode,
            ttft_ms: forecast.map(|seen| ms(seen.ttft)),
            tpot_ms: forecast.map(|seen| ms(seen.tpot)),
            strain: forecast.map(|seen| (seen.strain(targets) * 1e3).round() / 1e3),
        }
    }
}

impl Board {
    /// With nothing on it.
    pub(crate) fn new(mode: PlannerMode) -> Self {
        Self(Mutex::new(Content { mode: mode.as_str(), ..Content::default() }))
    }

    /// What the planner does from now on.
    pub(crate) fn set_mode(&self, mode: PlannerMode) {
        self.lock().mode = mode.as_str();
    }

    /// All of it as it is now.
    pub(crate) fn read(&self) -> Content {
        self.lock().clone()
    }

    /// Who plans.
    pub(crate) fn leader(&self, leader: Option<Leader>) {
        self.lock().leader = leader;
    }

    /// What was seen of a model.
    pub(crate) fn looked(&self, model: &str, situation: &Situation, verdict: &Verdict) {
        let Situation { demand, targets, .. } = situation;
        let outlook = Outlook {
            ttft_target_ms: targets.ttft * 1e3,
            tpot_target_ms: targets.tpot * 1e3,
            prompt_tokens_per_second: demand.prompt_tokens_per_second.round(),
            answer_tokens_per_second: demand.answer_tokens_per_second.round(),
            prompt_tokens: demand.prompt_tokens.round(),
            context_tokens: demand.context_tokens.round(),
            backlog_tokens: demand.backlog_tokens,
            now: Expected::new(verdict.now, verdict.forecast, targets),
            better: verdict.better.map(|(split, forecast)| Expected::new(split, Some(forecast), targets)),
            why: verdict.why.clone(),
        };
        self.lock().models.insert(model.to_owned(), outlook);
    }

    /// Something happened.
    pub(crate) fn tell(&self, what: &'static str, model: &str, worker: &str, to: &str, why: &str) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let [model, worker, to, why] = [model, worker, to, why].map(str::to_owned);
        let mut content = self.lock();
        if content.events.len() == EVENTS {
            content.events.pop_front();
        }
        content.events.push_back(Event { at, what, model, worker, to, why });
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
