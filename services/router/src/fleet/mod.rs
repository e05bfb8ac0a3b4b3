//! The workers this router may use: members of the cluster, sorted by model and pairing, with what they do for us.
//!
//! Rebuilt whenever the members change, replaced as a whole, never changed: a request works on the fleet it found. A
//! worker that stays keeps its load and its connection from one fleet to the next; the same name with another
//! incarnation is another worker.
//!
//! Written by one task ([`Fleet::build`]); read by every request. Loads and connections are shared between fleets.

mod pulse;
mod rehearsal;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use kvasir_cluster::{Member, View};
use kvasir_proto::v1;
use kvasir_rpc::Rpc;
use kvasir_types::{Incarnation, KvLayout, MemberId, ModelFingerprint, PROTOCOL_VERSION, Role};
use tonic::transport::Channel;

use crate::{
    cache::Lookup,
    external::{Engine, Engines},
    health::Health,
    route::{DecodeOption, Pool, PrefillOption},
    text::Model,
    upstream,
};

pub(crate) use pulse::Pulse;
pub use rehearsal::{Rehearsal, Workers};

/// Models of one name but with other weights or other layouts that prompts are hashed for; there is more than one while a
/// cluster changes over.
const MAX_NAMINGS: usize = 4;

/// A number for a name (of a worker, of a session) that is the same on all routers.
pub(crate) fn key_of(name: &str) -> u64 {
    blake3::hash(name.as_bytes()).as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// One life of one worker.
pub(crate) struct Worker {
    /// Its record when it was first seen with the parts that matter here.
    pub(crate) member: Member,
    /// Its load.
    pub(crate) pulse: Pulse,
    rpc: Rpc,
    /// What it is if it is an engine of somebody else's.
    pub(crate) engine: Option<Arc<Engine>>,
    channel: OnceLock<Channel>,
    /// Written by requests that have something to say of it, read by all; held for a copy.
    health: Mutex<Health>,
    /// What it told last. Written by its feed, read by the planner; held for a copy.
    told: Mutex<Option<v1::WorkerLoad>>,
}

impl Worker {
    fn new(rpc: Rpc, member: Member, engine: Option<Arc<Engine>>) -> Arc<Self> {
        let key = key_of(member.id.as_str());
        let pulse = Pulse::of(key, member.model.as_ref().map_or(1, |model| model.layout.block_size));
        let (channel, health, told) = (OnceLock::new(), Mutex::default(), Mutex::default());
        Arc::new(Self { member, pulse, engine, rpc, channel, health, told })
    }

    /// Whether this decode worker may be fed by that prefill worker.
    fn pairs_with(&self, prefill: &Self) -> bool {
        match (&self.engine, &prefill.engine) {
            (None, None) => self.member.compatible(&prefill.member).is_ok(),
            (Some(ours), Some(theirs)) => ours.pairs_with(theirs),
            _ => false,
        }
    }

    /// The connection to it, made when first needed.
    pub(crate) fn channel(&self) -> Result<Channel, upstream::Error> {
        if let Some(channel) = self.channel.get() {
            return Ok(channel.clone());
        }
        let fresh = upstream::connect(&self.rpc, &self.member)?;
        Ok(self.channel.get_or_init(|| fresh).clone())
    }

    /// It told how busy it is.
    pub(crate) fn hears(&self, load: v1::WorkerLoad) {
        self.pulse.told(&load, self.block_tokens());
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(load);
    }

    /// It tells nothing any more.
    pub(crate) fn silent(&self) {
        self.pulse.silent();
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What it told last, if it still tells.
    pub(crate) fn load(&self) -> Option<v1::WorkerLoad> {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It failed: others are preferred to it for a while. Whether that is news.
    pub(crate) fn failed(&self, error: &upstream::Error, rest: Duration) -> bool {
        let mut news = false;
        self.change(|health| {
            let now = Instant::now();
            let rested = health.rests(now);
            health.failed(error, rest, now);
            news = !rested && health.rests(now);
        });
        news
    }

    /// It answered.
    pub(crate) fn answered(&self) {
        self.change(Health::answered);
    }

    /// A request is sent to it.
    pub(crate) fn asked(&self) {
        self.change(|health| health.asked(Instant::now()));
    }

    /// Decisions read its rest, for every worker, where they read its load.
    fn change(&self, change: impl FnOnce(&mut Health)) {
        let mut health: MutexGuard<'_, Health> = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut health);
        self.pulse.rest(health.rests_until());
    }

    /// Counts a request of `tokens` prompt tokens, of which `work` are to be computed, until the lease is dropped.
    pub(crate) fn lease(self: &Arc<Self>, tokens: usize, work: usize) -> Lease {
        let (tokens, work) = (tokens as u64, work as u64);
        let began = self.pulse.begin(tokens, work);
        Lease { worker: Arc::clone(self), tokens, work, began }
    }

    /// Tokens of one of its blocks.
    pub(crate) fn block_tokens(&self) -> u32 {
        self.pulse.block_tokens()
    }

    fn max_model_len(&self) -> u32 {
        self.member.model.as_ref().map_or(0, |model| model.max_model_len)
    }

    fn naming(&self) -> Option<Naming> {
        self.member.model.as_ref().map(|model| (model.fingerprint, model.layout))
    }

    fn cached_tokens(&self, blocks: &[u32]) -> u32 {
        let number = self.pulse.number();
        let blocks = number.and_then(|number| blocks.get(number as usize)).copied().unwrap_or(0);
        blocks.saturating_mul(self.block_tokens())
    }
}

/// A request's place in a worker's load.
pub(crate) struct Lease {
    worker: Arc<Worker>,
    tokens: u64,
    work: u64,
    began: u32,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.worker.pulse.end(self.tokens, self.work, self.began);
    }
}

/// What names of blocks begin with, beside a tenant's salt.
pub(crate) type Naming = (ModelFingerprint, KvLayout);

/// A decode worker and who can feed it.
struct DecodeWorker {
    worker: Arc<Worker>,
    /// Index into the roster's pairings.
    pairing: usize,
}

/// The workers of one model.
#[derive(Default)]
struct Roster {
    decode: Vec<DecodeWorker>,
    prefill: Vec<Arc<Worker>>,
    /// Sets of prefill workers: indexes into `prefill`. One, unless a cluster changes over.
    pairings: Arc<[Vec<usize>]>,
    namings: Vec<Naming>,
}

/// Workers of one model: those that write answers, perhaps not all of them, and those that read prompts. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Crew {
    roster: Arc<Roster>,
    /// Those of the decode workers that are in it; `None`: all.
    decode: Option<Arc<[usize]>>,
}

/// Room for what a decision looks at, to be used again for the next one.
#[derive(Default)]
pub(crate) struct Desk {
    /// Who holds the prompt's blocks.
    pub(crate) lookup: Lookup,
    /// The same by number: how many.
    blocks: Vec<u32>,
    /// What the policy sees.
    pub(crate) pool: Pool,
}

impl Crew {
    /// Those of the decode workers for which `keep` holds, with all prefill workers.
    pub(crate) fn filter(&self, keep: impl Fn(&Worker) -> bool) -> Self {
        // Most of the time all are kept, and nothing need be written down.
        if self.indexes().all(|at| keep(&self.roster.decode[at].worker)) {
            return self.clone();
        }
        let decode = self.indexes().filter(|&at| keep(&self.roster.decode[at].worker)).collect();
        Self { roster: Arc::clone(&self.roster), decode: Some(decode) }
    }

    /// Without the decode workers that rest, unless that leaves none: one that may be back is better than nobody.
    pub(crate) fn rested(&self, now: Instant) -> Self {
        let rested = self.filter(|worker| !worker.pulse.rests(now));
        if rested.is_empty() { self.clone() } else { rested }
    }

    /// The longest context one of the decode workers takes.
    pub(crate) fn max_model_len(&self) -> Option<u32> {
        self.indexes().map(|at| self.roster.decode[at].worker.max_model_len()).max()
    }

    /// Those whose context is longer than `tokens`.
    pub(crate) fn longer_than(&self, tokens: usize) -> Self {
        self.filter(|worker| worker.max_model_len() as usize > tokens)
    }

    /// Whether there is no decode worker.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many decode workers there are.
    pub(crate) fn len(&self) -> usize {
        self.decode.as_ref().map_or(self.roster.decode.len(), |decode| decode.len())
    }

    /// Its decode workers, as indexes into the roster.
    fn indexes(&self) -> impl Iterator<Item = usize> {
        let all = if self.decode.is_none() { self.roster.decode.len() } else { 0 };
        (0..all).chain(self.decode.iter().flat_map(|decode| decode.iter().copied()))
    }

    /// The decode worker with this index in the pool.
    pub(crate) fn decode(&self, at: usize) -> Option<&Arc<Worker>> {
        let at = self.decode.as_ref().map_or(Some(at), |decode| decode.get(at).copied())?;
        self.roster.decode.get(at).map(|decode| &decode.worker)
    }

    /// The prefill worker with this index in the pool.
    pub(crate) fn prefill(&self, at: usize) -> Option<&Arc<Worker>> {
        self.roster.prefill.get(at)
    }

    /// All of the model's workers, and what they work as.
    pub(crate) fn everybody(&self) -> impl Iterator<Item = (&Arc<Worker>, Role)> {
        let prefill = self.roster.prefill.iter().map(|worker| (worker, Role::Prefill));
        prefill.chain(self.roster.decode.iter().map(|decode| (&decode.worker, Role::Decode)))
    }

    /// What names of blocks begin with on its workers.
    pub(crate) fn namings(&self) -> &[Naming] {
        &self.roster.namings
    }

    /// Bytes of a token's keys and values.
    pub(crate) fn token_bytes(&self) -> u32 {
        let layout = self.roster.namings.first().map(|(_, layout)| layout);
        layout.map_or(0, |layout| (layout.block_bytes() / layout.block_size.max(1) as usize) as u32)
    }

    /// Puts what a policy sees on the desk; who holds what is there already.
    pub(crate) fn lay_out(&self, desk: &mut Desk) {
        let Desk { lookup, blocks, pool } = desk;
        blocks.clear();
        for (number, count) in lookup.found() {
            let at = number.0 as usize;
            if at >= blocks.len() {
                blocks.resize(at + 1, 0);
            }
            blocks[at] = blocks[at].max(*count);
        }
        let option = |DecodeWorker { worker, pairing }: &DecodeWorker| {
            let pulse = &worker.pulse;
            DecodeOption {
                key: pulse.key(),
                load: pulse.decode_load(),
                prefilling_tokens: pulse.told_work(),
                cached_tokens: worker.cached_tokens(blocks),
                room_tokens: pulse.room_tokens(),
                local_tokens: pulse.local_tokens(),
                next_step: pulse.next_step(),
                speed: pulse.speed(),
                pairing: *pairing,
            }
        };
        pool.decode.clear();
        match &self.decode {
            None => pool.decode.extend(self.roster.decode.iter().map(option)),
            Some(some) => pool.decode.extend(some.iter().map(|&at| option(&self.roster.decode[at]))),
        }
        pool.prefill.clear();
        pool.prefill.extend(self.roster.prefill.iter().map(|worker| PrefillOption {
            key: worker.pulse.key(),
            load: worker.pulse.prefill_load(),
            cached_tokens: worker.cached_tokens(blocks),
            speed: worker.pulse.speed(),
        }));
        pool.pairings = Arc::clone(&self.roster.pairings);
    }
}

impl Roster {
    fn new(prefill: Vec<Arc<Worker>>, decode: Vec<Arc<Worker>>) -> Self {
        let mut pairings: Vec<Vec<usize>> = Vec::new();
        let mut namings: Vec<Naming> = Vec::new();
        for naming in decode.iter().chain(&prefill).filter_map(|worker| worker.naming()) {
            if namings.len() < MAX_NAMINGS && !namings.contains(&naming) {
                namings.push(naming);
            }
        }
        let decode = decode.into_iter().filter_map(|worker| {
            let pairs = prefill.iter().enumerate();
            let pairs: Vec<usize> = pairs.filter(|(_, prefill)| worker.pairs_with(prefill)).map(|(at, _)| at).collect();
            if pairs.is_empty() && worker.engine.as_ref().is_some_and(|engine| engine.needs_a_partner()) {
                return None; // until one comes
            }
            let pairing = pairings.iter().position(|known| *known == pairs).unwrap_or_else(|| {
                pairings.push(pairs);
                pairings.len() - 1
            });
            Some(DecodeWorker { worker, pairing })
        });
        let decode = decode.collect();
        Self { decode, prefill, pairings: pairings.into(), namings }
    }
}

/// All of them, by model.
#[derive(Default)]
pub(crate) struct Fleet {
    crews: HashMap<String, Crew>,
    /// How its workers are called.
    rpc: Rpc,
}

/// A worker of a model we serve that can't be used, and why.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Misfit {
    /// Which worker.
    pub(crate) id: MemberId,
    /// Which life of it.
    pub(crate) incarnation: Incarnation,
    /// What doesn't fit, for the log.
    pub(crate) why: String,
}

impl Fleet {
    /// Nobody yet; who comes is called so.
    pub(crate) fn new(rpc: Rpc) -> Self {
        Self { crews: HashMap::new(), rpc }
    }

    /// Sorts the members; workers that are in `previous` too stay the same. Also returns those that don't fit.
    pub(crate) fn build(view: &View, engines: &Engines, models: &[Arc<Model>], previous: &Self) -> (Self, Vec<Misfit>) {
        let known: HashMap<(Role, &MemberId, Incarnation), &Arc<Worker>> =
            previous.workers().map(|w| ((w.member.role, &w.member.id, w.member.incarnation), w)).collect();
        let worker = |member: &Member| match known.get(&(member.role, &member.id, member.incarnation)) {
            // The record of a life changes only in `draining`, and then the worker is not in the fleet.
            Some(worker) if same_place(&worker.member, member) => Arc::clone(worker),
            _ => {
                let engine = engines.get(&(member.role, member.id.clone())).map(|known| Arc::clone(&known.engine));
                Worker::new(previous.rpc.clone(), member.clone(), engine)
            }
        };
        let (mut crews, mut misfits) = (HashMap::new(), Vec::new());
        for model in models {
            let mut of_role = |role| {
                let mut fitting = Vec::new();
                for member in view.working_as(role).filter(|member| serves(member, model) && !member.draining) {
                    let taken = engines.contains_key(&(member.role, member.id.clone()));
                    let alone = || if taken { Err("an engine has its name".to_owned()) } else { Ok(()) };
                    match fits(member, model).and_then(|()| alone()) {
                        Ok(()) => fitting.push(worker(member)),
                        Err(why) => {
                            misfits.push(Misfit { id: member.id.clone(), incarnation: member.incarnation, why });
                        }
                    }
                }
                let engines = engines.values().map(|known| &known.member);
                fitting.extend(engines.filter(|member| member.role == role && serves(member, model)).map(&worker));
                fitting
            };
            let roster = Roster::new(of_role(Role::Prefill), of_role(Role::Decode));
            let crew = Crew { roster: Arc::new(roster), decode: None };
            crews.insert(model.name().to_owned(), crew);
        }
        (Self { crews, rpc: previous.rpc.clone() }, misfits)
    }

    /// The workers of a model.
    pub(crate) fn crew(&self, model: &str) -> Option<&Crew> {
        self.crews.get(model)
    }

    /// Decode workers of all models.
    pub(crate) fn decode_workers(&self) -> usize {
        self.crews.values().map(Crew::len).sum()
    }

    /// All workers.
    pub(crate) fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.crews
            .values()
            .flat_map(|crew| crew.roster.prefill.iter().chain(crew.roster.decode.iter().map(|decode| &decode.worker)))
    }
}

fn same_place(a: &Member, b: &Member) -> bool {
    a.grpc == b.grpc && a.model == b.model && a.segment == b.segment
}

fn serves(member: &Member, model: &Model) -> bool {
    member.model.as_ref().is_some_and(|info| info.name == model.name())
}

fn fits(member: &Member, model: &Model) -> Result<(), String> {
    if member.protocol != PROTOCOL_VERSION {
        return Err(format!("speaks protocol version {}, this router speaks {PROTOCOL_VERSION}", member.protocol));
    }
    let theirs = member.model.as_ref().map_or("", |info| info.tokenizer.as_str());
    let ours = model.tokenizer_id();
    if !theirs.is_empty() && theirs != ours {
        return Err(format!("its model goes with tokenizer {theirs}, this router's folder holds {ours}"));
    }
    if member.grpc.is_empty() {
        return Err("has no address".to_owned());
    }
    Ok(())
}
