//! A run: requests come, a policy chooses, workers compute; events on a virtual clock.
//!
//! ```text
//!   arrival ─▶ Front::decide ─▶ decode worker: memory for prompt and answer ─▶ prefill worker: memory, reads, chunks
//!                                   │ (or computes the rest itself)                      │ first token ─▶ client
//!                                   ◀────────── layer by layer, while it computes ───────┘
//!                                   └─▶ joins the answers there, step by step, ends
//! ```
//!
//! Same workload, plan and seed: same outcome. Nothing here reads a clock but to tell how long decisions took in reality,
//! which decides nothing.

use std::{cmp::Reverse, collections::BinaryHeap};

use kvasir_router::route::{PolicyName, Speed};

use crate::{
    front::{Front, Role, Setting},
    known::{Lease, Told},
    plan::{Error, Fate, Outcome, Plan},
    profile::Profile,
    room::{Hold, Room},
    steer::{Move, Steer},
    worker::{Done, Prompt, Worker},
    workload::{Ns, Workload, nanos, seconds},
};

/// How often `progress` hears, in requests.
const PROGRESS_EVERY: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The worker's step is over, if its generation is still this.
    Step(u32, u32),
    /// A request is at its decode worker.
    AtDecode(u32),
    /// A prompt is at its prefill worker.
    AtPrefill(u32),
    /// What was read for a prompt is there.
    Ready(u32),
    /// The client has the first token.
    First(u32),
    /// All of a prompt is at the decode worker.
    Landed(u32),
    /// A worker is what it was told to become.
    Changed(u32),
}

/// A request under way.
#[derive(Clone, Copy, Debug, Default)]
struct Flight {
    decode: u32,
    prefill: Option<u32>,
    /// Which of both it waits for now.
    at_prefill: bool,
    /// Tokens that the decode worker has.
    there: u32,
    stored: u32,
    hold: Hold,
    reading: Option<Prompt>,
    lease: Lease,
    prefill_lease: Option<Lease>,
}

/// Runs the workload under a policy; `progress` hears of requests that came.
///
/// # Errors
/// If the plan can't be simulated.
pub fn run(
    workload: &Workload,
    plan: &Plan,
    policy: PolicyName,
    progress: impl FnMut(usize),
) -> Result<Outcome, Error> {
    plan.check()?;
    let mut run = Run::new(workload, plan, policy);
    run.all(progress);
    Ok(run.outcome())
}

struct Run<'a> {
    workload: &'a Workload,
    plan: &'a Plan,
    profile: &'a Profile,
    hop: Ns,
    now: Ns,
    events: BinaryHeap<Reverse<(Ns, u64, Event)>>,
    happened: u64,
    scheduled: u64,
    workers: Vec<Worker>,
    roles: Vec<Role>,
    /// Those that are about to be what their roles say.
    changing: Vec<bool>,
    steer: Option<Steer>,
    moves: Vec<Move>,
    front: Front,
    store: Room,
    flights: Vec<Flight>,
    fates: Vec<Fate>,
    done: Vec<Done>,
    end: Ns,
}

impl<'a> Run<'a> {
    fn new(workload: &'a Workload, plan: &'a Plan, policy: PolicyName) -> Self {
        let profile = &plan.profile;
        let count = plan.prefill + plan.decode;
        let setting = Setting {
            policy,
            token_bytes: profile.kv.token_bytes,
            local_tokens: profile.decode.local_tokens,
            block_tokens: workload.shape().block_tokens,
            delay: plan.index_delay_ms * 1_000_000,
            every: plan.load_interval_ms * 1_000_000,
            seed: workload.shape().seed,
        };
        let roles: Vec<Role> =
            (0..count).map(|worker| if worker < plan.prefill { Role::Prefill } else { Role::Decode }).collect();
        let mut front = Front::new(setting, count);
        front.members(roles.iter().copied().map(Some));
        Self {
            workload,
            plan,
            profile,
            hop: nanos(profile.hop_seconds),
            now: 0,
            events: BinaryHeap::new(),
            happened: 0,
            scheduled: 0,
            workers: (0..count).map(|_| Worker::new(profile.kv.room_tokens)).collect(),
            roles,
            changing: vec![false; count],
            steer: plan.steering.map(Steer::new),
            moves: Vec::new(),
            front,
            store: Room::new(plan.store_tokens),
            flights: vec![Flight::default(); workload.len()],
            fates: vec![Fate::default(); workload.len()],
            done: Vec::new(),
            end: 0,
        }
    }

    fn all(&mut self, mut progress: impl FnMut(usize)) {
        let mut next = 0;
        loop {
            let event = self.events.peek().map(|Reverse((at, ..))| *at);
            let arrival = (next < self.workload.len()).then(|| self.workload.at(next));
            let Some(soonest) = event.into_iter().chain(arrival).min() else { break };
            if let Some(look) = self.steer.as_ref().map(|steer| steer.next).filter(|&look| look < soonest) {
                self.now = look;
                self.steer();
                continue;
            }
            if next < self.workload.len() && event.is_none_or(|at| self.workload.at(next) <= at) {
                if next.is_multiple_of(PROGRESS_EVERY) {
                    progress(next);
                }
                self.now = self.workload.at(next);
                self.arrive(next as u32);
                next += 1;
                continue;
            }
            let Some(Reverse((at, _, event))) = self.events.pop() else { break };
            self.now = at;
            self.happened += 1;
            self.happens(event);
        }
    }

    fn outcome(self) -> Outcome {
        Outcome {
            fates: self.fates,
            totals: self.workers.iter().map(|worker| worker.totals).collect(),
            end: self.end,
            events: self.happened,
            decisions: (self.front.decisions, self.front.took),
            moves: self.moves,
        }
    }

    fn at(&mut self, at: Ns, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse((at, self.scheduled, event)));
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Step(worker, generation) => self.stepped(worker, generation),
            Event::AtDecode(request) => {
                let worker = self.flights[request as usize].decode;
                self.line_up(worker, request, 0);
            }
            Event::AtPrefill(request) => {
                let flight = &mut self.flights[request as usize];
                flight.at_prefill = true;
                let worker = flight.prefill.expect("it was sent to one");
                self.line_up(worker, request, u64::from(self.workload.prompt(request as usize)));
            }
            Event::Ready(request) => {
                let flight = &mut self.flights[request as usize];
                let worker = flight.prefill.expect("it reads for one");
                let prompt = flight.reading.take().expect("it was reading");
                self.hear(worker);
                self.compute(worker, prompt);
                self.go_on(worker);
            }
            Event::First(request) => {
                self.fates[request as usize].first = self.now;
                let flight = &mut self.flights[request as usize];
                if let (Some(worker), Some(lease)) = (flight.prefill, flight.prefill_lease.take()) {
                    self.hear(worker);
                    self.front.over(worker, lease);
                }
            }
            Event::Landed(request) => self.landed(request),
            Event::Changed(worker) => {
                self.hear(worker);
                self.changing[worker as usize] = false;
                self.front.members(chosen(&self.roles, &self.changing).into_iter());
            }
        }
    }

    /// The planner observes, and perhaps somebody changes. What a worker has begun, it goes on with.
    fn steer(&mut self) {
        let roles = chosen(&self.roles, &self.changing);
        let (Some(steer), Some(steering)) = (&mut self.steer, self.plan.steering) else { return };
        let room = self.profile.kv.room_tokens;
        let Some(verdict) = steer.observe(self.now, &self.workers, &roles, room) else { return };
        for &at in &verdict.moves {
            let worker = at as u32;
            self.hear(worker);
            let to = if self.roles[at] == Role::Prefill { Role::Decode } else { Role::Prefill };
            (self.roles[at], self.changing[at]) = (to, true);
            self.moves.push(Move { at_seconds: seconds(self.now), worker, to, why: verdict.why.clone() });
            self.at(self.now + nanos(steering.switch_seconds), Event::Changed(worker));
        }
        if !verdict.moves.is_empty() {
            self.front.members(chosen(&self.roles, &self.changing).into_iter());
        }
    }

    fn arrive(&mut self, request: u32) {
        let at = request as usize;
        let blocks = self.workload.blocks(at);
        if blocks.tokens() + u64::from(self.workload.answer(at)) > self.profile.kv.room_tokens {
            return;
        }
        for worker in 0..self.workers.len() as u32 {
            self.hear(worker);
        }
        let choice =
            self.front.decide(self.now, at, blocks, self.workload.session(at)).expect("there is a decode worker");
        let (tokens, left) = (blocks.tokens(), choice.left);
        let lease = self.front.sent(choice.decode, tokens, if choice.prefill.is_none() { left } else { 0 });
        let prefill_lease = choice.prefill.map(|prefill| self.front.sent(prefill, tokens, left));
        let (decode, prefill) = (choice.decode, choice.prefill);
        self.flights[at] = Flight { decode, prefill, lease, prefill_lease, ..Flight::default() };
        self.at(self.now + self.hop, Event::AtDecode(request));
    }

    /// The router hears what a worker told until now: before it changes, and before anybody is chosen.
    fn hear(&mut self, worker: u32) {
        let (at, model) = (worker as usize, &self.workers[worker as usize]);
        let decode = self.roles[at] == Role::Decode;
        self.front.known[at].hear(self.now, || Told {
            requests: u64::from(model.holding) + model.waiting.len() as u64,
            // A decode worker has prompts waiting for memory that others will compute.
            work: model.prefilling_tokens() + if decode { 0 } else { model.waiting_tokens },
            room: model.room.available(),
            speed: Speed {
                prefill_tokens_per_second: model.prefill_speed() as f32,
                step_seconds: model.step_seconds() as f32,
                handoff_bytes_per_second: if model.link_free > 0 {
                    self.profile.handover.bytes_per_second as f32
                } else {
                    0.0
                },
            },
        });
    }

    /// A request waits for memory at a worker.
    fn line_up(&mut self, worker: u32, request: u32, tokens: u64) {
        self.hear(worker);
        let model = &mut self.workers[worker as usize];
        model.waiting.push_back(request);
        model.waiting_tokens += tokens;
        self.go_on(worker);
    }

    /// Those first in line get memory, if there is some; then a step begins, if there is something to do.
    fn go_on(&mut self, worker: u32) {
        let at = worker as usize;
        while let Some(&request) = self.workers[at].waiting.front()
            && self.workers[at].holding < self.profile.decode.max_running
        {
            let admitted = match self.flights[request as usize].at_prefill {
                true => self.admit_prompt(worker, request),
                false => self.admit(worker, request),
            };
            if !admitted {
                break;
            }
            let model = &mut self.workers[at];
            model.waiting.pop_front();
            model.holding += 1;
        }
        if let Some(ends) = self.workers[at].begin(self.now, self.profile, self.workload) {
            let generation = self.workers[at].generation;
            self.at(ends, Event::Step(worker, generation));
        }
        self.front.changed(self.now, worker, &mut self.workers[at].room.changes);
    }

    /// Memory for prompt and answer at the decode worker; then the prompt is computed here or elsewhere.
    fn admit(&mut self, worker: u32, request: u32) -> bool {
        let at = request as usize;
        let (blocks, answer) = (self.workload.blocks(at), self.workload.answer(at));
        let Some(hold) = self.workers[worker as usize].room.hold(blocks, answer.into()) else { return false };
        let tokens = self.workload.prompt(at);
        let there = blocks.tokens_of(hold.blocks).min(u64::from(tokens) - 1) as u32;
        let flight = &mut self.flights[at];
        flight.there = there;
        let local = tokens - there <= self.profile.decode.local_tokens;
        if flight.prefill.is_some() && !local {
            flight.hold = hold;
            self.at(self.now + self.hop, Event::AtPrefill(request));
        } else {
            if let (Some(prefill), Some(lease)) = (flight.prefill.take(), flight.prefill_lease.take()) {
                self.hear(prefill);
                self.front.over(prefill, lease);
            }
            self.compute(worker, Prompt { request, done: there, tokens, from: there, hold, begun: false });
        }
        true
    }

    /// Memory for the prompt at the prefill worker; what others have is read, if that is faster than computing it.
    fn admit_prompt(&mut self, worker: u32, request: u32) -> bool {
        let at = request as usize;
        let blocks = self.workload.blocks(at);
        let Some(hold) = self.workers[worker as usize].room.hold(blocks, 0) else { return false };
        let tokens = self.workload.prompt(at);
        self.workers[worker as usize].waiting_tokens -= u64::from(tokens);
        let usable = |blocks_found| blocks.tokens_of(blocks_found).min(u64::from(tokens) - 1) as u32;
        let here = usable(hold.blocks);
        let Profile { kv, handover, store, prefill, .. } = self.profile;
        let reading = |from: u32, to: u32, speed: f64| f64::from(to - from) * f64::from(kv.token_bytes) / speed;
        let computing = |from: u32, to: u32| f64::from(to - from) * prefill.token_seconds;
        let (mut done, mut ready) = (here, 0.0);
        let there = self.flights[at].there;
        let read = reading(here, there.max(here), handover.bytes_per_second);
        if there > here && read < computing(here, there) {
            (done, ready) = (there, read);
        }
        let stored = if self.plan.store_tokens > 0 { usable(self.store.found(blocks)) } else { 0 };
        if stored > done {
            let read = store.lookup_seconds + reading(done, stored, store.bytes_per_second);
            if read < computing(done, stored) {
                self.flights[at].stored = stored - done;
                (done, ready) = (stored, ready + read);
            }
        }
        let prompt = Prompt { request, done, tokens, from: done, hold, begun: false };
        if ready > 0.0 {
            self.flights[at].reading = Some(prompt);
            self.at(self.now + nanos(ready), Event::Ready(request));
        } else {
            self.compute(worker, prompt);
        }
        true
    }

    fn compute(&mut self, worker: u32, prompt: Prompt) {
        self.interrupt(worker);
        self.workers[worker as usize].compute(prompt);
    }

    fn interrupt(&mut self, worker: u32) {
        let model = &mut self.workers[worker as usize];
        if let Some(ends) = model.interrupt(self.now) {
            let generation = model.generation;
            self.at(ends, Event::Step(worker, generation));
        }
    }

    fn stepped(&mut self, worker: u32, generation: u32) {
        if self.workers[worker as usize].generation != generation {
            return;
        }
        self.hear(worker);
        let mut done = std::mem::take(&mut self.done);
        self.workers[worker as usize].finish(self.now, &mut done);
        for done in done.drain(..) {
            match done {
                Done::Answer { request } => self.ended(request),
                Done::Chunk { prompt, tokens, began } => {
                    if self.flights[prompt.request as usize].prefill == Some(worker) {
                        self.written(worker, prompt, tokens, began);
                    } else if prompt.done == prompt.tokens {
                        self.computed_here(prompt);
                    }
                }
            }
        }
        self.done = done;
        self.go_on(worker);
    }

    /// A chunk was computed, and was written into the decode worker's memory meanwhile.
    fn written(&mut self, worker: u32, prompt: Prompt, tokens: u32, began: Ns) {
        let at = prompt.request as usize;
        let Flight { there, decode, .. } = self.flights[at];
        let Profile { handover, kv, .. } = self.profile;
        let bytes = |from: u32, to: u32| f64::from(to.saturating_sub(from.max(there))) * f64::from(kv.token_bytes);
        let moving = |bytes: f64| bytes / handover.bytes_per_second;
        let layers = f64::from(handover.layers);
        let (before, model) = (prompt.done - tokens, &mut self.workers[worker as usize]);
        let mut free = seconds(model.link_free.max(began));
        if before == prompt.from {
            // What was found here or elsewhere goes first.
            free += moving(bytes(0, prompt.from));
        }
        let fresh = moving(bytes(before, prompt.done));
        let first_layer = seconds(began) + seconds(self.now - began) / layers;
        free = (free.max(first_layer) + fresh).max(seconds(self.now) + fresh / layers);
        model.link_free = nanos(free);
        if prompt.done < prompt.tokens {
            return;
        }
        let mut hold = prompt.hold;
        let blocks = self.workload.blocks(at);
        model.room.fill(&mut hold, blocks);
        model.room.release(hold, blocks);
        model.holding -= 1;
        self.front.changed(self.now, worker, &mut model.room.changes);
        let landed = model.link_free.max(self.now) + self.hop;
        self.keep(prompt);
        (self.fates[at].prefill, self.fates[at].decode) = (worker, decode);
        self.at(self.now + 2 * self.hop, Event::First(prompt.request));
        self.at(landed, Event::Landed(prompt.request));
    }

    /// The decode worker computed a prompt itself.
    fn computed_here(&mut self, prompt: Prompt) {
        let flight = &mut self.flights[prompt.request as usize];
        flight.hold = prompt.hold;
        let fate = &mut self.fates[prompt.request as usize];
        (fate.prefill, fate.decode) = (flight.decode, flight.decode);
        self.keep(prompt);
        self.at(self.now + self.hop, Event::First(prompt.request));
        self.begin_answer(prompt.request);
    }

    /// Notes what of a prompt was found, and puts it into the KV store.
    fn keep(&mut self, prompt: Prompt) {
        let at = prompt.request as usize;
        let fate = &mut self.fates[at];
        // What came meanwhile from others' computing needs no store.
        let stored = self.flights[at].stored;
        fate.stored = stored;
        fate.found = prompt.from - stored.min(prompt.from);
        if self.plan.store_tokens > 0 {
            let blocks = self.workload.blocks(at);
            if let Some(mut hold) = self.store.hold(blocks, 0) {
                self.store.fill(&mut hold, blocks);
                self.store.release(hold, blocks);
            }
            self.store.changes.clear();
        }
    }

    fn landed(&mut self, request: u32) {
        let worker = self.flights[request as usize].decode;
        self.hear(worker);
        self.begin_answer(request);
        self.go_on(worker);
    }

    /// The whole prompt is at the decode worker.
    fn begin_answer(&mut self, request: u32) {
        let at = request as usize;
        let worker = self.flights[at].decode;
        let (prompt, answer) = (self.workload.prompt(at), self.workload.answer(at));
        let blocks = self.workload.blocks(at);
        let hold = &mut self.flights[at].hold;
        self.workers[worker as usize].room.fill(hold, blocks);
        if answer == 1 {
            self.ended(request);
        } else {
            self.interrupt(worker);
            self.workers[worker as usize].answer(request, prompt.saturating_add(1), answer - 1);
        }
    }

    fn ended(&mut self, request: u32) {
        let at = request as usize;
        let Flight { decode, hold, lease, .. } = self.flights[at];
        let model = &mut self.workers[decode as usize];
        model.room.release(hold, self.workload.blocks(at));
        model.holding -= 1;
        self.front.over(decode, lease);
        let end = self.now + self.hop;
        self.fates[at].end = end;
        self.end = self.end.max(end);
    }
}

/// What workers may be chosen as.
fn chosen(roles: &[Role], changing: &[bool]) -> Vec<Option<Role>> {
    roles.iter().zip(changing).map(|(&role, &changing)| (!changing).then_some(role)).collect()
}
