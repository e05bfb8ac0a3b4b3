//! One sequence: its tokens, its blocks, and how far it is.
//!
//! ```text
//!   Queued ──blocks──▶ Held ──compute──▶ Prefilling ──last chunk──▶ Decoding ──▶ ended
//!                       │                  ▲      │                  │  ▲
//!                       │ resume           │      └─ PrefillOnly ─▶ Parked
//!                       └──────────────────┼─────────────────────────┼──┘
//!                                          │                         │ out of blocks
//!                                          └── blocks ── Preempted ◀─┘
//! ```
//!
//! Only the states that have blocks have a [`Table`], so a sequence cannot be computed without or wait with one. The
//! memory a peer may be writing to belongs to `Held`; the memory a peer may be reading from belongs to a sequence with a
//! [`LayerSink`], or to `Parked`. None of these is ever preempted.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use kvasir_kv_cache::{KvCache, Table};
use kvasir_types::{BlockHash, FinishReason, TokenId};

use crate::{
    Ask, Error, Event, EventSink, Guess, History, LayerSink, Mask, Mode, Request, SeqId, constrain::Constrained,
    request::QueuePlace, speculate::Pace,
};

/// Who watches a prompt being computed, if anybody.
pub(crate) type Watcher = Option<Box<dyn LayerSink>>;

/// A request on its way through the engine.
pub(crate) struct Sequence {
    pub id: SeqId,
    pub request: Request,
    /// The prompt, then the answer so far.
    pub tokens: Vec<TokenId>,
    /// What penalties and `min_tokens` must know of the tokens.
    history: History,
    /// The form that the answer must have.
    pub constrained: Option<Constrained>,
    /// How well its tokens are guessed.
    pub pace: Pace,
    /// Hashes of the prompt's full blocks.
    pub prompt_hashes: Arc<[BlockHash]>,
    /// Hashes of the full blocks of `tokens`, as far as they were needed.
    hashes: Vec<BlockHash>,
    /// Most tokens the answer may have, those included that were there before.
    output_limit: usize,
    pub state: State,
    events: Box<dyn EventSink>,
}

/// Where a sequence is; see the module's page.
pub(crate) enum State {
    /// Waits for its blocks for the first time. `early`: `compute` came before the blocks did.
    Queued { _place: QueuePlace, early: Option<Watcher> },
    /// Lost its blocks to an older sequence; computes prompt and answer anew once it gets some.
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
        constrained: Option<Constrained>,
        prompt_hashes: Arc<[BlockHash]>,
        output_limit: usize,
        events: Box<dyn EventSink>,
        place: QueuePlace,
    ) -> Self {
        Self {
            id,
            tokens: request.prompt.to_vec(),
            history: History::new(&request.sampling, &request.prompt),
            request,
            constrained,
            pace: Pace::default(),
            hashes: prompt_hashes.to_vec(),
            prompt_hashes,
            output_limit,
            state: State::Queued { _place: place, early: None },
            events,
        }
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
        running && self.request.mode == Mode::Generate
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

    /// What a proposer is told.
    pub fn guess(&self, limit: usize) -> Guess<'_> {
        let sampling = &self.request.sampling;
        Guess { seq: self.id, tokens: &self.tokens, sampling, history: &self.history, limit }
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

    /// Tells the caller. False: the sink panicked, and there is nobody left to work for.
    #[must_use]
    pub fn tell(&mut self, event: Event) -> bool {
        catch_unwind(AssertUnwindSafe(|| self.events.event(event))).is_ok()
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
        write!(f, "{} {state} {} of {} tokens", self.id, self.table().map_or(0, |t| t.computed), self.tokens.len())
    }
}
