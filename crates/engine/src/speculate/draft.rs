//! A small model with the same tokens guesses what the large one will say.
//!
//! It has its own runner, its own blocks, and a place in each answer of its own:
//!
//! ```text
//!   tokens of the answer   p p p p p p p p a a a b | drafts
//!   in the draft's blocks  p p p p p p p p a a a x |           x: a draft that was not accepted, written over
//!                          └ settled ──────────┘
//! ```
//!
//! Before it drafts, it computes what it lacks: after a step, the tokens that were not its own drafts; after a prompt that
//! was prefilled elsewhere, all of it, in chunks of [`DraftModel::chunk_tokens`] over all sequences and steps. A sequence
//! gets drafts once it has caught up. All sequences are drafted for in one batch, a token at a time.
//!
//! When its blocks run out, the sequences not asked about for the longest lose theirs: what a draft model forgets is
//! computed again or not drafted, and never wrong.

use std::collections::HashMap;

use kvasir_kv_cache::{Geometry, KvCache, Table};
use kvasir_model::SeqInput;
use kvasir_types::{KvLayout, Sampling, TokenId};

use super::{Guess, Proposer};
use crate::{Ask, Error, History, Runner, RunnerSpec, Sampler, SeqId};

/// Sequences not asked about in so many steps have ended, or are not worth drafting for.
const FORGET_AFTER: u64 = 128;

/// Guesses with a model.
pub struct DraftModel {
    runner: Box<dyn Runner>,
    spec: RunnerSpec,
    cache: KvCache,
    states: HashMap<SeqId, State>,
    sampler: Sampler,
    /// Most tokens computed in one step to catch up with prompts.
    chunk_tokens: usize,
    steps: u64,
}

/// What of a sequence is in the draft model's blocks.
struct State {
    table: Table,
    /// Tokens whose K and V are there, drafts included.
    tokens: Vec<TokenId>,
    /// Of those, how many are known to be the sequence's own.
    settled: usize,
    asked: u64,
}

/// A sequence being drafted for.
struct Draft {
    sampling: Sampling,
    history: History,
    drafts: Vec<TokenId>,
    /// It has caught up, and may go on.
    ready: bool,
}

impl DraftModel {
    /// A draft model over `blocks` blocks of `layout` that are its own. It computes at most `chunk_tokens` tokens of
    /// prompts in a step.
    pub fn new(runner: Box<dyn Runner>, layout: &KvLayout, blocks: usize, chunk_tokens: usize) -> Self {
        let spec = runner.spec().clone();
        let cache = KvCache::new(Geometry::new(layout.block_size as usize, &spec.groups), blocks, 0);
        let chunk_tokens = chunk_tokens.max(1);
        Self { runner, spec, cache, states: HashMap::new(), sampler: Sampler::default(), chunk_tokens, steps: 0 }
    }

    /// Blocks that are in use, for checks.
    #[cfg(test)]
    pub(crate) fn blocks_in_use(&self) -> usize {
        self.cache.counts().in_use
    }

    /// Finds out how much of what is in the blocks is still right. False: there is no drafting for this sequence.
    fn settle(&mut self, guess: &Guess<'_>) -> bool {
        let longest = guess.tokens.len() + guess.limit;
        if longest > self.spec.max_len || !self.understands(guess.seq, guess.tokens) {
            return false;
        }
        if !self.states.contains_key(&guess.seq) {
            let Some(table) = self.reserve(guess.seq) else { return false };
            let state = State { table, tokens: Vec::new(), settled: 0, asked: self.steps };
            self.states.insert(guess.seq, state);
        }
        let state = self.states.get_mut(&guess.seq).expect("inserted just now");
        state.asked = self.steps;
        let agree = state.tokens[state.settled..].iter().zip(&guess.tokens[state.settled..]);
        let agreed = state.settled + agree.take_while(|(a, b)| a == b).count();
        // The last token is computed anew if need be: what follows it is the question.
        state.settled = agreed.min(guess.tokens.len() - 1);
        state.tokens.truncate(state.settled);
        state.table.computed = state.settled;
        true
    }

    /// Whether all of it is in this model's vocabulary; what is settled has been looked at before.
    fn understands(&self, seq: SeqId, tokens: &[TokenId]) -> bool {
        let settled = self.states.get(&seq).map_or(0, |state| state.settled);
        tokens[settled..].iter().all(|token| (token.0 as usize) < self.spec.vocab)
    }

    fn reserve(&mut self, seq: SeqId) -> Option<Table> {
        loop {
            if let Some(table) = self.cache.reserve(&[], 1, 1) {
                return Some(table);
            }
            if !self.forget_one(seq) {
                return None;
            }
        }
    }

    /// Gives the table of `seq` room for so many tokens.
    fn grow(&mut self, seq: SeqId, tokens: usize) -> bool {
        loop {
            let Some(state) = self.states.get_mut(&seq) else { return false };
            if self.cache.grow(&mut state.table, tokens) {
                return true;
            }
            if !self.forget_one(seq) {
                return false;
            }
        }
    }

    /// Takes the blocks of the sequence not asked about for the longest; of those asked about just now, none.
    fn forget_one(&mut self, except: SeqId) -> bool {
        let candidates = self.states.iter().filter(|(seq, state)| **seq != except && state.asked < self.steps);
        let Some(oldest) = candidates.min_by_key(|(seq, state)| (state.asked, **seq)).map(|(&seq, _)| seq) else {
            return false;
        };
        self.forget(oldest);
        true
    }

    fn forget(&mut self, seq: SeqId) {
        if let Some(state) = self.states.remove(&seq) {
            self.cache.give_back(state.table);
        }
    }

    /// Computes the `tokens` that follow what each of these sequences has; the logits after the last one, where wanted.
    fn run(&mut self, batch: &[(SeqId, Vec<TokenId>, bool)]) -> Result<Vec<Vec<f32>>, Error> {
        let inputs: Vec<SeqInput<'_>> = batch
            .iter()
            .map(|(seq, tokens, wanted)| {
                let state = &self.states[seq];
                let (start, tables) = (state.tokens.len(), state.table.ids());
                SeqInput { tokens, start, tables, rows: usize::from(*wanted) }
            })
            .collect();
        let logits = self.runner.run(&inputs, &mut |_| {}).map_err(|error| Error::Runner(error.into()))?;
        drop(inputs);
        for (seq, tokens, _) in batch {
            let state = self.states.get_mut(seq).expect("it was computed just now");
            state.tokens.extend_from_slice(tokens);
        }
        Ok(logits.iter().map(<[f32]>::to_vec).collect())
    }

    /// The first pass: what each sequence lacks, and with its last token the first draft.
    fn catch_up(&mut self, guesses: &[Guess<'_>], drafts: &mut [Draft]) -> Result<(), Error> {
        let mut budget = self.chunk_tokens;
        let (mut batch, mut ready) = (Vec::new(), Vec::new());
        for (index, guess) in guesses.iter().enumerate() {
            if !drafts[index].ready {
                continue;
            }
            let lacking = &guess.tokens[self.states[&guess.seq].tokens.len()..];
            // What a step adds to an answer is always computed: only prompts are long enough to be put off.
            let now = if lacking.len() <= guess.limit + 1 { lacking.len() } else { lacking.len().min(budget) };
            budget = budget.saturating_sub(now);
            drafts[index].ready = now == lacking.len();
            let end = self.states[&guess.seq].tokens.len() + now;
            if now == 0 || !self.grow(guess.seq, end) {
                drafts[index].ready = false;
                continue;
            }
            if drafts[index].ready {
                ready.push(index);
            }
            batch.push((guess.seq, lacking[..now].to_vec(), drafts[index].ready));
        }
        self.draw(guesses, drafts, &batch, &ready)?;
        for guess in guesses {
            if let Some(state) = self.states.get_mut(&guess.seq) {
                state.settled = state.tokens.len().min(guess.tokens.len());
                // Not the drafts to come: a sliding window that has moved on with them could not go back.
                state.table.computed = state.settled;
            }
        }
        Ok(())
    }

    /// Another pass: one more token each.
    fn go_on(&mut self, guesses: &[Guess<'_>], drafts: &mut [Draft]) -> Result<bool, Error> {
        let (mut batch, mut ready) = (Vec::new(), Vec::new());
        for (index, guess) in guesses.iter().enumerate() {
            let draft = &mut drafts[index];
            let Some(&last) = draft.drafts.last() else { continue };
            let ends = self.spec.eos.contains(&last) && !draft.sampling.ignore_eos;
            draft.ready = draft.ready && draft.drafts.len() < guess.limit && !ends;
            if draft.ready && self.grow(guess.seq, guess.tokens.len() + draft.drafts.len()) {
                batch.push((guess.seq, vec![last], true));
                ready.push(index);
            } else {
                draft.ready = false;
            }
        }
        self.draw(guesses, drafts, &batch, &ready)?;
        Ok(!ready.is_empty())
    }

    /// Computes a batch and draws a token for each of the `ready` ones, which are those that wanted logits, in order.
    fn draw(
        &mut self,
        guesses: &[Guess<'_>],
        drafts: &mut [Draft],
        batch: &[(SeqId, Vec<TokenId>, bool)],
        ready: &[usize],
    ) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        let rows = self.run(batch)?;
        for (mut row, &index) in rows.into_iter().zip(ready) {
            let (guess, draft) = (&guesses[index], &mut drafts[index]);
            let position = guess.tokens.len() + draft.drafts.len();
            let (sampling, history) = (&draft.sampling, &draft.history);
            let ask = Ask { sampling, position, history, eos: &self.spec.eos, mask: None };
            let token = self.sampler.sample(&mut row, ask)?.token;
            draft.drafts.push(token);
            draft.history.push(token);
        }
        Ok(())
    }
}

impl Proposer for DraftModel {
    fn propose(&mut self, guesses: &[Guess<'_>]) -> Result<Vec<Vec<TokenId>>, Error> {
        self.steps += 1;
        let old: Vec<SeqId> =
            self.states.iter().filter(|(_, s)| s.asked + FORGET_AFTER < self.steps).map(|(&seq, _)| seq).collect();
        old.into_iter().for_each(|seq| self.forget(seq));
        let mut drafts: Vec<Draft> = Vec::with_capacity(guesses.len());
        for guess in guesses {
            drafts.push(Draft {
                sampling: Sampling { logprobs: None, grammar: None, ..guess.sampling.clone() },
                history: guess.history.clone(),
                drafts: Vec::with_capacity(guess.limit),
                ready: self.settle(guess),
            });
        }
        self.catch_up(guesses, &mut drafts)?;
        while self.go_on(guesses, &mut drafts)? {}
        Ok(drafts.into_iter().map(|draft| draft.drafts).collect())
    }
}
