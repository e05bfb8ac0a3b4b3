//! What the engine is asked to do, and the checks before it takes a request on.
//!
//! Everything that can be known to fail without looking at the pool's present state is refused here, on the caller's
//! thread, with the request handed back. What passes will be admitted sooner or later, and gets as many tokens as its
//! client asked for: a request whose [`Demand`] the whole pool cannot meet is refused with the numbers. Only where nobody
//! asked for a length ([`Sampling::max_tokens_asked`]) an answer may end with the pool.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
};

use kvasir_kv_cache::Geometry;
use kvasir_types::{BlockHash, Priority, RequestId, Sampling, TokenId, chain};

use crate::{
    BadGrammar, Config, Constraints, Error, EventSink, Limits, RunnerSpec, constrain::Constrained, engine::Command,
    sequence::Sequence,
};

/// Most choices of one request.
pub const MAX_CHOICES: u32 = 128;

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
    /// Who goes before whom: the order of admission, of the batch, and, backwards, of losing blocks. An offline request
    /// that was without a turn for a number of steps ([`Config::offline_patience`]) counts as online: then its age puts it
    /// before those that came later, so it cannot starve.
    pub priority: Priority,
    /// How many answers to write to the prompt, 1 to [`MAX_CHOICES`]; each with its own seed
    /// ([`crate::choice_seed`]), the first with the request's. A `PrefillOnly` sequence draws the first one's token only.
    pub choices: u32,
}

impl Request {
    /// How many answers are written here.
    pub(crate) fn answers(&self) -> u32 {
        match self.mode {
            Mode::Generate => self.choices,
            Mode::PrefillOnly => 1,
        }
    }
}

/// What an engine takes on. It can change while it runs, and refuses nothing that is under way: a change shows at the
/// door, and in how a step is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Duty {
    /// Prompts and answers: every step has one token of each answer, and chunks of prompts beside them.
    #[default]
    Mixed,
    /// New requests must be `PrefillOnly`. Answers that are being written go on, a token in every step.
    Prefill,
    /// New requests must be `Generate`. Prompts of theirs that must be computed here after all (what a prefill worker did
    /// not bring) are, but while an answer is being written in chunks of no more than [`Config::remainder_tokens`] for all of
    /// them, so that it is not held up. `PrefillOnly` sequences that are there are finished in the same way.
    Decode,
}

impl Duty {
    const ALL: [Self; 3] = [Self::Mixed, Self::Prefill, Self::Decode];

    fn takes(self, mode: Mode) -> bool {
        match self {
            Self::Mixed => true,
            Self::Prefill => mode == Mode::PrefillOnly,
            Self::Decode => mode == Mode::Generate,
        }
    }
}

/// Blocks that a request may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Without so many it does not start.
    pub to_start: usize,
    /// With fewer in the whole pool it cannot be answered to its end: what one choice alone has, as long as it may get.
    pub to_end: usize,
    /// It never has more: all choices as long as they may get, sharing only the prompt.
    pub at_most: usize,
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
    /// What may be changed of the settings, in bounds; leaf lock, held for a copy.
    limits: Mutex<Limits>,
    /// As it was at start, for their bounds.
    config: Config,
    next_seq: AtomicU64,
    /// By priority.
    waiting: [Arc<AtomicUsize>; 2],
    /// Index in [`Duty::ALL`].
    duty: AtomicU8,
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
            limits: Mutex::new(config.limits()),
            config: config.clone(),
            next_seq: AtomicU64::new(0),
            waiting: Default::default(),
            duty: AtomicU8::new(0),
            closed: AtomicBool::new(false),
            constraints,
        }))
    }

    /// Checks a request and makes the command that starts it. Does the expensive parts (hashing the prompt, compiling the
    /// grammar) here, on the caller's thread.
    pub fn admit(&self, request: Request, events: Box<dyn EventSink>) -> Result<(SeqId, Command), Rejected> {
        let checked = self.check(&request).and_then(|()| self.forms(&request));
        match checked.and_then(|forms| Ok((forms, self.enqueue(request.priority)?))) {
            Ok((forms, place)) => {
                let hashes = chain(request.root, &request.prompt, self.0.geometry.block_size());
                let seq = SeqId(self.0.next_seq.fetch_add(1, Ordering::Relaxed));
                let limit = self.output_limit(&request);
                let sequence = Box::new(Sequence::new(seq, request, forms, hashes.into(), limit, place));
                Ok((seq, Command::Admit(NewSequence { sequence, events })))
            }
            Err(error) => Err(Rejected { error, request: Box::new(request) }),
        }
    }

    /// Requests that were taken on and do not have their blocks yet.
    pub fn waiting(&self) -> usize {
        self.0.waiting.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// What the engine takes on.
    pub fn duty(&self) -> Duty {
        Duty::ALL[usize::from(self.0.duty.load(Ordering::Relaxed))]
    }

    /// Changes what it takes on; see [`Duty`].
    pub fn set_duty(&self, duty: Duty) {
        self.0.duty.store(duty as u8, Ordering::Relaxed);
    }

    /// What may be changed of the settings, as it is now.
    pub fn limits(&self) -> Limits {
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other limits: at the door at once, for steps from the next one on. What could not work is raised as at start.
    pub fn set_limits(&self, limits: Limits) {
        let limits = self.0.config.clone().limited(limits, self.0.geometry.block_size()).limits();
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// How many blocks a request needs, and may come to need.
    pub fn demand(&self, request: &Request) -> Demand {
        let shared = &*self.0;
        let needed = |tokens| shared.geometry.needed(tokens, shared.chunk_tokens);
        let prompt = request.prompt.len();
        let to_start = needed(prompt + usize::from(request.mode == Mode::Generate));
        if request.mode == Mode::PrefillOnly || prompt >= shared.max_len {
            return Demand { to_start, to_end: to_start, at_most: to_start };
        }
        let to_end = self.needed_with(request, self.output_limit(request));
        let more = (request.answers() as usize).saturating_sub(1);
        let at_most = to_end + more * to_end.saturating_sub(shared.geometry.shared(prompt));
        Demand { to_start, to_end: to_end.max(to_start), at_most: at_most.max(to_start) }
    }

    /// Blocks that the prompt needs with an answer of `output` tokens, those included that are there already.
    fn needed_with(&self, request: &Request, output: usize) -> usize {
        let prompt = request.prompt.len();
        // The last token's KV is never computed.
        let end = prompt - (request.sampling.continued as usize).min(prompt) + output - 1;
        self.0.geometry.needed(end.max(prompt), self.0.chunk_tokens)
    }

    /// The error if the client asked for more than there are blocks for, even with nobody else here.
    fn answer_fits(&self, request: &Request) -> Result<(), Error> {
        let (blocks, needed) = (self.0.blocks, self.demand(request).to_end);
        if !request.sampling.max_tokens_asked || needed <= blocks {
            return Ok(());
        }
        let max_tokens = self.output_limit(request);
        // So many fit: there are blocks to start with. And so many are too much.
        let (mut at_most, mut too_many) = (request.sampling.continued as usize + 1, max_tokens);
        while too_many - at_most > 1 {
            let middle = at_most.midpoint(too_many);
            let half = if self.needed_with(request, middle) <= blocks { &mut at_most } else { &mut too_many };
            *half = middle;
        }
        Err(Error::AnswerExceedsPool { tokens: request.prompt.len(), max_tokens, needed, blocks, at_most })
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
        let duty = self.duty();
        if !duty.takes(request.mode) {
            return Err(Error::WrongDuty { duty });
        }
        if !(1..=MAX_CHOICES).contains(&request.choices) {
            return Err(Error::BadChoices { choices: request.choices, limit: MAX_CHOICES });
        }
        if tokens == 0 {
            return Err(Error::EmptyPrompt);
        }
        // The context must have room for the prompt and one token after it.
        if tokens >= shared.max_len {
            return Err(Error::PromptTooLong { tokens, max_len: shared.max_len });
        }
        let needed = self.demand(request).to_start;
        if needed > shared.blocks {
            return Err(Error::PromptExceedsPool { tokens, needed, blocks: shared.blocks });
        }
        let sampling = &request.sampling;
        let continued = sampling.continued as usize;
        let max_tokens = sampling.max_tokens as usize;
        if continued >= tokens || (request.mode == Mode::Generate && continued >= max_tokens) {
            return Err(Error::BadContinuation { continued, tokens, max_tokens });
        }
        self.answer_fits(request)?;
        let biased = sampling.logit_bias.iter().map(|(token, _)| token);
        match request.prompt.iter().chain(biased).find(|token| token.0 as usize >= shared.vocab) {
            Some(&token) => Err(Error::UnknownToken { token, vocab: shared.vocab }),
            None => Ok(()),
        }
    }

    /// The constraints that the answers' form makes, one for each choice, after as much of the answer as there is.
    fn forms(&self, request: &Request) -> Result<Vec<Constrained>, Error> {
        let Some(grammar) = &request.sampling.grammar else { return Ok(Vec::new()) };
        let no_tokenizer = || BadGrammar::new("this worker's model has no tokenizer that grammars can be made for");
        let constraints = self.0.constraints.as_ref().ok_or_else(|| Error::Grammar(no_tokenizer()))?;
        let written = request.prompt.len() - request.sampling.continued as usize;
        let mut forms = Vec::new();
        for _ in 0..request.answers() {
            let mut constrained = Constrained::new(constraints.compile(grammar).map_err(Error::Grammar)?);
            for &token in &request.prompt[written..] {
                if constrained.advance(token)? {
                    return Err(Error::Grammar(BadGrammar::new("the answer to go on with is complete")));
                }
            }
            forms.push(constrained);
        }
        Ok(forms)
    }

    fn enqueue(&self, priority: Priority) -> Result<QueuePlace, Error> {
        let limits = self.limits();
        let limit = [limits.max_waiting, limits.max_waiting_offline][priority as usize];
        let waiting = &self.0.waiting[priority as usize];
        let one_more = |count: usize| (count < limit).then_some(count + 1);
        match waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) {
            Ok(_) => Ok(QueuePlace(Arc::clone(waiting))),
            Err(_) => Err(Error::QueueFull { limit }),
        }
    }

    /// Most tokens the answer may have: what was asked for, or what the model's context leaves.
    fn output_limit(&self, request: &Request) -> usize {
        let asked = usize::try_from(request.sampling.max_tokens).unwrap_or(usize::MAX);
        asked.clamp(1, self.0.max_len - request.prompt.len() + request.sampling.continued as usize)
    }
}

/// A checked request on its way to the engine, with its name and its place in the queue.
pub struct NewSequence {
    pub(crate) sequence: Box<Sequence>,
    pub(crate) events: Box<dyn EventSink>,
}

/// A place in the bounded queue; dropping it (admitted, aborted, or lost with the thread) makes room for another.
#[derive(Debug)]
pub(crate) struct QueuePlace(Arc<AtomicUsize>);

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
