//! Who gets blocks, and who gets computed in the next step.
//!
//! The rules, in the order in which a step applies them:
//! 1. every decoding sequence gets one token, oldest first; one that needs a block and finds none takes it from the
//!    youngest sequence that may lose its blocks (see [`Sequence::is_preemptible`]), which is possibly itself;
//! 2. those who wait get blocks in order of age, preempted ones therefore before new ones; the first that does not fit
//!    stops the line;
//! 3. what is left of the token budget goes to prompts, oldest first, in chunks that end at block boundaries.
//!
//! Why this ends: the oldest sequence that runs is never a victim of another, and takes from everybody else; a sequence
//! that holds the whole pool and wants more is finished with `Length` (its pool is its context); a sequence that
//! preempted itself waits first in line for blocks of sequences that their callers hold.

use std::{collections::BTreeMap, ops::Range};

use kvasir_kv_cache::{Geometry, KvCache, Table};
use kvasir_types::{FinishReason, TokenId};

use crate::{
    Admission, Config, Error, Event, SeqId, Stats,
    sequence::{Sequence, State},
};

/// What to compute of one sequence in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub seq: SeqId,
    /// Positions to compute.
    pub tokens: Range<usize>,
    /// Whether they reach the end of what is known: then the next token is sampled.
    pub last: bool,
    /// Guesses at what follows, to be computed behind them and checked.
    pub drafts: Vec<TokenId>,
}

impl Work {
    fn new(seq: SeqId, tokens: Range<usize>, last: bool) -> Self {
        Self { seq, tokens, last, drafts: Vec::new() }
    }

    /// Rows of logits that it needs.
    pub fn rows(&self) -> usize {
        if self.last { 1 + self.drafts.len() } else { 0 }
    }
}

/// The sequences and the blocks.
pub(crate) struct Scheduler {
    config: Config,
    pub block_size: usize,
    cache: KvCache,
    /// Without blocks, by age. Ids grow with age, so the first is the next to be admitted.
    waiting: BTreeMap<SeqId, Sequence>,
    /// With blocks, by age.
    live: BTreeMap<SeqId, Sequence>,
    /// The totals among the statistics; the rest is counted when asked for.
    pub totals: Stats,
}

impl Scheduler {
    pub fn new(config: Config, geometry: Geometry, blocks: usize) -> Self {
        let block_size = geometry.block_size();
        let cache = KvCache::new(geometry, blocks, 0);
        let (waiting, live) = (BTreeMap::new(), BTreeMap::new());
        Self { config, block_size, cache, waiting, live, totals: Stats::default() }
    }

    /// The settings, as far as they concern steps.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Makes room for so many tokens of a decoding sequence, from what nobody will need in the next step. False: there
    /// is none.
    pub fn has_room_for(&mut self, seq: SeqId, tokens: usize) -> bool {
        let spare = self.cache.available() > self.live.len() * self.cache.geometry().kinds().len();
        let Some(State::Decoding(table, _)) = self.live.get_mut(&seq).map(|sequence| &mut sequence.state) else {
            return false;
        };
        let there = table.ids().iter().all(|ids| ids.len() * self.block_size >= tokens);
        (there || spare) && self.cache.grow(table, tokens)
    }

    /// Takes a sequence into the queue.
    pub fn enqueue(&mut self, sequence: Sequence) {
        self.waiting.insert(sequence.id, sequence);
    }

    /// A sequence that has blocks.
    pub fn live_mut(&mut self, seq: SeqId) -> Option<&mut Sequence> {
        self.live.get_mut(&seq)
    }

    /// The same, to look at.
    pub fn live(&self, seq: SeqId) -> Option<&Sequence> {
        self.live.get(&seq)
    }

    /// A sequence that has none.
    pub fn waiting_mut(&mut self, seq: SeqId) -> Option<&mut Sequence> {
        self.waiting.get_mut(&seq)
    }

    /// Every sequence.
    pub fn ids(&self) -> Vec<SeqId> {
        self.live.keys().chain(self.waiting.keys()).copied().collect()
    }

    /// KV of the first `tokens` tokens of a live sequence is there, and complete for good for the first `sealable` ones.
    pub fn advance(&mut self, seq: SeqId, tokens: usize, sealable: usize) {
        let Some(sequence) = self.live.get_mut(&seq) else { return };
        sequence.advance(tokens);
        if self.config.prefix_cache {
            sequence.seal(sealable, &mut self.cache);
        }
    }

    /// Takes a sequence out, whatever it is doing, and gives its blocks back.
    pub fn remove(&mut self, seq: SeqId) -> Option<Sequence> {
        let mut sequence = self.live.remove(&seq).or_else(|| self.waiting.remove(&seq))?;
        if let Some(table) = sequence.take_table() {
            self.cache.give_back(table);
        }
        Some(sequence)
    }

    /// Ends a sequence with its last event, told after its blocks are free again.
    pub fn end(&mut self, seq: SeqId, event: Event) {
        let Some(mut sequence) = self.remove(seq) else { return };
        match event {
            Event::Failed(_) => self.totals.failed += 1,
            _ => self.totals.finished += 1,
        }
        let _gone_either_way = sequence.tell(event);
    }

    /// The work of the next step, and whether anything changed while it was planned (so that planning once more may find
    /// more to do).
    pub fn plan(&mut self) -> (Vec<Work>, bool) {
        let mut work = Vec::new();
        let mut budget = self.config.max_batch_tokens;
        let decoding: Vec<_> =
            self.live.values().filter(|s| matches!(s.state, State::Decoding(..))).map(|s| s.id).collect();
        let mut changed = false;
        for seq in decoding {
            match self.plan_decode(seq) {
                Some(next) => work.push(next),
                None => changed = true,
            }
        }
        budget = budget.saturating_sub(work.len());
        while self.admit_next() {
            changed = true;
        }
        let prompts: Vec<_> =
            self.live.values().filter(|s| matches!(s.state, State::Prefilling(..))).map(|s| s.id).collect();
        for seq in prompts {
            let limit = self.config.chunk_tokens.min(budget);
            match self.plan_chunk(seq, limit) {
                Some(next) => {
                    budget -= next.tokens.len();
                    work.push(next);
                }
                None => changed |= !self.live.contains_key(&seq),
            }
        }
        // Whoever lost its blocks to a later one in this loop has no work.
        work.retain(|next| self.live.contains_key(&next.seq));
        (work, changed)
    }

    /// One token of a decoding sequence, with a block for it. `None`: the sequence does not decode (any more).
    fn plan_decode(&mut self, seq: SeqId) -> Option<Work> {
        loop {
            let State::Decoding(table, _) = &mut self.live.get_mut(&seq)?.state else { return None };
            let at = table.computed;
            if self.cache.grow(table, at + 1) {
                return Some(Work::new(seq, at..at + 1, true));
            }
            self.make_room_for(seq);
        }
    }

    /// The next chunk of a sequence that is being prefilled, of at most `limit` tokens.
    ///
    /// Every chunk starts at a block boundary (but for a lone last token) and, unless it is the last one, ends at one: so
    /// a layer of a chunk is a number of whole blocks to push. If the limit is less than a block, the sequence waits a
    /// step.
    fn plan_chunk(&mut self, seq: SeqId, limit: usize) -> Option<Work> {
        loop {
            let sequence = self.live.get_mut(&seq)?;
            let total = sequence.tokens.len();
            let State::Prefilling(table, _) = &mut sequence.state else { return None };
            let start = table.computed;
            let end = if total - start <= limit { total } else { (start + limit) / self.block_size * self.block_size };
            if end <= start {
                return None;
            }
            if self.cache.grow(table, end) {
                return Some(Work::new(seq, start..end, end == total));
            }
            self.make_room_for(seq);
        }
    }

    /// The first `tokens` tokens of a held sequence's prompt landed.
    pub fn landed(&mut self, seq: SeqId, tokens: usize) {
        let Some(sequence) = self.live.get_mut(&seq) else { return };
        let prompt = sequence.request.prompt.len();
        let State::Held(table) = &mut sequence.state else { return };
        let landed = if tokens >= prompt { prompt } else { tokens / self.block_size * self.block_size };
        let before = table.computed;
        // A sliding group's table has room for the end of the prompt only: a part that leaves out its window is no use.
        if landed <= before || !self.cache.covers(table, landed) {
            return;
        }
        self.cache.fence(table, landed.div_ceil(self.block_size));
        self.totals.landed_tokens += (landed - before) as u64;
        // The block of the last token stays open: if the first output token never comes, `compute` computes the last
        // prompt token here, which writes to that block once more.
        self.advance(seq, landed, landed.min(prompt - 1));
    }

    /// Takes the table of a held sequence that is to be computed from its first `computed` tokens on: nobody writes into
    /// it any more.
    pub fn unhold(&mut self, seq: SeqId, computed: usize) -> Option<(&mut Sequence, Table)> {
        let sequence = self.live.get_mut(&seq)?;
        if !matches!(sequence.state, State::Held(_)) {
            return None;
        }
        let mut table = sequence.take_table()?;
        self.cache.fence(&mut table, usize::MAX);
        if computed < table.computed || table.computed < sequence.tokens.len() {
            table.computed = table.computed.min(computed);
            self.cache.rewind(&mut table);
        }
        Some((sequence, table))
    }

    /// Every token that was known is computed, and the next one sampled.
    pub fn begin_answer(&mut self, seq: SeqId) {
        let Some(sequence) = self.live.get_mut(&seq) else { return };
        let prefilled = matches!(sequence.state, State::Prefilling(..));
        sequence.after_sampling();
        if prefilled && let Some(table) = sequence.state.table_mut() {
            self.cache.give_back_stock(table);
        }
    }

    /// No block is left for the next token of `seq`: takes blocks away from somebody.
    fn make_room_for(&mut self, seq: SeqId) {
        let Some(needy) = self.live.get(&seq) else { return };
        let (blocks, tokens) = (needy.table().map_or(0, Table::len), needy.tokens.len());
        // Not from older ones: they are in this step's work already, and taking in turns would get nobody to the end.
        let victim = self.live.range(seq..).rev().find(|(_, other)| other.is_preemptible()).map(|(&id, _)| id);
        match victim {
            Some(victim) if victim != seq => self.preempt(victim),
            _ if blocks == self.cache.counts().total => self.end(seq, Event::Finished(FinishReason::Length)),
            Some(_itself) => self.preempt(seq),
            None => self.end(seq, Event::Failed(Error::OutOfBlocks { tokens })),
        }
    }

    fn preempt(&mut self, seq: SeqId) {
        if let Some(sequence) = self.remove(seq) {
            self.totals.preemptions += 1;
            self.waiting.insert(seq, sequence);
        }
    }

    /// Gives blocks to the first in line, if there are enough. False: nobody waits, or not now.
    fn admit_next(&mut self) -> bool {
        if self.live.len() >= self.config.max_running {
            return false;
        }
        let Some(mut entry) = self.waiting.first_entry() else { return false };
        let sequence = entry.get_mut();
        let tokens = sequence.tokens_to_reserve();
        let hashes = sequence.reusable_hashes(self.block_size);
        let Some(table) = self.cache.reserve(hashes, tokens, self.config.chunk_tokens) else { return false };
        let sequence = entry.remove();
        self.start(sequence, table);
        true
    }

    /// A sequence has its blocks: on to the caller, or straight on computing.
    fn start(&mut self, mut sequence: Sequence, mut table: Table) {
        if matches!(sequence.state, State::Queued { early: None, .. }) {
            self.cache.open(&mut table, sequence.request.prompt.len());
        }
        let blocks = sequence.request.prompt.len().div_ceil(self.block_size);
        let admission = Admission {
            tables: table.ids().iter().map(|ids| ids[..blocks.min(ids.len())].to_vec()).collect(),
            hashes: sequence.prompt_hashes.clone(),
            cached_tokens: table.computed,
        };
        let seq = sequence.id;
        let (state, first_time) = match std::mem::replace(&mut sequence.state, State::Preempted) {
            State::Queued { early: Some(watcher), .. } => (State::Prefilling(table, watcher), true),
            State::Queued { early: None, .. } => (State::Held(table), true),
            _ => (State::Prefilling(table, None), false),
        };
        sequence.state = state;
        if first_time {
            self.totals.cached_tokens += admission.cached_tokens as u64;
            let told = sequence.tell(Event::Admitted(admission));
            self.live.insert(seq, sequence);
            if !told {
                self.remove(seq);
            }
        } else {
            self.live.insert(seq, sequence);
        }
    }

    /// What is going on now, and the totals so far.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats { blocks: self.cache.counts(), ..self.totals };
        for sequence in self.waiting.values() {
            match sequence.state {
                State::Preempted => stats.preempted += 1,
                _ => stats.waiting += 1,
            }
        }
        for sequence in self.live.values() {
            match sequence.state {
                State::Held(_) => stats.held += 1,
                State::Parked(_) => stats.parked += 1,
                _ => stats.running += 1,
            }
        }
        stats
    }

    /// A block that may be written belongs to one sequence, and the counts agree with the tables.
    #[cfg(test)]
    pub fn check(&self) {
        let tables = || self.live.values().map(|sequence| sequence.table().expect("live sequences have a table"));
        let mut uses = std::collections::HashMap::new();
        let all = tables().flat_map(|table| table.open_ids().chain(table.sealed_ids().map(|(.., id)| id)));
        all.for_each(|id| *uses.entry(id).or_insert(0) += 1);
        for id in tables().flat_map(Table::open_ids) {
            assert_eq!(uses[&id], 1, "{id} may be written and is in {} tables", uses[&id]);
        }
        let counts = self.cache.counts();
        assert_eq!(counts.in_use, uses.len());
        assert_eq!(counts.free + counts.cached + counts.in_use, counts.total);
    }
}
