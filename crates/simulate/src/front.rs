//! The router's side: what it knows of the workers, and whom its policy chooses.
//!
//! Policy and index are the router's own ([`kvasir_router::route`], [`kvasir_router::cache`]). What workers hold gets into the
//! index a while after it happened, as over the network; their loads are [`Known`] as of the last time they told.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_router::{
    cache::{Index, Lookup, MAX_WORKERS, Number},
    route::{Ask, DecodeOption, Policy, PolicyName, Pool, PrefillOption},
};
use kvasir_types::{BlockHash, mix};

use crate::{
    known::{Known, Lease},
    room::Change,
    workload::{Blocks, Ns},
};

/// Most workers: a decision looks at all of them.
pub const MOST_WORKERS: usize = 16_384;
const _: () = assert!(MOST_WORKERS <= MAX_WORKERS as usize);

/// What a worker is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Writes answers.
    Decode,
}

/// Whom the policy chose: workers' numbers.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The decode worker.
    pub decode: u32,
    /// The prefill worker to be tried first, if any.
    pub prefill: Option<u32>,
    /// Tokens to compute, as far as the router knows.
    pub left: u64,
}

/// See the module's page.
pub struct Front {
    policy: Box<dyn Policy>,
    /// What is known of each worker.
    pub known: Vec<Known>,
    token_bytes: u32,
    local_tokens: u32,
    block_tokens: u32,
    seed: u64,
    delay: Ns,
    index: Index,
    numbers: Vec<Number>,
    /// When it is known, of whom.
    delayed: VecDeque<(Ns, u32, Change)>,
    lookup: Lookup,
    /// By worker: blocks of the prompt that it holds.
    held: Vec<u32>,
    decode: Vec<u32>,
    prefill: Vec<u32>,
    pool: Pool,
    /// Decisions so far.
    pub decisions: u64,
    /// Real time that they took, looking up and laying out included.
    pub took: Duration,
}

/// What a front is built from.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// By which policy.
    pub policy: PolicyName,
    /// Bytes of a token's keys and values.
    pub token_bytes: u32,
    /// Decode workers compute so many tokens themselves.
    pub local_tokens: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// What changes at a worker is known so much later.
    pub delay: Ns,
    /// Workers tell their loads so often.
    pub every: Ns,
    /// For the policy's dice.
    pub seed: u64,
}

impl Front {
    /// Of so many workers (at most [`MOST_WORKERS`]), none of which may be chosen yet.
    pub fn new(setting: Setting, workers: usize) -> Self {
        let index = Index::default();
        let numbers = (0..workers).map(|_| index.join().expect("workers were counted before")).collect();
        let phase = |worker: usize| (worker as u64 * setting.every) / workers.max(1) as u64;
        Self {
            policy: setting.policy.build(),
            known: (0..workers).map(|worker| Known::new(setting.every, phase(worker))).collect(),
            token_bytes: setting.token_bytes,
            local_tokens: setting.local_tokens,
            block_tokens: setting.block_tokens,
            seed: setting.seed,
            delay: setting.delay,
            index,
            numbers,
            delayed: VecDeque::new(),
            lookup: Lookup::default(),
            held: vec![0; workers],
            decode: Vec::new(),
            prefill: Vec::new(),
            pool: Pool::default(),
            decisions: 0,
            took: Duration::ZERO,
        }
    }

    /// Those that may be chosen from now on.
    pub fn members(&mut self, roles: impl Iterator<Item = Option<Role>>) {
        (self.decode, self.prefill) = (Vec::new(), Vec::new());
        for (worker, role) in (0u32..).zip(roles) {
            match role {
                Some(Role::Decode) => self.decode.push(worker),
                Some(Role::Prefill) => self.prefill.push(worker),
                None => {}
            }
        }
        self.pool.pairings = Arc::from([(0..self.prefill.len()).collect()]);
    }

    /// A worker's memory changed.
    pub fn changed(&mut self, now: Ns, worker: u32, changes: &mut Vec<Change>) {
        if self.policy.wants_cache() {
            self.delayed.extend(changes.drain(..).map(|change| (now + self.delay, worker, change)));
        } else {
            changes.clear();
        }
    }

    /// Chooses; `None` only if there is no decode worker. What workers told must have been [heard](Known::hear).
    pub fn decide(&mut self, now: Ns, request: usize, blocks: Blocks<'_>, session: u64) -> Option<Choice> {
        while let Some(&(at, worker, Change { block, stored })) = self.delayed.front()
            && at <= now
        {
            let change = if stored { Index::insert } else { Index::remove };
            change(&self.index, &name(block), self.numbers[worker as usize]);
            self.delayed.pop_front();
        }
        let began = Instant::now();
        if self.policy.wants_cache() {
            self.lookup.clear();
            self.index.lookup(blocks.iter().map(|(block, _)| name(block)), &mut self.lookup);
            self.held.fill(0);
            for (number, count) in self.lookup.found() {
                // Numbers are given out from 0 on.
                self.held[number.0 as usize] = *count;
            }
        }
        self.lay_out();
        let ask = Ask {
            prompt_tokens: blocks.tokens() as usize,
            token_bytes: self.token_bytes,
            session: Some(session),
            ticket: request as u64,
            dice: mix(mix(self.seed).wrapping_add(request as u64)),
            ..Ask::default()
        };
        let decision = self.policy.decide(&ask, &self.pool)?;
        let left = blocks.tokens() - u64::from(decision.cached_tokens(&ask, &self.pool));
        self.decisions += 1;
        self.took += began.elapsed();
        Some(Choice {
            decode: self.decode[decision.decode],
            prefill: decision.prefill.first().map(|&at| self.prefill[at]),
            left,
        })
    }

    /// As the router's fleet lays it out.
    fn lay_out(&mut self) {
        let Self { known, held, pool, .. } = self;
        let tokens = |worker: u32| held[worker as usize].saturating_mul(self.block_tokens);
        pool.decode.clear();
        pool.decode.extend(self.decode.iter().map(|&worker| {
            let known = &known[worker as usize];
            DecodeOption {
                key: mix(worker.into()),
                load: known.decode_load(),
                prefilling_tokens: known.told().work,
                cached_tokens: tokens(worker),
                room_tokens: Some(known.told().room),
                local_tokens: self.local_tokens,
                speed: known.told().speed,
                ..DecodeOption::default()
            }
        }));
        pool.prefill.clear();
        pool.prefill.extend(self.prefill.iter().map(|&worker| {
            let known = &known[worker as usize];
            let (load, speed) = (known.prefill_load(), known.told().speed);
            PrefillOption { key: mix(worker.into()), load, cached_tokens: tokens(worker), speed }
        }));
    }

    /// The request counts as that worker's from now on.
    pub fn sent(&mut self, worker: u32, tokens: u64, work: u64) -> Lease {
        self.known[worker as usize].begin(tokens, work)
    }

    /// It does not any more.
    pub fn over(&mut self, worker: u32, lease: Lease) {
        self.known[worker as usize].end(lease);
    }
}

/// A block's name in the index.
fn name(block: u32) -> BlockHash {
    let (low, high) = (mix(block.into()), mix(!u64::from(block)));
    BlockHash((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}
