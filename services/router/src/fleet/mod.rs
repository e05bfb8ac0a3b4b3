//! The workers this router may use: members of the cluster, sorted by model and pairing, with what they do for us.
//!
//! Rebuilt whenever the members change, replaced as a whole, never changed: a request works on the fleet it found. A
//! worker that stays keeps its load and its connection from one fleet to the next; the same name with another
//! incarnation is another worker.
//!
//! Written by one task ([`Fleet::build`]); read by every request. Loads and connections are shared between fleets.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kvasir_cluster::{Member, View};
use kvasir_types::{Incarnation, MemberId, PROTOCOL_VERSION, Role};
use tonic::transport::Channel;

use crate::{
    health::Health,
    route::{DecodeOption, Load, Pool, PrefillOption},
    text::Model,
    upstream,
};

/// One life of one worker.
pub(crate) struct Worker {
    /// Its record when it was first seen with the parts that matter here.
    pub(crate) member: Member,
    requests: AtomicU64,
    tokens: AtomicU64,
    channel: OnceLock<Channel>,
    /// Written by requests that have something to say of it, read by all; held for a copy.
    health: Mutex<Health>,
}

impl Worker {
    fn new(member: Member) -> Arc<Self> {
        Arc::new(Self {
            member,
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            channel: OnceLock::new(),
            health: Mutex::default(),
        })
    }

    /// The connection to it, made when first needed.
    pub(crate) fn channel(&self) -> Result<Channel, upstream::Error> {
        if let Some(channel) = self.channel.get() {
            return Ok(channel.clone());
        }
        let fresh = upstream::connect(&self.member)?;
        Ok(self.channel.get_or_init(|| fresh).clone())
    }

    /// What it does for this router now.
    pub(crate) fn load(&self) -> Load {
        Load { requests: self.requests.load(Relaxed), tokens: self.tokens.load(Relaxed) }
    }

    /// It failed: others are preferred to it for a while.
    pub(crate) fn failed(&self, error: &upstream::Error, rest: Duration) {
        self.health().failed(error, rest, Instant::now());
    }

    /// It answered.
    pub(crate) fn answered(&self) {
        self.health().answered();
    }

    /// A request is sent to it.
    pub(crate) fn asked(&self) {
        self.health().asked(Instant::now());
    }

    fn rests(&self, now: Instant) -> bool {
        self.health().rests(now)
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request of `tokens` prompt tokens until the lease is dropped.
    pub(crate) fn lease(self: &Arc<Self>, tokens: usize) -> Lease {
        let tokens = tokens as u64;
        self.requests.fetch_add(1, Relaxed);
        self.tokens.fetch_add(tokens, Relaxed);
        Lease { worker: Arc::clone(self), tokens }
    }

    fn max_model_len(&self) -> u32 {
        self.member.model.as_ref().map_or(0, |model| model.max_model_len)
    }
}

/// A request's place in a worker's load.
pub(crate) struct Lease {
    worker: Arc<Worker>,
    tokens: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.worker.requests.fetch_sub(1, Relaxed);
        self.worker.tokens.fetch_sub(self.tokens, Relaxed);
    }
}

/// A decode worker and who can feed it.
#[derive(Clone)]
pub(crate) struct DecodeWorker {
    /// The worker.
    pub(crate) worker: Arc<Worker>,
    /// Indexes into [`Crew::prefill`].
    pub(crate) pairs: Vec<usize>,
}

/// The workers of one model.
#[derive(Clone, Default)]
pub(crate) struct Crew {
    /// Those that write answers.
    pub(crate) decode: Vec<DecodeWorker>,
    /// Those that read prompts.
    pub(crate) prefill: Vec<Arc<Worker>>,
}

impl Crew {
    /// Those of the decode workers for which `keep` holds, with all prefill workers.
    pub(crate) fn filter(&self, keep: impl Fn(&Worker) -> bool) -> Self {
        let decode = self.decode.iter().filter(|decode| keep(&decode.worker)).cloned().collect();
        Self { decode, prefill: self.prefill.clone() }
    }

    /// Without the decode workers that rest, unless that leaves none: one that may be back is better than nobody.
    pub(crate) fn rested(&self, now: Instant) -> Self {
        let rested = self.filter(|worker| !worker.rests(now));
        if rested.decode.is_empty() { self.clone() } else { rested }
    }

    /// The longest context one of the decode workers takes.
    pub(crate) fn max_model_len(&self) -> Option<u32> {
        self.decode.iter().map(|decode| decode.worker.max_model_len()).max()
    }

    /// Those whose context is longer than `tokens`.
    pub(crate) fn longer_than(&self, tokens: usize) -> Self {
        self.filter(|worker| worker.max_model_len() as usize > tokens)
    }

    /// What a policy sees.
    pub(crate) fn pool(&self) -> Pool {
        let decode = |decode: &DecodeWorker| DecodeOption { load: decode.worker.load(), pairs: decode.pairs.clone() };
        Pool {
            decode: self.decode.iter().map(decode).collect(),
            prefill: self.prefill.iter().map(|worker| PrefillOption { load: worker.load() }).collect(),
        }
    }
}

/// All of them, by model.
#[derive(Default)]
pub(crate) struct Fleet {
    crews: HashMap<String, Crew>,
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
    /// Sorts the members; workers that are in `previous` too stay the same. Also returns those that don't fit.
    pub(crate) fn build(view: &View, models: &[Arc<Model>], previous: &Self) -> (Self, Vec<Misfit>) {
        let known: HashMap<(Role, &MemberId, Incarnation), &Arc<Worker>> =
            previous.workers().map(|w| ((w.member.role, &w.member.id, w.member.incarnation), w)).collect();
        let worker = |member: &Member| match known.get(&(member.role, &member.id, member.incarnation)) {
            // The record of a life changes only in `draining`, and then the worker is not in the fleet.
            Some(worker) if same_place(&worker.member, member) => Arc::clone(worker),
            _ => Worker::new(member.clone()),
        };
        let (mut crews, mut misfits) = (HashMap::new(), Vec::new());
        for model in models {
            let mut crew = Crew::default();
            let mut of_role = |role| {
                let mut fitting = Vec::new();
                for member in view.role(role).filter(|member| serves(member, model) && !member.draining) {
                    match fits(member, model) {
                        Ok(()) => fitting.push(worker(member)),
                        Err(why) => {
                            misfits.push(Misfit { id: member.id.clone(), incarnation: member.incarnation, why });
                        }
                    }
                }
                fitting
            };
            crew.prefill = of_role(Role::Prefill);
            for worker in of_role(Role::Decode) {
                let pairs = crew.prefill.iter().enumerate();
                let pairs = pairs.filter(|(_, prefill)| worker.member.compatible(&prefill.member).is_ok());
                let pairs = pairs.map(|(at, _)| at).collect();
                crew.decode.push(DecodeWorker { worker, pairs });
            }
            crews.insert(model.name().to_owned(), crew);
        }
        (Self { crews }, misfits)
    }

    /// The workers of a model.
    pub(crate) fn crew(&self, model: &str) -> Option<&Crew> {
        self.crews.get(model)
    }

    /// Decode workers of all models.
    pub(crate) fn decode_workers(&self) -> usize {
        self.crews.values().map(|crew| crew.decode.len()).sum()
    }

    fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.crews.values().flat_map(|crew| crew.prefill.iter().chain(crew.decode.iter().map(|decode| &decode.worker)))
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
