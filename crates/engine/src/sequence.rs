//! One sequence: its tokens, its blocks, and how far it is.
//!
//! ```text
//!                     ┌───────────────── resume ─────────────────────┐
//!                     │                                              ▼
//!   Queued ─blocks─▶ Held ─compute─▶ Prefilling ──last chunk──▶ Decoding ──▶ ended
//!                     ▲               │  ▲   └─ PrefillOnly ─▶ Parked │
//!                     │ brought back  ▼  │ blocks                     │ loses its blocks
//!                     └──────────── Preempted ◀──────────────────────┘
//! ```
//!
//! A request with several choices is one sequence until its prompt is computed; then each further choice becomes one of
//! its own (`Prefilling` with all but the last token done, or `Decoding`, or, if there are no blocks, `Preempted`).
//!
//! A sequence that is `Prefilling` may have a [`Landing`]: a part of its prompt that peers write meanwhile. It is computed up to
//! there and waits; once they have ended, what they wrote is taken as computed and the rest goes on.
//!
//! Only the states that have blocks have a [`Table`], so a sequence cannot be computed without or wait with one. The
//! memory a peer may be writing to belongs to `Held`; the memory a peer may be reading from belongs to a sequence with a
//! [`LayerSink`], or to `Parked`. None of these is ever preempted.

use std::{fmt, sync::Arc};

use kvasir_kv_cache::{KvCache, Table};
use kvasir_model::Need;
use kvasir_types::{BlockHash, FinishReason, TokenId};

use crate::{
    Ask, Error, Guess, History, LayerSink, MAX_CHOICES, Mask, Mode, Priority, Request, RunnerSpec, SeqId, choice_seed,
    constrain::Constrained, request::QueuePlace, speculate::Pace,
};

/// Who watches a prompt being computed, if anybody.
pub(crate) type Watcher = Option<Box<dyn LayerSink>>;

/// One choice of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub seq: SeqId,
    pub choice: u32,
}

/// Whose turn it is: the urgent before the others, then the older, then the first choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Turn {
    pub class: Priority,
    pub key: Key,
}

/// A request, or one choice of it, on its way through the engine.
pub(crate) struct Sequence {
    pub key: Key,
    /// Its request's priority, or a better one, once it has waited long enough.
    pub class: Priority,
    /// Steps it spent without a turn, those of the present wait apart.
    pub waited: u64,
    /// When the present wait for blocks began.
    pub waits_since: u64,
    /// Blocks, from the first on, that were moved out when it lost them.
    pub spilled: usize,
    /// While it is computed, peers write or have written part of its prompt that it has not come to.
    pub landing: Option<Landing>,
    pub request: Request,
    /// The prompt, then the answer so far.
    pub tokens: Vec<TokenId>,
    /// What penalties and `min_tokens` must know of the tokens.
    history: History,
    /// The form that the answer must have.
    pub constrained: Option<Constrained>,
    /// The same for the further choices, until they are sequences of their own.
    forms: Vec<Constrained>,
    /// How well its tokens are guessed.
    pub pace: Pace,
    /// Hashes of the prompt's full blocks.
    pub prompt_hashes: Arc<[BlockHash]>,
    /// Hashes of the full blocks of `tokens`, as far as they were needed.
    hashes: Vec<BlockHash>,
    /// Most tokens the answer may have, those included that were there before.
    output_limit: usize,
    pub state: State,
}

/// Where a sequence is; see the module's page.
pub(crate) enum State {
    /// Waits for its blocks for the first time. `early`: `compute` came before the blocks did.
    Queued { _place: QueuePlace, early: Option<Watcher> },
    /// Lost its blocks, or is a choice that found none; computes prompt and answer anew once it gets some.
    Preempted,
    /// Blocks reserved; KV may be landing in them from elsewhere.
    Held(Table),
    /// Being computed in chunks.
    Prefilling(Table, Watcher),
    /// One token a step. KV of all tokens but the last is in the table. The watcher has nothing more to see; that it is
    /// still there says that peers may still be reading.
    Decoding(Table, Watcher),
    /// A finished `PrefillOnly` sequence.
    Parked(Table),
}

/// Part of a prompt that is written by peers while what comes before it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Landing {
    /// Tokens before it: computing stops there for the time being.
    pub start: usize,
    /// Behind the last token that is there.
    pub end: usize,
    /// Whether peers may still write behind `end`.
    pub open: bool,
}

impl State {
    pub fn table_mut(&mut self) -> Option<&mut Table> {
        match self {
            Self::Queued { .. } | Self::Preempted => None,
            Self::Held(table) | Self::Prefilling(table, _) | Self::Decoding(table, _) | Self::Parked(table) => {
                Some(table)
            }
        }
    }
}

impl Sequence {
    pub fn new(
        id: SeqId,
        request: Request,
        mut forms: Vec<Constrained>,
        prompt_hashes: Arc<[BlockHash]>,
        output_limit: usize,
        place: QueuePlace,
    ) -> Self {
        Self {
            key: Key { seq: id, choice: 0 },
            class: request.priority,
            waited: 0,
            waits_since: 0,
            spilled: 0,
            landing: None,
            tokens: request.prompt.to_vec(),
            history: History::new(&request.sampling, &request.prompt),
            request,
            constrained: forms.pop(),
            forms,
            pace: Pace::default(),
            hashes: prompt_hashes.to_vec(),
            prompt_hashes,
            output_limit,
            state: State::Queued { _place: place, early: None },
        }
    }

    /// Another choice of the same request, as far as this one is; without blocks.
    pub fn fork(&mut self, choice: u32) -> Self {
        let mut request = self.request.clone();
        request.sampling.seed = choice_seed(request.sampling.seed, choice);
        Self {
            key: Key { choice, ..self.key },
            class: self.class,
            waited: self.waited,
            waits_since: self.waits_since,
            spilled: 0,
            landing: None,
            tokens: self.tokens.clone(),
            history: self.history.clone(),
            request,
            constrained: self.forms.pop(),
            forms: Vec::new(),
            pace: Pace::default(),
            hashes: self.hashes.clone(),
            prompt_hashes: self.prompt_hashes.clone(),
            output_limit: self.output_limit,
            state: State::Preempted,
        }
    }

    /// Where it stands in every line.
    pub fn turn(&self) -> Turn {
        Turn { class: self.class, key: self.key }
    }

    /// Whether nothing of the answer is written yet (here).
    pub fn is_prompt(&self) -> bool {
        self.tokens.len() == self.request.prompt.len()
    }

    /// Hashes of the full blocks of its tokens, as far as they were needed.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// Its blocks, if it has any.
    pub fn table(&self) -> Option<&Table> {
        match &self.state {
            State::Queued { .. } | State::Preempted => None,
            State::Held(table) | State::Prefilling(table, _) | State::Decoding(table, _) | State::Parked(table) => {
                Some(table)
            }
        }
    }

    /// Takes the blocks away; the sequence waits from then on.
    pub fn take_table(&mut self) -> Option<Table> {
        match std::mem::replace(&mut self.state, State::Preempted) {
            State::Held(table) | State::Prefilling(table, _) | State::Decoding(table, _) | State::Parked(table) => {
                Some(table)
            }
            waiting @ (State::Queued { .. } | State::Preempted) => {
                self.state = waiting;
                None
            }
        }
    }

    /// Every token that was known is computed, and the next one sampled: a prompt becomes an answer, or is done.
    pub fn after_sampling(&mut self) {
        self.state = match (std::mem::replace(&mut self.state, State::Preempted), self.request.mode) {
            (State::Prefilling(table, watcher), Mode::Generate) => State::Decoding(table, watcher),
            (State::Prefilling(table, _), Mode::PrefillOnly) => State::Parked(table),
            (decoding, _) => decoding,
        };
    }

    /// Whether its blocks may be taken away: it computes by itself, and nobody outside reads or writes its blocks.
    pub fn is_preemptible(&self) -> bool {
        let running = matches!(self.state, State::Prefilling(_, None) | State::Decoding(_, None));
        running && self.landing.is_none() && self.request.mode == Mode::Generate
    }

    /// Tokens for which blocks must be there before it may start: all of them, and the next one if it will have any.
    pub fn tokens_to_reserve(&self) -> usize {
        self.tokens.len() + usize::from(self.request.mode == Mode::Generate)
    }

    /// Hashes of those leading blocks that can be taken from the prefix cache: never all, because the last token must be
    /// computed to know what follows it.
    pub fn reusable_hashes(&mut self, block_size: usize) -> &[BlockHash] {
        let blocks = (self.tokens.len() - 1) / block_size;
        self.hash_blocks(blocks, block_size);
        &self.hashes[..blocks]
    }

    /// The same hashes once more, and the blocks.
    pub fn reusable(&mut self, block_size: usize) -> (&[BlockHash], Option<&mut Table>) {
        let blocks = (self.tokens.len() - 1) / block_size;
        self.hash_blocks(blocks, block_size);
        (&self.hashes[..blocks], self.state.table_mut())
    }

    /// KV of the first `tokens` tokens is there.
    pub fn advance(&mut self, tokens: usize) {
        if let Some(table) = self.state.table_mut() {
            table.computed = tokens;
        }
    }

    /// The full blocks among the first `tokens` tokens are complete for good: makes them findable.
    pub fn seal(&mut self, tokens: usize, cache: &mut KvCache) {
        let block_size = cache.geometry().block_size();
        let blocks = tokens / block_size;
        self.hash_blocks(blocks, block_size);
        if let Some(table) = self.state.table_mut() {
            cache.seal(table, self.request.root, &self.hashes[..blocks]);
        }
    }

    fn hash_blocks(&mut self, blocks: usize, block_size: usize) {
        for index in self.hashes.len()..blocks {
            let parent = self.hashes.last().copied().unwrap_or(self.request.root);
            self.hashes.push(parent.extend(&self.tokens[index * block_size..(index + 1) * block_size]));
        }
    }

    /// The question what the next token is.
    pub fn ask<'a>(&'a self, eos: &'a [TokenId], mask: Option<&'a Mask>) -> Ask<'a> {
        let sampling = &self.request.sampling;
        Ask { sampling, position: self.tokens.len(), history: &self.history, eos, mask }
    }

    /// How much of a row of logits it takes to choose the token that is `ahead` tokens behind its next one. Several answers draw
    /// each with noise of its own.
    pub fn need(&self, spec: &RunnerSpec, ahead: usize) -> Need {
        let several = self.is_prompt() && self.request.answers() > 1;
        match self.ask(&spec.eos, None).need(spec.vocab, ahead) {
            Need::Drawn { .. } if several => Need::Whole,
            need if self.constrained.is_none() => need,
            _ => Need::Whole,
        }
    }

    /// A number of its own for every choice.
    fn name(&self) -> SeqId {
        SeqId(self.key.seq.0 * u64::from(MAX_CHOICES) + u64::from(self.key.choice))
    }

    /// What a proposer is told.
    pub fn guess(&self, limit: usize) -> Guess<'_> {
        let sampling = &self.request.sampling;
        Guess { seq: self.name(), tokens: &self.tokens, sampling, history: &self.history, limit }
    }

    /// Tokens that may still be written.
    pub fn output_left(&self) -> usize {
        self.output_limit.saturating_sub(self.history.answered())
    }

    /// One more token of the answer. `Some`: it was the last one, and why.
    ///
    /// # Errors
    /// If the grammar does not allow it.
    pub fn push(&mut self, token: TokenId, eos: &[TokenId]) -> Result<Option<FinishReason>, Error> {
        self.tokens.push(token);
        self.history.push(token);
        let sampling = &self.request.sampling;
        let ends_model = !sampling.ignore_eos && eos.contains(&token);
        if ends_model || sampling.stop_token_ids.contains(&token) {
            return Ok(Some(FinishReason::Stop));
        }
        if let Some(constrained) = &mut self.constrained
            && constrained.advance(token)?
        {
            return Ok(Some(FinishReason::Stop));
        }
        Ok(if self.history.answered() >= self.output_limit { Some(FinishReason::Length) } else { None })
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Queued { .. } => "queued",
            State::Preempted => "preempted",
            State::Held(_) => "held",
            State::Prefilling(..) => "prefilling",
            State::Decoding(..) => "decoding",
            State::Parked(_) => "parked",
        };
        write!(
            f,
            "{}.{} {state} {} of {} tokens",
            self.key.seq,
            self.key.choice,
            self.table().map_or(0, |t| t.computed),
            self.tokens.len()
        )
    }
}
