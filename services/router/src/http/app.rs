//! What every request handler shares.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::{Request, header};
use kvasir_cluster::{Event, EventKind, Registry};
use kvasir_rpc::operator::Desk;
use kvasir_runtime::{Context, chain, random_u64};
use kvasir_settings::{Live, Now};
use kvasir_types::{Deadline, MemberId, RequestId, Retry};
use tokio::sync::{Semaphore, watch};
use tracing::{Instrument, debug_span, info};

use super::{
    deciding::Policies,
    error::Error,
    requests::{Requests, Tracked},
};
use crate::{
    access::{Caller, Keyring},
    admission::{Door, Gate, Gates, Pass},
    cache::Index,
    config::Config,
    fleet::{Fleet, Worker},
    metrics::{Inflight, Metrics},
    planner::Board,
    retry::Purse,
    route::Ask,
    text::Model,
    upstream,
};

/// Bodies up to this long are worked on where they come in; longer ones go to threads of their own, so that streams keep
/// flowing meanwhile. The tokenizer takes 0.1 µs a byte (demo model; 0.7 in the dev profile): up to here less than 1 ms.
const INLINE_BYTES: usize = 8 << 10;

/// The router's parts. One for the process, shared by all handlers.
pub(crate) struct App {
    /// The configuration, as it is whenever it is looked at.
    live: Live<Config>,
    /// The models served.
    pub(crate) models: Vec<Arc<Model>>,
    /// The workers now.
    pub(crate) fleet: watch::Receiver<Arc<Fleet>>,
    /// Whether everybody may see what is counted.
    pub(crate) public_metrics: bool,
    /// How workers are chosen.
    pub(crate) policies: Policies,
    /// What workers hold.
    pub(crate) index: Arc<Index>,
    /// What is counted.
    pub(crate) metrics: Metrics,
    /// The process: its metrics page and readiness.
    pub(crate) context: Context,
    /// When the router started, in seconds since 1970.
    pub(crate) started: u64,
    /// Who may ask.
    pub(crate) keys: watch::Receiver<Arc<Keyring>>,
    /// Where requests wait for their turn, by model.
    gates: Gates,
    /// What the planner knows.
    pub(crate) board: Arc<Board>,
    /// The requests under way, and what became of the last ones.
    pub(crate) requests: Requests,
    /// Where operators ask for changes.
    pub(crate) desk: Desk,
    /// This router's name.
    pub(crate) id: MemberId,
    /// The cluster's history is there. Not held: the admin page outlives the service.
    registry: Weak<dyn Registry>,
    /// Leaf lock, held for a sum.
    purse: Mutex<Purse>,
    inflight: Door,
    text: Arc<Semaphore>,
    tickets: AtomicU64,
}

/// What a router is made of besides its configuration.
pub(crate) struct Parts {
    pub(crate) models: Vec<Arc<Model>>,
    pub(crate) fleet: watch::Receiver<Arc<Fleet>>,
    pub(crate) index: Arc<Index>,
    pub(crate) keys: watch::Receiver<Arc<Keyring>>,
    pub(crate) gates: Gates,
    pub(crate) board: Arc<Board>,
    pub(crate) desk: Desk,
    pub(crate) id: MemberId,
    pub(crate) registry: Weak<dyn Registry>,
    pub(crate) metrics: Metrics,
    pub(crate) context: Context,
    pub(crate) live: Live<Config>,
}

/// A generation request that was let in.
pub(crate) struct Admitted {
    /// Who sent it.
    pub(crate) caller: Caller,
    /// It counts as under way.
    pub(crate) inflight: Inflight,
    /// Its place among those under way.
    pub(crate) pass: Pass,
    /// When nobody waits for it any more.
    pub(crate) deadline: Deadline,
    /// Its place in the list of those under way.
    pub(crate) tracked: Tracked,
}

impl App {
    /// All of it.
    pub(crate) fn new(config: &Config, parts: Parts) -> Self {
        let Parts { models, fleet, index, keys, gates, board, desk, id, registry, metrics, context, live } = parts;
        Self {
            inflight: Door::default(),
            text: Arc::new(Semaphore::new(config.limits.text_threads)),
            purse: Mutex::new(Purse::new(&config.retry, Instant::now())),
            live,
            keys,
            gates,
            board,
            requests: Requests::new(),
            desk,
            id,
            registry,
            models,
            fleet,
            public_metrics: config.public_metrics,
            policies: Policies::new(config.policy),
            index,
            metrics,
            context,
            started: unix_now(),
            tickets: AtomicU64::new(0),
        }
    }

    /// The configuration now.
    pub(crate) fn now(&self) -> Arc<Now<Config>> {
        Arc::clone(&self.live.borrow())
    }

    /// Does as the configuration says from now on, where it is not looked at each time.
    pub(crate) fn follow(&self, now: &Now<Config>) {
        let before = self.policies.name();
        if now.policy != before {
            self.policies.set(now.policy);
            let (policy, before) = (now.policy.as_str(), before.as_str());
            info!(policy, before, who = now.who, "another policy");
            let what = format!("chooses workers by {policy} (before: {before})");
            self.note(EventKind::Policy, self.id.as_str(), what, &now.who);
        }
        self.purse().set(&now.retry);
        let admission = Arc::new(now.admission.clone());
        self.gates.values().for_each(|gate| gate.set(Arc::clone(&admission)));
        self.board.set_mode(now.planner.mode);
    }

    /// Lets a generation request in, if there is room: before its body is read, so that what waits is bounded too.
    pub(crate) fn admit(&self, request: &Request<Body>) -> Result<Admitted, Error> {
        let caller = request.extensions().get::<Caller>().cloned().ok_or(Error::NoKey)?;
        caller.request(Instant::now()).map_err(|over| self.refused(over))?;
        let (limit, timeout) = {
            let now = self.live.borrow();
            (now.limits.max_inflight, now.limits.request_timeout())
        };
        let pass = self.inflight.enter(limit).ok_or(Error::Full { limit })?;
        let deadline = Deadline::after(timeout);
        self.purse().request();
        let id = request.extensions().get::<RequestId>().cloned().unwrap_or_else(super::fresh_id);
        let tracked = self.requests.begin(&id, &caller.tenant().name, request.uri().path());
        Ok(Admitted { caller, inflight: self.metrics.admitted(), pass, deadline, tracked })
    }

    /// Where requests for a model wait for their turn.
    pub(crate) fn gate(&self, model: &str) -> Result<&Gate, Error> {
        self.gates.get(model).ok_or_else(|| Error::NoWorker(model.to_owned()))
    }

    /// Counts a request that is not let in.
    pub(crate) fn refused(&self, why: impl Into<Error>) -> Error {
        let error = why.into();
        let why = match &error {
            Error::Rate { .. } => "rate",
            Error::Queued { .. } => "full",
            _ => "late",
        };
        self.metrics.not_let_in(why);
        error
    }

    /// A worker failed: others are preferred to it for a while.
    pub(crate) fn failed(&self, worker: &Worker, error: &upstream::Error) {
        if worker.failed(error, self.now().limits.worker_rest()) && !error.is_leave() {
            let what = format!("{} sends it nothing for a while: {}", self.id, chain(error));
            self.note(EventKind::Ejection, worker.member.id.as_str(), what, "");
        }
    }

    /// Something happened that the cluster's history should have.
    pub(crate) fn note(&self, kind: EventKind, on: &str, what: String, who: &str) {
        if let Some(registry) = self.registry.upgrade() {
            registry.note(Event::now(kind, &self.id, on, what).by(who));
        }
    }

    /// Whether what one worker did not do may be asked of another. One that leaves in good order costs no try: it does so
    /// once, and whoever had it leave knows how much that moves.
    pub(crate) fn may_go_elsewhere(&self, error: &upstream::Error) -> bool {
        error.retry() == Retry::Elsewhere && (error.is_leave() || self.may_try_again())
    }

    /// Whether a worker's failure may cost another try now.
    fn may_try_again(&self) -> bool {
        let may = self.purse().take(Instant::now());
        self.metrics.second_try(may);
        may
    }

    fn purse(&self) -> MutexGuard<'_, Purse> {
        self.purse.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model of this name.
    pub(crate) fn model(&self, name: &str) -> Result<&Arc<Model>, Error> {
        let found = self.models.iter().find(|model| model.name() == name);
        found.ok_or_else(|| Error::NoModel(name.chars().take(200).collect()))
    }

    /// What a policy may know of a request.
    pub(crate) fn ask(&self, prompt_tokens: usize) -> Ask {
        let ticket = self.tickets.fetch_add(1, Relaxed);
        Ask { prompt_tokens, ticket, dice: random_u64(), ..Ask::default() }
    }

    /// The same of a request that is not made: nobody's turn changes.
    pub(crate) fn ask_for_show(&self, prompt_tokens: usize) -> Ask {
        Ask { prompt_tokens, ticket: self.tickets.load(Relaxed), dice: random_u64(), ..Ask::default() }
    }

    /// Reads a body within its limits of size and time.
    pub(crate) async fn body(&self, request: Request<Body>) -> Result<Bytes, Error> {
        let now = self.now();
        let limit_bytes = now.limits.max_body_bytes;
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > limit_bytes as u64) {
            return Err(Error::BigBody { limit_bytes });
        }
        let timeout = now.limits.body_timeout();
        let reading = read(request.into_body(), limit_bytes);
        tokio::time::timeout(timeout, reading).await.map_err(|_| Error::SlowBody(timeout))?
    }

    /// Does text work on `bytes` bytes of input, on another thread if it is much.
    pub(crate) async fn text_work<T: Send + 'static>(
        &self,
        bytes: usize,
        deadline: Deadline,
        work: impl FnOnce() -> Result<T, crate::text::Error> + Send + 'static,
    ) -> Result<Result<T, crate::text::Error>, Error> {
        let span = debug_span!("text", bytes);
        if bytes <= INLINE_BYTES {
            return Ok(span.in_scope(work));
        }
        let elsewhere = async {
            let permit = Arc::clone(&self.text).acquire_owned().await.expect("the semaphore is never closed");
            // The permit goes with the work: if the client leaves, the work still ends on its thread.
            let joined = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                work()
            });
            joined.await
        };
        match tokio::time::timeout_at(deadline.instant().into(), elsewhere.instrument(span)).await {
            Err(_) => Err(Error::Deadline),
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::Deadline), // cancelled: the process ends
            },
        }
    }
}

async fn read(body: Body, limit_bytes: usize) -> Result<Bytes, Error> {
    let mut stream = body.into_data_stream();
    let mut whole = BytesMut::new();
    while let Some(part) = stream.next().await {
        let part = part.map_err(|_| Error::Body)?;
        if whole.len() + part.len() > limit_bytes {
            return Err(Error::BigBody { limit_bytes });
        }
        whole.extend_from_slice(&part);
    }
    Ok(whole.freeze())
}

/// Milliseconds since 1970.
pub(crate) fn unix_now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
