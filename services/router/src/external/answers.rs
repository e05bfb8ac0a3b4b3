//! The answers to one request from an engine: one request a choice, each with a prefill server of its own choosing.
//!
//! ```text
//!   vLLM    prefill server (the next one, should it fail; last of all nobody) ─▶ decode server ─▶ tokens
//!   SGLang  prefill server and decode server at once; the next prefill server, should it fail ─▶ tokens
//! ```
//!
//! Neither engine computes a prompt once for several choices when prefill and decode are apart, and what was computed is
//! handed to one reader only; so a choice is a request of its own. Prefill servers have the prompt in their caches from the
//! first one on.
//!
//! Dropping it closes the connections, which is how engines notice that nobody listens; an SGLang server, which looks for
//! that every few seconds only, is told.

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::BodyDataStream;
use futures_util::StreamExt;
use kvasir_runtime::{Kind, Tasks, chain, random_u64};
use kvasir_types::{MemberId, RequestId, Sampled, Sampling, TokenId, Usage, choice_seed};
use tokio::time::{Instant, Sleep};
use tonic::Code;
use tracing::{Span, warn};

use super::{
    Nonsense, Told,
    config::EngineKind,
    engine::Engine,
    http::{Ask, broken},
    sglang, sse, vllm,
};
use crate::{
    fleet::Worker,
    upstream::{Error, Event, Patience},
};

/// For an engine to hear that a request was given up.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);
/// After a decode server's failure, for its prefill server to say that it failed.
const BOTH_FAIL: Duration = Duration::from_millis(500);
/// Log-probabilities below are as good as never; JSON has no word for what is less.
const LEAST_LOGPROB: f32 = -9999.0;

/// What an engine is asked for one choice.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    /// The prompt.
    pub(crate) prompt: &'a [TokenId],
    /// How tokens are chosen.
    pub(crate) sampling: &'a Sampling,
    /// The seed of this choice.
    pub(crate) seed: u64,
    /// Most tokens to come.
    pub(crate) max_tokens: u32,
    /// The tenant's salt.
    pub(crate) salt: &'a str,
    /// How many tokens the model has.
    pub(crate) vocab: usize,
}

/// Who asks, whom, and how patiently.
pub(crate) struct Way<'a> {
    /// The decode server.
    pub(crate) worker: &'a Arc<Worker>,
    /// Prefill servers, in the order in which to try them.
    pub(crate) prefill: &'a [Arc<Worker>],
    /// The request's name.
    pub(crate) id: &'a RequestId,
    /// How long anything may take.
    pub(crate) patience: Patience,
    /// After a failure, how long others are preferred.
    pub(crate) rest: Duration,
    /// Those of the process.
    pub(crate) tasks: &'a Tasks,
}

/// Answers under way. Dropping it gives them up.
pub(crate) struct Answers {
    streams: Vec<Stream>,
    /// Which stream is looked at first: they take turns.
    turn: usize,
    worker: MemberId,
    prompt: u32,
    patience: Patience,
    heard: Instant,
    /// Never later than it must ring; reset when it does.
    clock: Pin<Box<Sleep>>,
}

impl Answers {
    /// Asks for so many choices, and waits for the first token of each. Also returns the prefill server that computed the first
    /// one's prompt, if one did.
    pub(crate) async fn open(
        way: &Way<'_>,
        asked: Asked<'_>,
        choices: u32,
    ) -> Result<(Self, Option<Arc<Worker>>), Error> {
        let opening = (0..choices).map(|choice| {
            let asked = Asked { seed: choice_seed(asked.seed, choice), ..asked };
            async move { Stream::open(way, &asked).await }
        });
        let opened = futures_util::future::try_join_all(opening).await?;
        let computed = opened.first().and_then(|(_, by)| by.clone());
        let patience = way.patience;
        let now = Instant::now();
        let answers = Self {
            streams: opened.into_iter().map(|(stream, _)| stream).collect(),
            turn: 0,
            worker: way.worker.member.id.clone(),
            prompt: asked.prompt.len() as u32,
            patience,
            heard: now,
            clock: Box::pin(tokio::time::sleep_until(now + patience.idle.min(patience.deadline.remaining()))),
        };
        Ok((answers, computed))
    }

    /// The next event. After the end of the last choice or an error there is none: don't ask.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, Error>> {
        let streams = self.streams.len();
        for at in (0..streams).map(|at| (at + self.turn) % streams) {
            match self.streams[at].poll(cx) {
                Poll::Pending => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(told)) => {
                    self.turn = at + 1;
                    self.heard = Instant::now();
                    let output = self.streams[at].tokens;
                    return Poll::Ready(Ok(match told {
                        Told::Token(sampled) => Event::Token(at, sampled),
                        Told::Finished(reason, cached) => {
                            let cached = cached.unwrap_or(0).min(self.prompt);
                            Event::Finished(at, reason, Usage { prompt: self.prompt, cached, output })
                        }
                    }));
                }
            }
        }
        loop {
            std::task::ready!(self.clock.as_mut().poll(cx));
            let Patience { idle, deadline, .. } = self.patience;
            if deadline.passed() {
                return Poll::Ready(Err(Error::Deadline { worker: self.worker.clone() }));
            }
            let now = Instant::now();
            if self.heard + idle <= now {
                return Poll::Ready(Err(Error::Stalled { worker: self.worker.clone(), idle }));
            }
            self.clock.as_mut().reset((self.heard + idle).min(now + deadline.remaining()));
        }
    }
}

/// What reads an engine's events.
enum Reader {
    Vllm(vllm::Reader),
    Sglang(sglang::Reader),
}

impl Reader {
    fn hear(&mut self, data: &[u8], tell: impl FnMut(Told)) -> Result<(), Nonsense> {
        match self {
            Self::Vllm(reader) => reader.hear(data, tell),
            Self::Sglang(reader) => reader.hear(data, tell),
        }
    }

    fn end(&mut self) -> Option<Told> {
        match self {
            Self::Vllm(reader) => reader.end(),
            Self::Sglang(reader) => reader.end(),
        }
    }
}

impl From<sse::TooLong> for Nonsense {
    fn from(error: sse::TooLong) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// A prefill server's answer that is still to come: tokens of the prompt that it had.
type Computing = Pin<Box<dyn Future<Output = Result<Option<u32>, Error>> + Send>>;

/// One choice.
struct Stream {
    /// `None` once nothing more comes.
    body: Option<BodyDataStream>,
    events: sse::Events,
    reader: Reader,
    told: VecDeque<Told>,
    /// Polled along: its connection is to stay open until it has answered.
    computing: Option<Computing>,
    /// What the prefill server said of its cache: truer than the decode server's word, for which all that it was handed is
    /// cached.
    cached: Option<u32>,
    handed: bool,
    worker: MemberId,
    vocab: usize,
    tokens: u32,
    max_tokens: u32,
    over: bool,
    /// Tells those who have to be told, unless it has ended.
    _abort: Option<Abort>,
}

impl Stream {
    async fn open(way: &Way<'_>, asked: &Asked<'_>) -> Result<(Self, Option<Arc<Worker>>), Error> {
        match engine(way.worker)?.kind {
            EngineKind::Vllm => Self::open_vllm(way, asked).await,
            EngineKind::Sglang => Self::open_sglang(way, asked).await,
        }
    }

    async fn open_vllm(way: &Way<'_>, asked: &Asked<'_>) -> Result<(Self, Option<Arc<Worker>>), Error> {
        let id = attempt(way.id);
        let (mut handed, mut by) = (None, None);
        for prefill in way.prefill {
            match vllm_prefill(way, prefill, asked, &id).await {
                Ok(told) => {
                    (handed, by) = (Some(told), Some(Arc::clone(prefill)));
                    break;
                }
                Err(error) => prefill_failed(way, prefill, &error)?,
            }
        }
        let engine = engine(way.worker)?;
        let params = handed.as_ref().and_then(|handed| handed.params.as_deref());
        let body = vllm::decode(asked, &engine.served_name, params);
        let ask = way.ask(way.worker, engine, vllm::PATH, way.patience.silence);
        let response = ask.send(Some(&id), Some(body)).await?;
        let reader = Reader::Vllm(vllm::Reader::new(asked.sampling.logprobs));
        let events = sse::Events::new(vllm::MAX_EVENT_BYTES);
        let mut stream = Self::new(way, asked, response.into_body().into_data_stream(), events, reader);
        if let Some(handed) = handed {
            (stream.handed, stream.cached) = (handed.params.is_some(), handed.cached);
        }
        stream.first(way).await?;
        Ok((stream, by))
    }

    async fn open_sglang(way: &Way<'_>, asked: &Asked<'_>) -> Result<(Self, Option<Arc<Worker>>), Error> {
        let worker = engine(way.worker)?;
        if !worker.needs_a_partner() {
            let mut stream = Self::sglang_decode(way, asked, &attempt(way.id), None).await?;
            stream.first(way).await?;
            return Ok((stream, None));
        }
        let id = way.worker.member.id.clone();
        let mut last =
            Error::Busy { worker: id.clone(), message: "no prefill server of its group was there".to_owned() };
        for prefill in way.prefill {
            let failed = match Self::sglang_pair(way, asked, prefill).await {
                Ok(stream) => return Ok((stream, Some(Arc::clone(prefill)))),
                Err(error) if error.worker() == &id => return Err(error),
                Err(error) => error,
            };
            prefill_failed(way, prefill, &failed)?;
            last = match failed {
                // Whose fault it was can't be told from here: a prefill server waits for the decode server, too.
                Error::Stalled { idle, .. } => Error::Stalled { worker: id.clone(), idle },
                _ => Error::Busy { worker: id.clone(), message: format!("no prefill server of its group: {failed}") },
            };
        }
        Err(last)
    }

    /// Both hear of it at once. An error says whose it is.
    async fn sglang_pair(way: &Way<'_>, asked: &Asked<'_>, prefill: &Arc<Worker>) -> Result<Self, Error> {
        let partner = engine(prefill)?;
        let meeting = sglang::Meeting {
            host: partner.authority.host().trim_matches(['[', ']']).to_owned(),
            port: partner.bootstrap_port,
            room: random_u64() & i64::MAX as u64,
        };
        let id = attempt(way.id);
        let mut computing = sglang_prefill(way, prefill, asked, &id, &meeting)?;
        let decoding = async {
            let mut stream = Self::sglang_decode(way, asked, &id, Some(&meeting)).await?;
            poll_fn(|cx| stream.fill(cx)).await?;
            Ok(stream)
        };
        tokio::pin!(decoding);
        // Until the prompt is computed the prefill server's time counts, then the decode server's. Dropping what has not ended
        // closes its connection.
        let (mut computed, mut late) = (None, Box::pin(tokio::time::sleep(way.patience.deadline.remaining())));
        loop {
            tokio::select! {
                decoding = &mut decoding => {
                    let mut stream: Self = match decoding {
                        Ok(stream) => stream,
                        // A decode server fails, too, when its prefill server does, and may be the first to say so.
                        Err(error @ Error::Failed { .. }) if computed.is_none() => {
                            return Err(match tokio::time::timeout(BOTH_FAIL, computing).await {
                                Ok(Err(prefills)) => prefills,
                                _ => error,
                            });
                        }
                        Err(error) => return Err(error),
                    };
                    (stream.handed, stream.cached) = (true, computed.flatten());
                    stream.computing = computed.is_none().then_some(computing);
                    return Ok(stream);
                }
                told = &mut computing, if computed.is_none() => {
                    computed = Some(told?);
                    late.as_mut().reset(Instant::now() + way.patience.idle.min(way.patience.deadline.remaining()));
                }
                () = &mut late => {
                    let worker = way.worker.member.id.clone();
                    return Err(match way.patience.deadline.passed() {
                        true => Error::Deadline { worker },
                        false => Error::Stalled { worker, idle: way.patience.idle },
                    });
                }
            }
        }
    }

    async fn sglang_decode(
        way: &Way<'_>,
        asked: &Asked<'_>,
        id: &str,
        meeting: Option<&sglang::Meeting>,
    ) -> Result<Self, Error> {
        let engine = engine(way.worker)?;
        let body = sglang::generate(asked, id, meeting, true, engine.seeds);
        let abort = Abort::new(way, way.worker, id);
        let ask = way.ask(way.worker, engine, sglang::PATH, way.patience.silence);
        let response = ask.send(Some(id), Some(body)).await?;
        let reader = Reader::Sglang(sglang::Reader::new(asked.sampling.logprobs));
        let events = sse::Events::new(sglang::MAX_EVENT_BYTES);
        let mut stream = Self::new(way, asked, response.into_body().into_data_stream(), events, reader);
        stream._abort = Some(abort);
        Ok(stream)
    }

    fn new(way: &Way<'_>, asked: &Asked<'_>, body: BodyDataStream, events: sse::Events, reader: Reader) -> Self {
        Self {
            body: Some(body),
            events,
            reader,
            told: VecDeque::new(),
            computing: None,
            cached: None,
            handed: false,
            worker: way.worker.member.id.clone(),
            vocab: asked.vocab,
            tokens: 0,
            max_tokens: asked.max_tokens,
            over: false,
            _abort: None,
        }
    }

    /// Waits until something is told.
    async fn first(&mut self, way: &Way<'_>) -> Result<(), Error> {
        let began = Instant::now();
        let limit = way.patience.idle.min(way.patience.deadline.remaining());
        match tokio::time::timeout(limit, poll_fn(|cx| self.fill(cx))).await {
            Ok(filled) => filled,
            Err(_) if way.patience.deadline.passed() => Err(Error::Deadline { worker: self.worker.clone() }),
            Err(_) => Err(Error::Stalled { worker: self.worker.clone(), idle: began.elapsed() }),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Told, Error>> {
        if self.over {
            return Poll::Pending;
        }
        if let Some(computing) = &mut self.computing
            && let Poll::Ready(computed) = computing.as_mut().poll(cx)
        {
            // The decode server has what it needs: what else happened there does not matter.
            self.cached = computed.ok().flatten();
            self.computing = None;
        }
        std::task::ready!(self.fill(cx))?;
        let told = self.told.pop_front().expect("filled");
        let told = match told {
            Told::Token(sampled) => Told::Token(self.checked(sampled)?),
            Told::Finished(reason, cached) => {
                self.over = true;
                if let Some(abort) = &mut self._abort {
                    abort.disarm();
                }
                // One more look: a connection whose answer was read to its end can be used again.
                if let Some(body) = &mut self.body {
                    let _the_end = body.poll_next_unpin(cx);
                }
                self.body = None;
                Told::Finished(reason, if self.handed { self.cached } else { cached })
            }
        };
        Poll::Ready(Ok(told))
    }

    /// Has something to tell when it is ready.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while self.told.is_empty() {
            let Some(body) = &mut self.body else {
                return Poll::Ready(Err(self.protocol("nothing after the end".to_owned())));
            };
            match std::task::ready!(body.poll_next_unpin(cx)) {
                Some(Ok(bytes)) => {
                    let (reader, told) = (&mut self.reader, &mut self.told);
                    let heard = self.events.push(&bytes, |data| reader.hear(data, |one| told.push_back(one)));
                    if let Err(nonsense) = heard {
                        return Poll::Ready(Err(meaning(&self.worker, nonsense)));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Err(broken(&self.worker, Box::new(error)))),
                None => {
                    self.body = None;
                    match self.reader.end() {
                        Some(end) => self.told.push_back(end),
                        None => return Poll::Ready(Err(self.protocol("the stream ended in the middle".to_owned()))),
                    }
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn checked(&mut self, mut sampled: Sampled) -> Result<Sampled, Error> {
        self.tokens += 1;
        if self.tokens > self.max_tokens {
            return Err(self.protocol(format!("more than the {} tokens that were asked for", self.max_tokens)));
        }
        let mut ids = sampled.top.iter().map(|top| top.token).chain([sampled.token]);
        if let Some(id) = ids.find(|id| id.0 as usize >= self.vocab) {
            return Err(self.protocol(format!("token {} of {}", id.0, self.vocab)));
        }
        let logprobs = sampled.logprob.iter_mut().chain(sampled.top.iter_mut().map(|top| &mut top.logprob));
        logprobs
            .for_each(|logprob| *logprob = if *logprob >= LEAST_LOGPROB { logprob.min(0.0) } else { LEAST_LOGPROB });
        Ok(sampled)
    }

    fn protocol(&self, what: String) -> Error {
        Error::Protocol { worker: self.worker.clone(), what }
    }
}

impl<'a> Way<'a> {
    fn ask(&self, worker: &'a Worker, engine: &'a Engine, path: &'static str, limit: Duration) -> Ask<'a> {
        let until = Instant::now() + limit.min(self.patience.deadline.remaining());
        Ask { engine, worker: &worker.member.id, path, until }
    }
}

/// A request's name at the engines: another one for each try, as one that was given up may still be known there.
fn attempt(id: &RequestId) -> String {
    format!("{id}-{:08x}", random_u64() as u32)
}

fn engine(worker: &Worker) -> Result<&Arc<Engine>, Error> {
    worker
        .engine
        .as_ref()
        .ok_or_else(|| Error::Unavailable { worker: worker.member.id.clone(), message: "is no engine".to_owned() })
}

async fn vllm_prefill(
    way: &Way<'_>,
    prefill: &Arc<Worker>,
    asked: &Asked<'_>,
    id: &str,
) -> Result<vllm::Handed, Error> {
    let engine = engine(prefill)?;
    let ask = way.ask(prefill, engine, vllm::PATH, way.patience.idle);
    let body = vllm::prefill(asked, &engine.served_name);
    prefill.asked();
    let answer = ask.whole(Some(id), Some(body), vllm::MAX_PREFILL_BYTES).await?;
    let handed = vllm::handed(&answer).map_err(|nonsense| meaning(&prefill.member.id, nonsense))?;
    prefill.answered();
    Ok(handed)
}

fn sglang_prefill(
    way: &Way<'_>,
    prefill: &Arc<Worker>,
    asked: &Asked<'_>,
    id: &str,
    meeting: &sglang::Meeting,
) -> Result<Computing, Error> {
    let engine = Arc::clone(engine(prefill)?);
    let until = Instant::now() + way.patience.idle.min(way.patience.deadline.remaining());
    let body = sglang::generate(asked, id, Some(meeting), false, engine.seeds);
    let mut abort = Abort::new(way, prefill, id);
    let (prefill, id) = (Arc::clone(prefill), id.to_owned());
    Ok(Box::pin(async move {
        let worker = &prefill.member.id;
        let ask = Ask { engine: &engine, worker, path: sglang::PATH, until };
        prefill.asked();
        let answer = ask.whole(Some(&id), Some(body), sglang::MAX_PREFILL_BYTES).await?;
        let cached = sglang::handed(&answer).map_err(|nonsense| meaning(worker, nonsense))?;
        prefill.answered();
        abort.disarm();
        Ok(cached)
    }))
}

/// A prefill server failed: it rests, and the next one is tried, unless nobody could do better.
fn prefill_failed(way: &Way<'_>, prefill: &Worker, error: &Error) -> Result<(), Error> {
    prefill.failed(error, way.rest);
    match error {
        Error::Refused { message, field, .. } => {
            Err(Error::Refused { worker: prefill.member.id.clone(), message: message.clone(), field: *field })
        }
        _ if way.patience.deadline.passed() => Err(Error::Deadline { worker: prefill.member.id.clone() }),
        _ => {
            warn!(worker = %prefill.member.id, error = chain(error), "prefill failed, trying next");
            Ok(())
        }
    }
}

fn meaning(worker: &MemberId, nonsense: Nonsense) -> Error {
    let worker = worker.clone();
    match nonsense {
        Nonsense::Protocol(what) => Error::Protocol { worker, what },
        Nonsense::Failed(message) => Error::Failed { worker, code: Code::Internal, message },
        Nonsense::Refused(message) => Error::Refused { worker, message, field: None },
        Nonsense::Busy(message) => Error::Busy { worker, message },
    }
}

/// Tells an SGLang server that a request is given up, when it is dropped.
struct Abort(Option<Box<GivenUp>>);

/// Whom to tell what.
struct GivenUp {
    worker: Arc<Worker>,
    rid: String,
    tasks: Tasks,
}

impl Abort {
    fn new(way: &Way<'_>, worker: &Arc<Worker>, rid: &str) -> Self {
        let told = GivenUp { worker: Arc::clone(worker), rid: rid.to_owned(), tasks: way.tasks.clone() };
        Self(Some(Box::new(told)))
    }

    /// It has ended: there is nothing to give up.
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for Abort {
    fn drop(&mut self) {
        let Some(told) = self.0.take() else { return };
        let GivenUp { worker, rid, tasks } = *told;
        tasks.spawn_in(Kind::Request, "abort", Span::none(), async move {
            let engine = engine(&worker)?;
            let until = Instant::now() + ABORT_TIMEOUT;
            let ask = Ask { engine, worker: &worker.member.id, path: sglang::ABORT_PATH, until };
            ask.send(None, Some(sglang::abort(&rid))).await?;
            Ok(())
        });
    }
}
