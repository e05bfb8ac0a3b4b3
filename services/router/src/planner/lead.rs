//! The planner's task: every router watches, one acts.
//!
//! Which one is an office in the cluster's metadata: a router that dies or loses its lease loses it, and another one takes
//! over within two leases. Every change is asked for under the term of that office, and workers refuse one that is over: a
//! router that was stopped in the middle of a plan does no harm when it goes on.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_cluster::{Member, Office, Registry, View};
use kvasir_proto::v1::{self, worker_client::WorkerClient};
use kvasir_runtime::chain;
use kvasir_settings::Live;
use kvasir_types::{Incarnation, MemberId, PROTOCOL_VERSION, Role};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    PlannerMode,
    board::{Board, Leader},
    forecast::Targets,
    meter::{Meter, Told},
    plan::{Candidate, Planner, Situation, Verdict},
};
use crate::{
    admission::Gates,
    config::{Config, Slo},
    fleet::{Fleet, Worker},
    metrics::PlannerMetrics,
};

/// Between two looks at what workers tell.
const OBSERVE: Duration = Duration::from_millis(500);
/// For a worker to change what it works as.
const PATIENCE: Duration = Duration::from_secs(3);
/// Requests that wait here tell how many more there would be; not more than this many times more.
const MOST_CROWD: f64 = 4.0;
/// The office's name.
const OFFICE: &str = "planner";

/// What the task is made of.
pub(crate) struct Parts {
    /// This router's name.
    pub(crate) id: MemberId,
    /// Looked at before each look at the workers.
    pub(crate) live: Live<Config>,
    /// By model.
    pub(crate) targets: BTreeMap<String, Slo>,
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) fleet: watch::Receiver<Arc<Fleet>>,
    pub(crate) gates: Gates,
    pub(crate) board: Arc<Board>,
    /// What it shows to workers that move for operators only.
    pub(crate) token: Option<String>,
    pub(crate) metrics: PlannerMetrics,
}

/// What is known of a model from one look to the next.
struct Ledger {
    targets: Targets,
    meter: Meter<Life>,
    planner: Planner,
    /// What every worker worked as when it was last looked at.
    worked_as: HashMap<Life, Role>,
    advised: String,
}

/// One life of one worker.
type Life = (MemberId, Incarnation);

/// The task.
pub(crate) struct Lead {
    parts: Parts,
    ledgers: BTreeMap<String, Ledger>,
    began: Instant,
    term: Option<u64>,
}

impl Lead {
    /// That has not looked yet.
    pub(crate) fn new(parts: Parts) -> Self {
        let ledgers = parts.targets.iter().map(|(model, slo)| {
            let planner = Planner::new(parts.live.borrow().planner.settings());
            let targets = Targets { ttft: slo.ttft_ms / 1e3, tpot: slo.tpot_ms / 1e3 };
            let ledger =
                Ledger { targets, meter: Meter::default(), planner, worked_as: HashMap::new(), advised: String::new() };
            (model.clone(), ledger)
        });
        Self { ledgers: ledgers.collect(), parts, began: Instant::now(), term: None }
    }

    /// Never ends.
    pub(crate) async fn run(mut self) {
        let (mut observed, mut looked) = (Instant::now(), Instant::now());
        loop {
            tokio::time::sleep(OBSERVE).await;
            let now = Instant::now();
            let fleet = Arc::clone(&self.parts.fleet.borrow());
            let told = self.observe(&fleet, now.duration_since(observed).as_secs_f64());
            observed = now;
            let look = Duration::from_millis(self.parts.live.borrow().planner.look_ms).max(OBSERVE);
            if now.duration_since(looked) >= look {
                looked = now;
                self.look(&fleet, &told).await;
            }
        }
    }

    /// Learns from what workers tell, and lets decisions know what steps will take.
    fn observe(&mut self, fleet: &Fleet, seconds: f64) -> BTreeMap<String, Vec<Told<Life>>> {
        let mut all = BTreeMap::new();
        for (model, ledger) in &mut self.ledgers {
            let crew = fleet.crew(model);
            let workers = || crew.into_iter().flat_map(|crew| crew.everybody());
            let told: Vec<Told<Life>> = workers().filter_map(|(worker, role)| told(worker, role)).collect();
            ledger.meter.observe(seconds, &told);
            let context = ledger.meter.context();
            for (worker, _) in workers() {
                if let Some(step) = ledger.meter.speeds(&life(&worker.member)).step {
                    worker.pulse.predict(step.base as f32, step.each(context) as f32);
                }
            }
            all.insert(model.clone(), told);
        }
        all
    }

    /// Holds the office, if nobody else does, and does what the plan says.
    async fn look(&mut self, fleet: &Fleet, told: &BTreeMap<String, Vec<Told<Life>>>) {
        let config = self.parts.live.borrow().planner.clone();
        if config.mode == PlannerMode::Off {
            return;
        }
        let Some(term) = self.leads().await else { return };
        let now = self.began.elapsed().as_secs_f64();
        let view = Arc::clone(&self.parts.registry.view().borrow());
        let models: Vec<String> = self.ledgers.keys().cloned().collect();
        for model in models {
            let told = told.get(&model).map_or(&[][..], Vec::as_slice);
            let crowd = self.crowd(&model);
            let Some(ledger) = self.ledgers.get_mut(&model) else { continue };
            let records: Vec<Option<&Member>> = told.iter().map(|worker| record(&view, worker)).collect();
            ledger.notice(&records, now);
            ledger.planner.set(config.settings());
            let situation = ledger.situation(told, &records, crowd);
            let verdict = ledger.planner.look(now, &situation);
            self.parts.board.looked(&model, &situation, &verdict);
            if config.mode == PlannerMode::Act {
                self.act(&model, term, fleet, told, &verdict).await;
            } else {
                self.advise(&model, told, &verdict);
            }
        }
    }

    /// The term of office, if this router plans.
    async fn leads(&mut self) -> Option<u64> {
        let office: MemberId = OFFICE.parse().expect("a name");
        let asked = self.parts.registry.claim_office(&office, &self.parts.id, Role::Router).await;
        let held = match asked {
            Ok(held) => held,
            // Not known: nobody should act, and what workers do meanwhile is what they did before.
            Err(_) => {
                self.lost();
                self.parts.board.leader(None);
                return None;
            }
        };
        let Office { holder, term, ours } = held;
        self.parts.board.leader(Some(Leader { router: holder.to_string(), term, here: ours }));
        if !ours {
            self.lost();
            return None;
        }
        if self.term.replace(term) != Some(term) {
            info!(term, "this router plans");
            self.parts.metrics.leads(true);
            self.parts.board.tell("leads", "", "", "", &format!("term {term}"));
            // Whoever planned before may have moved somebody a moment ago.
            let now = self.began.elapsed().as_secs_f64();
            self.ledgers.values_mut().for_each(|ledger| ledger.planner.disturbed(now));
        }
        Some(term)
    }

    fn lost(&mut self) {
        if self.term.take().is_some() {
            info!("this router plans no more");
            self.parts.metrics.leads(false);
        }
    }

    /// How many times more would be asked of the workers if all that waits in this router were let in. Other routers are thought to
    /// be as crowded.
    fn crowd(&self, model: &str) -> f64 {
        let (waiting, placed) = self.parts.gates.get(model).map_or((0, 0), crate::admission::Gate::counts);
        (1.0 + waiting as f64 / (placed.max(1)) as f64).min(MOST_CROWD)
    }

    async fn act(&self, model: &str, term: u64, fleet: &Fleet, told: &[Told<Life>], verdict: &Verdict) {
        let (board, metrics) = (&self.parts.board, &self.parts.metrics);
        for worker in verdict.moves.iter().filter_map(|&at| told.get(at)) {
            let to = if worker.reads { Role::Decode } else { Role::Prefill };
            let request = v1::SetDutyRequest {
                protocol_version: PROTOCOL_VERSION,
                incarnation: worker.worker.1.0,
                role: to.to_string(),
                pin: v1::Pin::Unspecified.into(),
                term,
                reason: verdict.why.clone(),
            };
            let name = worker.worker.0.as_str();
            let found = fleet.workers().find(|one| is(&one.member, &worker.worker));
            let Some(found) = found else { continue };
            match set_duty(found, request, self.parts.token.as_deref()).await {
                Ok(()) => {
                    info!(model, worker = name, to = %to, why = verdict.why, "a worker is moved");
                    board.tell("moved", model, name, &to.to_string(), &verdict.why);
                    metrics.moved(to);
                }
                Err(error) => {
                    warn!(model, worker = name, to = %to, error, "a worker was not moved");
                    board.tell("failed", model, name, &to.to_string(), &error);
                }
            }
        }
    }

    fn advise(&mut self, model: &str, told: &[Told<Life>], verdict: &Verdict) {
        let Some(ledger) = self.ledgers.get_mut(model) else { return };
        for worker in verdict.moves.iter().filter_map(|&at| told.get(at)) {
            let to = if worker.reads { Role::Decode } else { Role::Prefill };
            let advice = format!("{} {to}", worker.worker.0);
            // The same advice every pause would be noise.
            if ledger.advised != advice {
                info!(model, worker = %worker.worker.0, to = %to, why = verdict.why, "a worker would be better as something else");
                self.parts.board.tell("advised", model, worker.worker.0.as_str(), &to.to_string(), &verdict.why);
                ledger.advised = advice;
            }
        }
    }
}

impl Ledger {
    /// Somebody else may have moved workers: then what was thought before is void.
    fn notice(&mut self, records: &[Option<&Member>], now: f64) {
        let works_as: HashMap<_, _> =
            records.iter().flatten().map(|member| (life(member), member.works_as())).collect();
        let moved = works_as.iter().any(|(name, role)| self.worked_as.get(name).is_some_and(|before| before != role));
        if moved {
            self.planner.disturbed(now);
        }
        self.worked_as = works_as;
    }

    fn situation(&self, told: &[Told<Life>], records: &[Option<&Member>], crowd: f64) -> Situation {
        let candidates = told.iter().zip(records).map(|(worker, record)| Candidate {
            decodes: !worker.reads,
            movable: record.is_some_and(|member| !member.duty.pinned && !member.draining),
            work: worker.work(),
        });
        Situation {
            demand: self.meter.demand(told, crowd),
            fleet: self.meter.fleet(told),
            targets: self.targets,
            workers: candidates.collect(),
        }
    }
}

fn record<'a>(view: &'a View, worker: &Told<Life>) -> Option<&'a Member> {
    view.members.iter().find(|member| is(member, &worker.worker))
}

fn life(member: &Member) -> Life {
    (member.id.clone(), member.incarnation)
}

fn is(member: &Member, life: &Life) -> bool {
    member.id == life.0 && member.incarnation == life.1
}

/// What a worker tells, if it tells what is needed (older ones don't).
fn told(worker: &Worker, role: Role) -> Option<Told<Life>> {
    let load = worker.load()?;
    let totals = load.totals?;
    Some(Told {
        worker: life(&worker.member),
        totals: (&totals).into(),
        reads: role == Role::Prefill,
        waiting_tokens: load.waiting_tokens.min(1 << 40),
        room_tokens: load.total_blocks.saturating_mul(worker.block_tokens().into()).min(1 << 40),
        requests: load.running.saturating_add(load.waiting),
    })
}

async fn set_duty(worker: &Worker, request: v1::SetDutyRequest, token: Option<&str>) -> Result<(), String> {
    let channel = worker.channel().map_err(|error| chain(&error).to_string())?;
    let mut client = WorkerClient::new(channel);
    let call = kvasir_rpc::operator::with_token(request, token).map_err(|status| status.message().to_owned())?;
    match tokio::time::timeout(PATIENCE, client.set_duty(call)).await {
        Err(_) => Err(format!("no answer within {} ms", PATIENCE.as_millis())),
        Ok(Err(status)) => Err(status.message().chars().filter(|c| !c.is_control()).take(400).collect()),
        Ok(Ok(_)) => Ok(()),
    }
}
