//! A request from its checked form to the end of its answer, whatever form the answer has.
//!
//! ```text
//! Common + prompt ──start──▶ Call ─▶ a worker that begins ─▶ Tokens (other workers, should it fail) ─▶ Live
//! Live::next ─▶ Delta { text, logged, end? } ─▶ chat.rs / completions.rs make JSON of it, sse.rs or whole
//! ```
//!
//! Dropping a [`Live`] cancels the request on every worker and gives its places back.

use std::{collections::HashSet, pin::Pin, sync::Arc, time::Instant};

use kvasir_runtime::random_u64;
use kvasir_types::{FinishReason, Priority, RequestId, Sampling, TokenId, Usage};
use tracing::{Instrument, Span, debug_span, info};

use super::{
    app::{Admitted, App},
    error::{Error, Params},
    guard::Meter,
    placing::{self, Call},
    requests::Tracked,
    tokens::Tokens,
    types::{Common, ServiceTier},
};
use crate::{
    admission::{Entrant, Pass, Place},
    fleet::key_of,
    metrics::Progress,
    text::{Answer, Hidden, Logged, Model},
    upstream::Event,
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
    /// Special tokens to show.
    pub(crate) markers: Arc<HashSet<TokenId>>,
}

/// What a token, or the end, added to one of the answers.
#[derive(Debug)]
pub(crate) struct Delta {
    /// Which one.
    pub(crate) choice: usize,
    /// New text.
    pub(crate) text: String,
    /// Log-probabilities of the tokens that became visible.
    pub(crate) logged: Vec<Logged>,
    /// Why the answer ends here, if it does.
    pub(crate) end: Option<FinishReason>,
    /// What all of them cost, if this is the end of the last one.
    pub(crate) cost: Option<Cost>,
}

/// What a request cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cost {
    /// In tokens; the output is that of all choices.
    pub(crate) usage: Usage,
    /// Whether `usage.cached` is known: the worker tells it when it ends an answer itself.
    pub(crate) cached_known: bool,
}

/// One of the answers.
struct Choice {
    answer: Answer,
    tokens: u32,
    ended: bool,
}

/// Answers under way: the choices of one request.
pub(crate) struct Live {
    /// The request's name.
    pub(crate) id: RequestId,
    /// The model.
    pub(crate) model: Arc<Model>,
    /// Which weights answer.
    pub(crate) fingerprint: String,
    /// Who went first, if the client said.
    pub(crate) service_tier: Option<ServiceTier>,
    /// `None` once all have ended: ending them early resets the stream at once.
    tokens: Option<Tokens>,
    choices: Vec<Choice>,
    prompt_tokens: u32,
    cached_tokens: Option<u32>,
    progress: Progress,
    span: Span,
    meter: Meter,
    place: Place,
    tracked: Tracked,
    /// An operator ends it. Made once: looked at where there is no token yet, not for every token.
    cancelled: Pin<Box<dyn Future<Output = ()> + Send>>,
    _pass: Pass,
}

impl Live {
    /// Has a worker begin the answer. On return its first event is here, so whatever refuses it has done so.
    pub(crate) async fn start(
        app: &Arc<App>,
        admitted: Admitted,
        common: Common,
        prepared: Prepared,
    ) -> Result<Self, Error> {
        let entry = Arc::clone(admitted.tracked.entry());
        entry.queued(prepared.model.name(), prepared.prompt.len());
        // Dropping what has begun is what happens when a client leaves.
        let started = tokio::select! {
            biased;
            () = entry.cancel.wait() => Err(Error::Cancelled),
            started = Self::begin(app, admitted, common, prepared) => started,
        };
        if let Err(error) = &started {
            entry.story.end("failed", [("why", error.code().unwrap_or("refused").into())]);
        }
        started
    }

    async fn begin(app: &Arc<App>, admitted: Admitted, common: Common, prepared: Prepared) -> Result<Self, Error> {
        let Prepared { id, model, prompt, param, markers } = prepared;
        let Admitted { caller, inflight, pass, deadline, tracked } = admitted;
        if !caller.may_use(model.name()) {
            return Err(Error::NoModel(model.name().to_owned())); // as if it were not there
        }
        let fleet = Arc::clone(&app.fleet.borrow());
        placing::crew(fleet.crew(model.name()), &model, prompt.len(), param)?;
        let max_tokens = placing::max_tokens(common.max_tokens, app.now().limits.max_output_tokens)?;
        placing::few_choices(common.choices, app.now().limits.max_choices)?;
        placing::biases_in_vocabulary(&common.sampling, &model)?;

        let prompt_tokens = prompt.len();
        let salt = caller.cache_salt(&common.cache_salt);
        let tenant = Arc::clone(caller.tenant());
        let meter = Meter::prompt(caller, prompt_tokens).map_err(|over| app.refused(over))?;
        let priority = common.service_tier.map_or_else(Priority::default, Priority::from);
        let answer_tokens = u64::from(max_tokens).saturating_mul(common.choices.into());
        let entrant = Entrant { tenant: &tenant, priority, prompt_tokens, answer_tokens, deadline };
        let arrived = Instant::now();
        let queued = app.gate(model.name())?.enter(entrant).instrument(debug_span!("queue"));
        let mut place = queued.await.map_err(|refused| app.refused(refused))?;
        app.metrics.waited(arrived.elapsed());
        tracked.story.tell("its turn", [("waited_ms", arrived.elapsed().into())]);
        place.spent(prompt_tokens as u64);
        // Who is there may have changed meanwhile.
        let fleet = Arc::clone(&app.fleet.borrow());
        let crew = placing::crew(fleet.crew(model.name()), &model, prompt_tokens, param)?;
        let call = Call {
            app: Arc::clone(app),
            id: id.clone(),
            model: Arc::clone(&model),
            prompt,
            seed_asked: common.seed.is_some(),
            sampling: Sampling { seed: common.seed.unwrap_or_else(random_u64), ..common.sampling },
            salt,
            session: common.session.as_deref().map(key_of),
            tenant: tenant.name.clone(),
            priority,
            choices: common.choices,
            max_tokens,
            deadline,
            entry: Arc::clone(tracked.entry()),
        };
        let asked = common.max_tokens.map(|(param, _)| param);
        let params = Params { form: common.form_param, max_tokens: asked, prompt: param };
        let placed = call.begin(crew).instrument(debug_span!("begin")).await.map_err(|error| error.naming(params))?;
        let span = Span::current();
        span.record("worker", placed.worker.member.id.as_str());

        let mut hidden: HashSet<TokenId> = call.sampling.stop_token_ids.iter().copied().collect();
        if !call.sampling.ignore_eos {
            hidden.extend(model.end_tokens());
        }
        let info = placed.worker.member.model.as_ref();
        let fingerprint = info.map_or_else(String::new, |info| format!("fp_{}", info.fingerprint));
        let hidden = Arc::new(hidden);
        let choice = |_| {
            let hidden = Hidden { tokens: Arc::clone(&hidden), markers: Arc::clone(&markers) };
            let answer = Answer::new(Arc::clone(&model), common.stop.clone(), hidden);
            Choice { answer: answer.at_least(call.sampling.min_tokens), tokens: 0, ended: false }
        };
        Ok(Self {
            choices: (0..common.choices).map(choice).collect(),
            id,
            fingerprint,
            service_tier: common.service_tier,
            prompt_tokens: prompt_tokens as u32,
            cached_tokens: None,
            progress: inflight.begun(prompt_tokens, common.choices as usize, call.model.slo()),
            span,
            meter,
            place,
            tokens: Some(Tokens::new(call, placed, hidden.iter().copied().collect())),
            model,
            cancelled: {
                let cancel = tracked.cancel.clone();
                Box::pin(async move { cancel.wait().await })
            },
            tracked,
            _pass: pass,
        })
    }

    /// What comes next: something to show, or the end, or both. `None` after the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Delta>, Error> {
        while let Some(tokens) = &mut self.tokens {
            // Once it is cancelled no more is wanted, so dropping what was waited for loses nothing.
            let next = tokio::select! {
                biased;
                next = tokens.next() => next,
                () = &mut self.cancelled => Err(Error::Cancelled),
            };
            let event = match next {
                Ok(event) => event,
                Err(error) => {
                    self.tokens = None;
                    self.progress.failed();
                    self.tracked.story.end("failed", [("why", error.code().unwrap_or("refused").into())]);
                    return Err(error);
                }
            };
            let (at, piece, reason) = match event {
                Event::Token(at, sampled) => {
                    self.progress.token(at);
                    self.tracked.token();
                    self.meter.token();
                    self.place.spent(1);
                    let choice = &mut self.choices[at];
                    choice.tokens += 1;
                    (at, choice.answer.push(sampled), None)
                }
                Event::Finished(at, reason, usage) => {
                    self.cached_tokens = Some(usage.cached);
                    (at, self.choices[at].answer.finish(), Some(reason))
                }
            };
            if piece.stopped {
                // The worker does not know of stop strings, and goes on.
                tokens.drop_choice(at);
            }
            let end = if piece.stopped { Some(FinishReason::Stop) } else { reason };
            self.choices[at].ended = end.is_some();
            let cost = self.choices.iter().all(|choice| choice.ended).then(|| self.over());
            if end.is_some() || !piece.text.is_empty() || !piece.logged.is_empty() {
                return Ok(Some(Delta { choice: at, text: piece.text, logged: piece.logged, end, cost }));
            }
        }
        Ok(None)
    }

    /// All answers have ended. If a stop string ended the last, the worker is not asked any more.
    fn over(&mut self) -> Cost {
        self.tokens = None;
        let output_tokens: u32 = self.choices.iter().map(|choice| choice.tokens).sum();
        let cached_tokens = self.cached_tokens.unwrap_or(0);
        self.progress.complete(cached_tokens);
        let told = [("output_tokens", output_tokens.into()), ("cached_tokens", cached_tokens.into())];
        self.tracked.story.end("answered", told);
        self.span.in_scope(|| info!(output_tokens, cached_tokens, "answered"));
        let usage = Usage { prompt: self.prompt_tokens, cached: cached_tokens, output: output_tokens };
        Cost { usage, cached_known: self.cached_tokens.is_some() }
    }

    /// How many answers there are.
    pub(crate) fn choices(&self) -> usize {
        self.choices.len()
    }
}

/// One answer as a whole.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    /// Its text.
    pub(crate) text: String,
    /// Log-probabilities of its visible tokens.
    pub(crate) logged: Vec<Logged>,
    /// Why it ended.
    pub(crate) end: Option<FinishReason>,
}

impl Live {
    /// All answers to their ends, and what they cost.
    pub(crate) async fn whole(&mut self) -> Result<(Vec<Whole>, Option<Cost>), Error> {
        let mut wholes: Vec<Whole> = self.choices.iter().map(|_| Whole::default()).collect();
        let mut cost = None;
        while let Some(delta) = self.next().await? {
            let whole = &mut wholes[delta.choice];
            whole.text.push_str(&delta.text);
            whole.logged.extend(delta.logged);
            whole.end = delta.end;
            cost = delta.cost;
        }
        Ok((wholes, cost))
    }
}
