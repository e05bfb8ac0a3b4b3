//! What the engine is asked to do, and the checks before it takes a request on.
//!
//! Everything that can be known to fail without looking at the pool's present state is refused here, on the caller's
//! thread, with the request handed back. What passes will be admitted sooner or later.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use kvasir_kv_cache::Geometry;
use kvasir_types::{BlockHash, RequestId, Sampling, TokenId, chain};

use crate::{
    BadGrammar, Config, Constraints, Error, EventSink, RunnerSpec, constrain::Constrained, engine::Command,
    sequence::Sequence,
};

/// A sequence of one engine. Numbers grow in the order of admission and are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "q{}", self.0)
    }
}

/// A prompt and what to make of it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The client's request, for log lines.
    pub id: RequestId,
    /// Token ids of the prompt, at least one.
    pub prompt: Arc<[TokenId]>,
    /// Where the prompt's chain of block hashes starts: [`BlockHash::root`] of fingerprint and salt.
    pub root: BlockHash,
    /// How to choose tokens, and how many.
    pub sampling: Sampling,
    /// What to do once the prompt is there.
    pub mode: Mode,
}

/// How far a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Write the answer to its end.
    Generate,
    /// Compute the prompt, sample one token, keep the blocks until `release` or `abort`. `max_tokens` and stop tokens
    /// mean nothing here; they are the decode worker's business.
    PrefillOnly,
}

/// A request that was not taken on; it comes back with the reason.
#[derive(Debug, thiserror::Error)]
#[error("request {} refused", request.id)]
pub struct Rejected {
    /// Why.
    #[source]
    pub error: Error,
    /// The request, as it was.
    pub request: Box<Request>,
}

/// The gate in front of an engine: checks requests, bounds the queue, names sequences. Shared by all handles; written by
/// them on their own threads, read by the engine's.
#[derive(Clone, Debug)]
pub struct Intake(Arc<Shared>);

struct Shared {
    geometry: Geometry,
    chunk_tokens: usize,
    blocks: usize,
    vocab: usize,
    max_len: usize,
    max_waiting: usize,
    next_seq: AtomicU64,
    waiting: Arc<AtomicUsize>,
    closed: AtomicBool,
    constraints: Option<Arc<dyn Constraints>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("waiting", &self.waiting).field("closed", &self.closed).finish_non_exhaustive()
    }
}

impl Intake {
    pub(crate) fn new(
        config: &Config,
        geometry: Geometry,
        blocks: usize,
        spec: &RunnerSpec,
        constraints: Option<Arc<dyn Constraints>>,
    ) -> Self {
        Self(Arc::new(Shared {
            geometry,
            chunk_tokens: config.chunk_tokens,
            blocks,
            vocab: spec.vocab,
            max_len: spec.max_len,
            max_waiting: config.max_waiting,
            next_seq: AtomicU64::new(0),
            waiting: Arc::default(),
            closed: AtomicBool::new(false),
            constraints,
        }))
    }

    /// Checks a request and makes the command that starts it. Does the expensive parts (hashing the prompt, compiling the
    /// grammar) here, on the caller's thread.
    pub fn admit(&self, request: Request, events: Box<dyn EventSink>) -> Result<(SeqId, Command), Rejected> {
        let checked = self.check(&request).and_then(|()| self.constrained(&request));
        match checked.and_then(|constrained| Ok((constrained, self.enqueue()?))) {
            Ok((constrained, place)) => {
                let hashes = chain(request.root, &request.prompt, self.0.geometry.block_size());
                let seq = SeqId(self.0.next_seq.fetch_add(1, Ordering::Relaxed));
                let limit = self.output_limit(&request);
                let sequence = Sequence::new(seq, request, constrained, hashes.into(), limit, events, place);
                Ok((seq, Command::Admit(NewSequence(Box::new(sequence)))))
            }
            Err(error) => Err(Rejected { error, request: Box::new(request) }),
        }
    }

    /// Requests that were taken on and do not have their blocks yet.
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::Relaxed)
    }

    /// From here on every request is refused.
    pub(crate) fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
    }

    fn check(&self, request: &Request) -> Result<(), Error> {
        let shared = &*self.0;
        let tokens = request.prompt.len();
        if shared.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        if tokens == 0 {
            return Err(Error::EmptyPrompt);
        }
        // The context must have room for the prompt and one token after it.
        if tokens >= shared.max_len {
            return Err(Error::PromptTooLong { tokens, max_len: shared.max_len });
        }
        let needed = shared.geometry.needed(tokens + usize::from(request.mode == Mode::Generate), shared.chunk_tokens);
        if needed > shared.blocks {
            return Err(Error::PromptExceedsPool { tokens, needed, blocks: shared.blocks });
        }
        let sampling = &request.sampling;
        let continued = sampling.continued as usize;
        let max_tokens = sampling.max_tokens as usize;
        if continued >= tokens || (request.mode == Mode::Generate && continued >= max_tokens) {
            return Err(Error::BadContinuation { continued, tokens, max_tokens });
        }
        let biased = sampling.logit_bias.iter().map(|(token, _)| token);
        match request.prompt.iter().chain(biased).find(|token| token.0 as usize >= shared.vocab) {
            Some(&token) => Err(Error::UnknownToken { token, vocab: shared.vocab }),
            None => Ok(()),
        }
    }

    /// The constraint that the answer's form makes, after as much of the answer as there is.
    fn constrained(&self, request: &Request) -> Result<Option<Constrained>, Error> {
        let Some(grammar) = &request.sampling.grammar else { return Ok(None) };
        let no_tokenizer = || BadGrammar::new("this worker's model has no tokenizer that grammars can be made for");
        let constraints = self.0.constraints.as_ref().ok_or_else(|| Error::Grammar(no_tokenizer()))?;
        let mut constrained = Constrained::new(constraints.compile(grammar).map_err(Error::Grammar)?);
        let written = request.prompt.len() - request.sampling.continued as usize;
        for &token in &request.prompt[written..] {
            if constrained.advance(token)? {
                return Err(Error::Grammar(BadGrammar::new("the answer to go on with is complete")));
            }
        }
        Ok(Some(constrained))
    }

    fn enqueue(&self) -> Result<QueuePlace, Error> {
        let waiting = &self.0.waiting;
        let one_more = |count: usize| (count < self.0.max_waiting).then_some(count + 1);
        match waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) {
            Ok(_) => Ok(QueuePlace(Arc::clone(waiting))),
            Err(_) => Err(Error::QueueFull { limit: self.0.max_waiting }),
        }
    }

    /// Most tokens the answer may have: what was asked for, or what the model's context leaves.
    fn output_limit(&self, request: &Request) -> usize {
        let asked = usize::try_from(request.sampling.max_tokens).unwrap_or(usize::MAX);
        asked.clamp(1, self.0.max_len - request.prompt.len() + request.sampling.continued as usize)
    }
}

/// A checked request on its way to the engine, with its name and its place in the queue.
#[derive(Debug)]
pub struct NewSequence(pub(crate) Box<Sequence>);

/// A place in the bounded queue; dropping it (admitted, aborted, or lost with the thread) makes room for another.
#[derive(Debug)]
pub(crate) struct QueuePlace(Arc<AtomicUsize>);

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
