//! Speculative decoding: several tokens of an answer in one step of the model.
//!
//! A [`Proposer`] guesses how an answer goes on. The step then computes the last token and the drafts behind it as one run,
//! and gets the logits after each. From these the sampler chooses as ever, position by position, and as long as it chooses
//! what was drafted, the next row is the right one, too:
//!
//! ```text
//!   answer … t        drafts a b c        the model computes      t   a   b   c
//!                                         the sampler chooses     a   b   x          → a, b, x are written
//!                                                                 └ = ┘   ≠          c's row is of no use
//! ```
//!
//! Tokens are what they are without speculation, one by one: for the sampler is a function of the logits, the request and
//! the tokens before, whoever computed them in whatever run; that holds for penalties and grammars, too, whose masks are
//! computed along the drafts. Seen as a distribution it is the rule of Leviathan, Kalman, Matias (Fast inference from
//! transformers via speculative decoding, 2023, section 2.3): a proposal that puts all its weight on one token `d` is
//! accepted with probability p(d), and if not, the token comes from p without `d`, normalized. Both happen here: `d` is
//! chosen with probability p(d), and what else is chosen has the rest of p. A draft model draws with the target's own
//! noise (see the sampler), so the two mostly choose alike where their distributions do.
//!
//! K and V of drafts that were not accepted stay in the sequence's own open blocks until they are written over; a block is
//! sealed up to what was accepted, never further. Drafts come last in a step: they get what the token budget and the pool
//! have left, and nobody loses a block for one.

mod draft;
mod ngram;
mod pace;

use std::panic::{AssertUnwindSafe, catch_unwind};

use kvasir_types::{Sampling, TokenId};

pub(crate) use self::pace::Pace;
pub use self::{draft::DraftModel, ngram::NGrams};
use crate::{Engine, Error, History, SeqId, scheduler::Work, sequence::State};

/// A sequence that tokens are to be guessed for.
#[derive(Clone, Copy, Debug)]
pub struct Guess<'a> {
    /// Its name here: the same in every step, and never another's (nor another choice's, so it is not the request's).
    pub seq: SeqId,
    /// Prompt and answer so far. Since the last step they have only become longer.
    pub tokens: &'a [TokenId],
    /// How its tokens are chosen.
    pub sampling: &'a Sampling,
    /// What has been written of the answer.
    pub history: &'a History,
    /// Most tokens that are of use, at least 1.
    pub limit: usize,
}

/// Guesses how answers go on. A wrong guess costs time and nothing else.
pub trait Proposer: Send {
    /// The likely next tokens of each sequence, perhaps none.
    ///
    /// # Errors
    /// If it can't go on: it is asked no more then, and everything is computed token by token.
    fn propose(&mut self, guesses: &[Guess<'_>]) -> Result<Vec<Vec<TokenId>>, Error>;
}

impl Engine {
    /// Adds drafts to the work of sequences that decode.
    pub(crate) fn speculate(&mut self, work: &mut [Work]) {
        let Some(proposer) = &mut self.proposer else { return };
        let planned: usize = work.iter().map(|item| item.tokens.len()).sum();
        let mut budget = self.scheduler.config().max_batch_tokens.saturating_sub(planned);
        let most = self.scheduler.config().draft_tokens;
        let mut wanted: Vec<(usize, usize)> = Vec::new();
        for (index, item) in work.iter().enumerate() {
            let Some(sequence) = self.scheduler.get_mut(item.key) else { continue };
            if !matches!(sequence.state, State::Decoding(..)) {
                continue;
            }
            // The last token that may be written needs no draft behind it, and none has a place after the context's end.
            let room = sequence.output_left().min(self.spec.max_len - sequence.tokens.len()).saturating_sub(1);
            let limit = most.min(room).min(budget);
            let limit = if limit == 0 { 0 } else { sequence.pace.limit(limit) };
            if limit > 0 {
                budget -= limit;
                wanted.push((index, limit));
            }
        }
        if wanted.is_empty() {
            return;
        }
        let guess = |&(index, limit): &(usize, usize)| {
            let sequence = self.scheduler.get(work[index].key).expect("work is planned for live sequences");
            sequence.guess(limit)
        };
        let guesses: Vec<Guess<'_>> = wanted.iter().map(guess).collect();
        let proposed = catch_unwind(AssertUnwindSafe(|| proposer.propose(&guesses)));
        let Ok(Ok(proposed)) = proposed else {
            self.scheduler.totals.proposer_failures += 1;
            self.proposer = None;
            return;
        };
        for ((index, limit), mut drafts) in wanted.into_iter().zip(proposed) {
            drafts.truncate(limit);
            let known = drafts.iter().take_while(|draft| (draft.0 as usize) < self.spec.vocab).count();
            drafts.truncate(known);
            let item = &mut work[index];
            if self.scheduler.has_room_for(item.key, item.tokens.end + drafts.len()) {
                item.drafts = drafts;
            }
        }
    }
}
