//! Who answers a request: the worker that the policy chooses, or one of a few others; and who goes on with an answer whose
//! worker failed.
//!
//! What no worker could do is refused here, before any is asked.

use std::{
    cell::Cell,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use kvasir_proto::{convert, v1};
use kvasir_runtime::chain;
use kvasir_types::{Deadline, PROTOCOL_VERSION, Priority, RequestId, Sampling, TokenId, choice_seed};
use tracing::{info, warn};

use super::{
    app::App,
    deciding::{self, Chosen, Prompt},
    error::{BadParam, Error},
    requests::Entry,
};
use crate::{
    external::{self, Answers, Asked, Engine, Way},
    fleet::{Crew, Lease, Worker},
    route::Ask,
    text::Model,
    upstream::{self, Event, Events, Patience},
};

/// Before all workers are asked again whether one goes on with an answer …
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// … and at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The workers whose context is long enough.
pub(crate) fn crew(
    crew: Option<&Crew>,
    model: &Model,
    prompt_tokens: usize,
    param: &'static str,
) -> Result<Crew, Error> {
    if prompt_tokens == 0 {
        return Err(BadParam::new(param, "invalid_value", format!("'{param}' holds no token")).into());
    }
    let no_worker = || Error::NoWorker(model.name().to_owned());
    let limit = crew.and_then(Crew::max_model_len).or_else(|| model.context_len());
    if let Some(limit) = limit
        && prompt_tokens >= limit as usize
    {
        let message = format!(
            "the model's context is {limit} tokens long, '{param}' takes {prompt_tokens} of it and leaves none for an answer"
        );
        return Err(BadParam::new(param, "context_length_exceeded", message).into());
    }
    let fitting = crew.ok_or_else(no_worker)?.longer_than(prompt_tokens);
    if fitting.is_empty() { Err(no_worker()) } else { Ok(fitting) }
}

pub(crate) fn max_tokens(asked: Option<(&'static str, u32)>, limit: u32) -> Result<u32, Error> {
    match asked {
        Some((param, asked)) if asked > limit => {
            let message = format!("'{param}' is {asked}, this server writes at most {limit} tokens");
            Err(BadParam::new(param, "above_max_value", message).into())
        }
        Some((_, asked)) => Ok(asked),
        None => Ok(limit),
    }
}

pub(crate) fn few_choices(asked: u32, limit: u32) -> Result<(), BadParam> {
    if asked <= limit {
        return Ok(());
    }
    let message = format!("'n' is {asked}, this server gives at most {limit} choices");
    Err(BadParam::new("n", "above_max_value", message))
}

pub(crate) fn biases_in_vocabulary(sampling: &Sampling, model: &Model) -> Result<(), BadParam> {
    let size = model.vocab_size();
    match sampling.logit_bias.iter().find(|(token, _)| token.0 as usize >= size) {
        None => Ok(()),
        Some((token, _)) => {
            let message =
                format!("'logit_bias' holds token id {}, the model's are 0 to {}", token.0, size.saturating_sub(1));
            Err(BadParam::new("logit_bias", "invalid_value", message))
        }
    }
}

/// One request, as workers get it however often.
pub(crate) struct Call {
    pub(crate) app: Arc<App>,
    pub(crate) id: RequestId,
    pub(crate) model: Arc<Model>,
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) sampling: Sampling,
    /// The client wants a seed, and this one.
    pub(crate) seed_asked: bool,
    pub(crate) salt: String,
    /// A number for the session that it belongs to.
    pub(crate) session: Option<u64>,
    pub(crate) tenant: String,
    pub(crate) priority: Priority,
    pub(crate) choices: u32,
    pub(crate) max_tokens: u32,
    pub(crate) deadline: Deadline,
    /// Its place in the list of those under way.
    pub(crate) entry: Arc<Entry>,
}

/// What of a call a worker is asked for: all of it, or the rest of one of its answers.
struct Part<'a> {
    prompt: &'a [TokenId],
    sampling: &'a Sampling,
    choices: u32,
}

/// A worker that has begun.
pub(crate) struct Placed {
    pub(crate) worker: Arc<Worker>,
    pub(crate) lease: Lease,
    pub(crate) events: Source,
}

/// Where events come from.
#[expect(clippy::large_enum_variant, reason = "the large one is the usual one, and looked at for every token")]
pub(crate) enum Source {
    /// A worker of ours.
    Worker(Events),
    /// An engine of somebody else's.
    Engine(Answers),
}

impl Source {
    /// The next event. After the end of the last choice or an error there is none: don't ask.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, upstream::Error>> {
        match self {
            Self::Worker(events) => events.poll(cx),
            Self::Engine(answers) => answers.poll(cx),
        }
    }
}

impl Call {
    /// Finds a worker that begins the answers: the one the policy chooses, or one of a few others.
    pub(crate) async fn begin(&self, crew: Crew) -> Result<Placed, Error> {
        let part = Part { prompt: &self.prompt, sampling: &self.sampling, choices: self.choices };
        let ask = self.app.ask(part.prompt.len());
        let mut crew = self.able(crew)?;
        let mut last: Option<upstream::Error> = None;
        let begin = self.app.now().retry.begin;
        for again in 0..=begin {
            let Some(chosen) = self.choose(&part, ask, &crew.rested(Instant::now())) else { break };
            let worker = Arc::clone(&chosen.worker);
            let error = match self.open(&part, chosen).await {
                Ok(placed) => return Ok(placed),
                Err(error) => error,
            };
            let again = again < begin && self.app.may_go_elsewhere(&error);
            self.told(&error, again, "a worker did not begin an answer");
            let others = crew.filter(|other| !std::ptr::eq(other, &*worker));
            // A connection that broke says little of the worker, and the next call makes a new one: rather it than nobody.
            if !(others.is_empty() && matches!(error, upstream::Error::Broken { .. })) {
                crew = others;
            }
            // The only one, asked again, is gone: that it broke off in the middle is what the client should hear.
            let gone = matches!((&last, &error), (
                Some(upstream::Error::Broken { worker: broke, .. }),
                upstream::Error::Unavailable { worker, .. },
            ) if broke == worker);
            if !gone {
                last = Some(error);
            }
            if !again {
                break;
            }
        }
        // Nobody else is there: the last worker's word is the answer.
        Err(last.map_or_else(|| Error::NoWorker(self.model.name().to_owned()), Error::from))
    }

    /// Finds a worker that goes on with one of the answers, which `lost` wrote so far: another one, or the same in its next
    /// life. Waits for one for a while, if there is none.
    pub(crate) async fn go_on(
        &self,
        choice: u32,
        said: &[TokenId],
        lost: &Arc<Worker>,
    ) -> Result<Placed, upstream::Error> {
        let prompt = [self.prompt.as_slice(), said].concat();
        let sampling = Sampling {
            seed: choice_seed(self.sampling.seed, choice),
            continued: said.len() as u32,
            ..self.sampling.clone()
        };
        // Which weights: those that have written what is there already.
        let fingerprint = lost.member.model.as_ref().map(|info| info.fingerprint);
        let part = Part { prompt: &prompt, sampling: &sampling, choices: 1 };
        let ask = self.app.ask(prompt.len());
        let until = Instant::now() + self.app.now().retry.move_wait().min(self.deadline.remaining());
        let mut fleet = self.app.fleet.clone();
        let (mut pause, mut failed, mut last) = (FIRST_PAUSE, vec![Arc::clone(lost)], None);
        loop {
            let crew = fleet.borrow_and_update().crew(self.model.name()).cloned().unwrap_or_default();
            let crew = crew.longer_than(prompt.len()).filter(|worker| {
                let fits = worker.member.model.as_ref().map(|info| info.fingerprint) == fingerprint;
                fits && !failed.iter().any(|failed| std::ptr::eq(&**failed, worker))
            });
            if let Some(chosen) = self.choose(&part, ask, &crew.rested(Instant::now())) {
                let worker = Arc::clone(&chosen.worker);
                let error = match self.open(&part, chosen).await {
                    Ok(placed) => return Ok(placed),
                    Err(error) => error,
                };
                let again = Instant::now() < until && self.app.may_go_elsewhere(&error);
                self.told(&error, again, "a worker did not go on with an answer");
                if !again {
                    return Err(error);
                }
                failed.push(worker);
                last = Some(error);
                continue;
            }
            if Instant::now() >= until {
                let nobody = || upstream::Error::Unavailable {
                    worker: lost.member.id.clone(),
                    message: "no other worker of its model came".to_owned(),
                };
                return Err(last.unwrap_or_else(nobody));
            }
            // Nobody (else): a change of the members may bring one, and after a while all are worth another try.
            tokio::select! {
                changed = fleet.changed() => {
                    if changed.is_err() {
                        tokio::time::sleep(pause).await; // the process is about to end
                    }
                }
                () = tokio::time::sleep(pause) => {
                    failed.clear();
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn open(&self, part: &Part<'_>, chosen: Chosen) -> Result<Placed, upstream::Error> {
        let Chosen { worker, prefill, cached, left, reason } = chosen;
        let first = prefill.first().map_or("", |first| first.member.id.as_str());
        self.entry.placed(worker.member.id.as_str(), first, reason, cached);
        let lease = worker.lease(part.prompt.len(), if prefill.is_empty() { left } else { 0 });
        // Only the first prefill worker is likely to be used; it is busy with this until the first token.
        let _prefill_lease = prefill.first().map(|first| first.lease(part.prompt.len(), left));
        worker.asked();
        let patience = self.app.now().limits.patience(self.deadline);
        let opened = match &worker.engine {
            None => {
                let request = self.request(part, &worker, &prefill, patience.heartbeat_ms());
                Events::open(&worker, request, self.model.vocab_size(), patience).await.map(Source::Worker)
            }
            Some(engine) => self.ask(part, &worker, engine, &prefill, patience).await.map(Source::Engine),
        };
        match opened {
            Ok(events) => {
                worker.answered();
                self.app.metrics.predicted(cached);
                Ok(Placed { worker, lease, events })
            }
            Err(error) => {
                self.app.metrics.upstream_error(error.kind());
                let told = [("worker", error.worker().as_str().into()), ("why", error.kind().into())];
                self.entry.story.tell("not begun", told);
                // It may be a prefill server's failure, which has been dealt with.
                if error.worker() == &worker.member.id {
                    self.app.failed(&worker, &error);
                }
                Err(error)
            }
        }
    }

    /// Has an engine of somebody else's begin.
    async fn ask(
        &self,
        part: &Part<'_>,
        worker: &Arc<Worker>,
        engine: &Engine,
        prefill: &[Arc<Worker>],
        patience: Patience,
    ) -> Result<Answers, upstream::Error> {
        let sampling = part.sampling;
        let max_tokens = self.room(worker).min(self.max_tokens).saturating_sub(sampling.continued).max(1);
        let (prompt, salt, vocab) = (part.prompt, self.salt.as_str(), self.model.vocab_size());
        let asked = Asked { prompt, sampling, seed: sampling.seed, max_tokens, salt, vocab };
        let rest = self.app.now().limits.worker_rest();
        let way = Way { worker, prefill, id: &self.id, patience, rest, tasks: &self.app.context.tasks };
        let (answers, computed) = Answers::open(&way, asked, part.choices).await?;
        // Whoever has had the prompt is thought to hold it from now on. SGLang's decode servers keep nothing of what was
        // handed to them.
        let prompt = &Prompt { tokens: prompt, salt };
        if let Some(prefill) = &computed {
            deciding::remember(&self.app.index, prefill, prompt);
        }
        if !engine.needs_a_partner() {
            deciding::remember(&self.app.index, worker, prompt);
        }
        Ok(answers)
    }

    /// Those workers that can do what is asked, and else why none can.
    fn able(&self, crew: Crew) -> Result<Crew, Error> {
        let refusal = Cell::new(None);
        let able = crew.filter(|worker| {
            let engine = worker.engine.as_ref();
            let Some(Err(no)) = engine.map(|engine| external::carries(engine, &self.sampling, self.seed_asked)) else {
                return true;
            };
            refusal.set(Some(upstream::Error::Refused {
                worker: worker.member.id.clone(),
                message: no.why.to_owned(),
                field: Some(no.field),
            }));
            false
        });
        match refusal.take() {
            Some(refusal) if able.is_empty() => Err(refusal.into()),
            _ => Ok(able),
        }
    }

    /// Whether another worker of its kind could go on with an answer of so many tokens that `lost` wrote.
    pub(crate) fn may_go_on(&self, lost: &Worker, said: usize) -> bool {
        let sampling = || Sampling { continued: said as u32, ..self.sampling.clone() };
        lost.engine.as_ref().is_none_or(|engine| external::carries(engine, &sampling(), self.seed_asked).is_ok())
    }

    fn told(&self, error: &upstream::Error, again: bool, what: &str) {
        match error {
            // The client's mistake, and the client is told: nobody has to look.
            upstream::Error::Refused { .. } => info!(error = chain(error), again, "a worker refused a request"),
            // It is meant to, and somebody else takes the request.
            upstream::Error::Leaving { .. } if again => info!(error = chain(error), "a worker is leaving"),
            _ => warn!(error = chain(error), again, "{what}"),
        }
    }

    fn choose(&self, part: &Part<'_>, ask: Ask, crew: &Crew) -> Option<Chosen> {
        let ask = Ask { session: self.session, ..ask.within(self.model.slo()) };
        deciding::decide(&self.app, ask, &Prompt { tokens: part.prompt, salt: &self.salt }, crew)
    }

    fn request(
        &self,
        part: &Part<'_>,
        worker: &Worker,
        prefill: &[Arc<Worker>],
        heartbeat_ms: u32,
    ) -> v1::GenerateRequest {
        let info = worker.member.model.as_ref();
        let sampling =
            v1::Sampling { max_tokens: self.room(worker).min(self.max_tokens), ..v1::Sampling::from(part.sampling) };
        let candidate = |worker: &Arc<Worker>| v1::PrefillCandidate {
            member: worker.member.id.to_string(),
            address: worker.member.grpc.clone(),
        };
        v1::GenerateRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: self.id.to_string(),
            fingerprint: info.map_or_else(Default::default, |info| info.fingerprint.0.to_vec().into()),
            prompt: convert::token_ids(part.prompt),
            sampling: Some(sampling),
            cache_salt: self.salt.clone(),
            prefill: prefill.iter().map(candidate).collect(),
            deadline_ms: self.deadline.to_wire(),
            priority: v1::Priority::from(self.priority).into(),
            choices: part.choices,
            heartbeat_ms,
            tenant: self.tenant.clone(),
        }
    }

    /// Most tokens of an answer that a worker's context has room for, what is there already included.
    pub(crate) fn room(&self, worker: &Worker) -> u32 {
        // `crew` keeps only workers whose context is longer than the prompt.
        let info = worker.member.model.as_ref();
        info.map_or(1, |info| info.max_model_len.saturating_sub(self.prompt.len() as u32)).max(1)
    }
}
