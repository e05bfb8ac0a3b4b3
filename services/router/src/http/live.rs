//! A request from its checked form to the end of its answer, whatever form the answer has.
//!
//! ```text
//! Common + prompt ──start──▶ choose worker ─▶ open stream (next worker once, if it failed before a token) ─▶ Live
//! Live::next ─▶ Delta { text, logged, end? } ─▶ chat.rs / completions.rs make JSON of it, sse.rs or whole
//! ```
//!
//! Dropping a [`Live`] cancels the request on every worker and gives its places back.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_proto::{convert, v1};
use kvasir_runtime::{chain, random_u64};
use kvasir_types::{Deadline, FinishReason, PROTOCOL_VERSION, Priority, RequestId, Retry, Sampling, TokenId, Usage};
use tokio::sync::OwnedSemaphorePermit;
use tracing::{Span, info, warn};

use super::{
    app::{Admitted, App},
    error::{BadParam, Error},
    types::{Common, ServiceTier},
};
use crate::{
    fleet::{Crew, Lease, Worker},
    metrics::Progress,
    route::Ask,
    text::{Answer, Hidden, Logged, Model},
    upstream::{self, Event, Events},
};

/// A prompt with what is needed to answer it.
pub(crate) struct Prepared {
    /// The request's name.
    pub(crate) id: RequestId,
    /// The model.
    pub(crate) model: Arc<Model>,
    /// The prompt.
    pub(crate) prompt: Vec<TokenId>,
    /// The field it came from, for error messages.
    pub(crate) param: &'static str,
}

/// What a token, or the end, added to the answer.
#[derive(Debug)]
pub(crate) struct Delta {
    /// New text.
    pub(crate) text: String,
    /// Log-probabilities of the tokens that became visible.
    pub(crate) logged: Vec<Logged>,
    /// The end, if this is it.
    pub(crate) end: Option<End>,
}

/// How the answer ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct End {
    /// Why.
    pub(crate) reason: FinishReason,
    /// What it cost. `cached` is known only if the worker itself ended the answer.
    pub(crate) usage: Usage,
    /// Whether `usage.cached` is known.
    pub(crate) cached_known: bool,
}

/// An answer under way.
pub(crate) struct Live {
    /// The request's name.
    pub(crate) id: RequestId,
    /// The model.
    pub(crate) model: Arc<Model>,
    /// Which weights answer.
    pub(crate) fingerprint: String,
    /// Who went first, if the client said.
    pub(crate) service_tier: Option<ServiceTier>,
    /// `None` once the answer has ended: ending it early resets the stream at once.
    events: Option<Events>,
    answer: Answer,
    prompt_tokens: u32,
    output_tokens: u32,
    progress: Progress,
    span: Span,
    lease: Lease,
    worker_rest: Duration,
    _permit: OwnedSemaphorePermit,
}

impl Live {
    /// Has a worker begin the answer. On return its first event is here, so whatever refuses it has done so.
    pub(crate) async fn start(
        app: &App,
        admitted: Admitted,
        common: Common,
        prepared: Prepared,
    ) -> Result<Self, Error> {
        let Prepared { id, model, prompt, param } = prepared;
        let Admitted { inflight, permit, deadline } = admitted;
        let fleet = Arc::clone(&app.fleet.borrow());
        let crew = crew(fleet.crew(model.name()), &model, prompt.len(), param)?;
        let max_tokens = max_tokens(common.max_tokens, app.limits.max_output_tokens)?;
        biases_in_vocabulary(&common.sampling, &model)?;

        let sampling = Sampling { seed: common.seed.unwrap_or_else(random_u64), ..common.sampling };
        let call = Call {
            app,
            id: &id,
            prompt: &prompt,
            sampling: &sampling,
            salt: &common.cache_salt,
            priority: common.service_tier.map_or_else(Priority::default, Priority::from),
            max_tokens,
            deadline,
        };
        let placed = call.place(&model, crew).await;
        let (worker, lease, events) = placed.map_err(|error| error.naming(common.form_param))?;
        let span = Span::current();
        span.record("worker", worker.member.id.as_str());

        let mut hidden: HashSet<TokenId> = sampling.stop_token_ids.iter().copied().collect();
        if !sampling.ignore_eos {
            hidden.extend(model.end_tokens());
        }
        let fingerprint =
            worker.member.model.as_ref().map_or_else(String::new, |info| format!("fp_{}", info.fingerprint));
        Ok(Self {
            answer: Answer::new(Arc::clone(&model), common.stop, Hidden { tokens: hidden })
                .at_least(sampling.min_tokens),
            id,
            model,
            fingerprint,
            service_tier: common.service_tier,
            events: Some(events),
            prompt_tokens: prompt.len() as u32,
            output_tokens: 0,
            progress: inflight.begun(prompt.len()),
            span,
            lease,
            worker_rest: app.limits.worker_rest(),
            _permit: permit,
        })
    }

    /// What comes next: something to show, or the end, or both. `None` after the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Delta>, Error> {
        while let Some(events) = &mut self.events {
            let event = match events.next().await {
                Ok(event) => event,
                Err(error) => {
                    self.events = None;
                    self.progress.failed(error.kind());
                    self.lease.worker().rest_after(&error, self.worker_rest);
                    self.span.in_scope(|| warn!(error = chain(&error), "an answer broke off"));
                    return Err(error.into());
                }
            };
            let (piece, end) = match event {
                Event::Token(sampled) => {
                    self.progress.token();
                    self.output_tokens += 1;
                    (self.answer.push(sampled), None)
                }
                Event::Finished(reason, usage) => {
                    (self.answer.finish(), Some(End { reason, usage, cached_known: true }))
                }
            };
            let end = if piece.stopped { Some(self.stopped(end)) } else { end };
            if let Some(end) = &end {
                self.events = None;
                self.progress.complete(end.usage.cached);
                let (output_tokens, cached_tokens) = (end.usage.output, end.usage.cached);
                self.span.in_scope(|| info!(output_tokens, cached_tokens, "answered"));
            }
            if end.is_some() || !piece.text.is_empty() || !piece.logged.is_empty() {
                return Ok(Some(Delta { text: piece.text, logged: piece.logged, end }));
            }
        }
        Ok(None)
    }

    /// The end at a stop string: the worker is not asked any more, so what it alone knows stays unknown.
    fn stopped(&self, told: Option<End>) -> End {
        let usage = Usage { prompt: self.prompt_tokens, cached: 0, output: self.output_tokens };
        let end = told.unwrap_or(End { reason: FinishReason::Stop, usage, cached_known: false });
        End { reason: FinishReason::Stop, ..end }
    }
}

/// The workers whose context is long enough.
fn crew(crew: Option<&Crew>, model: &Model, prompt_tokens: usize, param: &'static str) -> Result<Crew, Error> {
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
    if fitting.decode.is_empty() { Err(no_worker()) } else { Ok(fitting) }
}

fn max_tokens(asked: Option<(&'static str, u32)>, limit: u32) -> Result<u32, Error> {
    match asked {
        Some((param, asked)) if asked > limit => {
            let message = format!("'{param}' is {asked}, this server writes at most {limit} tokens");
            Err(BadParam::new(param, "above_max_value", message).into())
        }
        Some((_, asked)) => Ok(asked),
        None => Ok(limit),
    }
}

fn biases_in_vocabulary(sampling: &Sampling, model: &Model) -> Result<(), BadParam> {
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

/// One request on its way to a worker.
struct Call<'a> {
    app: &'a App,
    id: &'a RequestId,
    prompt: &'a [TokenId],
    sampling: &'a Sampling,
    salt: &'a str,
    priority: Priority,
    max_tokens: u32,
    deadline: Deadline,
}

impl Call<'_> {
    /// Finds a worker that begins the answer: the one the policy chooses, or, once, another.
    async fn place(&self, model: &Model, mut crew: Crew) -> Result<(Arc<Worker>, Lease, Events), Error> {
        let ask = self.app.ask(self.prompt.len());
        let mut first: Option<upstream::Error> = None;
        loop {
            let Some((worker, prefill)) = self.choose(&ask, &crew.rested(Instant::now())) else {
                // Nobody else is there: the first worker's word is the answer.
                return Err(first.map_or_else(|| Error::NoWorker(model.name().to_owned()), Error::from));
            };
            let lease = worker.lease(self.prompt.len());
            // Only the first prefill worker is likely to be used; it is busy with this until the first token.
            let prefill_lease = prefill.first().map(|first| first.lease(self.prompt.len()));
            let request = self.request(&worker, &prefill);
            let opened = Events::open(&worker, request, self.app.limits.idle_timeout(), self.deadline).await;
            drop(prefill_lease);
            match opened {
                Ok(events) => return Ok((worker, lease, events)),
                Err(error) => {
                    let again = first.is_none() && error.retry() == Retry::Elsewhere;
                    self.app.metrics.upstream_error(error.kind());
                    match &error {
                        // The client's mistake, and the client is told: nobody has to look.
                        upstream::Error::Refused { .. } => {
                            info!(worker = %worker.member.id, error = chain(&error), "a worker refused a request");
                        }
                        _ => warn!(
                            worker = %worker.member.id, error = chain(&error), again, "a worker did not begin an answer"
                        ),
                    }
                    worker.rest_after(&error, self.app.limits.worker_rest());
                    if !again {
                        return Err(error.into());
                    }
                    first = Some(error);
                    crew = crew.filter(|other| !std::ptr::eq(other, &*worker));
                }
            }
        }
    }

    fn choose(&self, ask: &Ask, crew: &Crew) -> Option<(Arc<Worker>, Vec<Arc<Worker>>)> {
        let decision = self.app.policy.decide(ask, &crew.pool())?;
        let decode = crew.decode.get(decision.decode)?;
        let prefill = decision.prefill.iter().filter_map(|&at| crew.prefill.get(at)).cloned().collect();
        Some((Arc::clone(&decode.worker), prefill))
    }

    fn request(&self, worker: &Worker, prefill: &[Arc<Worker>]) -> v1::GenerateRequest {
        let info = worker.member.model.as_ref();
        // `crew` keeps only workers whose context is longer than the prompt.
        let room = info.map_or(1, |info| info.max_model_len.saturating_sub(self.prompt.len() as u32)).max(1);
        let sampling = v1::Sampling { max_tokens: self.max_tokens.min(room), ..v1::Sampling::from(self.sampling) };
        let candidate = |worker: &Arc<Worker>| v1::PrefillCandidate {
            member: worker.member.id.to_string(),
            address: worker.member.grpc.clone(),
        };
        v1::GenerateRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: self.id.to_string(),
            fingerprint: info.map_or_else(Default::default, |info| info.fingerprint.0.to_vec().into()),
            prompt: convert::token_ids(self.prompt),
            sampling: Some(sampling),
            cache_salt: self.salt.to_owned(),
            prefill: prefill.iter().map(candidate).collect(),
            deadline_ms: self.deadline.to_wire(),
            priority: v1::Priority::from(self.priority).into(),
        }
    }
}
