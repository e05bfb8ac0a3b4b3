//! What the next step computes.

use std::{collections::HashSet, ops::Range};

use kvasir_types::{BlockHash, TokenId};

use super::{Duty, Key, Priority, Scheduler, State};

/// What to compute of one sequence in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub key: Key,
    /// Positions to compute.
    pub tokens: Range<usize>,
    /// Whether they reach the end of what is known: then the next token is sampled.
    pub last: bool,
    /// Guesses at what follows, to be computed behind them and checked.
    pub drafts: Vec<TokenId>,
}

impl Work {
    fn new(key: Key, tokens: Range<usize>, last: bool) -> Self {
        Self { key, tokens, last, drafts: Vec::new() }
    }

    /// Rows of logits that it needs.
    pub fn rows(&self) -> usize {
        if self.last { 1 + self.drafts.len() } else { 0 }
    }
}

impl Scheduler {
    /// The work of the next step, and whether anything changed while it was planned (so that planning once more may find
    /// more to do).
    pub fn plan(&mut self) -> (Vec<Work>, bool) {
        self.steps += 1;
        self.age();
        let mut work = Vec::new();
        let mut changed = false;
        for key in self.live_where(|state| matches!(state, State::Decoding(..))) {
            match self.plan_decode(key) {
                Some(next) => work.push(next),
                None => changed = true,
            }
        }
        while self.admit_next() {
            changed = true;
        }
        // Whoever gave way to a more urgent one has no work, not even if it has blocks again: others.
        work.retain(|next: &Work| matches!(self.sequences.get(&next.key).map(|s| &s.state), Some(State::Decoding(..))));
        let mut budget = self.config.max_batch_tokens.saturating_sub(work.len());
        if self.duty == Duty::Decode && !work.is_empty() {
            budget = budget.min(self.config.remainder_tokens);
        }
        changed |= self.plan_prompts(budget, &mut work);
        work.retain(|next| self.is_live(next.key));
        debug_assert!(
            work.iter().map(|next| next.key).collect::<HashSet<_>>().len() == work.len(),
            "a sequence is in a batch once"
        );
        (work, changed)
    }

    fn is_live(&self, key: Key) -> bool {
        self.sequences.get(&key).is_some_and(|sequence| sequence.table().is_some())
    }

    /// Chunks of prompts, as far as the budget goes. True: somebody lost its blocks or ended.
    fn plan_prompts(&mut self, mut budget: usize, work: &mut Vec<Work>) -> bool {
        let prompts = self.live_where(|state| matches!(state, State::Prefilling(..)));
        // Names of the blocks that those who have work compute in this step or will in later ones.
        let mut coming: HashSet<BlockHash> = HashSet::new();
        let may_share = self.config.prefix_cache && prompts.len() > 1;
        let mut changed = false;
        for key in prompts {
            if may_share && self.waits_for(key, &coming) {
                continue;
            }
            match self.plan_chunk(key, self.config.chunk_tokens.min(budget)) {
                Some(next) => {
                    budget -= next.tokens.len();
                    if may_share && let Some(sequence) = self.sequences.get(&key) {
                        coming.extend(
                            &sequence.hashes()[sequence.hashes().len().min(next.tokens.start / self.block_size)..],
                        );
                    }
                    work.push(next);
                }
                None => match self.sequences.get_mut(&key).filter(|sequence| sequence.table().is_some()) {
                    Some(sequence) if sequence.class == Priority::Offline => sequence.waited += 1,
                    Some(_) => {}
                    None => changed = true,
                },
            }
        }
        changed
    }

    /// Makes room for so many tokens of a decoding sequence, from what nobody will need in the next step. False: there
    /// is none.
    pub fn has_room_for(&mut self, key: Key, tokens: usize) -> bool {
        let spare = self.cache.available() > self.live.len() * self.cache.geometry().kinds().len();
        let Some(State::Decoding(table, _)) = self.sequences.get_mut(&key).map(|sequence| &mut sequence.state) else {
            return false;
        };
        let there = table.ids().iter().all(|ids| ids.len() * self.block_size >= tokens);
        (there || spare) && self.cache.grow(table, tokens)
    }

    /// One token of a decoding sequence, with a block for it. `None`: the sequence does not decode (any more).
    fn plan_decode(&mut self, key: Key) -> Option<Work> {
        loop {
            let State::Decoding(table, _) = &mut self.sequences.get_mut(&key)?.state else { return None };
            let at = table.computed;
            if self.cache.grow(table, at + 1) {
                return Some(Work::new(key, at..at + 1, true));
            }
            self.make_room_for(key);
        }
    }

    /// The next chunk of a sequence that is being prefilled, of at most `limit` tokens.
    ///
    /// Every chunk starts at a block boundary (but for a lone last token) and, unless it is the last one, ends at one: so
    /// a layer of a chunk is a number of whole blocks to push. If the limit is less than a block, the sequence waits a
    /// step.
    fn plan_chunk(&mut self, key: Key, limit: usize) -> Option<Work> {
        self.take_landed(key);
        loop {
            let sequence = self.sequences.get_mut(&key)?;
            let all = sequence.tokens.len();
            let total = sequence.landing.map_or(all, |landing| landing.start);
            let State::Prefilling(table, _) = &mut sequence.state else { return None };
            let start = table.computed;
            let end = if total - start <= limit { total } else { (start + limit) / self.block_size * self.block_size };
            if end <= start {
                return None;
            }
            // With a window, a smaller chunk needs fewer blocks at once; one block's worth is the least.
            let least = (start + self.block_size).min(end);
            for end in [end, least] {
                if self.cache.grow(table, end) {
                    return Some(Work::new(key, start..end, end == all));
                }
            }
            self.make_room_for(key);
        }
    }
}
