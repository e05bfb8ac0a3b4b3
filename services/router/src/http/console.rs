//! The console: one page on the admin port that shows the cluster live, and what it asks for.
//!
//! | call | |
//! | --- | --- |
//! | `GET /console` (and `/`) | the page; it fetches nothing but what is named here, `/metrics` and `/route/explain`, and changes nothing |
//! | `GET /console/state` | members as the metadata has them, workers as this router sees them, the planner's board |
//! | `GET /console/requests`, `GET /console/request?id=` | the latest requests, and the way of one ([`ways`](super::ways)) |

use std::{sync::Arc, time::Instant};

use axum::{
    Json, Router,
    extract::State,
    response::{Html, IntoResponse, Redirect},
    routing::get,
};
use http::{HeaderName, header};
use kvasir_cluster::{Member, View};
use kvasir_runtime::Tasks;
use kvasir_types::MemberId;
use serde::Serialize;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};

use super::{
    app::{App, unix_now_ms},
    routing::{Operators, Refusal},
    ways,
};
use crate::{
    fleet::{Crew, Fleet, Worker},
    planner::Content,
};

/// The whole page: styles and script are in it.
const PAGE: &str = include_str!("console.html");

/// The page may not load or send anything elsewhere, or be shown inside another one.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What the console shows beside what requests use.
pub(crate) struct Surroundings {
    /// This router.
    pub(crate) id: MemberId,
    /// All members.
    pub(crate) members: watch::Receiver<Arc<View>>,
    /// Where what is set is changed.
    pub(crate) settings: kvasir_settings::Page,
    /// Where requests are served, and what is asked of workers lives.
    pub(crate) runtime: Handle,
    pub(crate) tasks: Tasks,
    /// Places for those who look at a request's way.
    pub(super) looks: Arc<Semaphore>,
}

impl Surroundings {
    /// Of this router; to be called where it serves requests.
    pub(crate) fn new(
        id: MemberId,
        members: watch::Receiver<Arc<View>>,
        settings: kvasir_settings::Page,
        tasks: Tasks,
    ) -> Self {
        let (runtime, looks) = (Handle::current(), Arc::new(Semaphore::new(ways::MAX_LOOKS)));
        Self { id, members, settings, runtime, tasks, looks }
    }
}

pub(super) fn routes() -> Router<Operators> {
    Router::new()
        .route("/", get(|| async { Redirect::temporary("/console") }))
        .route("/console", get(page))
        .route("/console/state", get(state))
        .merge(ways::routes())
}

async fn page() -> impl IntoResponse {
    let nosniff = (HeaderName::from_static("x-content-type-options"), "nosniff");
    ([(header::CONTENT_SECURITY_POLICY, POLICY), (header::CACHE_CONTROL, "no-cache"), nosniff], Html(PAGE))
}

async fn state(State(operators): State<Operators>) -> Result<Json<Shown>, Refusal> {
    let (app, around) = operators.opened()?;
    let (fleet, view) = (Arc::clone(&app.fleet.borrow()), Arc::clone(&around.members.borrow()));
    Ok(Json(shown(app, around, &fleet, &view)))
}

/// All that the page is told. Its field names are a public surface.
#[derive(Serialize)]
struct Shown {
    router: String,
    version: &'static str,
    now_ms: u64,
    policy: &'static str,
    models: Vec<String>,
    planner: Content,
    members: Vec<ShownMember>,
    workers: Vec<ShownWorker>,
    /// What is not as it should be, in words; empty: all is well, as far as this router knows.
    wrong: Vec<String>,
}

/// As the metadata has it.
#[derive(Serialize)]
struct ShownMember {
    id: String,
    role: String,
    works_as: String,
    pinned: bool,
    draining: bool,
    version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// Which engine of somebody else's it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<String>,
}

/// As this router sees it.
#[derive(Serialize)]
struct ShownWorker {
    id: String,
    role: String,
    /// This router's requests there.
    requests: u64,
    /// So long others are preferred, because it failed.
    rests_ms: u64,
    /// What it told last; absent: it tells nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    told: Option<Told>,
}

#[derive(Serialize)]
struct Told {
    running: u32,
    waiting: u32,
    waiting_tokens: u64,
    free_blocks: u64,
    cached_blocks: u64,
    total_blocks: u64,
    prefill_tokens_per_second: f64,
    step_ms: f64,
    /// What it wrote into decode workers' memory, while it did: what routing counts with. 0: it has not yet.
    handoff_bytes_per_second: f64,
    prefilled_tokens: u64,
    sampled_tokens: u64,
}

fn shown(app: &App, around: &Surroundings, fleet: &Fleet, view: &View) -> Shown {
    let members: Vec<_> = view.members.iter().map(ShownMember::of).collect();
    let now = Instant::now();
    let mut workers: Vec<_> = fleet.workers().map(|worker| ShownWorker::of(worker, now)).collect();
    workers.sort_by(|one, other| (&one.role, &one.id).cmp(&(&other.role, &other.id)));
    let models: Vec<String> = app.models.iter().map(|model| model.name().to_owned()).collect();
    let wrong = wrong(app, &models, &workers, fleet);
    Shown {
        router: around.id.to_string(),
        version: env!("CARGO_PKG_VERSION"),
        now_ms: unix_now_ms(),
        policy: app.policies.name().as_str(),
        models,
        planner: app.board.read(),
        members,
        workers,
        wrong,
    }
}

fn wrong(app: &App, models: &[String], workers: &[ShownWorker], fleet: &Fleet) -> Vec<String> {
    let mut wrong = Vec::new();
    if let Err(why) = app.context.health.ready() {
        wrong.push(format!("this router is not ready: {why}"));
    }
    for model in models {
        if fleet.crew(model).is_none_or(Crew::is_empty) {
            wrong.push(format!("{model}: no decode worker"));
        }
    }
    let resting = workers.iter().filter(|worker| worker.rests_ms > 0).map(|worker| worker.id.as_str());
    let resting: Vec<_> = resting.take(5).collect();
    if !resting.is_empty() {
        wrong.push(format!("failed lately: {}", resting.join(", ")));
    }
    wrong
}

impl ShownMember {
    fn of(member: &Member) -> Self {
        Self {
            id: member.id.to_string(),
            role: member.role.to_string(),
            works_as: member.works_as().to_string(),
            pinned: member.duty.pinned,
            draining: member.draining,
            version: member.version.clone(),
            model: member.model.as_ref().map(|model| model.name.clone()),
            engine: member.engine.as_ref().map(|engine| engine.kind.clone()),
        }
    }
}

impl ShownWorker {
    fn of(worker: &Worker, now: Instant) -> Self {
        let finite = |value: f64| if value.is_finite() { value } else { 0.0 };
        let told = worker.load().map(|load| {
            let totals = load.totals.unwrap_or_default();
            Told {
                running: load.running,
                waiting: load.waiting,
                waiting_tokens: load.waiting_tokens,
                free_blocks: load.free_blocks,
                cached_blocks: load.cached_blocks,
                total_blocks: load.total_blocks,
                prefill_tokens_per_second: finite(load.prefill_tokens_per_second),
                step_ms: finite(load.step_seconds * 1e3),
                handoff_bytes_per_second: finite(load.handoff_bytes_per_second),
                prefilled_tokens: totals.prefilled_tokens,
                sampled_tokens: totals.sampled_tokens,
            }
        });
        Self {
            id: worker.member.id.to_string(),
            role: worker.member.role.to_string(),
            requests: worker.pulse.requests(),
            rests_ms: worker.pulse.rests_for(now).as_millis() as u64,
            told,
        }
    }
}
