//! When a request goes to the workers: at once while they have room, else in its turn.
//!
//! ```text
//! enter ─┬─ room ──────────────────────────▶ Place (given back when dropped)
//!        ├─ would be late, queue full ─────▶ refused at once, with a time to come back
//!        └─ waits, fairly between tenants ─▶ Place, or refused when its time is over
//! ```
//!
//! Workers have queues, too, but theirs know no tenants, and what waits there can't go elsewhere any more. So they are given
//! as much as they can work on, and the rest waits here, where it costs a few hundred bytes. One gate for each model. Nothing
//! here holds a lock across a wait.

mod door;
mod fair;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

pub(crate) use door::{Door, Pass};
use fair::{Fair, Ticket};
use kvasir_types::{Deadline, Priority};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::access::Tenant;

/// Tokens of an answer that are expected where more are allowed.
const USUAL_ANSWER: u64 = 256;
/// How much a new measurement of the speed counts.
const NEW_SPEED: f64 = 0.1;
/// The speed is measured over at least this.
const SPEED_SPAN: Duration = Duration::from_millis(500);

/// How many requests workers get.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdmissionConfig {
    /// Requests under way for each decode worker of the model; others wait in this router, in their turn. Best a little more
    /// than the workers' `engine.max_running`. Default 80.
    pub per_worker: usize,
    /// In percent of that, how many offline requests may be under way. Default 75.
    pub offline_percent: usize,
    /// Requests that wait; one more sends the last one away of the tenant that has most waiting. Default 2048.
    pub max_waiting: usize,
    /// Longest wait, in milliseconds. A request that would wait longer, by what the last ones took, is refused at once.
    /// Default 60000.
    pub max_wait_ms: u64,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self { per_worker: 80, offline_percent: 75, max_waiting: 2048, max_wait_ms: 60_000 }
    }
}

/// Why a request does not get in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Refused {
    /// Too many wait.
    Full {
        /// How many may.
        limit: usize,
        /// When there will be room, by what the last ones took.
        after: Duration,
    },
    /// It would not be its turn in time, or was not.
    Late {
        /// How long it would take, or took.
        wait: Duration,
    },
}

/// Who wants in.
pub(crate) struct Entrant<'a> {
    pub(crate) tenant: &'a Tenant,
    pub(crate) priority: Priority,
    pub(crate) prompt_tokens: usize,
    /// Most tokens of all answers together.
    pub(crate) answer_tokens: u64,
    pub(crate) deadline: Deadline,
}

impl Entrant<'_> {
    fn cost(&self) -> u64 {
        (self.prompt_tokens as u64).saturating_add(self.answer_tokens.min(USUAL_ANSWER)).max(1)
    }
}

/// The gates, by model.
pub(crate) type Gates = Arc<HashMap<String, Gate>>;

/// The gate of a model. Clones are the same.
#[derive(Clone)]
pub(crate) struct Gate {
    /// Leaf lock; written by whoever enters or leaves.
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    config: Arc<AdmissionConfig>,
    /// Decode workers.
    workers: usize,
    online: usize,
    offline: usize,
    queue: Fair,
    waiting: HashMap<Ticket, Waiting>,
    speed: Speed,
}

struct Waiting {
    /// Not entered yet. Sent through the channel, it is given back even if nobody takes it out.
    place: Place,
    go: oneshot::Sender<Place>,
}

/// Tokens a second that get done, as of late.
#[derive(Default)]
struct Speed {
    since: Option<Instant>,
    done: u64,
    per_second: Option<f64>,
}

impl Speed {
    fn done(&mut self, tokens: u64, now: Instant) {
        self.done += tokens;
        let since = *self.since.get_or_insert(now);
        let passed = now.saturating_duration_since(since);
        if passed < SPEED_SPAN {
            return;
        }
        let new = self.done as f64 / passed.as_secs_f64();
        self.per_second = Some(self.per_second.map_or(new, |old| old + NEW_SPEED * (new - old)));
        (self.since, self.done) = (Some(now), 0);
    }

    /// It says nothing of how fast things are done when there is nothing to do.
    fn idle(&mut self) {
        (self.since, self.done) = (None, 0);
    }

    fn time_for(&self, tokens: u64) -> Duration {
        match self.per_second {
            Some(speed) if speed > 0.0 => Duration::from_secs_f64((tokens as f64 / speed).min(86_400.0)),
            _ => Duration::ZERO,
        }
    }
}

impl State {
    fn room(&self, priority: Priority) -> bool {
        let config = &self.config;
        let all = self.workers.saturating_mul(config.per_worker);
        match priority {
            Priority::Online => self.online + self.offline < all,
            Priority::Offline => self.online + self.offline < all.saturating_mul(config.offline_percent) / 100,
        }
    }

    fn count(&mut self, priority: Priority) -> &mut usize {
        match priority {
            Priority::Online => &mut self.online,
            Priority::Offline => &mut self.offline,
        }
    }

    /// Lets in whoever is next, while there is room.
    fn let_in(&mut self) {
        while self.room(Priority::Online) {
            let offline = self.room(Priority::Offline);
            let Some(ticket) = self.queue.pop(offline) else { return };
            let Some(Waiting { place, go }) = self.waiting.remove(&ticket) else { continue };
            let priority = place.priority;
            *self.count(priority) += 1;
            if let Err(mut gone) = go.send(place.enter()) {
                // Nobody waits any more. Not given back by its end, which would want the lock that is held here.
                gone.entered = false;
                *self.count(priority) -= 1;
            }
        }
    }
}

impl Gate {
    /// One that nobody has passed.
    pub(crate) fn new(config: Arc<AdmissionConfig>) -> Self {
        Self { state: Arc::new(Mutex::new(State { config, ..State::default() })) }
    }

    /// Other limits from now on, for those who wait, too.
    pub(crate) fn set(&self, config: Arc<AdmissionConfig>) {
        let mut state = self.lock();
        state.config = config;
        state.let_in();
    }

    /// So many decode workers there are now.
    pub(crate) fn set_workers(&self, workers: usize) {
        let mut state = self.lock();
        state.workers = workers;
        state.let_in();
    }

    /// How many wait, and how many are in.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.queue.len(), state.online + state.offline)
    }

    /// Waits for a place.
    pub(crate) async fn enter(&self, entrant: Entrant<'_>) -> Result<Place, Refused> {
        let (cost, priority) = (entrant.cost(), entrant.priority);
        let (name, weight) = (entrant.tenant.name.clone(), entrant.tenant.weight);
        let place = Place { gate: self.clone(), tenant: name, weight, priority, cost, spent: 0, entered: false };
        let started = Instant::now();
        let (_waits, come, limit, max_waiting) = {
            let mut state = self.lock();
            let max_waiting = state.config.max_waiting;
            let limit = Duration::from_millis(state.config.max_wait_ms).min(entrant.deadline.remaining());
            if state.queue.len() == 0 && state.room(priority) {
                *state.count(priority) += 1;
                return Ok(place.enter());
            }
            let wait = state.speed.time_for(state.queue.before(&place.tenant, weight, priority) + cost);
            if wait > limit {
                return Err(Refused::Late { wait });
            }
            if state.queue.len() >= max_waiting {
                let Some(greedy) = state.queue.most_greedy(&place.tenant) else {
                    return Err(Refused::Full { limit: max_waiting, after: wait });
                };
                state.queue.remove(greedy);
                state.waiting.remove(&greedy); // its receiver hears of it
            }
            let (go, come) = oneshot::channel();
            let ticket = state.queue.push(&place.tenant, weight, cost, priority);
            state.waiting.insert(ticket, Waiting { place, go });
            state.let_in();
            (Waits { gate: self, ticket }, come, limit, max_waiting)
        };
        match tokio::time::timeout(limit, come).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) => Err(Refused::Full { limit: max_waiting, after: started.elapsed() }),
            Err(_) => Err(Refused::Late { wait: started.elapsed() }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that waits, or has waited; dropped, it waits no more.
struct Waits<'a> {
    gate: &'a Gate,
    ticket: Ticket,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        if state.waiting.remove(&self.ticket).is_some() {
            state.queue.remove(self.ticket);
        }
    }
}

/// A place among those under way; dropped, it is given back.
#[must_use]
pub(crate) struct Place {
    gate: Gate,
    tenant: String,
    weight: u32,
    priority: Priority,
    cost: u64,
    spent: u64,
    entered: bool,
}

impl Place {
    fn enter(mut self) -> Self {
        self.entered = true;
        self
    }

    /// So many tokens were computed or written for it.
    pub(crate) fn spent(&mut self, tokens: u64) {
        self.spent = self.spent.saturating_add(tokens);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.entered {
            return;
        }
        let mut state = self.gate.lock();
        let count = state.count(self.priority);
        *count = count.saturating_sub(1);
        state.queue.correct(&self.tenant, self.weight, self.priority, self.spent as i64 - self.cost as i64);
        let now = Instant::now();
        state.speed.done(self.spent.max(1), now);
        if state.queue.len() == 0 {
            state.speed.idle();
        }
        state.let_in();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::access::Keyring;

    fn gate(per_worker: usize, max_waiting: usize) -> Gate {
        let gate = Gate::new(Arc::new(AdmissionConfig { per_worker, max_waiting, ..AdmissionConfig::default() }));
        gate.set_workers(1);
        gate
    }

    fn nobody() -> Arc<Tenant> {
        Arc::clone(Keyring::open().caller(None).unwrap().tenant())
    }

    fn entrant(tenant: &Tenant, priority: Priority) -> Entrant<'_> {
        let deadline = Deadline::after(Duration::from_secs(60));
        Entrant { tenant, priority, prompt_tokens: 10, answer_tokens: 10, deadline }
    }

    #[tokio::test]
    async fn who_waits_goes_in_when_another_leaves_and_offline_ones_leave_room() {
        let (gate, tenant) = (gate(4, 10), nobody());
        let mut inside = Vec::new();
        for _ in 0..3 {
            inside.push(gate.enter(entrant(&tenant, Priority::Offline)).await.unwrap());
        }
        let mut offline = Box::pin(gate.enter(entrant(&tenant, Priority::Offline)));
        assert!(offline.as_mut().now_or_never().is_none(), "three of four is all that offline ones get");
        inside.push(gate.enter(entrant(&tenant, Priority::Online)).now_or_never().unwrap().unwrap());
        let mut online = Box::pin(gate.enter(entrant(&tenant, Priority::Online)));
        assert!(online.as_mut().now_or_never().is_none());
        assert_eq!(gate.counts(), (2, 4));
        drop(inside.remove(0));
        let online = online.now_or_never().unwrap().unwrap();
        assert!(offline.as_mut().now_or_never().is_none());
        drop((online, inside));
        drop(offline.now_or_never().unwrap().unwrap());
        assert_eq!(gate.counts(), (0, 0));
    }

    #[tokio::test]
    async fn who_leaves_while_waiting_or_in_the_moment_of_its_turn_takes_no_place() {
        let (gate, tenant) = (gate(1, 10), nobody());
        let inside = gate.enter(entrant(&tenant, Priority::Online)).await.unwrap();
        let mut waiting = Box::pin(gate.enter(entrant(&tenant, Priority::Online)));
        let mut next = Box::pin(gate.enter(entrant(&tenant, Priority::Online)));
        assert!(waiting.as_mut().now_or_never().is_none() && next.as_mut().now_or_never().is_none());
        drop(inside); // `waiting` has its turn, and does not know yet
        assert_eq!(gate.counts(), (1, 1));
        drop(waiting);
        assert_eq!(gate.counts(), (0, 1));
        drop(next);
        assert_eq!(gate.counts(), (0, 0));
    }

    #[tokio::test]
    async fn a_full_queue_and_a_wait_that_would_be_too_long_are_refused_at_once() {
        let (gate, tenant) = (gate(1, 1), nobody());
        let mut inside = gate.enter(entrant(&tenant, Priority::Online)).await.unwrap();
        let mut waiting = Box::pin(gate.enter(entrant(&tenant, Priority::Online)));
        assert!(waiting.as_mut().now_or_never().is_none());
        let refused = gate.enter(entrant(&tenant, Priority::Online)).now_or_never().unwrap();
        assert!(matches!(refused.map(drop), Err(Refused::Full { limit: 1, .. })));
        // By the last ones, 20 tokens a second.
        gate.lock().speed.per_second = Some(20.0);
        let hasty =
            Entrant { deadline: Deadline::after(Duration::from_millis(1_500)), ..entrant(&tenant, Priority::Online) };
        let Err(Refused::Late { wait }) = gate.enter(hasty).now_or_never().unwrap().map(drop) else { panic!("let in") };
        assert_eq!(wait, Duration::from_secs(2));
        inside.spent(1_000);
        drop(inside);
        assert!(waiting.now_or_never().unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_longer_than_allowed() {
        let (gate, tenant) = (gate(1, 10), nobody());
        let _inside = gate.enter(entrant(&tenant, Priority::Online)).await.unwrap();
        let started = tokio::time::Instant::now();
        let late =
            Entrant { deadline: Deadline::after(Duration::from_secs(600)), ..entrant(&tenant, Priority::Online) };
        assert!(matches!(gate.enter(late).await.map(drop), Err(Refused::Late { .. })));
        assert_eq!(started.elapsed().as_secs(), 60);
        assert_eq!(gate.counts(), (0, 1));
    }

    #[tokio::test]
    async fn other_limits_count_at_once_for_those_who_wait_too() {
        let (gate, tenant) = (gate(1, 1), nobody());
        let _inside = gate.enter(entrant(&tenant, Priority::Online)).await.unwrap();
        let mut waiting = Box::pin(gate.enter(entrant(&tenant, Priority::Online)));
        assert!(waiting.as_mut().now_or_never().is_none());
        let refused = gate.enter(entrant(&tenant, Priority::Online)).now_or_never().unwrap();
        assert!(matches!(refused.map(drop), Err(Refused::Full { limit: 1, .. })));
        gate.set(Arc::new(AdmissionConfig { per_worker: 2, max_waiting: 0, ..AdmissionConfig::default() }));
        let _second = waiting.now_or_never().unwrap().unwrap();
        let refused = gate.enter(entrant(&tenant, Priority::Online)).now_or_never().unwrap();
        assert!(matches!(refused.map(drop), Err(Refused::Full { limit: 0, .. })), "no queue at all any more");
    }

    #[tokio::test]
    async fn more_workers_are_more_room() {
        let (gate, tenant) = (gate(1, 10), nobody());
        let _inside = gate.enter(entrant(&tenant, Priority::Online)).await.unwrap();
        let mut waiting = Box::pin(gate.enter(entrant(&tenant, Priority::Online)));
        assert!(waiting.as_mut().now_or_never().is_none());
        gate.set_workers(2);
        assert!(waiting.now_or_never().unwrap().is_ok());
    }
}
