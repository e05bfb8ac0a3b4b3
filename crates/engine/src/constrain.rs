//! Answers that must have a form: which tokens may come next, computed beside the model.
//!
//! The engine knows token ids only. What a grammar makes of them is behind two traits: [`Constraints`] compiles a request's
//! grammar, the [`Constraint`] that comes out follows one answer. `kvasir-grammar` implements them; tests have their own.
//!
//! ```text
//!   step   plan ──▶ [constraint] ──┬──▶ model ──────────────┬──▶ sample with the masks ──▶ advance by what was chosen
//!                                  └──▶ mask thread: masks ─┘
//! ```
//!
//! A mask takes as long as the grammar is complicated, up to milliseconds; the model takes longer. So a step sends its
//! constraints away before the model runs and takes them back, with masks, when the logits are there; it waits only for
//! those that are not done by then. A constraint's state is a function of the grammar and the answer's tokens, so it can be
//! made anew wherever an answer goes on.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use kvasir_types::{Grammar, TokenId};

use crate::{Error, Mask};

/// What is wrong with a grammar, or with a text under it. In words, for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadGrammar(pub Arc<str>);

impl BadGrammar {
    /// For this reason.
    pub fn new(reason: impl Into<Arc<str>>) -> Self {
        Self(reason.into())
    }
}

/// Compiles grammars. Called on callers' threads, several at a time.
pub trait Constraints: Send + Sync {
    /// Makes a constraint for one answer, which is empty so far.
    ///
    /// # Errors
    /// If it is no grammar, or too large a one: compiling takes bounded time and memory, whatever the client sends.
    fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, BadGrammar>;
}

/// Follows one answer.
pub trait Constraint: Send {
    /// The answer's next token. True: the answer is complete and nothing can follow.
    ///
    /// # Errors
    /// If the grammar does not allow it here, or its limits are exceeded. The constraint is of no use then.
    fn advance(&mut self, token: TokenId) -> Result<bool, BadGrammar>;

    /// What may come next; then what may come after the first draft, and so on: up to one more mask than drafts, fewer if
    /// a draft is not allowed or ends the answer. End tokens are in a mask where the text may end. The constraint is
    /// where it was afterwards.
    ///
    /// # Errors
    /// If its limits are exceeded. The constraint is of no use then.
    fn masks(&mut self, drafts: &[TokenId]) -> Result<Vec<Mask>, BadGrammar>;
}

/// The constraint of a sequence.
pub(crate) struct Constrained {
    place: Place,
}

enum Place {
    Here(Box<dyn Constraint>),
    Away(Receiver<Computed>),
    /// It panicked or reached a limit: the sequence is about to fail.
    Lost,
}

struct Computed {
    constraint: Box<dyn Constraint>,
    masks: Result<Vec<Mask>, BadGrammar>,
}

impl Constrained {
    pub fn new(constraint: Box<dyn Constraint>) -> Self {
        Self { place: Place::Here(constraint) }
    }

    /// Has the masks computed for the next token and, if they are chosen, for those after each of `drafts`.
    pub fn send(&mut self, drafts: &[TokenId], threads: &MaskThreads) {
        if let Place::Here(constraint) = std::mem::replace(&mut self.place, Place::Lost) {
            self.place = Place::Away(threads.compute(constraint, drafts.to_vec()));
        }
    }

    /// Waits for the masks.
    pub fn receive(&mut self) -> Result<Vec<Mask>, Error> {
        let Place::Away(computed) = std::mem::replace(&mut self.place, Place::Lost) else { return Err(lost()) };
        // Not a wait without an end: computing is bounded, and a thread that panics drops its end of the channel.
        let Computed { constraint, masks } = computed.recv().map_err(|_| lost())?;
        let masks = masks.map_err(Error::Grammar)?;
        self.place = Place::Here(constraint);
        Ok(masks)
    }

    /// The answer's next token. True: the answer is complete.
    pub fn advance(&mut self, token: TokenId) -> Result<bool, Error> {
        let Place::Here(constraint) = &mut self.place else { return Err(lost()) };
        let result = catch_unwind(AssertUnwindSafe(|| constraint.advance(token)));
        result.unwrap_or_else(|_| Err(BadGrammar::new("following the grammar panicked"))).map_err(Error::Grammar)
    }
}

fn lost() -> Error {
    Error::Grammar(BadGrammar::new("computing what the grammar allows panicked"))
}

impl fmt::Debug for Constrained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.place {
            Place::Here(_) => "here",
            Place::Away(_) => "away",
            Place::Lost => "lost",
        })
    }
}

/// The threads that compute masks, named `mask-0` and so on. They end when this is dropped and their work is done.
pub(crate) struct MaskThreads {
    jobs: Option<Sender<Job>>,
}

struct Job {
    constraint: Box<dyn Constraint>,
    drafts: Vec<TokenId>,
    reply: Sender<Computed>,
}

impl Job {
    fn run(self) {
        let Self { mut constraint, drafts, reply } = self;
        if let Ok(masks) = catch_unwind(AssertUnwindSafe(|| constraint.masks(&drafts))) {
            // Nobody waits any more if the sequence was aborted.
            let _ = reply.send(Computed { constraint, masks });
        }
    }
}

impl MaskThreads {
    /// So many threads; none: masks are computed on the engine's, when they are asked for. `sequences` is how many can
    /// have a job at a time, so that handing one over never waits.
    pub fn new(threads: usize, sequences: usize) -> Self {
        let (jobs, inbox) = bounded::<Job>(sequences);
        for index in 0..threads {
            let inbox: Receiver<Job> = inbox.clone();
            let body = move || inbox.into_iter().for_each(Job::run);
            thread::Builder::new().name(format!("mask-{index}")).spawn(body).expect("a thread can be started");
        }
        Self { jobs: (threads > 0).then_some(jobs) }
    }

    fn compute(&self, constraint: Box<dyn Constraint>, drafts: Vec<TokenId>) -> Receiver<Computed> {
        let (reply, computed) = bounded(1);
        let job = Job { constraint, drafts, reply };
        match &self.jobs {
            // The threads live as long as this sender.
            Some(jobs) => drop(jobs.send(job)),
            None => job.run(),
        }
        computed
    }
}
